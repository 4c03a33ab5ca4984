"""The cost model puts settings in the order that they must have, and adds up what it says it adds up."""

import dataclasses

import pytest

from amclr_scale.config.load import build
from amclr_scale.config.schema import Momentum
from amclr_scale.memory.towers import trace
from amclr_scale.memory.units import in_two_digits
from amclr_scale.metrics.devices import find_profile
from amclr_scale.planner.messages import Message, Messages
from amclr_scale.planner.settings import changed, with_batch
from amclr_scale.planner.step_time import Rates, _seconds, between, default_rates, estimate
from amclr_scale.planner.traffic import on_the_wire
from tests.planner.test_search import small

H100 = find_profile("h100")
ONLY_OPERATIONS = dataclasses.replace(H100, memory_bandwidth=1e30, link=1e30, node_link=1e30, host_link=1e30)
NO_WAITING = Rates(utilisation=0.5, launch=0.0, message=0.0)


def seconds(profile=H100, world_size=1, batch=8192, rates=None, ranks_per_node=None, **execution):
    config = changed(with_batch(small(), batch), **{"micro_batch_size": 64, "kept_micro_batches": 0, **execution})
    return estimate(
        config, profile, world_size=world_size, num_samples=10_000, rates=rates, ranks_per_node=ranks_per_node
    )


@pytest.mark.slow
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
    words = {
        "model": small().model.model_copy(update={"momentum": Momentum()}),
        "objective": {"name": "momentum_queue"},
    }
    taught = changed(with_batch(small().model_copy(update=words), 8192), micro_batch_size=64, kept_micro_batches=128)
    cost = estimate(taught, ONLY_OPERATIONS, world_size=1, num_samples=10_000, rates=NO_WAITING)
    assert cost.towers == pytest.approx(4 * one)  # one more forward, of a teacher
    assert cost.flops == pytest.approx(4 * flops)


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


@pytest.mark.parametrize(("device", "collective"), [("cuda", "reduce_scatter"), ("cpu", "all_to_all")])
def test_sums_are_scattered_as_the_device_does_it(device, collective):
    """One tower's gradient, B D float32; exchanged in parts on a CPU, where gloo would send all of it to everybody."""
    config = changed(with_batch(small(), 128), **{"similarity.distribution": "reduce_scatter"})
    found = on_the_wire(config, world_size=16, num_samples=10_000, device_type=device, ranks_per_node=8).messages
    largest = max(
        (m for m in found if m.purpose == "features" and m.collective != "all_gather"), key=lambda m: m.payload
    )
    assert (largest.collective, largest.payload) == (collective, 128 * config.model.embedding_width * 4)


def test_two_nodes_use_all_their_cards():
    """16 ranks, 8 a node, 15/16 of a payload each: a ring crosses with 8 cards, an exchange with each rank's own."""
    profile = dataclasses.replace(H100, link=8e9, node_link=1e9)
    took = {
        name: _seconds(Messages((Message(name, 16, 16_000_000_000),)), profile, NO_WAITING, 16, 8)
        for name in ("reduce_scatter", "all_gather", "all_to_all", "send")
    }
    assert took == pytest.approx({"reduce_scatter": 15 / 8, "all_gather": 15 / 8, "all_to_all": 8, "send": 16})
    assert _seconds(Messages((Message("all_to_all", 16, 16_000_000_000),)), profile, NO_WAITING, 16, 16) == 15 / 8


@pytest.mark.slow
@pytest.mark.parametrize(("micro_batch", "measured"), [(2048, 6163), (256, 3841)], ids=["plain", "cached"])
def test_what_was_measured_on_a_gpu_lies_in_the_interval(micro_batch, measured):
    """docs/measurements.md, "On a GPU": samples/s of ViT-B/32 and a 12-layer text tower on one H200."""
    tree = {
        "data": {"image_size": 224, "context_length": 77, "tokenizer": "clip"},
        "model": {
            "image": {"name": "timm/vit_base_patch32_224"}, "text": {"width": 512, "layers": 12, "heads": 8},
            "embedding_width": 512,
        },
        "train": {"global_batch_size": 2048, "samples": 2048},
        "execution": {
            "precision": "bf16", "zero_stage": 1, "micro_batch_size": micro_batch, "kept_micro_batches": 1,
        },
    }  # fmt: skip
    job = {"profile": find_profile("h200"), "world_size": 1, "num_samples": 10**6}
    slow, usual, fast = (cost.samples_per_second for cost in between(build(tree, 1), **job))
    assert slow < measured < fast
    assert usual == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize(
    ("run", "asked", "products", "kind"),
    [
        ("fp32", "auto", 1, "fp32"),
        ("bf16", "auto", 3, "bf16"),
        ("bf16", "fp32", 1, "fp32"),
        ("fp32", "bf16", 1, "bf16"),
    ],
)
def test_an_objective_multiplies_in_its_own_precision(run, asked, products, kind):
    config = changed(with_batch(small(), 8192), micro_batch_size=64, kept_micro_batches=0)
    similarity = config.execution.similarity.model_copy(update={"precision": asked})
    execution = config.execution.model_copy(update={"precision": run, "similarity": similarity})
    cost = estimate(
        config.model_copy(update={"execution": execution}), ONLY_OPERATIONS, world_size=1, num_samples=10_000,
        rates=NO_WAITING,
    )  # fmt: skip
    operations = 8 * 8192**2 * config.model.embedding_width  # CLIP's four products
    assert cost.objective == pytest.approx(products * operations / (0.5 * H100.peak(kind)), rel=1e-6)


def test_a_measured_utilisation_leaves_a_fifth():
    slow, fast = Rates(utilisation=0.4).ends()
    assert (slow.utilisation, fast.utilisation) == pytest.approx((0.32, 0.48))
    slow, fast = default_rates(find_profile("h100")).ends()
    assert (slow.utilisation, fast.utilisation) == (0.2, 0.4)
    assert default_rates(find_profile("v100")).utilisation == 0.3  # a guess


def test_two_digits():
    numbers = {
        2890: "2,900",
        0.01234: "0.012",
        9.96: "10",
        0.0996: "0.10",
        1.25: "1.2",
        41: "41",
        0: "0",
        123456: "120,000",
    }
    assert {x: in_two_digits(x) for x in numbers} == numbers


def test_offload_costs_the_hosts_link():
    there = seconds(zero_stage=2, world_size=2, offload="optimizer")
    here = seconds(zero_stage=2, world_size=2)
    assert there.host > here.host == 0
    assert there.optimizer > here.optimizer


def test_messages_add_up():
    both = Messages((Message("send", 2, 100),)) + Messages((Message("all_gather", 2, 100),))
    assert both.wire_bytes == 150
