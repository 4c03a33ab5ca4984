"""How far a rounded gradient is from the exact sum of its micro-batches', for more and more micro-batches.

    python tools/compare_precision.py --config configs/quickstart.yaml

One batch, cut into 1, 4, 16, ... micro-batches, goes through DeepSpeed's engine and the gradient cache at each ZeRO
stage. Printed is the relative error |g - e| / |e| of the gradient g that the optimizer gets:

    summation   e is the float64 sum of the very gradients that the backward passes left, in the parameters' type
    whole       e is the fp32 gradient of the same weights and batch, so that the rounding of activations counts too

with sums in fp32, as the engine takes them (engine/zero/gradient_sums.py), and with sums in the parameters' own type.
The last column's e is of stage 0 in fp32.

    python tools/compare_precision.py --cost --batch 64 --counts 1 4 --rounds 7 KEY=VALUE ...

compares fp32, amp_bf16 and bf16 at stage 1 instead: the gradient's error against fp32, the most bytes that tensors take
in a step (tools/benchmark_memory.py) and the CPU time of a step, the precisions by turns, medians.

tf32, which only a GPU has, is imitated: what goes into a product loses the digits that TF32 has not (`Truncated`).
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("DS_ACCELERATOR", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from amclr_scale import objectives
from amclr_scale.config.load import load
from amclr_scale.config.schema import Config
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.distributed.process_group import seed_everything, start
from amclr_scale.engine.build import model_of
from amclr_scale.engine.deepspeed_setup import build_engine, prepare_towers
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.zero.gradient_sums import GradientSums
from amclr_scale.metrics.phases import Phases
from amclr_scale.types import Batch

COMPARED = ("fp32", "amp_bf16", "bf16")


class Truncated(TorchDispatchMode):
    """Matrices of float32 that are multiplied lose the 13 of their 23 bits that TF32 has not, forward and backward.

    Tensor cores drop them where nobody has rounded before, which is the worst that a library may do.
    """

    products = (
        "mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
    )  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in self.products:
            args = tuple(map(self._truncated, args))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _truncated(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.dim() < 2:  # a bias is added, not multiplied
            return x
        return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32).view_as(x)


def made(
    config: Config, micro_batch: int, device: torch.device, *, kept: int, watch: Callable[[int, Tensor], None]
) -> tuple[Any, Any, TrainStep]:
    """A model, its engine, and a step of it.

    Args:
        watch: gets the number of each parameter whose gradient has come, and the parameter.
    """
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.context_length)
    seed_everything(config.seed)
    model = model_of(config, tokenizer)
    prepare_towers(model, config.execution)
    engine, _ = build_engine(config, model, no_decay=model.no_weight_decay(), device=device, world_size=1)
    for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.register_post_accumulate_grad_hook(partial(watch, index))  # before the step's, which take it away
    sizes, clip = (micro_batch, micro_batch), objectives.create("clip").to(device)
    step = TrainStep(engine, clip, micro_batch_sizes=sizes, device=device, phases=Phases(device), kept=kept)
    return model, engine, step


def gradients(
    config: Config, batch: Batch, micro_batch: int, device: torch.device, *, sums: bool, truncated: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """What the optimizer gets for each parameter, and, with sums, what the backward passes left, added in float64."""
    from deepspeed.utils import safe_get_full_grad

    exact: dict[int, Tensor] = {}

    def add(index: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.double()
        exact[index] = exact[index] + gradient if index in exact else gradient

    model, engine, step = made(config, micro_batch, device, kept=0, watch=add)
    parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
    found = list[Tensor]()
    plain = engine.step

    def look_and_step() -> None:
        for parameter in parameters:
            whole = parameter.grad if config.execution.zero_stage == 0 else safe_get_full_grad(parameter)
            found.append(torch.zeros_like(parameter) if whole is None else whole.double())
        plain()

    engine.step = look_and_step
    switched_off = mock.patch.multiple(GradientSums, __enter__=lambda _: None, __exit__=lambda *_: None)
    with nullcontext() if sums else switched_off, Truncated() if truncated else nullcontext():  # type: ignore[no-untyped-call]
        step(batch, 1e-6)
    engine.destroy()
    return found, [exact.get(i, torch.zeros_like(g)) for i, g in enumerate(found)]


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """Relative, of all parameters together."""
    difference = sum(float((g - w).square().sum()) for g, w in zip(got, want, strict=True))
    return float((difference / sum(float(w.square().sum()) for w in want)) ** 0.5)


def cost(options: argparse.Namespace, base: list[str], batch: Batch, device: torch.device) -> None:
    """Print what each precision takes and changes, for each number of micro-batches."""
    from tools.benchmark_memory import measure

    print("| micro-batches | precision | error of the gradient | peak MiB | of fp32 | CPU s of a step | of fp32 |")
    print("|---" * 7 + "|")
    for count in options.counts:
        size, rows, steps = options.batch // count, dict[str, tuple[float, float]](), dict[str, TrainStep]()
        want = list[Tensor]()
        for name in COMPARED:
            words = ["execution.zero_stage=1", f"execution.precision={name}", f"execution.micro_batch_size={size}"]
            config = load(options.config, [*base, *words])
            got, _ = gradients(config, batch, size, device, sums=True)
            want = want or got
            rows[name] = error(got, want), measure(config, 1, 0).peak / 2**20
            steps[name] = made(config, size, device, kept=1, watch=lambda *_: None)[-1]
        times: dict[str, list[float]] = {name: [] for name in COMPARED}
        for number in range(options.rounds + 1):
            for name, step in steps.items():
                begin = time.process_time()
                step(batch, 1e-6)
                if number:  # the first one makes buffers
                    times[name].append(time.process_time() - begin)
        for name, (wrong, peak) in rows.items():
            seconds, first = statistics.median(times[name]), statistics.median(times[COMPARED[0]])
            print(
                f"| {count} | {name} | {wrong:.1e} | {peak:.1f} | {peak / rows[COMPARED[0]][1]:.2f} | {seconds:.2f} "
                f"| {seconds / first:.2f} |",
                flush=True,
            )


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="micro-batches")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], choices=[0, 1, 2, 3])
    parser.add_argument("--precision", default="bf16", choices=["tf32", "amp_bf16", "bf16", "fp16"])
    parser.add_argument("--cost", action="store_true", help="bytes and time beside errors, of fp32, amp_bf16 and bf16")
    parser.add_argument("--rounds", type=int, default=5, help="of --cost: steps of each precision")
    parser.add_argument("words", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    base = ["execution.threads=1", "model.text.dropout=0", "optimizer.max_grad_norm=0", *options.words]
    base.append(f"train.global_batch_size={options.batch}")

    device, data = start(RankInfo(), 1), load(options.config, base).data
    generator, b = torch.Generator().manual_seed(0), options.batch
    images = torch.randint(0, 256, (b, 3, data.image_size, data.image_size), dtype=torch.uint8, generator=generator)
    vocabulary = load_tokenizer(data.tokenizer, data.context_length).vocab_size
    texts = torch.randint(1, vocabulary, (b, data.context_length), generator=generator)
    batch = Batch(torch.arange(b), (images,), (texts,))
    if options.cost:
        return cost(options, base, batch, device)
    whole, _ = gradients(load(options.config, [*base, "execution.zero_stage=0"]), batch, b, device, sums=True)

    print("| stage | micro-batches | summation, in fp32 | in the type itself | whole, in fp32 | in the type itself |")
    print("|---|---|---|---|---|---|")
    for stage in options.stages:
        imitated = options.precision == "tf32"
        words = [*base, f"execution.zero_stage={stage}"]
        words.append(f"execution.precision={'fp32' if imitated else options.precision}")
        for count in options.counts:
            config = load(options.config, words)
            summed, exact = gradients(config, batch, b // count, device, sums=True, truncated=imitated)
            added, _ = gradients(config, batch, b // count, device, sums=False, truncated=imitated)
            errors = [error(got, want) for want in (exact, whole) for got in (summed, added)]
            print(f"| {stage} | {count} | {' | '.join(f'{e:.1e}' for e in errors)} |", flush=True)


if __name__ == "__main__":
    main()
