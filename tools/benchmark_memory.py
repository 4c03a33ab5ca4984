"""The memory account against measurement: 24 configurations on CPU, on one rank and on two.

    python tools/benchmark_memory.py                 # all; prints a Markdown table
    python tools/benchmark_memory.py --only 3 --phases
    python tools/benchmark_memory.py --device cuda --phases      # larger configurations, on one GPU

Every configuration trains for three steps through DeepSpeed's engine and the gradient cache, on random pixels and
captions of full length. A tensor-level tracker (amclr_scale/memory/tracker.py) measures steps two and three; on a GPU
its allocator does (max_memory_allocated), which tells no components, so that phases are compared as wholes.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cuda" if "cuda" in sys.argv else "cpu")  # asked for when it is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from amclr_scale.config.load import load
from amclr_scale.config.schema import Config
from amclr_scale.memory.account import Account, account
from amclr_scale.memory.measured.phase_peaks import MemoryReport, Peak
from amclr_scale.memory.units import in_words

SAMPLES, STEPS = 4096, 3
DEVICE = os.environ["DS_ACCELERATOR"]

SMALL = ("data.image_size=32", "data.context_length=24", "train.epochs=1", "execution.threads=1")
VIT = (
    "model.image.name=timm/vit_tiny_patch16_224",
    "data.image_size=64",
    "model.text.layers=4",
    "model.text.width=128",
)
BERT = ("model.text.name=transformers/distilbert", "data.context_length=32")
RESNET = ("model.image.name=torchvision/resnet18", "model.image.norm=group", "data.image_size=64")
BUCKET = "deepspeed.zero_optimization.reduce_bucket_size=2000000"
FULL = ("execution.recompute_image=full", "execution.recompute_text=full")
VIEWS = ("data.image_views=1", "data.text_views=1", "model.image.width=24")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    world_size: int
    batch: int
    words: tuple[str, ...]

    def config(self) -> Config:
        return load(None, [*SMALL, *self.words, f"train.global_batch_size={self.batch}"], self.world_size)


def cases() -> list[Case]:
    """Towers x micro-batch x kept graphs x recomputation x ZeRO stage x objective, a sample of all combinations."""

    def zero(stage: int) -> tuple[str, ...]:
        return (f"execution.zero_stage={stage}", *((BUCKET,) if stage else ()))

    def micro(size: int, kept: int = 1) -> tuple[str, ...]:
        return (f"execution.micro_batch_size={size}", f"execution.kept_micro_batches={kept}")

    def named(name: str) -> str:
        return f"objective.name={name}"

    bf16 = "execution.precision=bf16"
    one = [
        ("small towers, whole batch", 128, ()),
        ("small towers, micro-batch 16", 128, micro(16)),
        ("small towers, micro-batch 16, none kept", 128, micro(16, 0)),
        ("small towers, micro-batch 16, 4 kept", 128, micro(16, 4)),
        ("small towers, whole batch, recomputed", 128, FULL),
        ("small towers, 32 images or 8 texts, sogclr, stage 1", 128, (
            *zero(1), named("sogclr"), "execution.micro_batch_size=32", "execution.text_micro_batch_size=8")),
        ("ViT-Ti, whole batch, stage 1", 32, (*VIT, *zero(1))),
        ("ViT-Ti, micro-batch 8, recomputed, stage 2", 32, (*VIT, *micro(8), *FULL, *zero(2))),
        ("ViT-Ti, micro-batch 8, every 3rd block, sigmoid loss", 32, (
            *VIT, *micro(8), "execution.recompute_image=3", named("siglip"))),
        ("ViT-Ti and DistilBERT, micro-batch 8", 32, (*VIT, *BERT, *micro(8))),
        ("ResNet-18, micro-batch 8, none kept, stage 3", 32, (*RESNET, *micro(8, 0), *zero(3))),
        ("ResNet-18, recomputed, bf16, stage 1", 32, (*RESNET, *FULL, bf16, *zero(1))),
    ]  # fmt: skip
    two = [
        ("small towers, micro-batch 16", 128, micro(16)),
        ("small towers, micro-batch 16, stage 1, lamb", 128, (*micro(16), *zero(1), "optimizer.name=lamb")),
        ("small towers, micro-batch 16, stage 2", 128, (*micro(16), *zero(2))),
        ("small towers, micro-batch 16, stage 3", 128, (*micro(16), *zero(3))),
        ("small towers, large batch, D 512, small chunk", 1024, (
            *micro(32, 0), "model.embedding_width=512", "execution.similarity.chunk=256")),
        ("small towers, large batch, D 512, ring", 1024, (
            *micro(32, 0), "model.embedding_width=512", "execution.similarity.gather=ring",
            "execution.similarity.chunk=256", *zero(1))),
        ("small towers, amclr, 1 further view, stage 2", 64, (*VIEWS, named("amclr"), *micro(16), *zero(2))),
        ("small towers, isogclr, sharded state, stage 1, lion", 128, (
            named("isogclr"), "execution.sample_state=sharded", *zero(1), "optimizer.name=lion")),
        ("ViT-Ti, micro-batch 8, bf16, stage 2", 32, (*VIT, *micro(8), bf16, *zero(2))),
        ("ViT-Ti, micro-batch 8, bf16, recomputed, stage 3", 32, (*VIT, *micro(8), *FULL, bf16, *zero(3))),
        ("ViT-Ti and DistilBERT, micro-batch 8, none kept, stage 3", 32, (*VIT, *BERT, *micro(8, 0), *zero(3))),
        ("ResNet-18, micro-batch 8, sgd, stage 2", 32, (*RESNET, *micro(8), *zero(2), "optimizer.name=sgd")),
    ]  # fmt: skip
    return [Case(n, 1, b, tuple(w)) for n, b, w in one] + [Case(n, 2, b, tuple(w)) for n, b, w in two]


def cuda_cases() -> list[Case]:
    """Of a size at which a GPU's own buffers (cuBLAS, cuDNN) do not decide."""
    size = ("data.image_size=224", "data.context_length=77", "execution.precision=bf16", "execution.threads=8")
    text = ("model.text.layers=12", "model.text.width=512")
    vit = (*size, *text, "model.image.name=timm/vit_base_patch32_224", "model.embedding_width=512")
    resnet = (*size, *text, "model.image.name=torchvision/resnet50", "model.image.norm=group")
    found = [
        ("ViT-B/32, whole batch, stage 1", 512, (*vit, "execution.zero_stage=1")),
        ("ViT-B/32, micro-batch 256, stage 1", 2048, (
            *vit, "execution.zero_stage=1", "execution.micro_batch_size=256")),
        ("ViT-B/32, micro-batch 256, recomputed, stage 2", 2048, (
            *vit, *FULL, "execution.zero_stage=2", "execution.micro_batch_size=256")),
        ("ViT-B/32, micro-batch 256, stage 3", 1024, (
            *vit, "execution.zero_stage=3", "execution.micro_batch_size=256")),
        ("ResNet-50, micro-batch 128, sogclr, stage 1", 1024, (
            *resnet, "execution.zero_stage=1", "execution.micro_batch_size=128", "objective.name=sogclr")),
    ]  # fmt: skip
    return [Case(name, 1, batch, tuple(words)) for name, batch, words in found]


