"""The account: worked numbers, what DeepSpeed and the objectives allocate, and which knob shrinks what."""

import json
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from amclr_scale.config.load import load
from amclr_scale.config.schema import Config
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.engine.batch_plan import make_plan
from amclr_scale.errors import UserError
from amclr_scale.memory import towers
from amclr_scale.memory.account import account
from amclr_scale.memory.components import PHASES
from amclr_scale.memory.inputs import input_components
from amclr_scale.memory.towers import skeleton, trace
from amclr_scale.memory.tracker import Tracker
from amclr_scale.memory.units import GIB, MIB, in_bytes, in_words
from tools.memory_pages import formulas

N = 4096


def config(*words: str, batch: int = 64, world_size: int = 1) -> Config:
    given = ["data.image_size=32", "data.context_length=16", "train.epochs=1", "execution.threads=1"]
    return load(None, [*given, *words, f"train.global_batch_size={batch}"], world_size)


def found(*words: str, batch: int = 64, world_size: int = 1, device: str = "cpu"):
    return account(
        config(*words, batch=batch, world_size=world_size), world_size=world_size, num_samples=N, device=device
    )


def component(of, name: str) -> int:
    return next(c.bytes for c in of.components if c.name == name)


# --- worked numbers ---------------------------------------------------------------------------------------------------


def test_queues_banks_and_tables():
    assert formulas.queue(65_536, 3072) == 805_306_368
    assert formulas.queue(65_536, 768) == 201_326_592
    assert formulas.queue(65_536, 3072, banks=2) + formulas.queue(65_536, 768, banks=2) == 2_013_265_920
    assert formulas.queue(3_264_868, 768) == 10_029_674_496
    assert formulas.sample_state(100_000, 4) == 1_600_000
    assert formulas.sample_state(2_900_000, 4) == 46_400_000
    assert formulas.sample_state(400_000_000, 4) == 6_400_000_000
    assert formulas.sample_state(400_000_000, 8) == 2 * formulas.sample_state(400_000_000, 4)
    assert formulas.sample_state(400_000_000, 4, world_size=64) == 100_000_000
    assert formulas.queue(1000, 256) // formulas.sample_state(1000, 2) == 256 // 2  # bank : table = D / 2
    assert formulas.momentum_copy(90_600_000) == 362_400_000


@pytest.mark.parametrize(
    ("world_size", "megabytes"), [(1, (1449.6, 1449.6, 1449.6)), (8, (498, 340, 181)), (64, (379, 201, 23))]
)
def test_zero_stages_of_90_million_parameters(world_size, megabytes):
    sizes = [formulas.model_states(90_600_000, world_size, stage) / 1e6 for stage in (1, 2, 3)]
    assert [round(x) for x in sizes] == [round(x) for x in megabytes]


def test_similarities_of_32768():
    assert formulas.similarity_matrix(32_768, 32_768) == 4 * GIB
    assert formulas.similarity_matrix(32_768, 32_768, matrices=6) == 24 * GIB
    assert formulas.similarity_matrix(1024, 32_768) == 128 * MIB
    assert formulas.gathered_features(32_768, 256) == 64 * MIB


def test_sizes_in_words_and_back():
    assert in_words(4 * GIB) == "4.00 GiB"
    assert in_words(805_306_368) == "768.0 MiB"
    assert in_words(640) == "640 B"
    assert in_bytes("80GiB") == 80 * GIB
    assert in_bytes("24 GB") == 24 * 10**9
    with pytest.raises(UserError, match="memory: expected a size such as 80GiB"):
        in_bytes("80")


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stages_divide_what_they_say():
    whole, halves = found(), found("execution.zero_stage=1", world_size=2)
    total = component(whole, "parameters")
    assert component(whole, "optimizer states") == 2 * total
    assert component(halves, "optimizer states") == pytest.approx(total, rel=1e-4)
    assert component(halves, "fp32 masters") == pytest.approx(total / 2, rel=1e-4)
    assert component(halves, "parameters") == pytest.approx(total, rel=1e-4)
    third = found("execution.zero_stage=3", world_size=2)
    assert component(third, "parameters") == pytest.approx(total / 2, rel=1e-3)
    half = found("execution.zero_stage=2", "execution.precision=bf16", world_size=2)
    assert component(half, "parameters") == pytest.approx(total / 2, rel=1e-4)
    assert component(half, "fp32 masters") == component(halves, "fp32 masters")
    assert component(found("optimizer.name=lion"), "optimizer states") == total


def test_offloaded_states_are_the_hosts():
    there = found("execution.zero_stage=2", "execution.offload=optimizer", world_size=2, device="cuda")
    here = found("execution.zero_stage=2", world_size=2, device="cuda")
    moved = component(here, "optimizer states") + component(here, "fp32 masters")
    assert there.host_bytes >= moved
    assert there.in_phase("data") < here.in_phase("data") - moved


def test_a_bucket_is_no_larger_than_the_model_unless_asked():
    assert found("execution.zero_stage=2").in_phase("reduce") < 100 * MIB
    asked = found("execution.zero_stage=2", "deepspeed.zero_optimization.reduce_bucket_size=500000000")
    assert asked.in_phase("reduce") > 500_000_000 * 4


