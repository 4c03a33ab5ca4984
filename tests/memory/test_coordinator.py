"""Stage 3's coordinator on sizes alone: what it keeps by the order that it has seen, and what arrives together.

That the real one does the same is measured in test_measure.py.
"""

import pytest
import torch

from amclr_scale.memory.zero3.coordinator import Coordinator, Limits, Visit

SIZE = 200_000  # elements of each parameter, too many to stay whole
BYTES = 4 * SIZE
MODULES = {1: (0,), 2: (1,)}


def visits(module: int, forward: bool, parameters: tuple[int, ...]) -> tuple[Visit, Visit]:
    return Visit(0, True, forward, module, parameters), Visit(0, False, forward, module, parameters)


def forward(coordinator: Coordinator) -> int:
    """One forward; what is gathered after it."""
    coordinator.begin()
    for module, parameters in MODULES.items():
        before, after = visits(module, True, parameters)
        coordinator.fetch(before)
        coordinator.release(after)
    return coordinator.bytes


def backward(coordinator: Coordinator) -> int:
    for module, parameters in reversed(MODULES.items()):
        before, after = visits(module, False, parameters)
        coordinator.fetch(before)
        coordinator.release(after)
    coordinator.end_backward()
    return coordinator.bytes


@pytest.fixture
def coordinator():
    return Coordinator((SIZE, SIZE), 4, 2, Limits())


def test_what_will_be_used_again_soon_stays_once_the_order_is_known(coordinator):
    assert forward(coordinator) == 0  # each module's own, for as long as it runs
    assert coordinator.highest == BYTES
    assert backward(coordinator) == 0
    assert forward(coordinator) == 2 * BYTES
    assert backward(coordinator) == 0


def test_what_was_given_up_in_a_forward_alone_is_given_up_for_ever(coordinator):
    """DeepSpeed remembers what it decided for a module at a place, whatever follows there later."""
    for _ in range(2):
        assert forward(coordinator) == 0  # the second time in an order that is known, and ends here
    backward(coordinator)  # does not belong to that order
    forward(coordinator)
    backward(coordinator)
    assert forward(coordinator) == 0
    assert forward(Coordinator((SIZE, SIZE), 4, 2, Limits())) == 0


def test_a_near_reuse_is_one_within_the_limit(coordinator):
    forward(coordinator)
    backward(coordinator)
    coordinator.limits = Limits(reuse=SIZE, prefetch=0)
    assert forward(coordinator) == BYTES  # the last module's, which backward uses first


def test_parameters_that_arrive_together_are_there_twice_for_a_moment():
    several = Coordinator((SIZE, SIZE), 4, 2, Limits())
    several.begin()
    before, after = visits(1, True, (0, 1))
    several.fetch(before)
    assert several.highest == 4 * BYTES
    assert several.bytes == 2 * BYTES
    several.release(after)
    assert several.bytes == 0


def test_a_step_leaves_small_parameters_whole_and_nothing_else():
    mixed = Coordinator((SIZE, 1001), 4, 2, Limits())
    mixed.begin()
    mixed.fetch(visits(1, True, (0, 1))[0])
    mixed.step()
    assert mixed.bytes == 4 * 1001


def test_a_trace_on_one_rank_leaves_deepspeeds_count_of_modules_as_it_was():
    """Ranks compare the numbers of their modules, and rank 0 alone predicts its memory before it trains."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    from amclr_scale.memory.zero3.hooks import Visits

    (counter,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    before = counter[0]
    Visits(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)).to("meta")).close()
    assert counter[0] == before
