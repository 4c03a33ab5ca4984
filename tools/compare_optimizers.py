"""Every optimizer by every provider that imports here, against one reference: is it the same rule, and how fast is it?

    python tools/compare_optimizers.py
    python tools/compare_optimizers.py --only adamw lamb --steps 50
    python tools/compare_optimizers.py --offload

All step the same parameters with the same gradients (two groups, with and without weight decay). The reference is what
a recipe gets on a CPU (engine/optimizers.py), in float64. Printed are the largest |p - r| / |r - r0| over parameters,
where r is the reference's value after the last step and r0 what both began with, and the median time of a step as a
ratio to the reference rule's in fp32. Providers that do not import, or do not run on this device, are listed with the
reason. DeepSpeed compiles its CPU optimizers at first use, for minutes; TORCH_EXTENSIONS_DIR says where they are kept.

`--offload`: what a recipe gets for AdamW under offload on a machine with a GPU, DeepSpeed's CPU Adam, inside the engine
on two CPU ranks at ZeRO stages 2 and 3, against torch's AdamW without offload at the same stage. Printed is the largest
|p - r| / |r| over parameters after five steps of two small, smooth towers on random pixels (deep ones with kinks carry
a rounding of the first step into the fourth digit of the third). Adam's epsilon is 1e-4 there: at 1e-8 an element whose
gradient cancels moves as its rounding says.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amclr_scale import objectives
from amclr_scale.config.load import load
from amclr_scale.config.schema import Optimizer
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.distributed.process_group import seed_everything, start, stop
from amclr_scale.engine import deepspeed_setup
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.optimizers import build_optimizer
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.metrics.phases import Phases
from amclr_scale.torchvision_ops import import_torchvision
from amclr_scale.types import Batch

SHAPES = ((512, 1024), (1024,), (256, 64, 3, 3), (256,), (30000, 64), (7,))
LR, DECAY = 1e-2, 0.1
SIDE, WORDS = 8, 100  # of the towers that --offload trains: pixels, and words
LR_OF = {"lars": 1.0}  # whose step is a thousandth of that
L2 = "another rule: the decay is part of the gradient"
RESCALED = "another rule: the decay is rescaled too"
OTHER_RULES = {
    ("nadam", "timm"): "another rule: without NAdam's schedule of the momentum",
    ("sgd", "torch"): L2,
    ("sgd", "NVIDIA apex"): L2,
    ("lamb", "timm, as published"): RESCALED,
    ("lamb", "DeepSpeed FusedLamb"): RESCALED,
    ("lamb", "NVIDIA apex"): RESCALED,
    ("lars", "timm, as published"): RESCALED,
}
SAME = 1e-4  # beyond it, float32 rounding is no explanation
SAME_OF = {"lion": 1e-2}  # but for a sign that rounding turns, which moves a weight by a whole step the other way
Make = Callable[[list[dict[str, Any]], Optimizer], Any]


def _torch(name: str, **how: Any) -> Make:
    def make(groups: list[dict[str, Any]], o: Optimizer) -> Any:
        if name == "SGD":
            return torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, nesterov=o.nesterov, **how)
        extra = {} if name == "AdamW" else {"decoupled_weight_decay": True}
        return getattr(torch.optim, name)(groups, lr=o.lr, betas=o.betas, eps=o.eps, **extra, **how)

    return make


def _timm(name: str, *keys: str, **how: Any) -> Make:
    def make(groups: list[dict[str, Any]], o: Optimizer) -> Any:
        import_torchvision()  # timm imports it
        import timm.optim

        return getattr(timm.optim, name)(groups, lr=o.lr, **{key: getattr(o, key) for key in keys}, **how)

    return make


def _imported(module: str, name: str, *keys: str, **how: Any) -> Make:
    def make(groups: list[dict[str, Any]], o: Optimizer) -> Any:
        found = getattr(__import__(module, fromlist=[name]), name)
        return found(groups, lr=o.lr, **{key: getattr(o, key) for key in keys}, **how)

    return make


ADAM = ("betas", "eps")
PROVIDERS: dict[str, dict[str, Make]] = {
    "adamw": {
        "torch, one by one": _torch("AdamW", foreach=False),
        "torch, foreach": _torch("AdamW", foreach=True),
        "torch, fused": _torch("AdamW", fused=True),
        "timm": _timm("AdamWLegacy", *ADAM),
        "DeepSpeed CPU Adam": _imported("deepspeed.ops.adam", "DeepSpeedCPUAdam", *ADAM, adamw_mode=True),
        "DeepSpeed FusedAdam": _imported("deepspeed.ops.adam", "FusedAdam", *ADAM, adam_w_mode=True),
        "NVIDIA apex": _imported("apex.optimizers", "FusedAdam", *ADAM, adam_w_mode=True),
    },
    "sgd": {
        "timm, one by one": _timm("SGDW", "momentum", "nesterov", foreach=False),
        "timm, foreach": _timm("SGDW", "momentum", "nesterov", foreach=True),
        "torch": _torch("SGD"),
        "NVIDIA apex": _imported("apex.optimizers", "FusedSGD", "momentum", "nesterov"),
    },
    "nadam": {
        "torch, one by one": _torch("NAdam", foreach=False),
        "torch, foreach": _torch("NAdam", foreach=True),
        "timm": _timm("NAdamW", *ADAM),
    },
    "radam": {
        "torch, one by one": _torch("RAdam", foreach=False),
        "torch, foreach": _torch("RAdam", foreach=True),
    },
    "lion": {
        "timm": _timm("Lion", "betas"),
        "DeepSpeed CPU Lion": _imported("deepspeed.ops.lion", "DeepSpeedCPULion", "betas"),
        "DeepSpeed FusedLion": _imported("deepspeed.ops.lion", "FusedLion", "betas"),
    },
    "adamp": {"timm": _timm("AdamP", *ADAM, "nesterov")},
    "lamb": {
        "timm, decoupled": _timm("Lamb", *ADAM, max_grad_norm=None, decoupled_decay=True),
        "timm, as published": _timm("Lamb", *ADAM, max_grad_norm=None),
        "DeepSpeed FusedLamb": _imported("deepspeed.ops.lamb", "FusedLamb", *ADAM),
        "NVIDIA apex": _imported("apex.optimizers", "FusedLAMB", *ADAM, max_grad_norm=0.0),
    },
    "lars": {"timm, as published": _timm("Lars", "momentum", trust_coeff=1e-3)},
}


def recipe(o: Optimizer) -> Make:
    """What a run with this name gets on this device."""

    def make(groups: list[dict[str, Any]], _: Optimizer) -> Any:
        groups = [{**group, "lr_factor": 1.0, "layerwise": group["weight_decay"] > 0} for group in groups]
        return build_optimizer(o, groups, groups[0]["params"][0].device)[0]

    return make


def first_values() -> list[Tensor]:
    """What all begin with, float32."""
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(shape, generator=generator) for shape in SHAPES]


class Racer:
    """One optimizer with parameters of its own."""

    def __init__(self, make: Make, o: Optimizer, device: torch.device, dtype: torch.dtype):
        self.device = device
        self.parameters = [nn.Parameter(x.to(device, dtype)) for x in first_values()]
        groups = [
            {"params": [p for p in self.parameters if (p.dim() > 1) == decay], "weight_decay": DECAY * decay}
            for decay in (True, False)
        ]
        self.optimizer, self.seconds = make(groups, o), list[float]()

    def step(self, gradients: list[Tensor]) -> None:
        """Change the parameters, and remember how long it took."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.to(parameter, copy=True)  # some keep theirs
        begin = _now(self.device)
        self.optimizer.step()
        self.seconds.append(_now(self.device) - begin)

    def values(self) -> list[Tensor]:
        """The parameters now, in float64 on the CPU."""
        return [p.detach().cpu().double() for p in self.parameters]


