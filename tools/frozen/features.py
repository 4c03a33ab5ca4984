"""What a frozen image tower and features made beforehand save: seconds and memory of a step, side by side.

    python tools/frozen/features.py                          # a minute or two on a CPU
    python tools/frozen/features.py --tower timm/vit_base_patch16_224 --size 224 --batches 1024 8192 --device cuda

both towers   the image tower trains              features   the frozen tower's features come from a file
frozen        it is frozen, and run in each step

Arms train on the same samples by the same micro-batches, one after another in each round; seconds are medians over
rounds of a whole step and of the reading of its batch, memory is the peak of tensors in a step (on CUDA of the
allocator). `features` may take larger batches that the others would need minutes for (--further).
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from amclr_scale.commands.embedding.of_towers import write_features
from amclr_scale.config.load import build
from amclr_scale.distributed.launcher import RankInfo, read_rank_info
from amclr_scale.distributed.process_group import start, stop
from amclr_scale.engine.build import build_trainer, open_data
from amclr_scale.engine.step import TrainStep
from amclr_scale.memory.measured.phase_peaks import MemoryReport
from amclr_scale.metrics.phases import Phases
from amclr_scale.metrics.stopwatch import Stopwatch

ARMS = ("both towers", "frozen", "features")


def recipe(options: argparse.Namespace, arm: str, batch: int, folder: Path) -> Any:
    features = {"image": str(folder / "image.npy")} if arm == "features" else {}
    text = {"width": options.text_width, "layers": options.text_layers, "heads": 2, "dropout": 0.0}
    return build(
        {
            "data": {
                "train": options.train, "image_size": options.size, "lanes": 2, "features": features,
                "augmentation": {"crop_scale": [1, 1], "flip": 0},
            },
            "model": {
                "embedding_width": 64, "text": text,
                "image": {"name": options.tower, "frozen": arm != "both towers"},
            },
            "train": {"global_batch_size": batch, "samples": batch * 1000},
            "execution": {"micro_batch_size": min(batch, options.micro_batch), "threads": options.threads},
        }
    )  # fmt: skip


def measured(options: argparse.Namespace, arm: str, batch: int, folder: Path, device: torch.device) -> dict[str, float]:
    """One arm at one batch: seconds of reading and of a step, and its peak in bytes."""
    config = recipe(options, arm, batch, folder)
    inputs = open_data(config, RankInfo())
    trainer = build_trainer(config, inputs, device=device, world_size=1, folder=folder, stopwatch=Stopwatch())
    phases = Phases(device)
    step = TrainStep(
        trainer.engine, trainer.objective, micro_batch_sizes=inputs.plan.micro_batch_sizes, kept=inputs.plan.kept,
        device=device, phases=phases,
    )  # fmt: skip
    seconds: dict[str, list[float]] = {"read": [], "step": []}
    for number in range(1 + options.steps):
        begin = time.perf_counter()
        read = next(inputs.loader)
        between = time.perf_counter()
        loss = step(read, config.optimizer.lr).loss.value
        float(loss.detach())  # waits for the device
        if number:  # the first one makes the optimizer's state
            seconds["read"].append(between - begin)
            seconds["step"].append(time.perf_counter() - between)
    report = MemoryReport(device, trainer.engine, trainer.objective, phases)
    step(next(inputs.loader), config.optimizer.lr)
    report.close()
    peak = max(one.allocated for one in report.peaks.values())
    inputs.loader.close()
    trainer.engine.destroy()
    del step, trainer, report, loss
    gc.collect()
    return {name: statistics.median(found) for name, found in seconds.items()} | {"peak": peak}


def table(options: argparse.Namespace, device: torch.device) -> list[str]:
    """As Markdown; ratios are to both towers at the same batch."""
    lines = [
        "| batch | trained | step, s | reading, s | whole, of both towers' | peak, MiB | of both towers' |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.perf_counter()
        config = recipe(options, "features", 2, folder)
        said = list(write_features(config, device=options.device, batch_size=options.micro_batch))
        lines.insert(0, f"{said[0].partition(' -> ')[0]}, made in {time.perf_counter() - begin:.0f} s\n")
        for batch in [*options.batches, *options.further]:
            arms = ARMS if batch in options.batches else ARMS[-1:]
            rounds = [
                {arm: measured(options, arm, batch, folder, device) for arm in arms} for _ in range(options.rounds)
            ]
            found = {
                arm: {key: statistics.median(one[arm][key] for one in rounds) for key in rounds[0][arm]} for arm in arms
            }
            base = found.get("both towers")
            for arm, one in found.items():
                whole = f"{(one['read'] + one['step']) / (base['read'] + base['step']):.3f}" if base else ""
                share = f"{one['peak'] / base['peak']:.2f}" if base else ""
                lines.append(
                    f"| {batch:,} | {arm} | {one['step']:.2f} | {one['read']:.2f} | {whole} | "
                    f"{one['peak'] / 2**20:,.0f} | {share} |"
                )
    return lines


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="emoji/train")
    parser.add_argument("--tower", default="timm/vit_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--text-width", type=int, default=64)
    parser.add_argument("--text-layers", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--further", type=int, nargs="*", default=[4096], help="batches of `features` alone")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="timed in each round, after one that is not")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args(words)
    device = start(read_rank_info(), options.threads)
    if device.type != options.device:
        parser.error(f"--device: expected {device.type}, which this process computes on, got {options.device}")
    print("\n".join(table(options, device)), flush=True)
    stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
