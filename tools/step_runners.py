"""The two training steps that `benchmark_step.py` times: ours, and open_clip's with the same towers in kind."""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """Towers of one kind in both projects."""

    image: dict[str, Any]  # our model.image
    text: dict[str, Any]  # our model.text
    theirs: str | dict[str, Any]  # open_clip's name, or configuration
    image_size: int = 224
    context: int = 77
    vocabulary: int = 49408
    width: int = 512  # of embeddings


TEXT = {"width": 512, "layers": 12, "heads": 8}
PAIRS = {
    "vit-b-32": Pair({"name": "timm/vit_base_patch32_224"}, TEXT, "ViT-B-32"),
    "vit-b-16": Pair({"name": "timm/vit_base_patch16_224"}, TEXT, "ViT-B-16"),
    "rn50": Pair({"name": "torchvision/resnet50", "norm": "batch"}, TEXT, "RN50", width=1024),
    "toy": Pair(
        {"name": "small_resnet", "width": 16}, {"width": 32, "layers": 2, "heads": 2},
        {
            "embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16},
            "text_cfg": {"context_length": 16, "vocab_size": 256, "width": 32, "heads": 2, "layers": 2},
        },
        image_size=32, context=16, vocabulary=256, width=32,
    ),
}  # fmt: skip


@dataclass
class Variant:
    """A way to take a step, ready to run."""

    step: Callable[[], object]
    flops: float  # useful operations per sample
    own: int  # bytes of its state, on a GPU
    phases: Callable[[], dict[str, float]] = dict


def pixels_and_words(pair: Pair, batch: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(batch)
    shape = (batch, 3, pair.image_size, pair.image_size)
    return (
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=g),
        torch.randint(2, pair.vocabulary, (batch, pair.context), generator=g),
    )


