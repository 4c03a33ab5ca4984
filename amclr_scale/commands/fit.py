"""The largest global batch that fits, and the fastest execution settings for a batch. Nothing is run but --verify.

    amclr-scale fit --config configs/quickstart.yaml --gpus 8 --device h100
    amclr-scale fit --config C --gpus 64 --per-node 8 --device a100-40gb --batch 32768 --num-samples 400000000
    amclr-scale fit --config C --gpus 2 --device cpu --memory 64MiB --verify

Words (key=value) go over the configuration, as for launch/train.py; keys of `execution` that they give stay as given,
all others are searched. docs/memory.md says what the answers rest on.
"""

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from amclr_scale.commands.words import command_parser, refused
from amclr_scale.config.load import from_words, load
from amclr_scale.config.schema import Config
from amclr_scale.errors import AbsentDataError, UserError

CUDA_RESERVE = 3 * 2**29  # bytes of a GPU that tensors cannot have: CUDA's context, NCCL's buffers
CPU_SHARE = 0.9  # of what the host has available


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_parser("fit", __doc__)
    parser.add_argument("--config", help="YAML file; without it, the defaults")
    parser.add_argument("--gpus", type=int, required=True, help="ranks W, over all nodes")
    parser.add_argument("--per-node", type=int, help="ranks on one node (default: 8 on GPUs, all on a CPU)")
    parser.add_argument("--device", default="cpu", help="cpu (measured here) or a GPU: h100, h200, a100-40gb, ...")
    parser.add_argument("--memory", help="for the tensors of one rank, such as 78GiB (default: what the device has)")
    parser.add_argument("--host-memory", help="for one rank, beside its GPU (default: not limited)")
    parser.add_argument("--batch", type=int, help="global batch size, instead of the largest")
    parser.add_argument("--num-samples", type=int, help="size of the data set (default: that of data.train)")
    parser.add_argument("--utilisation", type=float, help="of the device's peak in matrix products (an hfu from a log)")
    parser.add_argument("--top", type=int, default=5, help="settings to print")
    parser.add_argument("--json", type=Path, help="also write everything there")
    parser.add_argument("--verify", action="store_true", help="on this CPU: run the batch, and one 15 %% larger")
    parser.add_argument("--rehearse", help=argparse.SUPPRESS)  # one rank of --verify,
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)  # and the bytes that its tensors may take
    parser.add_argument("words", nargs="*", metavar="key=value", help="overrides, such as objective.name=sogclr")
    return parser.parse_intermixed_args(argv)


def check_numbers(options: argparse.Namespace) -> None:
    """Refuse what no search could answer, before anything takes seconds."""
    for name in ("gpus", "per_node", "batch", "num_samples", "top"):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {given}")
    if options.json and not options.json.resolve().parent.is_dir():
        raise UserError(f"--json: expected a file in a folder that exists, got {options.json}")


def samples_of(config: Config) -> int:
    """N, from the index of the training data."""
    from amclr_scale.data.loader import TrainLoader

    try:
        loader = TrainLoader(config.data, seed=config.seed, global_batch_size=config.data.lanes)
    except AbsentDataError as error:
        raise UserError(f"{error}\n--num-samples: with it, the data need not be here") from error
    loader.close()
    return loader.num_samples


def given(words: list[str]) -> list[str]:
    """The keys of `execution` that words give and the search would decide otherwise."""
    from amclr_scale.planner.settings import KEYS

    tree = from_words(words).get("execution", {})
    keys = [*tree, *(f"similarity.{key}" for key in tree.get("similarity", {}))]
    return [key for key in keys if key in KEYS]