@dataclass(frozen=True)
class Measured:
    """What rank 0 held."""

    state: dict[str, int]
    peaks: dict[str, Peak]
    losses: list[float]  # of each step

    @property
    def peak(self) -> int:
        return max(peak.allocated for peak in self.peaks.values())


def measure(config: Config, world_size: int, rank: int, *, look: bool = True) -> Measured:
    """Three steps on this rank, of which the last two are measured. All ranks call it.

    Args:
        look: False trains alone.
    """
    from amclr_scale import objectives
    from amclr_scale.data.tokenizers import load_tokenizer
    from amclr_scale.encoders.build import build_model
    from amclr_scale.engine.batch_plan import make_plan
    from amclr_scale.engine.deepspeed_setup import adapt_to_objective, build_engine, prepare_towers
    from amclr_scale.engine.step import TrainStep
    from amclr_scale.engine.teacher import build_teacher
    from amclr_scale.metrics.phases import Phases
    from amclr_scale.similarity import configure
    from amclr_scale.types import Batch

    data, device = config.data, torch.device(DEVICE)
    tokenizer, plan = load_tokenizer(data.tokenizer, data.context_length), make_plan(config, SAMPLES, world_size)
    torch.manual_seed(0)
    model = build_model(
        config.model, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id, end_id=tokenizer.end_id,
        context_length=data.context_length, image_size=data.image_size, image_mean=data.image_mean,
        image_std=data.image_std,
    )  # fmt: skip
    model.further_views = {"image": data.image_views, "text": data.text_views}
    options = {key: value for key, value in config.objective.items() if key != "name"}
    objective = objectives.create(
        config.objective["name"], num_samples=SAMPLES, sample_state=config.execution.sample_state, **options
    )
    adapt_to_objective(model, objective, config.model.embedding_width)
    prepare_towers(model, config.execution)
    similarity = config.execution.similarity
    configure(
        chunk=similarity.chunk, gather=similarity.gather, distribution=similarity.distribution,
        cache_bytes=similarity.cache_mib * 2**20,
    )  # fmt: skip
    engine, _ = build_engine(config, model, no_decay=model.no_weight_decay(), device=device, world_size=world_size)
    phases, kept = Phases(device), config.execution.kept_micro_batches
    assert kept != "auto"
    teacher = build_teacher(config, engine, total_steps=STEPS, device=device)
    step = TrainStep(
        engine, objective, micro_batch_sizes=plan.micro_batch_sizes, kept=kept, device=device, phases=phases,
        teacher=teacher,
    )  # fmt: skip
    report = MemoryReport(device, engine, objective, phases, teacher) if look else None
    losses = list[float]()
    b, generator = plan.local_batch_size, torch.Generator().manual_seed(rank)
    batch: Batch | None = None
    for number in range(STEPS):
        with phases("data"):
            batch = Batch(
                ids=torch.arange(b) + (number * world_size + rank) * b,
                images=tuple(
                    torch.randint(
                        0, 256, (b, 3, data.image_size, data.image_size), dtype=torch.uint8, generator=generator
                    )
                    for _ in range(data.images_each)
                ),
                texts=tuple(
                    torch.randint(
                        tokenizer.end_id + 1, tokenizer.vocab_size, (b, data.context_length), generator=generator
                    )
                    for _ in range(data.texts_each)
                ),
                given={
                    f"{side}_negative_mask": torch.ones(b, K, dtype=torch.bool)
                    for side, K in (("image", data.image_negatives), ("text", data.text_negatives))
                    if K
                },
            )
        losses.append(float(step(batch, 1e-4).loss.value.detach()))  # embeddings go at once, as in the training loop
        if number == 0 and report:
            report.restart()
    if report is None:
        return Measured({}, {}, losses)
    report.close()
    return Measured(report.state, report.peaks, losses)


