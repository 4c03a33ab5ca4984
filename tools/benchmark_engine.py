"""What the gradient cache costs and saves, on the towers of a configuration and random pixels, in one process.

    python tools/benchmark_engine.py cost   --config configs/quickstart.yaml
    python tools/benchmark_engine.py memory --config configs/quickstart.yaml
    python tools/benchmark_engine.py compile --config configs/quickstart.yaml
    python tools/benchmark_engine.py trim   --config configs/quickstart.yaml

`cost`: time per sample for 0 ... n kept micro-batches of n, against all n kept (ordinary training): theory says
(3 + (n - kept) / n) / 3. Variants run in turn, figures are medians, on a CPU the time is CPU time.
`memory`: peak memory of a step beyond what the process held before it, each in a fresh process, for growing global
batches at one micro-batch size, beside what must grow with the batch: waiting inputs, and embeddings and their
gradients.
`compile`: gradients of towers compiled by Inductor (execution.compile) against those of plain ones, with the cache and
without; seconds of the first step, and the time of later ones as a ratio. Needs a C++ compiler.
`trim`: samples per second with captions of the training set in full, cut, and cut among others of like length, as
execution.trim_texts does; and the norms of the gradients. On a CPU, where the tower cuts by itself, it is kept from
doing so.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from amclr_scale import objectives
from amclr_scale.config.load import load
from amclr_scale.config.schema import Config
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.distributed.process_group import seed_everything, start
from amclr_scale.engine.build import model_of
from amclr_scale.engine.deepspeed_setup import build_engine, prepare_towers
from amclr_scale.engine.records import peak_memory_gib
from amclr_scale.engine.step import TrainStep
from amclr_scale.metrics.phases import Phases
from amclr_scale.types import Batch


def random_batch(config: Config, size: int, vocab_size: int) -> Batch:
    """Pixels and words of the recipe's shapes."""
    data = config.data
    generator = torch.Generator().manual_seed(size)
    image = torch.randint(0, 256, (size, 3, data.image_size, data.image_size), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, vocab_size, (size, data.context_length), generator=generator)
    return Batch(torch.arange(size), (image,), (text,))


def make_step(config: Config, micro_batch: int, kept: int) -> tuple[TrainStep, int, torch.device]:
    """A training step on the recipe's towers, and the tokenizer's vocabulary."""
    device = start(RankInfo(), config.execution.threads)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.context_length)
    seed_everything(config.seed)
    model = model_of(config, tokenizer)
    prepare_towers(model, config.execution)
    engine, _ = build_engine(config, model, no_decay=model.no_weight_decay(), device=device, world_size=1)
    objective = objectives.create("clip").to(device)
    sizes = (micro_batch, micro_batch)
    step = TrainStep(engine, objective, micro_batch_sizes=sizes, device=device, phases=Phases(device), kept=kept)
    return step, tokenizer.vocab_size, device