# --- the whole --------------------------------------------------------------------------------------------------------


def test_components_of_a_phase_add_up_and_the_advice_names_the_largest():
    of = found("execution.micro_batch_size=16")
    for phase in PHASES:
        assert of.by_phase[phase] == sum(c.by_phase.get(phase, 0) for c in of.components if c.place == "device")
    assert of.peak_bytes == max(of.by_phase.values())
    assert of.largest().name == "image activations"
    words = of.advice(limit=10 * MIB)
    assert "more than 10.0 MiB" in words
    assert "execution.micro_batch_size below 16" in words
    assert "image activations" in of.table()


@pytest.mark.slow
def test_each_knob_shrinks_its_component():
    plain = found("execution.micro_batch_size=16")
    assert found("execution.micro_batch_size=8").peak_bytes < plain.peak_bytes
    assert found("execution.micro_batch_size=16", "execution.kept_micro_batches=0").peak_bytes < plain.peak_bytes
    recomputed = found("execution.micro_batch_size=16", "execution.recompute_image=full")
    assert component(recomputed, "image activations") < component(plain, "image activations")
    large = ("model.embedding_width=16", "execution.micro_batch_size=8", "execution.similarity.chunk=1024")
    small = ("model.embedding_width=16", "execution.micro_batch_size=8", "execution.similarity.chunk=128")
    tiles = [component(found(*words, batch=4096), "similarity blocks") for words in (large, small)]
    assert tiles == [3 * 4 * 1024**2, 3 * 4 * 128**2]
    ring = found("execution.similarity.gather=ring", world_size=4, batch=4096)
    assert component(ring, "gathered features and sums") < component(
        found(world_size=4, batch=4096), "gathered features and sums"
    )


def test_cuda_adds_workspace_and_inputs_and_keeps_batches_on_the_host():
    of = found("execution.micro_batch_size=16", device="cuda")
    assert component(of, "micro-batches on the device") == 2 * 16 * (3 * 32 * 32 + 16 * 8)
    assert next(c for c in of.components if c.name == "batch").place == "host"
    assert component(of, "workspace and fragmentation") > 0


def test_pinned_memory_comes_in_powers_of_two_and_stays():
    [of] = [c for c in found(device="cuda", batch=96).components if c.name == "batch"]
    pixels, tokens, ids = 96 * 3 * 32 * 32, 96 * 16 * 8, 96 * 8  # 294,912, 12,288 and 768 bytes
    assert of.by_phase["pass_1"] == 2 * (2**19 + 2**14 + 2**10)
    assert of.by_phase["data"] == of.by_phase["pass_1"] + pixels + tokens + ids


def test_views_that_the_device_makes_are_there_and_pixels_come_from_the_host():
    here, there = (found(f"data.augment_on={place}", device="cuda", batch=96) for place in ("workers", "device"))
    views, [host] = 96 * 3 * 32 * 32, [c for c in there.components if c.name == "batch"]
    assert all(c.name != "views made on the device" for c in here.components)
    made = next(c for c in there.components if c.name == "views made on the device")
    assert made.by_phase["pass_1"] == views
    assert made.by_phase["data"] > 2 * views
    assert component(there, "micro-batches on the device") == 96 * 16 * 8  # captions alone
    [plain] = [c for c in here.components if c.name == "batch"]
    assert 4 * views < host.by_phase["data"] - 2 * 2**21 < plain.by_phase["data"] + 4 * views
    held = found("data.resident=device", device="cuda", batch=96)
    assert next(c for c in held.components if c.name == "batch").bytes < views  # its rows name what lies there


@pytest.mark.parametrize(("batch", "workers", "parts"), [(256, 3, 6), (640, 2, 10), (16, 1, 2)])
def test_parts_that_workers_make_ahead_and_the_batch_that_they_are_joined_to(batch, workers, parts):
    """A part has 64 samples at most; a loader asks each worker for its share of a batch, and for two at least."""
    of = config(f"execution.workers={workers}", batch=batch)
    row, given = 3 * 32 * 32 + 16 * 8 + 8, {c.name: c for c in input_components(of, make_plan(of, N, 1), "cpu")}
    assert given["parts made ahead"].bytes == parts * min(64, batch) * row
    assert given["batch"].by_phase["pass_1"] == batch * row
    assert given["batch"].by_phase["data"] == (3 if batch > 64 else 2) * batch * row  # in use, in parts, and joined