def _rank(rank: int, world_size: int, store: str, wanted: list[Case], answers: Any) -> None:
    torch.set_num_threads(1)
    import deepspeed

    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, dist_init_required=False)
    for case in wanted:
        found = measure(case.config(), world_size, rank)
        if rank == 0:
            answers.put(found)
    dist.destroy_process_group()


def measure_all(wanted: list[Case], world_size: int) -> Iterator[Measured]:
    """Measure cases of one number of ranks, in processes of their own, one after another.

    On a GPU each case has its own: its allocator would count what an engine before it has left.
    """
    if DEVICE == "cuda" and len(wanted) > 1:
        for case in wanted:
            yield from measure_all([case], world_size)
        return
    context = mp.get_context("spawn")
    answers = context.Queue()
    if not wanted:
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, os.path.join(folder, "store"), wanted, answers)
        ranks = [context.Process(target=_rank, args=(r, *arguments)) for r in range(world_size)]
        for process in ranks:
            process.start()
        for _ in wanted:
            yield answers.get(timeout=1800)
        for process in ranks:
            process.join()


def states(predicted: Account, measured: Measured) -> tuple[int, int]:
    """Parameters, optimizer states, buffers and state per sample: predicted and measured bytes."""
    names = ("parameters", "buffers of the model", "fp32 masters", "optimizer states", "sample state")
    return sum(c.bytes for c in predicted.components if c.name in names), sum(measured.state.values())