def make_fit(options: argparse.Namespace) -> Any:
    """The search that the command line asks for."""
    from amclr_scale.encoders.start.taken import resolve
    from amclr_scale.memory.units import in_bytes
    from amclr_scale.metrics.devices import find_profile, measure_cpu
    from amclr_scale.planner.search import Fit
    from amclr_scale.planner.settings import changed
    from amclr_scale.planner.step_time import Rates, default_rates

    config = changed(
        resolve(load(options.config, ["execution=auto", *options.words], options.gpus), options.gpus), auto=False
    )
    cpu = options.device.lower() == "cpu"
    per_node = min(options.per_node or (options.gpus if cpu else 8), options.gpus)
    if cpu:
        threads = config.execution.threads or max(1, len(os.sched_getaffinity(0)) // per_node)
        profile = measure_cpu(threads=threads, ranks=per_node)
        memory = round(CPU_SHARE * psutil.virtual_memory().available / per_node)
    else:
        try:
            profile = find_profile(options.device)
        except UserError as error:
            raise UserError(f"--{error}") from error
        memory = profile.memory_bytes - CUDA_RESERVE
    rates = default_rates(profile)
    if options.utilisation is not None:
        if not 0 < options.utilisation <= 1:
            raise UserError(f"--utilisation: expected a share in (0, 1], got {options.utilisation}")
        rates = Rates(options.utilisation, rates.launch, rates.message)
    return Fit(
        config, profile, world_size=options.gpus, num_samples=options.num_samples or samples_of(config),
        memory=in_bytes(options.memory, "--memory") if options.memory else memory,
        host_memory=in_bytes(options.host_memory, "--host-memory") if options.host_memory else None,
        ranks_per_node=per_node, rates=rates, fixed=given(options.words),
    )  # fmt: skip


def table(choices: list[Any]) -> str:
    """One line per choice, times in two digits."""
    from amclr_scale.memory.units import in_two_digits, in_words

    head = ("zero", "offload", "recompute", "micro-batch", "kept", "gather", "chunk")
    rows = [(*head, "memory", "s/step", "samples/s", "sent", "time in")]
    for choice in choices:
        s, cost = choice.settings, choice.cost
        parts = [f"{name} {seconds / cost.seconds:.0%}" for name, seconds in cost.shares.items()][:2]
        rows.append((
            str(s["zero_stage"]), s["offload"], f"{s['recompute_image']}/{s['recompute_text']}",
            str(s["micro_batch_size"]), str(s["kept_micro_batches"]), s["similarity.gather"],
            str(s["similarity.chunk"]), in_words(choice.account.peak_bytes), in_two_digits(cost.seconds),
            in_two_digits(cost.samples_per_second), in_words(round(cost.wire_bytes)), ", ".join(parts),
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def answer(options: argparse.Namespace, fit: Any) -> list[Any]:
    """Search, print, and return the choices."""
    from amclr_scale.memory.units import in_two_digits, in_words
    from amclr_scale.planner.step_time import between
    from amclr_scale.planner.traffic import on_the_wire

    nodes = -(-fit.world_size // fit.ranks_per_node)
    print(f"{fit.world_size} ranks on {nodes} node{'s' * (nodes > 1)}: {fit.profile.name}, {in_words(fit.memory)} for "
          f"the tensors of one; {fit.num_samples:,} samples; {fit.config.execution.precision}")  # fmt: skip
    slow, fast = fit.rates.ends()
    given = options.utilisation is not None or fit.profile.type == "cpu"
    print(f"rates: {fit.profile.source}; utilisation {fit.rates.utilisation:.0%}, from {slow.utilisation:.0%} to "
          f"{fast.utilisation:.0%}" + ("" if given else f": {fit.profile.utilisation.source}"))  # fmt: skip
    batch = options.batch or fit.largest()
    if not options.batch:
        print(f"largest global batch: {batch:,} ({batch // fit.world_size:,} per rank)")
    if batch > fit.num_samples:
        print(f"note: a global batch of {batch:,} holds {batch / fit.num_samples:.1f} epochs: samples meet themselves")
    choices: list[Any] = fit.fastest(batch, options.top)
    best = choices[0]
    if in_host := best.account.host_bytes:  # the largest batch of a GPU may be one that no host holds
        limit = "no limit: set one with --host-memory"
        if fit.host_memory is not None:
            limit = f"at most {in_words(fit.host_memory)} for a rank"
        each = f"{in_words(in_host)} for a rank, {in_words(in_host * fit.ranks_per_node)} for a node"
        print(f"memory of the host for the first settings below: {each} ({limit})")
    print(f"\nfastest settings for a global batch of {batch:,} (predicted):\n{table(choices)}\n")
    ends = between(
        best.config, fit.profile, world_size=fit.world_size, num_samples=fit.num_samples,
        ranks_per_node=fit.ranks_per_node, rates=fit.rates,
    )  # fmt: skip
    least, _, most = (in_two_digits(cost.samples_per_second) for cost in ends)
    print(f"expect {least} to {most} samples/s of the first; the order is surer than the times\n")
    print(f"{best.account.table()}\n")
    wire = on_the_wire(
        best.config, world_size=fit.world_size, num_samples=fit.num_samples, device_type=fit.profile.type,
        ranks_per_node=fit.ranks_per_node,
    )  # fmt: skip
    print(f"{wire.table()}\n\nuse: train.global_batch_size={batch} {best.words()}")
    if options.json:
        found = [
            {
                "settings": choice.settings, "peak_bytes": choice.account.peak_bytes,
                "host_bytes": choice.account.host_bytes, "seconds": choice.cost.seconds,
                "samples_per_second": choice.cost.samples_per_second, "wire_bytes": choice.cost.wire_bytes,
            }
            for choice in choices
        ]  # fmt: skip
        found[0]["samples_per_second_between"] = sorted(cost.samples_per_second for cost in ends)
        options.json.write_text(json.dumps({"global_batch_size": batch, "choices": found}, indent=1) + "\n")
    return choices


def main(argv: list[str]) -> int:
    """Answer; with --verify, 1 where the machine disagrees."""
    options = arguments(argv)
    # timm imports wandb where it is installed, for a quarter of a second, and nothing is logged here.
    hides = "wandb" not in sys.modules
    if hides:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        return run(options)
    except UserError as error:
        print(f"\n{error}", file=sys.stderr, flush=True)
        return 2
    except Exception as error:
        if (told := refused(error, "--json")) is None:
            raise
        print(f"\n{told[1]}", file=sys.stderr, flush=True)
        return told[0]
    finally:
        if hides:
            del sys.modules["wandb"]


def run(options: argparse.Namespace) -> int:
    """The flow: configuration -> search -> answer."""
    from amclr_scale.commands.rehearse import rehearse_here, verify
    from amclr_scale.distributed.process_group import device_type

    os.environ.setdefault("DS_ACCELERATOR", device_type())  # DeepSpeed else says amid the answer that it found no GPU
    if options.rehearse:
        rehearse_here(options)
        return 0
    if options.verify and (options.device.lower() != "cpu" or options.batch):
        raise UserError("--verify: runs the largest batch on this CPU; expected --device cpu and no --batch")
    check_numbers(options)
    begin = time.perf_counter()
    gc.set_threshold(100_000, 20, 50)  # traces make millions of small objects, and hardly any in circles
    fit = make_fit(options)
    choices = answer(options, fit)
    print(f"answered in {time.perf_counter() - begin:.1f} s")
    return 0 if not options.verify or verify(options, fit, choices[0]) else 1