def race(racers: list[Racer], steps: int) -> None:
    """All take the same steps, in turn, so that a busy machine slows all alike."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        gradients = [torch.randn(shape, generator=generator) for shape in SHAPES]
        for racer in racers:
            racer.step(gradients)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def difference(got: list[Tensor], want: list[Tensor], start: list[Tensor]) -> float:
    """The largest over parameters, relative to the way that the reference went."""
    return max(float((g - w).norm() / (w - s).norm()) for g, w, s in zip(got, want, start, strict=True))


class SmoothTowers(nn.Module):
    """An image and a text tower that small differences pass through as small ones."""

    def __init__(self) -> None:
        super().__init__()
        self.image_tower = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2 * 3, 64), nn.Tanh(), nn.Linear(64, 32))
        self.text_tower = nn.Sequential(nn.EmbeddingBag(WORDS, 64), nn.Tanh(), nn.Linear(64, 32))
        self.logit_scale = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, images: tuple[Tensor, ...], texts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Unit vectors (b, 32) of both, and the scale."""
        image = nn.functional.normalize(self.image_tower(images[0] / 255), dim=-1)
        text = nn.functional.normalize(self.text_tower(texts[0]), dim=-1)
        return {"image": image, "text": text, "logit_scale": self.logit_scale.exp()}