def activations(predicted: Account, measured: Measured) -> tuple[int, int]:
    """Activations and features at the worst moment of the pass that has more of them: predicted and measured bytes."""
    phase = max(("pass_1", "pass_2"), key=lambda p: predicted.of_kind("activations", phase=p))  # type: ignore[arg-type]
    parts = measured.peaks[phase].parts
    made = sum(parts.get(name, 0) for name in ("pass_1", "pass_2", "objective"))
    return predicted.of_kind("activations", "features", phase=phase), made  # type: ignore[arg-type]


def row(number: int, case: Case, predicted: Account, measured: Measured) -> tuple[str, bool]:
    """A line of the table, and whether it is within the bounds."""
    pairs = [states(predicted, measured), activations(predicted, measured), (predicted.peak_bytes, measured.peak)]
    within, cells = True, []
    for (ours, theirs), bound in zip(pairs, (0.02, 0.10, 0.10), strict=True):
        if not theirs:  # a GPU's allocator does not tell activations from the rest
            cells.append(f"{in_words(ours)} | | ")
            continue
        error = ours / theirs - 1
        within &= abs(error) <= bound
        cells.append(f"{in_words(ours)} | {in_words(theirs)} | {error:+.1%}")
    line = f"| {number} | {case.name} | {case.world_size} | {case.batch} | {' | '.join(cells)} |"
    return line if within else f"{line} **outside**", within


HEADER = (
    "| | configuration | ranks | batch | state, predicted | measured | | activations, predicted | measured | "
    "| peak, predicted | measured | |\n" + "|---" * 13 + "|"
)


def by_phase(predicted: Account, measured: Measured) -> str:
    """Every phase's peak, for whoever looks for an error."""
    lines = []
    for phase in predicted.phases:
        peak = measured.peaks[phase]
        ours = predicted.by_phase[phase]
        lines.append(f"    {phase:10} {ours:>14,} {peak.allocated:>14,} {ours / peak.allocated - 1:+7.2%}")
        parts = {c.name: c.by_phase[phase] for c in predicted.components if c.by_phase.get(phase)}
        lines.append(f"        predicted {parts}")
        lines.append(f"        measured  {peak.parts}")
    return "\n".join(lines)


def main() -> int:
    """Print the table; 1 if a row is out of bounds."""
    say = partial(print, flush=True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of rows; default: all")
    parser.add_argument("--phases", action="store_true", help="also every phase's components")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    if DEVICE == "cuda" and not torch.cuda.is_available():  # the ranks would fail, and be waited for
        parser.error("--device: expected cpu where no NVIDIA GPU is visible, got cuda")
    torch.set_num_threads(1)
    table = cuda_cases() if DEVICE == "cuda" else cases()
    numbered = [(n, case) for n, case in enumerate(table, 1) if not options.only or n in options.only]
    predicted = {
        n: account(case.config(), world_size=case.world_size, num_samples=SAMPLES, device=DEVICE)
        for n, case in numbered
    }
    say(HEADER)
    good = True
    for world_size in (1, 2):
        chosen = [(n, case) for n, case in numbered if case.world_size == world_size]
        for (n, case), measured in zip(chosen, measure_all([case for _, case in chosen], world_size), strict=True):
            line, within = row(n, case, predicted[n], measured)
            good &= within
            say(line)
            if options.phases:
                say(by_phase(predicted[n], measured))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