def _seconds(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def cost(config: Config, micro_batch: int, micro_batches: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds per sample for each number of kept micro-batches."""
    step, vocabulary, device = make_step(config, micro_batch, micro_batches)
    batch = random_batch(config, micro_batch * micro_batches, vocabulary)
    choices = sorted({0, 1, micro_batches // 2, micro_batches})
    taken: dict[int, list[float]] = {kept: [] for kept in choices}
    for turn in range(rounds + 1):
        for kept in choices:
            step.kept = kept
            begin = _seconds(device)
            step(batch, 1e-4)
            if turn:  # the first round warms up
                taken[kept].append((_seconds(device) - begin) / len(batch))
    base = statistics.median(taken[micro_batches])
    return [
        {
            "kept": kept,
            "of": micro_batches,
            "ms_per_sample": 1000 * statistics.median(times),
            "ratio": statistics.median(times) / base,
            "theory": (3 + (micro_batches - kept) / micro_batches) / 3,
        }
        for kept, times in taken.items()
    ]


def compiled(config: Config, micro_batch: int, micro_batches: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Relative differences of gradients, over all parameters and the largest of one; and times."""
    for kept in (0, micro_batches):
        left: list[list[torch.Tensor]] = []
        taken: list[list[float]] = []
        for choice in (False, True):
            torch._dynamo.reset()
            execution = config.execution.model_copy(update={"compile": choice})
            step, vocabulary, _ = make_step(config.model_copy(update={"execution": execution}), micro_batch, kept)
            batch = random_batch(config, micro_batch * micro_batches, vocabulary)
            parameters = list(step.engine.module.parameters())
            plain, gradients, times = step.engine.step, list[torch.Tensor](), list[float]()

            def look_and_step(plain: Any = plain, parameters: Any = parameters, gradients: Any = gradients) -> None:
                if not gradients:
                    gradients += [torch.zeros_like(p) if p.grad is None else p.grad.double() for p in parameters]
                plain()

            step.engine.step = look_and_step
            for _ in range(rounds + 1):
                begin = time.perf_counter()
                step(batch, 1e-4)
                times.append(time.perf_counter() - begin)
            left.append(gradients)
            taken.append(times)
        squares = [
            (float((a - b).square().sum()), float(b.square().sum())) for a, b in zip(left[1], left[0], strict=True)
        ]
        yield {
            "kept": kept,
            "of": micro_batches,
            "difference": (sum(d for d, _ in squares) / sum(g for _, g in squares)) ** 0.5,
            "largest": max((d / g) ** 0.5 for d, g in squares if g),
            "first_step_seconds": taken[1][0],
            "ratio": statistics.median(taken[1][1:]) / statistics.median(taken[0][1:]),
        }


def trimmed(config: Config, micro_batch: int, micro_batches: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Samples per second, and the norm of the gradients: whole captions, cut ones, and cut ones of like length."""
    step, _, device = make_step(config, micro_batch, 1)
    module, size = step.engine.module, micro_batch * micro_batches
    loader = TrainLoader(config.data, seed=config.seed, global_batch_size=size)
    batch, tower = next(loader), module.text_tower
    loader.close()

    def lengths(texts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        tower.filled = False
        try:
            found: torch.Tensor | None = module.caption_lengths(texts)
        finally:
            tower.filled = True
        if found is None:
            raise SystemExit("trim: this tower's captions stay whole")
        return found

    tower.filled, taken, seen = True, dict[str, list[float]](), list[int]()
    norms, tokens = dict[str, list[float]](), dict[str, float]()
    tower.tokens.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    for turn in range(rounds + 1):
        for name in ("whole", "cut", "by length"):
            step.lengths, step.by_length = None if name == "whole" else lengths, name == "by length"
            seen.clear()
            begin = _seconds(device)
            report = step(batch, 0.0)  # which changes nothing: all steps are of the same weights
            if turn:
                taken.setdefault(name, []).append(size / (_seconds(device) - begin))
                norms.setdefault(name, []).append(report.grad_norm)
            tokens[name] = sum(seen[:micro_batches]) / size  # of the first pass over the batch
    for name, rates in taken.items():
        rate = statistics.median(rates)
        yield {"captions": name, "tokens": tokens[name], "samples_per_s": rate, "grad_norm": norms[name][0]}


def one_memory(config: Config, micro_batch: int, batch_size: int) -> dict[str, float]:
    """Peak of one step in this process, in MiB beyond what was held before the batch was made."""
    step, vocabulary, device = make_step(config, micro_batch, 0)
    step(random_batch(config, micro_batch, vocabulary), 1e-4)  # optimizer states, buffers of libraries
    held = psutil.Process().memory_info().rss
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    step(random_batch(config, batch_size, vocabulary), 1e-4)
    peak = peak_memory_gib(device) * 2**30 if device.type == "cuda" else _peak_of_process()
    data = config.data
    waiting = batch_size * (3 * data.image_size**2 + 8 * data.context_length)
    outputs = batch_size * 2 * config.model.embedding_width * 4 * 3  # parts, leaves, gradients
    return {"peak_mib": (peak - held) / 2**20, "waiting_mib": waiting / 2**20, "outputs_mib": outputs / 2**20}


def _peak_of_process() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One fresh process per batch size."""
    for size in arguments.batches:
        command = [sys.executable, __file__, "one", "--config", arguments.config]
        command += ["--micro-batch", str(arguments.micro_batch), "--batches", str(size), *arguments.words]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        yield {"batch": size, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    """Print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "memory", "compile", "trim", "one"], help="one: what `memory` starts")
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--micro-batches", type=int, default=8, help="cost: of one batch")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 4096, 8192], help="memory: batch sizes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("words", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    config = load(arguments.config, ["execution.threads=1", *arguments.words])
    if arguments.what == "one":
        print(json.dumps(one_memory(config, arguments.micro_batch, arguments.batches[0])))
        return
    rows: list[dict[str, Any]] = []
    found = {"cost": cost, "compile": compiled, "trim": trimmed}.get(arguments.what)
    several = (arguments.micro_batch, arguments.micro_batches, arguments.rounds)
    for row in memory(arguments) if found is None else found(config, *several):
        rows.append(row)
        print(
            "  ".join(
                f"{key} {value:.3{'f' if value > 1e-3 else 'e'}}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
            )
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