def train_on_rank(rank: int, words: list[str], steps: int, folder: str, cpu_adam: bool) -> None:
    """Train on one of two ranks; rank 0 writes the weights after the last step."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    os.environ.update(MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    device, config = start(RankInfo(rank, rank, 2, 2), 1), load(None, words)
    seed_everything(config.seed)
    model = SmoothTowers()
    no_decay = {name for name, parameter in model.named_parameters() if parameter.dim() < 2}

    def on_host(o: Optimizer, groups: Any, *_: Any, **__: Any) -> tuple[Any, str]:
        return DeepSpeedCPUAdam(groups, lr=o.lr, betas=o.betas, eps=o.eps, adamw_mode=True), "DeepSpeed's CPU AdamW"

    with mock.patch.object(deepspeed_setup, "build_optimizer", on_host) if cpu_adam else nullcontext():
        engine, _ = build_engine(config, model, no_decay=no_decay, device=device, world_size=2)
    b, clip = config.train.global_batch_size // 2, objectives.create("clip")
    step = TrainStep(engine, clip, micro_batch_sizes=(b // 2, b // 2), device=device, phases=Phases(device))
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        images = torch.randint(0, 256, (b, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
        step(Batch(torch.arange(b), (images,), (torch.randint(WORDS, (b, 8), generator=generator),)), LR / 10)
    weights = [full_fp32(p).double() for p in model.parameters()]
    if rank == 0:
        torch.save(weights, Path(folder) / "weights.pt")
    engine.destroy()
    stop()


def run_on_two_ranks(*arguments: Any) -> None:
    """`train_on_rank` in two fresh processes."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=train_on_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a rank ended with exit code {process.exitcode}")


def offloaded(steps: int) -> bool:
    """Print how far CPU Adam under offload is from torch's AdamW; whether it is the same rule."""
    base = ["train.global_batch_size=64", "train.samples=64", "optimizer.eps=1e-4", f"optimizer.weight_decay={DECAY}"]
    good = True
    print("| stage | offload | difference from torch's AdamW without it |\n|---|---|---|")
    for stage, offload in ((2, "optimizer"), (3, "optimizer"), (3, "parameters")):
        found = []
        for choice in ("none", offload):
            words = [*base, f"execution.zero_stage={stage}", f"execution.offload={choice}"]
            with tempfile.TemporaryDirectory() as folder:
                run_on_two_ranks(words, steps, folder, choice != "none")
                found.append(torch.load(Path(folder) / "weights.pt", weights_only=True))
        want, got = found
        far = max(float((g - w).norm() / w.norm()) for g, w in zip(got, want, strict=True))
        good &= far < 1e-6
        print(f"| {stage} | {offload} | {far:.1e} |", flush=True)
    return good


def main() -> int:
    """Print a Markdown table; 1 if a provider's rule is another one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--steps", type=int, help="default: 20, and 5 with --offload")
    parser.add_argument("--offload", action="store_true", help="only DeepSpeed's CPU Adam inside the engine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.offload:
        return 0 if offloaded(options.steps or 5) else 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    host, start, missing, good = torch.device("cpu"), first_values(), list[str](), True
    print("| optimizer | provider | difference | time | |\n|---|---|---|---|---|")
    for name in options.only:
        o = Optimizer.model_validate({"name": name, "lr": LR_OF.get(name, LR), "weight_decay": DECAY})
        exact = Racer(recipe(o), o, host, torch.float64)
        found = {"the recipe's": Racer(recipe(o), o, device, torch.float32)}
        for provider, make in PROVIDERS[name].items():
            try:
                found[provider] = Racer(make, o, device, torch.float32)
            except Exception as error:  # a broken build of a CUDA extension may raise anything
                reason = (str(error).strip() or "no reason given").splitlines()[0]
                missing.append(f"{name}, {provider}: {type(error).__name__}: {reason[:120]}")
        race([exact, *found.values()], options.steps or 20)
        base = statistics.median(found["the recipe's"].seconds)
        for provider, racer in found.items():
            far = difference(racer.values(), exact.values(), start)
            note = OTHER_RULES.get((name, provider), "" if far < SAME_OF.get(name, SAME) else "differs")
            good &= note != "differs"
            seconds = statistics.median(racer.seconds)
            print(f"| {name} | {provider} | {far:.1e} | {seconds / base:.2f} | {note} |", flush=True)
    print("\n".join(["", "Not run here:", *missing]))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
