"""The cost model puts settings in the order that they must have, and adds up what it says it adds up."""

import dataclasses

import pytest

from amclr_scale.memory.towers import trace
from amclr_scale.metrics.devices import find_profile
from amclr_scale.planner.messages import Message, Messages
from amclr_scale.planner.settings import changed, with_batch
from amclr_scale.planner.step_time import Rates, estimate
from tests.planner.test_search import small

H100 = find_profile("h100")
ONLY_OPERATIONS = dataclasses.replace(H100, memory_bandwidth=1e30, link=1e30, node_link=1e30, host_link=1e30)
NO_WAITING = Rates(utilisation=0.5, launch=0.0, message=0.0)


def seconds(profile=H100, world_size=1, batch=8192, rates=None, ranks_per_node=None, **execution):
    config = changed(with_batch(small(), batch), **{"micro_batch_size": 64, "kept_micro_batches": 0, **execution})
    return estimate(
        config, profile, world_size=world_size, num_samples=10_000, rates=rates, ranks_per_node=ranks_per_node
    )


def test_towers_take_their_operations():
    """Four forwards' worth with the gradient cache, three without, four with full recomputation of every block."""
    flops = sum(trace(small(), modality).flops for modality in ("image", "text"))
    one = 8192 * flops / (0.5 * H100.peak("fp32"))
    assert seconds(ONLY_OPERATIONS, rates=NO_WAITING).towers == pytest.approx(4 * one)
    assert seconds(ONLY_OPERATIONS, rates=NO_WAITING).bound == pytest.approx(4 * one)
    assert seconds(ONLY_OPERATIONS, rates=NO_WAITING, kept_micro_batches=128).towers == pytest.approx(3 * one)
    assert seconds(ONLY_OPERATIONS, rates=NO_WAITING, kept_micro_batches=64).towers == pytest.approx(3.5 * one)
    both = {"recompute_image": "full", "recompute_text": "full", "kept_micro_batches": 128}
    assert seconds(ONLY_OPERATIONS, rates=NO_WAITING, **both).towers == pytest.approx(4 * one)


def test_a_slower_device_a_smaller_utilisation_or_tiny_micro_batches_take_longer():
    base = seconds()
    assert seconds(rates=Rates(utilisation=1e-4)).towers > base.towers
    assert seconds(find_profile("v100")).seconds > base.seconds
    assert seconds(micro_batch_size=1).towers > 10 * base.towers
    assert base.seconds == pytest.approx(sum(base.shares.values()))
    assert base.samples_per_second == pytest.approx(8192 / base.seconds)


def test_messages_grow_with_the_stage_and_with_slow_networks():
    stages = [seconds(world_size=8, zero_stage=stage) for stage in (0, 2, 3)]
    sent = [cost.wire_bytes for cost in stages]
    assert sent == sorted(sent)
    assert len(set(sent)) == 3
    apart = seconds(world_size=8, zero_stage=2, ranks_per_node=1)
    assert apart.messages > stages[1].messages
    assert apart.wire_bytes == stages[1].wire_bytes
    assert seconds(world_size=1).messages == 0


def test_offload_costs_the_hosts_link():
    there = seconds(zero_stage=2, world_size=2, offload="optimizer")
    here = seconds(zero_stage=2, world_size=2)
    assert there.host > here.host == 0
    assert there.optimizer > here.optimizer


def test_messages_add_up():
    both = Messages((Message("send", 2, 100),)) + Messages((Message("all_gather", 2, 100),))
    assert both.wire_bytes == 150
