"""A small dual encoder and a plain one-process trainer, to hold the engine against."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale import objectives
from amclr_scale.config.load import build
from amclr_scale.config.schema import Config, ImageTower, Model, TextTower
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.encoders.build import build_model
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.engine.deepspeed_setup import build_engine, prepare_towers
from amclr_scale.engine.optimizers import parameter_groups
from amclr_scale.engine.schedules import learning_rate
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.metrics.phases import Phases
from amclr_scale.torchvision_ops import import_torchvision
from amclr_scale.types import Batch

CPU = torch.device("cpu")
PIXELS, WORDS, LENGTH, WIDTH = 6, 30, 5, 8


def _wide(x: Tensor) -> Tensor:
    """What the objective gets: float32, or float64 where the towers are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Block(nn.Module):
    """A residual block, which activation recomputation can run twice."""

    def __init__(self, dropout: float):
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(16), nn.Linear(16, 16), nn.Dropout(dropout)
        nn.init.normal_(self.norm.bias)  # a bias near zero has a relative error that says little

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.dropout(torch.tanh(self.linear(self.norm(x))))
        return out


class TinyTowers(nn.Module):
    """Two towers with norms, dropout, an embedding, and a learned scale: everything that could go wrong, quickly."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.image_tower = nn.Sequential(nn.Flatten(), nn.Linear(3 * PIXELS * PIXELS, 16), Block(dropout))
        self.words = nn.Embedding(WORDS, 16)
        self.text_tower = nn.Sequential(Block(dropout))
        self.image_head, self.text_head = nn.Linear(16, WIDTH), nn.Linear(16, WIDTH)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.full((1,), -10.0))

    def embed_image(self, pixels: Tensor) -> Tensor:
        features = self.image_head(self.image_tower(pixels.to(self.words.weight.dtype) / 255))
        return F.normalize(_wide(features), dim=-1)

    def embed_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(_wide(self.text_head(self.text_tower(self.words(tokens).mean(1)))), dim=-1)

    def forward(self, images: tuple[Tensor, ...], texts: tuple[Tensor, ...]) -> dict[str, Tensor]:
        out = {"logit_scale": _wide(self.logit_scale).exp(), "logit_bias": _wide(self.logit_bias)}
        if images:
            out["image"] = self.embed_image(images[0])
        if texts:
            out["text"] = self.embed_text(texts[0])
        return out

    def no_weight_decay(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.dim() < 2}


def towers(dropout: float = 0.0, seed: int = 0) -> TinyTowers:
    torch.manual_seed(seed)
    return TinyTowers(dropout)


def global_batch(step: int, size: int) -> Batch:
    g = torch.Generator().manual_seed(100 + step)
    images = torch.randint(0, 256, (size, 3, PIXELS, PIXELS), generator=g, dtype=torch.uint8)
    texts = torch.randint(0, WORDS, (size, LENGTH), generator=g)
    return Batch(ids=torch.arange(size) + step, images=(images,), texts=(texts,))


def local_batch(step: int, size: int, rank: int, world_size: int) -> Batch:
    whole, share = global_batch(step, size), size // world_size
    mine = slice(rank * share, (rank + 1) * share)
    return Batch(whole.ids[mine], tuple(v[mine] for v in whole.images), tuple(v[mine] for v in whole.texts))


def config(size: int, **changes: object) -> Config:
    tree: dict[str, dict[str, object]] = {
        "data": {"lanes": 4},
        "train": {"global_batch_size": size, "samples": 1000},
        "optimizer": {"lr": 0.02, "max_grad_norm": 0.5},
        "execution": {},
        "run": {},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    return build(tree, 1)


# Independent implementations: torch's and timm's own. Their decay is off: `plain_run` does it, decoupled.
REFERENCES = {
    "adamw": lambda g, o: torch.optim.AdamW(g, lr=o.lr, betas=o.betas, eps=o.eps),
    "sgd": lambda g, o: torch.optim.SGD(g, lr=o.lr, momentum=o.momentum, nesterov=o.nesterov),
    "nadam": lambda g, o: torch.optim.NAdam(g, lr=o.lr, betas=o.betas, eps=o.eps, decoupled_weight_decay=True),
    "radam": lambda g, o: torch.optim.RAdam(g, lr=o.lr, betas=o.betas, eps=o.eps, decoupled_weight_decay=True),
    "lion": lambda g, o: _timm("Lion", g, lr=o.lr, betas=o.betas),
    "adamp": lambda g, o: _timm("AdamP", g, lr=o.lr, betas=o.betas, eps=o.eps, nesterov=o.nesterov),
    "lamb": lambda g, o: _timm("Lamb", g, lr=o.lr, betas=o.betas, eps=o.eps, max_grad_norm=None),
    "lars": lambda g, o: _timm("Lars", g, lr=o.lr, momentum=o.momentum, trust_coeff=1e-3),
}


# What a learning-rate factor of 0 freezes.
FROZEN_WITH = {
    "image_tower": ["image_tower"],
    "text_tower": ["text_tower"],
    "heads": ["image_head", "text_head"],
    "temperature": ["logit_scale", "logit_bias"],
}


def _timm(name: str, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
    import_torchvision()
    import timm.optim

    return getattr(timm.optim, name)(*args, **kwargs)


def plain_run(settings: Config, steps: int, device: torch.device = CPU) -> tuple[dict[str, Tensor], list[float]]:
    """What the engine must equal: one process, one big batch, torch and nothing else."""
    model = towers().to(device)
    size = settings.train.global_batch_size
    o = settings.optimizer
    for part, factor in o.lr_factors.model_dump().items():
        for name in FROZEN_WITH[part] if factor == 0 else ():
            getattr(model, name).requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), model.no_weight_decay(), o)
    decays = [group.pop("weight_decay") for group in groups]
    # LAMB and LARS rescale matrices, however large the decay is; their libraries' rules ask whether there is one.
    groups = [{**group, "weight_decay": 0.0, "always_adapt": group["layerwise"]} for group in groups]
    if o.name == "adamp":  # whose rule decides how much of it there is
        groups = [{**group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True)]
        decays = [0.0] * len(groups)
    optimizer = REFERENCES[o.name](groups, o)
    losses = []
    for step in range(steps):
        batch = global_batch(step, size)
        out = model(*((views[0].to(device),) for views in (batch.images, batch.texts)))
        logits = out["logit_scale"] * out["image"] @ out["text"].T
        labels = torch.arange(size, device=device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        optimizer.zero_grad()
        loss.backward()
        if o.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_factor"] * learning_rate(o, (step + 0.5) * size, 1000, size)
        with torch.no_grad():
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                for p in group["params"]:
                    p.mul_(1 - group["lr"] * decay)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
    return {name: p.detach().float().cpu() for name, p in model.named_parameters()}, losses


def engine_run(
    settings: Config,
    micro_batch_sizes: tuple[int, int],
    kept: int,
    steps: int,
    *,
    device: torch.device = CPU,
    dropout: float = 0.0,
) -> tuple[dict[str, Tensor], list[float]]:
    """The same through DeepSpeed's engine and the gradient cache, on this rank's share of each batch.

    Returns:
        The whole weights after the last step, and the loss of every step as this rank has it.
    """
    model: Any = towers(dropout)
    prepare_towers(model, settings.execution)
    size, no_decay = settings.train.global_batch_size, model.no_weight_decay()
    engine, _ = build_engine(settings, model, no_decay=no_decay, device=device, world_size=world_size())
    clip, phases = objectives.create("clip"), Phases(device)
    step = TrainStep(engine, clip, micro_batch_sizes=micro_batch_sizes, device=device, phases=phases, kept=kept)
    torch.manual_seed(rank())
    losses = []
    for n in range(steps):
        lr = learning_rate(settings.optimizer, (n + 0.5) * size, 1000, size)
        losses.append(step(local_batch(n, size, rank(), world_size()), lr).loss.value.item())
    weights = {name: full_fp32(p).cpu() for name, p in model.named_parameters()}
    engine.destroy()
    return weights, losses


def differences(
    got: list[tuple[dict[str, Tensor], list[float]]], want: tuple[dict[str, Tensor], list[float]]
) -> dict[str, float]:
    """Of each parameter, the largest over ranks, relative to its norm; and of the losses' mean over ranks."""
    found = {
        name: max(float((weights[name] - value).norm() / value.norm()) for weights, _ in got)
        for name, value in want[0].items()
    }
    losses, mean = torch.tensor(want[1]), torch.tensor([losses for _, losses in got]).mean(0)
    return {**found, "loss": float(((mean - losses) / losses).abs().max())}


