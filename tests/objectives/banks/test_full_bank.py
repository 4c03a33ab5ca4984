"""full_bank is its definition, with drawn negatives and with all, wherever its rows lie."""

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.objectives.banks.full_bank import ROWS, draw
from amclr_scale.objectives.staging import staged
from amclr_scale.types import Embeddings
from tests.objectives.harness import (
    NUM_SAMPLES,
    B,
    D,
    assert_same,
    close,
    defined,
    global_batch,
    goes_on,
    joined,
    make,
    my_rows,
    off_diagonal,
    run,
)

BATCH = {"duplicate": True}
EPOCHS = (0.0, 0.4, 0.8, 1.2, 1.6)


def definition(
    *, negatives="all", temperature=0.07, proximal=30.0, momentum=0.5, device="gpu", key_gradient=True,
    batch_negatives=False, wait_epochs=0.0,
):  # fmt: skip
    def loss(state, e: Embeddings, step: int):
        t = 1 / e.logit_scale if temperature is None else temperature
        value = 0
        banks = [
            state.get(f"{side}_state.rows", torch.zeros(NUM_SAMPLES, e.image.shape[1]).double())
            for side in ("image", "text")
        ]
        for anchors, keys, bank, side in ((e.image, e.text, banks[1], 1), (e.text, e.image, banks[0], 0)):
            everybody = list(range(NUM_SAMPLES))
            samples = torch.tensor(everybody if negatives == "all" else draw(step, side, NUM_SAMPLES, negatives))
            left_out = (e.ids[:, None] == samples) | (bank[samples] == 0).all(1) | (EPOCHS[step] < wait_epochs)
            logits = ((anchors @ bank[samples].T) / t).masked_fill(left_out, -torch.inf)
            positive = (anchors * (keys if key_gradient else keys.detach())).sum(1, keepdim=True) / t
            if batch_negatives:
                of_batch = anchors @ (keys if key_gradient else keys.detach()).T / t
                logits = torch.cat([logits, off_diagonal(of_batch)], 1)
            value = value + (torch.cat([positive, logits], 1).logsumexp(1) - positive[:, 0]).mean() / 2
        for side, rows, bank in zip(("image", "text"), (e.image, e.text), banks, strict=True):
            new = bank.clone()
            for row, sample in zip(rows, e.ids.tolist(), strict=True):
                if bank[sample].any():
                    value = value + proximal * (row - bank[sample]).square().sum() / B / 2
                    moved = F.normalize(momentum * bank[sample] + (1 - momentum) * row, dim=0)
                new[sample] = (moved if bank[sample].any() else row).detach()
            state[f"{side}_state.rows"] = new
        state["steps.value"] = torch.tensor(step + 1.0).double()
        return value.squeeze(), value.squeeze()

    return loss


SETTINGS = [
    {},
    {"negatives": 7, "temperature": None, "momentum": 0.0},
    {"negatives": 20, "proximal": 0.0, "device": "sharded"},
    {"device": "host", "temperature": 0.2, "key_gradient": False},
    {"negatives": 9, "batch_negatives": True, "wait_epochs": 1.0, "proximal": 1.0},
    {"batch_negatives": True, "key_gradient": False, "temperature": 0.2},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_its_definition(options):
    want = defined(definition(**options), batch=BATCH)
    for chunk in (3, 100):
        assert_same(run("full_bank", options, chunk=chunk, batch=BATCH, epochs=EPOCHS), want)


def every_setting(layout):
    return [run("full_bank", options, chunk=3, batch=BATCH, sample_state=layout, epochs=EPOCHS) for options in SETTINGS]


@pytest.mark.parametrize(("world_size", "layout"), [(4, "sharded"), (2, "replicated")])
def test_ranks_are_one_batch(ranks, world_size, layout):
    for options, *answers in zip(SETTINGS, *ranks(world_size, every_setting, layout), strict=True):
        assert_same(joined(answers), defined(definition(**options), batch=BATCH))


def test_a_state_goes_on_bit_for_bit_on_other_ranks(ranks):
    goes_on(ranks, "full_bank", {"negatives": 7}, BATCH)


def test_rows_are_not_copied_where_changes_wait():
    """In the trainer backward is over when rows change, so that `all` reads the table itself."""
    plain, waiting = make("full_bank"), make("full_bank")
    for step in range(3):
        a, b = my_rows(global_batch(step)), my_rows(global_batch(step))
        plain(a).value.backward()
        with staged() as commit:
            waiting(b).value.backward()
            before = waiting.image_state.rows
            commit()
            assert waiting.image_state.rows is before
        close(b.image.grad, a.image.grad, 1e-14, f"step {step}")
    assert torch.equal(plain.image_state.rows, waiting.image_state.rows)


def test_every_step_and_side_draws_others():
    drawn = [tuple(draw(step, side, 1000, 50)) for step in range(3) for side in range(2)]
    assert len(set(drawn)) == len(drawn)
    assert all(len(set(one)) == 50 for one in drawn)


def test_the_host_keeps_its_rows():
    objective = make("full_bank", device="host", width=D).to("meta")
    assert objective.image_state.rows.device.type == "cpu"
    assert make("full_bank", device="gpu", width=D).to("meta").image_state.rows.device.type == "meta"


def test_mistakes_are_answered_in_words():
    for options, message in (
        ({"negatives": 21}, "negatives: expected at most num_samples = 20, or all, got 21"),
        ({"negatives": 0}, "negatives: expected a number of samples, or all, got 0"),
        ({"negatives": "some"}, "negatives: expected int or 'all'"),
        ({"momentum": 1.0}, r"momentum: expected a weight in \[0, 1\), got 1.0"),
        ({"proximal": -1}, "proximal: expected a weight of at least 0"),
        ({"device": "cpu"}, "device: expected 'gpu' or 'host' or 'sharded'"),
    ):
        with pytest.raises(ValueError, match=message):
            make("full_bank", **options)
    with pytest.raises(ValueError, match="width: expected 6, the width of the embeddings, got 5"):
        make("full_bank", width=5)(my_rows(global_batch(0)))
    forged = make("full_bank", width=6).state_dict() | {f"image_state.{ROWS}": torch.zeros(20)}
    with pytest.raises(RuntimeError, match=f"image_state.{ROWS}"):
        make("full_bank").load_state_dict(forged)
