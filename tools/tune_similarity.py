"""Find the fastest tiles of the Triton backend on this GPU, and say what the loss then takes.

    python tools/tune_similarity.py                                # the table, and JSON with --json FILE
    python tools/tune_similarity.py --save                         # and keep it for later processes on this machine
    python tools/tune_similarity.py --widths 512 1024 --seconds 200

Each candidate of each kernel is compiled (in parallel), run on B x D bfloat16 features, checked against the first one's
numbers, and timed: medians, by the device's clock. One that does not compile, does not fit or answers wrongly is
reported and left out. Then spans of weights, and whole losses with the best tiles beside their floor: four products
with torch.mm. Products are counted as 2 B B D operations each. It stops in time: what was not measured is said.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amclr_scale.similarity import contrast, triton_tiles, using
from amclr_scale.similarity.blocks import Statistics, Weights
from amclr_scale.similarity.precision import add_product, operand
from amclr_scale.similarity.settings import Settings
from amclr_scale.similarity.triton_backend import TritonBlocks
from amclr_scale.similarity.triton_tiles import Kernel, Tile

DEVICE = "cuda"
START = time.monotonic()
TEMPERATURE = 0.02
RATE = 1.4426950408889634 / TEMPERATURE
ACCUMULATE = [
    Tile(128, 256, 64, 8, 4), Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 4, 3, per_processor=2),
    Tile(128, 128, 64, 8, 3, per_processor=2), Tile(128, 128, 64, 8, 4), Tile(256, 128, 64, 8, 3),
    Tile(256, 128, 64, 8, 4), Tile(128, 128, 64, 4, 4), Tile(128, 128, 32, 4, 4, per_processor=2),
    Tile(64, 256, 64, 4, 3), Tile(128, 256, 64, 16, 4), Tile(64, 128, 64, 4, 4, per_processor=2),
]  # fmt: skip
WEIGHTS = [
    Tile(128, 128, 64, 4, 3, per_processor=2), Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4), Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 4, 2), Tile(128, 128, 32, 4, 4),
    Tile(128, 64, 64, 4, 4), Tile(64, 256, 64, 4, 3), Tile(128, 128, 64, 4, 3, group=16),
    Tile(128, 128, 64, 4, 3, group=4), Tile(128, 128, 64, 4, 4),
]  # fmt: skip
CANDIDATES: dict[Kernel, list[Tile]] = {"accumulate": ACCUMULATE, "weights": WEIGHTS}
SPANS = [(8192, 8192), (16384, 8192), (8192, 16384), (4096, 16384), (16384, 4096), (4096, 4096)]


def features(b: int, d: int) -> tuple[Tensor, Tensor]:
    """Image and text rows (b, d) of a trained model's kind: positives nearer than the rest."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    image, noise = torch.randn(2, b, d, device=DEVICE, generator=generator)
    return F.normalize(image, dim=1).bfloat16(), F.normalize(image + 2 * noise, dim=1).bfloat16()


def milliseconds(step: Callable[[], Any], budget_ms: float = 60) -> float:
    """Median time on the device, of as many calls as fit in `budget_ms`."""
    times: list[float] = []
    step()
    torch.cuda.synchronize()
    while not times or (sum(times) < budget_ms and len(times) < 30):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


class Kernels:
    """One call of each kernel, as the backend makes it, and the numbers that it answers."""

    def __init__(self, b: int, d: int):
        device = torch.device(DEVICE)
        image, text = features(b, d)
        self.blocks = TritonBlocks(Settings(), torch.float32, "bf16", device)
        self.a, self.k = (
            operand(x, "bf16", left=left, multiple=64, widen=self.blocks.widen)
            for x, left in ((image, True), (text, False))
        )
        self.rate = torch.full((b,), RATE, device=device)
        self.positive = torch.zeros(b, device=device)
        self.statistics = Statistics.empty(self.rate)
        ones = torch.ones_like(self.rate)
        self.side = Weights(self.rate, ones * 0.3, ones)
        self.one = self.blocks._common(self.side, self.side)

    def accumulate(self) -> list[Tensor]:
        self.statistics = Statistics.empty(self.rate)
        self.blocks._statistics(self.a.product, self.k.product, self.statistics, 0, self.positive, exclude=False)
        s = self.statistics
        return [s.shift, s.mass, s.moment, self.positive]

    def weights(self, *, common: bool = True) -> list[Tensor]:
        one = self.one if common else None
        return self.blocks._weights(self.a, self.k, self.side, self.side, one, (0, self.positive))

    def call(self, kernel: Kernel) -> list[Tensor]:
        return self.accumulate() if kernel == "accumulate" else self.weights()


