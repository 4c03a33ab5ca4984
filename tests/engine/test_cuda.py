"""On a GPU: the engine trains as one plain big batch does, and what runs on CUDA alone does what it says.

    pytest -m cuda

One process and one device over NCCL (which two ranks cannot share). The reference is plain PyTorch on the same device.
Bounds in fp32 are those of float32 kernels that add in another order; TF32 would miss them a hundred times over.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from amclr_scale import objectives
from amclr_scale.distributed.process_group import keep_float32
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.micro_batches import MicroBatch, on_device, split
from amclr_scale.engine.optimizers import build_optimizer, parameter_groups
from amclr_scale.engine.random_state import RandomState
from amclr_scale.engine.step import OutOfMemoryError, TrainStep
from amclr_scale.metrics.phases import Phases
from amclr_scale.types import Batch, Embeddings, Loss
from tests.engine.test_alignment import layout
from tests.engine.test_teacher import close, taught
from tests.engine.towers import config, differences, engine_run, local_batch, plain_run, towers

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch built for CUDA"),
]

CUDA = torch.device("cuda", 0)
SIZE, STEPS = 16, 5
MICRO_BATCHES = (((16, 16), 1), ((3, 3), 0), ((4, 4), 2), ((3, 4), 1))


def against_plain(changes: dict[str, Any], device: torch.device = CUDA) -> dict[str, dict[str, float]]:
    """For each way to cut the batch, how far weights and losses are from plain training in fp32."""
    keep_float32()
    scale = {"deepspeed": {"fp16": {"initial_scale_power": 8}}}  # 2**16 would overflow, and skip the first steps
    settings = config(SIZE, **changes).model_copy(update=scale)
    plain = {key: value for key, value in changes.items() if key.startswith("optimizer")}
    want = plain_run(config(SIZE, **plain), STEPS, device)
    return {
        f"{sizes}, {kept} kept": differences([engine_run(settings, sizes, kept, STEPS, device=device)], want)
        for sizes, kept in MICRO_BATCHES
    }


@pytest.mark.parametrize(("stage", "offload"), [(1, "none"), (3, "none"), (1, "optimizer"), (3, "optimizer")])
def test_a_teacher_follows_the_masters(gpu, stage, offload):
    found = gpu(taught, stage, (3, 4), precision="bf16", steps=5, device=CUDA, offload=offload)
    assert all(close(found["teacher"][name], value) for name, value in found["averages"].items())
    assert (torch.linalg.vector_norm(found["seen"][..., :8], dim=-1) - 1).abs().max() < 1e-5


def assert_close(found: dict[str, dict[str, float]], bound: float) -> None:
    wrong = [f"{how}: {name} {e:.1e}" for how, errors in found.items() for name, e in errors.items() if not e < bound]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "adamp", "lars", "lion", "nadam", "radam"])
def test_stages_and_optimizers_are_one_plain_big_batch(gpu, name, stage):
    changes = {"optimizer__name": name, "optimizer__lr": 0.5 if name == "lars" else 0.01, "optimizer__eps": 1e-4}
    assert_close(gpu(against_plain, {**changes, "execution__zero_stage": stage}), 1e-5)


@pytest.mark.parametrize(
    ("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]
)
def test_offload_changes_nothing(gpu, stage, offload):
    """DeepSpeed compiles its CPU Adam at first use."""
    changes = {"execution__zero_stage": stage, "execution__offload": offload, "optimizer__eps": 1e-4}
    assert_close(gpu(against_plain, {**changes, "optimizer__lr": 0.01}), 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_half_precision_follows_fp32(gpu, stage, precision):
    changes = {"execution__zero_stage": stage, "execution__precision": precision, "optimizer__lr": 0.002}
    assert_close(gpu(against_plain, {**changes, "optimizer__eps": 1e-4}), 0.05)


@pytest.mark.parametrize("stage", [0, 3])
def test_tf32_rounds_and_follows_fp32(gpu, stage):
    changes = {"execution__zero_stage": stage, "execution__precision": "tf32", "optimizer__lr": 0.002}
    found = gpu(against_plain, {**changes, "optimizer__eps": 1e-4})
    assert_close(found, 0.05)
    assert max(error for errors in found.values() for error in errors.values()) > 1e-6  # of fp32: below 1e-6 to 1e-5


def providers(device: torch.device = CUDA) -> dict[str, str]:
    """What a recipe gets for AdamW."""
    model = towers().to(device)
    o = config(SIZE).optimizer
    groups = parameter_groups(model.named_parameters(), model.no_weight_decay(), o)
    return {where: build_optimizer(o, groups, device, offload=where == "host")[1] for where in ("device", "host")}


def test_fused_optimizers_are_what_is_compared(gpu):
    found = gpu(providers)
    assert found["device"] in ("torch's fused AdamW", "NVIDIA apex's fused AdamW")
    assert found["host"] == "DeepSpeed's CPU AdamW"


def dropout_runs(device: torch.device = CUDA) -> list[dict[str, torch.Tensor]]:
    """With all graphs kept, none, and half of them."""
    keep_float32()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return [engine_run(config(SIZE), (4, 4), n, 3, device=device, dropout=0.3)[0] for n in (4, 0, 2)]
    finally:
        torch.use_deterministic_algorithms(False)


def test_dropout_is_replayed_bit_for_bit(gpu):
    kept, cached, half = gpu(dropout_runs)
    for name, weight in kept.items():
        assert torch.equal(weight, cached[name]), name
        assert torch.equal(weight, half[name]), name


def random_numbers(device: torch.device = CUDA) -> tuple[bool, bool, bool]:
    """Are masks replayed; are others drawn afterwards; does a replay leave the generator where it was?"""
    x = torch.ones(4096, device=device)
    torch.manual_seed(3)
    state = RandomState(device)
    first, second = F.dropout(x), F.dropout(x)
    with state:
        again = F.dropout(x), F.dropout(x)
    third = F.dropout(x)
    torch.manual_seed(3)
    want = [F.dropout(x) for _ in range(3)][2]
    return (
        torch.equal(first, again[0]) and torch.equal(second, again[1]),
        torch.equal(first, second),
        torch.equal(third, want),
    )


def test_random_numbers_of_the_device_are_replayed(gpu):
    assert gpu(random_numbers) == (True, False, True)


def copied(device: torch.device = CUDA) -> tuple[bool, float]:
    """Micro-batches under a device that is far behind its host: are they whole, and how many lie on it at once?"""
    count, pixels = 24, 1 << 17
    host = torch.randint(0, 256, (count, pixels)).pin_memory()  # int64, which a sum need not widen
    parts = [MicroBatch(slice(i, i + 1), (host[i : i + 1],), ()) for i in range(count)]
    wanted = host.sum(1)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, sums = torch.cuda.memory_allocated(device), []
    for part in on_device(parts, device):
        torch.cuda._sleep(10_000_000)  # clock cycles, before the pixels are read
        sums.append(part.images[0].sum())
    at_once = (torch.cuda.max_memory_allocated(device) - before) / host[0].nbytes
    return torch.equal(torch.stack(sums).cpu(), wanted), at_once


def test_copies_are_whole_and_few(gpu):
    """A copy that did not wait would overwrite pixels that are not read yet."""
    whole, at_once = gpu(copied)
    assert whole
    assert at_once < 4


def reordered(device: torch.device = CUDA) -> list[bool]:
    """Whether micro-batches hold the rows of an order, of views in pinned or plain memory, and on the device."""
    g, order = torch.Generator().manual_seed(0), torch.randperm(64, generator=torch.Generator().manual_seed(1))
    plain = torch.randint(0, 256, (64, 3, 32, 32), generator=g, dtype=torch.uint8)
    views = (plain.pin_memory(), plain, plain.to(device))
    parts = on_device(split(Batch(torch.arange(64), views, (plain.flatten(1),)), 8, 8, order), device)
    found = [(part.rows, *part.images, *part.texts) for part in parts]
    return [torch.equal(view.cpu().flatten(1), plain[order[rows]].flatten(1)) for rows, *each in found for view in each]


def test_micro_batches_in_another_order(gpu):
    same = gpu(reordered)
    assert len(same) == 4 * 8
    assert all(same)


def float32_errors(device: torch.device = CUDA) -> tuple[float, float]:
    """Relative errors of a convolution and of a matrix product, in the large."""
    keep_float32()
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(8, 64, 32, 32, generator=g), torch.randn(64, 64, 3, 3, generator=g)
    a, b = torch.randn(512, 512, generator=g), torch.randn(512, 512, generator=g)

    def error(got: torch.Tensor, want: torch.Tensor) -> float:
        return float((got.cpu().double() - want).norm() / want.norm())

    convolved = error(F.conv2d(x.to(device), w.to(device)), F.conv2d(x.double(), w.double()))
    return convolved, error(a.to(device) @ b.to(device), a.double() @ b.double())


def test_float32_is_not_rounded_to_tf32(gpu):
    for error in gpu(float32_errors):
        assert error < 1e-5


@pytest.mark.parametrize("offload", ["none", "optimizer", "parameters"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("towers", ["quickstart", "vit"])
def test_parameters_start_at_multiples_of_16_bytes(gpu, towers, stage, offload):
    if offload == "parameters" and stage < 3:
        pytest.skip("parameters are offloaded at stage 3")
    misaligned, looked_at = gpu(layout, towers, CUDA, stage=stage, offload=offload, factors=True)
    assert looked_at > 50
    assert not misaligned


def starved(device: torch.device = CUDA) -> str:
    settings, model = config(SIZE), towers()
    engine, _ = build_engine(settings, model, no_decay=model.no_weight_decay(), device=device, world_size=1)

    def objective(embeddings: Embeddings) -> Loss:
        torch.empty(2**50, device=device)
        return objectives.create("clip")(embeddings)

    step = TrainStep(engine, objective, micro_batch_sizes=(4, 4), device=device, phases=Phases(device))
    try:
        step(local_batch(0, SIZE, 0, 1), 0.01)
    except OutOfMemoryError as error:
        return str(error)
    finally:
        engine.destroy()
    return "the step went through"


def test_out_of_memory_says_which_key_to_turn(gpu):
    words = gpu(starved)
    assert "step 0, phase objective, 16 samples" in words
    assert "execution.similarity.chunk" in words