def pinned(tensors: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    return tuple(t.pin_memory() for t in tensors) if device.type == "cuda" else tensors


def held(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU now."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


class Ours:
    """Our engines, made when a variant first asks for one, and the batch."""

    def __init__(self, pair: Pair, options: argparse.Namespace, device: torch.device):
        from amclr_scale.types import Batch

        self.pair, self.options, self.device = pair, options, device
        images, texts = pinned(pixels_and_words(pair, options.batch), device)
        self.batch = Batch(torch.arange(len(images)), (images,), (texts,))
        self._made: dict[tuple[bool, bool], Any] = {}

    def variant(self, name: str) -> Variant:
        from amclr_scale.encoders.recomputation import Recomputation, set_recomputation

        compiled, aligned = "compiled" in name, name != "unaligned"
        before = held(self.device)
        step, flops = self._made.get((compiled, aligned)) or self._make(compiled, aligned)
        self._made[compiled, aligned] = step, flops
        size = self.options.micro_batch if name.startswith("cached") else self.options.batch
        recomputation: Recomputation = "full" if name == "recomputed" else "none"

        def run() -> None:
            step.micro_batch_sizes, step.kept = (size, size), 1
            for tower in (step.engine.module.image_tower, step.engine.module.text_tower):
                set_recomputation(tower, recomputation)
            step(self.batch, 1e-4)

        run()
        own = held(self.device) - before if name in ("plain", "compiled", "unaligned") else 0
        return Variant(run, flops, own, step.phases.seconds)

    def _make(self, compiled: bool, aligned: bool) -> tuple[Any, float]:
        from amclr_scale import objectives
        from amclr_scale.config.load import build
        from amclr_scale.encoders.build import build_model
        from amclr_scale.engine.deepspeed_setup import build_engine, prepare_towers
        from amclr_scale.engine.step import TrainStep
        from amclr_scale.metrics.flops import count
        from amclr_scale.metrics.phases import Phases

        pair, options = self.pair, self.options
        config = build(
            {
                "data": {"image_size": pair.image_size, "context_length": pair.context},
                "model": {"image": pair.image, "text": pair.text, "embedding_width": pair.width},
                "train": {"global_batch_size": options.batch, "samples": options.batch},
                "execution": {"precision": options.precision, "zero_stage": options.zero_stage, "compile": compiled},
            },
            1,
        )
        torch.manual_seed(0)
        with self.device if self.device.type == "cuda" else nullcontext():
            model = build_model(
                config.model, vocab_size=pair.vocabulary, pad_id=0, end_id=1, context_length=pair.context,
                image_size=pair.image_size, image_mean=config.data.image_mean, image_std=config.data.image_std,
            )  # fmt: skip
        images, texts = pixels_and_words(pair, 2)
        flops = count(model, (images.to(self.device),), (texts.to(self.device),)).useful()
        prepare_towers(model, config.execution)
        unsorted = mock.patch("amclr_scale.engine.optimizers.aligned_order", list)
        with nullcontext() if aligned else unsorted:
            engine, _ = build_engine(config, model, no_decay=model.no_weight_decay(), device=self.device, world_size=1)
        objective = objectives.create("clip").to(self.device)
        sizes, phases = (options.batch, options.batch), Phases(self.device)
        return TrainStep(engine, objective, micro_batch_sizes=sizes, device=self.device, phases=phases), flops


class Theirs:
    """open_clip's training step as its own loop takes it: autocast, fused AdamW, clipping, the scale's clamp."""

    def __init__(self, pair: Pair, options: argparse.Namespace, device: torch.device):
        from amclr_scale.torchvision_ops import import_torchvision

        import_torchvision()  # before open_clip imports it
        import open_clip

        self.options, self.device = options, device
        self.before = held(device)
        images, texts = pixels_and_words(pair, options.batch)
        self.images, self.texts = pinned(((images.float() / 255 - 0.45) / 0.27, texts), device)
        torch.manual_seed(0)
        settings = pair.theirs if isinstance(pair.theirs, dict) else open_clip.get_model_config(pair.theirs)
        with device if device.type == "cuda" else nullcontext():
            self.model: Any = open_clip.CLIP(**settings, output_dict=True)
        self.loss = open_clip.ClipLoss()
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=device.type == "cuda")
        from amclr_scale.metrics.flops import flop_counter

        counter = flop_counter()
        with torch.no_grad(), counter:
            self.model(self.images[:2].to(device), self.texts[:2].to(device))
        self.flops = 3.0 * counter.get_total_flops() / 2

    def variant(self, name: str) -> Variant:
        freq = self.options.batch // self.options.micro_batch if name == "accumulated" else 1

        def run() -> None:
            self.model.set_grad_checkpointing(name == "checkpointed")
            self.model.train()
            self.optimizer.zero_grad()
            (self._backward if freq == 1 else self._accumulate)(freq)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            with torch.no_grad():
                self.model.logit_scale.clamp_(0, 4.6052)

        run()
        own = held(self.device) - self.before if name == "open_clip" else 0
        return Variant(run, self.flops, own)

    def _autocast(self) -> Any:
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.options.precision)
        return torch.autocast(self.device.type, dtype=half) if half else nullcontext()

    def _parts(self, freq: int) -> list[tuple[Tensor, Tensor]]:
        """Micro-batches on the device: all of them stay there, as in its loop."""
        parts = zip(self.images.chunk(freq), self.texts.chunk(freq), strict=True)
        return [(i.to(self.device, non_blocking=True), t.to(self.device, non_blocking=True)) for i, t in parts]

    def _backward(self, freq: int) -> None:
        ((images, texts),) = self._parts(freq)
        with self._autocast():
            loss = self.loss(**self.model(images, texts))
        loss.backward()

    def _accumulate(self, freq: int) -> None:
        parts, cached = self._parts(freq), dict[str, list[Tensor]]()
        names = ("image_features", "text_features")
        for images, texts in parts:
            with torch.no_grad(), self._autocast():
                out = self.model(images, texts)
            for name in names:
                cached.setdefault(name, []).append(out[name])
        for j, (images, texts) in enumerate(parts):
            with self._autocast():
                out = self.model(images, texts)
                whole = {n: torch.cat([*cached[n][:j], out[n], *cached[n][j + 1 :]]) for n in names}
                loss = self.loss(**whole, logit_scale=out["logit_scale"])
            loss.backward()