def compile_some(job: tuple[int, list[tuple[Kernel, Tile]]]) -> None:
    """In a process of its own: what is compiled here lies in Triton's cache for everybody."""
    width, some = job
    held = Kernels(256, width)
    for kernel, tile in some:
        try:
            with triton_tiles.trying({kernel: tile}):
                held.call(kernel)
                torch.cuda.synchronize()
        except Exception:  # the main process meets it again, and reports it
            continue


def compile_all(widths: list[int], workers: int) -> None:
    everything = [(kernel, tile) for kernel, tiles in CANDIDATES.items() for tile in tiles]
    jobs = [(width, everything[i::workers]) for width in widths for i in range(workers)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_some, jobs))


def compare(kernel: Kernel, held: Kernels, reference: list[Tensor] | None, tile: Tile) -> tuple[float, list[Tensor]]:
    """Milliseconds of one candidate, and its answer.

    Raises:
        ArithmeticError: it differs from the reference.
    """
    with triton_tiles.trying({kernel: tile}):
        answer = [x.clone() for x in held.call(kernel)]
        for x, y in zip(answer, reference or answer, strict=True):
            difference = float((x.float() - y.float()).norm() / y.float().norm())
            if not difference < 1e-2 * (1 if kernel == "weights" else 1e-2):
                raise ArithmeticError(f"differs by {difference:.1e}")
        return milliseconds(lambda: held.call(kernel)), answer


def tune(width: int, batch: int, deadline: float) -> tuple[list[dict[str, Any]], dict[Kernel, Tile]]:
    rows: list[dict[str, Any]] = []
    best: dict[Kernel, Tile] = {}
    held = {"accumulate": Kernels(batch, width), "weights": Kernels(min(batch, 8192), width)}
    for kernel, tiles in CANDIDATES.items():
        reference: list[Tensor] | None = None
        n = len(held[kernel].rate)
        for tile in tiles:
            row: dict[str, Any] = {"width": width, "kernel": kernel, "size": n, "tile": asdict(tile)}
            if time.monotonic() > deadline:
                row["failed"] = "no time left"
            else:
                try:
                    row["ms"], answer = compare(kernel, held[kernel], reference, tile)
                    reference = reference or answer
                    row["tflops"] = 2 * n * n * width / row["ms"] / 1e9
                except Exception as error:
                    row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
            rows.append(row)
            shown = f"{row['ms']:.3f} ms, {row['tflops']:.0f} TFLOP/s" if "ms" in row else row["failed"]
            print(f"{kernel} D={width} {tuple(row['tile'].values())}: {shown}", flush=True)
        done = [row for row in rows if row["kernel"] == kernel and "ms" in row]
        if done:
            best[kernel] = Tile(**min(done, key=lambda row: row["ms"])["tile"])
    if "weights" in best and time.monotonic() < deadline:
        with triton_tiles.trying({"weights": best["weights"]}):
            ms = milliseconds(lambda: held["weights"].weights(common=False))
        rows.append({"width": width, "kernel": "weights, two exponentials", "ms": ms})
        print(f"weights with two exponentials: {ms:.3f} ms", flush=True)
    return rows, best


def floor_ms(b: int, d: int) -> float:
    """Four products in bfloat16: similarities twice, and both gradients with float32 sums, in panels as in use."""
    image, text = features(b, d)
    panel = min(b, 8192)
    s = torch.empty(panel, panel, dtype=torch.bfloat16, device=DEVICE)
    d_image, d_text = (torch.zeros(b, d, device=DEVICE) for _ in range(2))

    def step() -> None:
        for r in range(0, b, panel):
            for c in range(0, b, panel):
                a, k = image[r : r + panel], text[c : c + panel]
                out = s[: len(a), : len(k)]
                for _ in range(2):
                    torch.mm(a, k.T, out=out)
                for into, w, f in ((d_image[r : r + panel], out, k), (d_text[c : c + panel], out.T, a)):
                    add_product(into, [w], [f])

    return milliseconds(step)


