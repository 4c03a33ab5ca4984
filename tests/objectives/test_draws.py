"""Random draws of a step are its own, also in a loop that never says how far training is, and go on after a resume."""

import pytest
import torch

from amclr_scale.objectives.draws import Draws
from amclr_scale.objectives.staging import forgotten, staged
from tests.objectives.harness import global_batch, make, my_rows

DRAWING = [("m3col", {"mix_share": 1.0}), ("mochi", {"hardest": 3}), ("m2_mixup", {"mix_weight": 1.0})]


def value(objective) -> float:
    return objective(my_rows(global_batch(0))).value.item()


@pytest.mark.parametrize(("name", "options"), DRAWING, ids=str)
def test_steps_differ_where_nobody_sets_the_epoch(name, options):
    """The same batch five times; an epoch that is set once for all of its steps is the same case."""
    objective, found = make(name, **options), []
    for epoch in (None, 1.0):
        if epoch is not None:
            objective.set_epoch(epoch)
        steps = [value(objective) for _ in range(5)]
        assert len(set(steps)) == 5
        found.append(steps)
    assert not set(found[0]) & set(found[1])
    objective = make(name, **options)
    assert [value(objective) for _ in range(5)] == found[0]  # and again the same in another process


@pytest.mark.parametrize(("name", "options"), DRAWING, ids=str)
def test_a_resumed_loop_goes_on(name, options):
    whole, first, second = (make(name, **options) for _ in range(3))
    for objective in (whole, first, second):
        objective.set_epoch(3)
    want = [value(whole) for _ in range(4)]
    assert [value(first) for _ in range(2)] == want[:2]
    second.load_state_dict(first.state_dict())
    assert [value(second) for _ in range(2)] == want[2:]
    second.load_state_dict({})  # of a version that did not count: from the beginning, and no error
    assert value(second) == want[0]


def test_ranks_draw_alike(ranks):
    for (name, _), one, *parts in zip(DRAWING, all_of_them(), *ranks(2, all_of_them), strict=True):
        steps = [sum(values) / 2 for values in zip(*parts, strict=True)]
        assert steps == pytest.approx(one, rel=1e-12), name


def all_of_them() -> list[list[float]]:
    found = []
    for name, options in DRAWING:
        objective = make(name, **options)
        found.append([value(objective) for _ in range(3)])
    return found


def test_who_says_how_far_training_is_draws_as_ever():
    draws = Draws()
    assert [draws.words(7, epoch, learns=True) for epoch in (0.0, 0.4, 0.8)] == ["7 0.0", "7 0.4", "7 0.8"]
    assert [draws.words(7, 0.8, learns=True) for _ in range(2)] == ["7 0.8 1", "7 0.8 2"]
    assert draws.words(7, 0.8, learns=False) == "7 0.8 2"  # a measurement sees what the last step saw
    assert draws.words(7, 1.0, learns=False) == draws.words(7, 1.0, learns=True) == "7 1.0"


def test_a_step_that_is_not_applied_does_not_count():
    objective = make("m3col", mix_share=1.0)
    first = value(objective)
    with staged():
        second = value(objective)  # it overflows, say: no commit
    with forgotten():
        assert value(objective) == second != first
    with torch.no_grad():
        assert value(objective) == first
    assert value(objective) == second