@pytest.mark.slow
def test_ten_billion_parameters_in_seconds(tmp_path):
    sizes = {"vocab_size": 4096, "hidden_size": 6144, "intermediate_size": 24_576, "num_hidden_layers": 24,
             "num_attention_heads": 48, "max_position_embeddings": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"], **sizes}))
    wide = config(f"model.text.name=transformers/{tmp_path}", "execution.precision=bf16", "execution.zero_stage=3")
    begin = time.process_time()
    total = sum(p.numel() for p in skeleton(wide).parameters())
    text = trace(wide, "text")
    assert total > 10e9
    assert text.with_graph.kept(8) > 24 * 8 * 16 * 6144 * 2 * 10  # more than ten tensors of a layer's width
    assert time.process_time() - begin < 30


@pytest.mark.slow
def test_the_order_of_a_momentum_encoder():
    """First saves what it works with beside the graph that is kept, and nothing where the peak is in the backward."""
    words = ("model.image.name=timm/vit_base_patch16_224", "data.image_size=224", "objective.name=momentum_queue")

    def peak(order: str, *more: str):
        return found(*words, f"model.momentum={{order: {order}}}", *more)

    first, last = peak("first"), peak("last")
    working_set = 2 * 64 * 197 * 4 * 768 * 4  # two tensors of a block's widest layer: (m, T, 4 d) in float32
    assert working_set < last.peak_bytes - first.peak_bytes < 1.3 * working_set
    assert last.peak_phase == "teacher"
    again = [peak(order, "execution.recompute_image=full") for order in ("first", "last")]
    assert again[0].peak_bytes == again[1].peak_bytes
    assert again[0].peak_phase == "pass_2"
    weights = 4 * sum(p.numel() for p in skeleton(config(*words, "model.momentum={}")).parameters())
    assert component(first, "moving average") == weights


# --- towers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recomputation", ["none", "full"])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_trace_holds_for_every_micro_batch(modality, recomputation):
    wanted = config(f"execution.recompute_{modality}={recomputation}", "model.text.layers=2")
    timeline = trace(wanted, modality, "cpu").with_graph
    model = _real(wanted, modality, recomputation)
    for m in (3, 8, 21):
        kept, forward, backward = _measured(model, modality, m)
        assert timeline.kept(m) == pytest.approx(kept, rel=0.01)
        assert timeline.forward_peak(m).activations == pytest.approx(forward, rel=0.01)
        assert sum(timeline.backward_peak(m, first=True)) == pytest.approx(backward, rel=0.01)


def _real(wanted: Config, modality: str, recomputation: str) -> nn.Module:
    from amclr_scale.data.tokenizers import load_tokenizer
    from amclr_scale.encoders.build import build_model

    data = wanted.data
    tokenizer = load_tokenizer(data.tokenizer, data.context_length)
    model = build_model(
        wanted.model, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id, end_id=tokenizer.end_id,
        context_length=data.context_length, image_size=data.image_size, image_mean=data.image_mean,
        image_std=data.image_std,
    )  # fmt: skip
    model.set_recomputation(**{modality: recomputation})
    return model


def _measured(model: nn.Module, modality: str, m: int) -> tuple[int, int, int]:
    """Bytes after the forward, and at the peaks of forward and backward, of real tensors."""
    model.zero_grad(set_to_none=True)
    images, texts = torch.zeros(m, 3, 32, 32, dtype=torch.uint8), torch.full((m, 16), 9)
    tracker = Tracker()
    tracker.add([*model.parameters(), *model.buffers(), images, texts], "before")
    before = tracker.total
    with tracker:
        outputs = model((images,), ()) if modality == "image" else model((), (texts,))
        kept, forward = tracker.total - before, tracker.peak - before
        tracker.reset_peak()
        (outputs[modality] * torch.ones_like(outputs[modality])).sum().backward()
        return kept, forward, tracker.peak - before


@pytest.mark.parametrize(("batch", "world_size"), [(64, 1), (64, 4), (96, 2)])
@pytest.mark.slow
def test_groups_of_pairs_of_any_size_that_a_run_may_have(batch, world_size):
    """Inside a rank, whole ranks, several ranks: none needs more than all pairs together."""
    whole = found(batch=batch, world_size=world_size)
    local = batch // world_size
    sizes = [g for g in range(2, batch + 1) if batch % g == 0 and (local % g == 0 or g % local == 0)]
    assert len(sizes) > 4
    for size in sizes:
        grouped = found("objective.name=clip", f"objective.group_size={size}", batch=batch, world_size=world_size)
        assert 0 < grouped.in_phase("objective") <= 1.02 * whole.in_phase("objective")
    same = found("objective.name=clip", f"objective.group_size={batch}", batch=batch, world_size=world_size)
    assert same.by_phase == whole.by_phase


# --- traces -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_meta_and_fake_tensors_give_the_same_trace():
    given = config("model.image.name=timm/vit_tiny_patch16_224", "model.text.layers=2")
    for modality, recomputation, partitioned in (("image", "none", "no"), ("text", "full", "yes")):
        wanted = towers._key(given), modality, recomputation, "fp32", "cuda", partitioned
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        one, two = towers._traced(*wanted, nullcontext()), towers._traced(*wanted, mode)
        assert one.flops == two.flops
        for a, b in ((one.with_graph, two.with_graph), (one.without_graph, two.without_graph)):
            assert torch.equal(a.slope, b.slope)
            assert torch.equal(a.constant, b.constant)
            assert torch.equal(a.gradients, b.gradients)
            assert (a.forward_end, a.visits) == (b.forward_end, b.visits)


def test_the_vocabulary_of_clip_is_known_without_its_package():
    tokenizer = load_tokenizer("clip", 77)
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.end_id) == towers.CLIP