def loss_ms(b: int, d: int, dtype: torch.dtype, **settings: Any) -> tuple[float, float]:
    """Milliseconds of CLIP's loss, forward and backward, and MiB beyond the features and their gradients."""
    image, text = (x.to(dtype).requires_grad_() for x in features(b, d))
    scale = torch.tensor([1 / TEMPERATURE], device=DEVICE, requires_grad=True)

    def step() -> None:
        image.grad = text.grad = scale.grad = None
        with using(**settings):
            c = contrast(image, text, temperature=1 / scale, centred=True)
        ((c.image.log_sum.mean() + c.text.log_sum.mean()) / 2).backward()

    ms = milliseconds(step, 200)
    torch.cuda.reset_peak_memory_stats()
    image.grad = text.grad = None
    before = torch.cuda.memory_allocated()
    step()
    gradients = 2 * image.nbytes
    return ms, (torch.cuda.max_memory_allocated() - before - gradients) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 768], help="D")
    parser.add_argument("--batch", type=int, default=32768, help="B of the statistics; weights take 8,192")
    parser.add_argument("--seconds", type=float, default=100, help="about when to stop")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--save", action="store_true", help="keep the best tiles for later processes on this machine")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_similarity: no GPU here")
    import triton

    deadline = START + args.seconds
    card = torch.cuda.get_device_name()
    out: dict[str, Any] = {
        "card": card, "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
        "tiles": [], "spans": [], "losses": [],
    }  # fmt: skip
    print({k: v for k, v in out.items() if isinstance(v, str)})

    def write() -> None:
        out["seconds"] = time.monotonic() - START
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(out, indent=1) + "\n")

    compile_all(args.widths, args.workers)
    print(f"compiled after {time.monotonic() - START:.0f} s", flush=True)
    chosen: dict[str, Tile] = {}
    device = torch.device(DEVICE)
    for i, width in enumerate(args.widths):
        share = START + args.seconds * (0.3 + 0.3 * (i + 1) / len(args.widths))
        rows, best = tune(width, args.batch, share)
        out["tiles"] += rows
        chosen |= {triton_tiles.key(kernel, width, device): tile for kernel, tile in best.items()}
        with triton_tiles.trying(best):
            for b in (8192, 32768):
                if time.monotonic() < deadline - 8:
                    floor, (ms, mib) = floor_ms(b, width), loss_ms(b, width, torch.bfloat16, backend="triton")
                    row = {"batch": b, "width": width, "ms": ms, "floor_ms": floor, "of_floor": ms / floor, "mib": mib}
                    out["losses"].append(row)
                    print(f"loss B={b} D={width}: {ms:.2f} ms, {ms / floor:.2f} x floor of {floor:.2f} ms, "
                          f"{8 * b * b * width / ms / 1e9:.0f} TFLOP/s, {mib:.0f} MiB", flush=True)  # fmt: skip
            for span in SPANS if i == 0 else ():
                if time.monotonic() < deadline - 5:
                    original = triton_tiles.SPANS["bf16"]
                    triton_tiles.SPANS["bf16"] = span
                    try:
                        ms, mib = loss_ms(32768, width, torch.bfloat16, backend="triton")
                    finally:
                        triton_tiles.SPANS["bf16"] = original
                    out["spans"].append({"span": span, "batch": 32768, "width": width, "ms": ms, "mib": mib})
                    print(f"span {span}: loss B=32768 D={width} {ms:.2f} ms, {mib:.0f} MiB", flush=True)
        write()
    print("best tiles:")
    for name, tile in chosen.items():
        print(f"    {name}: {tile}")
    out["best"] = {name: asdict(tile) for name, tile in chosen.items()}
    write()
    if args.save:
        print(f"kept in {triton_tiles.save(chosen)}")
    print(f"{time.monotonic() - START:.0f} s")


if __name__ == "__main__":
    main()
