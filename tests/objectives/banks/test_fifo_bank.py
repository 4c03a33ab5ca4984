"""fifo_bank is its definition, whatever lies where, and goes on from a checkpoint on other ranks."""

import pytest
import torch

from amclr_scale.types import Embeddings
from tests.objectives.banks.plain import PlainBank, banks_of, log_sum
from tests.objectives.harness import (
    STEPS,
    assert_same,
    defined,
    global_batch,
    goes_on,
    joined,
    make,
    my_rows,
    run,
)

EPOCHS = (0.0, 0.4, 0.8, 1.2, 1.6)
BATCH = {"duplicate": True}  # one id comes twice in a batch, all come back from step to step


def definition(
    size, *, init="empty", exclude_same_id=True, proximal=0.0, temperature=None, source="student", key_gradient=True,
    wait_epochs=0.0,
):  # fmt: skip
    initial = {}
    if init in ("randn", "rand"):
        bank = make("fifo_bank", size=size, init=init, width=6).bank
        initial = {"image": bank.image.features.double(), "text": bank.text.features.double()}

    def loss(state, e: Embeddings, step: int):
        t = 1 / e.logit_scale if temperature is None else temperature
        banks = banks_of(state, size, init, initial)
        stored = (e.image, e.text) if source == "student" else (e.image_momentum, e.text_momentum)
        value = 0
        for bank, rows in zip(banks, stored, strict=True):
            bank.first_look(rows, e.ids)
        for anchors, against, bank in ((e.image, e.text, banks[1]), (e.text, e.image, banks[0])):
            keys = against if key_gradient else against.detach()
            left_out = (bank.same(e.ids) & exclude_same_id) | (EPOCHS[step] < wait_epochs)
            value = value + log_sum(anchors @ keys.T, anchors @ bank.keys().T, left_out, t).mean() / 2
            value = value - (anchors * keys).sum(1).mean() / t / 2
        for rows, bank in ((e.image, banks[0]), (e.text, banks[1])):
            own = [bank.newest(sample) for sample in e.ids.tolist()]
            near = [(row - q).square().sum() for row, q in zip(rows, own, strict=True) if q is not None]
            value = value + proximal * sum(near, 0) / len(rows) / 2
        for side, bank, rows in zip(("image", "text"), banks, stored, strict=True):
            bank.put(rows, e.ids)
            bank.into(state, f"bank.{side}")
        return value.squeeze(), value.squeeze()

    return loss


SETTINGS = [
    {"size": 13},
    {"size": 16, "exclude_same_id": False, "temperature": 0.1},
    {"size": 32, "proximal": 3.0, "key_gradient": False, "wait_epochs": 1.0},
    {"size": 13, "init": "batch", "proximal": 1.0, "source": "momentum"},
    {"size": 50, "init": "randn"},
    {"size": 11, "init": "rand"},
    {"size": 20, "init": "zeros"},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_its_definition(options):
    want = defined(definition(**options), batch=BATCH)
    for chunk in (3, 100):
        assert_same(run("fifo_bank", options, chunk=chunk, batch=BATCH, epochs=EPOCHS), want)


@pytest.mark.parametrize("exclude_same_id", [True, False])
def test_what_it_says_of_the_bank_is_so(exclude_same_id):
    objective, banks = make("fifo_bank", size=13, exclude_same_id=exclude_same_id), (PlainBank(13), PlainBank(13))
    for step in range(STEPS):
        e = my_rows(global_batch(step, **BATCH))
        found, (image, _) = objective(e).metrics, banks
        same, filled = image.same(e.ids).double().sum(1).mean().item(), image.filled
        ages, moved = [step + 1 - written for written in image.written[: image.filled]], []
        for rows, bank in zip((e.image, e.text), banks, strict=True):
            newest = [(row, bank.newest(sample)) for row, sample in zip(rows, e.ids.tolist(), strict=True)]
            apart = [1 - (row @ q).item() for row, q in newest if q is not None]
            moved.append(sum(apart) / max(1, len(apart)))
            bank.put(rows, e.ids)
        assert found["bank_filled"] == filled == min(8 * step, 13)
        assert found["bank_same_id"] == pytest.approx(same)
        assert found["bank_masked"] == pytest.approx(same / max(1, filled) if exclude_same_id else 0)
        assert found["bank_age"] == pytest.approx(sum(ages) / max(1, len(ages)))
        assert found["bank_drift"] == pytest.approx(sum(moved) / 2)
    assert same > 0


ON_RANKS = [SETTINGS[0], SETTINGS[2], SETTINGS[3]]


def drifts():
    """The logged drift of steps in which ranks have stored different shares of their samples."""
    objective = make("fifo_bank", size=13)
    return [objective(my_rows(global_batch(step, **BATCH))).metrics["bank_drift"] for step in range(STEPS)]


def test_what_has_moved_is_a_mean_over_all_ranks(ranks):
    want = drifts()
    assert len(set(want)) > 2
    for world_size in (2, 4):
        for got in ranks(world_size, drifts):
            assert got == pytest.approx(want, rel=1e-6)


def every_setting(layout):
    return [run("fifo_bank", options, chunk=3, batch=BATCH, sample_state=layout, epochs=EPOCHS) for options in ON_RANKS]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_are_one_batch(ranks, world_size):
    for layout in ("replicated", "sharded"):
        for options, *answers in zip(ON_RANKS, *ranks(world_size, every_setting, layout), strict=True):
            assert_same(joined(answers), defined(definition(**options), batch=BATCH))


def test_a_state_goes_on_bit_for_bit_on_other_ranks(ranks):
    goes_on(ranks, "fifo_bank", {"size": 13, "proximal": 1.0}, BATCH)


@pytest.mark.parametrize(
    ("name", "forged", "words"),
    [
        ("features", torch.zeros(8), r"features: expected \(8, None\) .*, got \(8,\)"),
        ("features", torch.zeros(7, 6), r"features: expected \(8, 6\) .*, got \(7, 6\)"),
        ("ids", torch.zeros(7, dtype=torch.int64), r"ids: expected \(8,\) .*, got \(7,\)"),
        ("written", torch.zeros(8, 2, dtype=torch.int64), r"written: expected \(8,\) .*, got \(8, 2\)"),
        ("pointer", torch.tensor(8), "pointer: expected 0 to 7, got 8"),
        ("filled", torch.tensor(9), "filled: expected 0 to 8, got 9"),
        ("steps", torch.tensor(-1), "steps: expected 0 to .*, got -1"),
    ],
)
def test_a_state_that_was_damaged_is_refused(name, forged, words):
    made = make("fifo_bank", size=8, width=6).bank.image.state_dict()
    bank = make("fifo_bank", size=8).bank.image
    with pytest.raises(RuntimeError, match=words):
        bank.load_state_dict(made | {name: forged})
    bank.load_state_dict(made)