def real_run(
    stage: int, prepare: Callable[[DualEncoder], None], *, layers: int, dropout: float, micro: int, kept: int
) -> list[Tensor]:
    """Weights after three steps of real towers: 8 samples of this rank, encoded `micro` at once.

    Args:
        prepare: called with the model, before the engine is built around it.
    """
    # SGD: a key's bias has no gradient but rounding, which Adam would blow up to whole steps.
    settings = config(16, execution__zero_stage=stage, optimizer__name="sgd")
    torch.manual_seed(0)
    text = TextTower(width=16, layers=layers, heads=2, dropout=dropout)
    sections = Model(image=ImageTower(width=8, dropout=dropout), text=text, embedding_width=8)
    ones = (1.0, 1.0, 1.0)
    model = build_model(
        sections, vocab_size=30, pad_id=0, context_length=5, image_size=16, image_mean=ones, image_std=ones
    )
    prepare(model)
    engine, _ = build_engine(settings, model, no_decay=model.no_weight_decay(), device=CPU, world_size=world_size())
    clip = objectives.create("clip")
    step = TrainStep(engine, clip, micro_batch_sizes=(micro, micro), device=CPU, phases=Phases(CPU), kept=kept)
    torch.manual_seed(rank())
    for n in range(3):
        g = torch.Generator().manual_seed(n * 10 + rank())
        images = torch.randint(0, 256, (8, 3, 16, 16), generator=g, dtype=torch.uint8)
        step(Batch(torch.arange(8), (images,), (torch.randint(1, 30, (8, 5), generator=g),)), 0.01)
    weights = [full_fp32(p) for p in model.parameters()]
    engine.destroy()
    return weights
