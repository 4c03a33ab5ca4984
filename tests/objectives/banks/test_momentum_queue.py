"""momentum_queue is its definition; MoCo and CLIP are what its options say."""

import pytest
import torch

from amclr_scale.types import Embeddings
from tests.objectives.banks.plain import banks_of
from tests.objectives.harness import B, assert_same, defined, global_batch, goes_on, joined, make, my_rows, run

BATCH = {"duplicate": True}


def definition(
    size, *, temperature=None, alpha=0.4, alpha_ramp_samples=0, in_batch_keys="momentum", queue_only=False,
    exclude_same_id=True, init="empty",
):  # fmt: skip
    def loss(state, e: Embeddings, step: int):
        t = 1 / e.logit_scale if temperature is None else temperature
        a = alpha * (min(1, step * B / alpha_ramp_samples) if alpha_ramp_samples else 1)
        banks = banks_of(state, size, init)
        value, own = 0, torch.eye(B, dtype=torch.bool)
        for bank, rows in zip(banks, (e.image_momentum, e.text_momentum), strict=True):
            bank.first_look(rows, e.ids)
        for x, guide, y, ym, bank in (
            (e.image, e.image_momentum, e.text, e.text_momentum, banks[1]),
            (e.text, e.text_momentum, e.image, e.image_momentum, banks[0]),
        ):
            of_batch = {"momentum": [ym], "student": [y], "both": [y, ym]}[in_batch_keys]
            left_out = [(~own) & queue_only] * len(of_batch) + [bank.same(e.ids) & exclude_same_id]
            left_out = torch.cat(left_out, 1)
            keys = torch.cat([*of_batch, bank.keys()])
            hard = torch.cat([own] * len(of_batch) + [torch.zeros(B, len(bank.keys()), dtype=torch.bool)], 1).double()
            soft = (guide @ keys.detach().T / t).masked_fill(left_out, -torch.inf).softmax(1).detach()
            target = a * soft + (1 - a) * hard / len(of_batch)
            log_p = (x @ keys.T / t).masked_fill(left_out, -torch.inf).log_softmax(1)
            value = value - (target * log_p.masked_fill(left_out, 0)).sum(1).mean() / 2
        for side, bank, rows in zip(("image", "text"), banks, (e.image_momentum, e.text_momentum), strict=True):
            bank.put(rows, e.ids)
            bank.into(state, f"bank.{side}")
        state["samples.value"] = torch.tensor(B * (step + 1.0)).double()
        return value.squeeze(), value.squeeze()

    return loss


SETTINGS = [
    {"size": 13},
    {"size": 16, "alpha_ramp_samples": 20, "in_batch_keys": "student", "exclude_same_id": False},
    {"size": 19, "in_batch_keys": "both", "temperature": 0.1, "alpha": 1.0},
    {"size": 13, "queue_only": True, "init": "batch"},
    {"size": 30, "alpha": 0.0, "in_batch_keys": "both"},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_its_definition(options):
    want = defined(definition(**options), batch=BATCH)
    for chunk in (3, 100):
        assert_same(run("momentum_queue", options, chunk=chunk, batch=BATCH), want)


def every_setting(layout):
    return [run("momentum_queue", options, chunk=3, batch=BATCH, sample_state=layout) for options in SETTINGS[:4]]


@pytest.mark.parametrize(("world_size", "layout"), [(4, "sharded"), (2, "replicated")])
def test_ranks_are_one_batch(ranks, world_size, layout):
    for options, *answers in zip(SETTINGS[:4], *ranks(world_size, every_setting, layout), strict=True):
        assert_same(joined(answers), defined(definition(**options), batch=BATCH))


def test_a_state_goes_on_bit_for_bit_on_other_ranks(ranks):
    options = {"size": 13, "alpha_ramp_samples": 20}
    goes_on(ranks, "momentum_queue", options, BATCH)


def test_the_students_own_keys_without_queue_and_soft_targets_are_clip():
    clip, _ = run("clip", {"temperature": 0.1})
    ours, _ = run("momentum_queue", {"temperature": 0.1, "size": 0, "alpha": 0.0, "in_batch_keys": "student"})
    for a, b in zip(clip, ours, strict=True):
        assert a.value == pytest.approx(b.value, abs=1e-13)
        torch.testing.assert_close(a.rows["image"], b.rows["image"], rtol=0, atol=1e-13)


def test_without_gradients_it_answers_and_learns_nothing():
    objective = make("momentum_queue", size=16)
    with torch.no_grad():
        value = objective(my_rows(global_batch(0))).value
    assert value.item() == pytest.approx(objective(my_rows(global_batch(0))).value.item(), abs=1e-12)
    assert objective.samples.value == B


def test_who_asks_what_a_step_costs_is_shown_one_with_soft_targets():
    """However long they take to come in: at first they cost nothing."""
    objective = make("momentum_queue", size=16, alpha=0.3, alpha_ramp_samples=10**9)
    assert objective.alpha == 0.0
    objective.rehearse(8, 16)
    assert objective.alpha == 0.3


def test_mistakes_are_answered_in_words():
    e = my_rows(global_batch(0))
    for options, message in (
        ({"size": 13, "alpha": 1.5}, r"alpha: expected a share in \[0, 1\], got 1.5"),
        ({"size": -1}, "size: expected at least as many slots"),
        ({"size": 13, "queue_only": True, "in_batch_keys": "both"}, "in_batch_keys: expected momentum"),
        ({"size": 13, "alpha_ramp_samples": -1}, "alpha_ramp_samples: expected a number of samples"),
        ({"size": 13, "width": 0}, "width: expected the width of the embeddings"),
    ):
        with pytest.raises(ValueError, match=message):
            make("momentum_queue", **options)
    for options, message in (
        ({"size": 7}, "size: expected at least as many slots as the global batch has samples, 8, got 7"),
        ({"size": 8, "width": 5}, "width: expected 6, the width of the embeddings, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            make("momentum_queue", **options)(e)
    flat = {name: x for name, x in e.flat().items() if "momentum" not in name}
    with pytest.raises(ValueError, match=r"embeddings\.image_momentum: .* set model\.momentum"):
        make("momentum_queue", size=8)(Embeddings.from_flat(flat))
