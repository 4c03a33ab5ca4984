"""The teacher: a moving average of the weights, which lends features to objectives and is evaluated beside the student.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, arXiv:1911.05722.
Li et al., "Align before Fuse", NeurIPS 2021, arXiv:2107.07651, for images and texts.

After each optimizer step, with m of `model.momentum` and theta the fp32 masters (the average begins as theta):

    average <- m average + (1 - m) theta

So a step's features are of an average that includes the step before it, as in ALBEF. The teacher is always in
evaluation mode, without dropout and with stored statistics, and draws no random numbers. So its features are the same
bits whether it encodes a batch before the student or after, and whatever the micro-batches are, as far as the towers'
kernels are: `order` is about memory alone.

b  samples on this rank    D  embedding width
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from amclr_scale.config.schema import Config, Momentum
from amclr_scale.config.teacher import lends_layers, lent_sides
from amclr_scale.encoders.rank_buffers import averaged_buffers
from amclr_scale.encoders.weights import saved_parts
from amclr_scale.engine.micro_batches import on_device, split
from amclr_scale.engine.random_state import RandomState
from amclr_scale.engine.schedules import averaging_decay
from amclr_scale.engine.zero.averaged_weights import AveragedWeights
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.precision import DTYPES
from amclr_scale.types import Batch, flatten

SCALE = ("logit_scale", "logit_bias")


class Teacher:
    """All ranks make it, and call everything, together.

    Args:
        settings: the section model.momentum.
        engine: DeepSpeed's, around the student.
        precision: what the student computes in.
        total_steps: of the run, for the decay's course.
        lends: which of image and text it encodes, as image_momentum and text_momentum.
        layers: whether it lends features of inner layers too, as image_momentum_layers and text_momentum_layers.

    Attributes:
        weights: the average.
        buffers: what stands in place of the student's buffers, in fp32 at least where they are floats.
    """

    def __init__(
        self,
        settings: Momentum,
        engine: Any,
        *,
        precision: str,
        total_steps: int,
        lends: Sequence[str],
        layers: bool = False,
        device: torch.device,
    ):
        self.settings, self.engine, self.total_steps, self.device = settings, engine, total_steps, device
        self.lends, self.layers = tuple(lends), layers
        self.computes_in = precision if settings.precision == "run" else settings.precision
        self.kept = () if settings.scale else SCALE
        self.weights = AveragedWeights(engine)
        self.buffers = {name: _copy(buffer) for name, buffer in self._own_buffers().items()}
        self._within = False

    @property
    def first(self) -> bool:
        """Whether it encodes a batch before the student."""
        return self.settings.order == "first"

    def _own_buffers(self) -> dict[str, Tensor]:
        return saved_parts(self.engine.module)[1]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move towards the student, who has just made this step (the first is 1)."""
        decay = averaging_decay(self.settings, (step - 0.5) / self.total_steps)
        self.weights.follow(decay)
        for name, buffer in self._own_buffers().items():
            if self.settings.buffers == "average" and buffer.is_floating_point():
                self.buffers[name].lerp_(buffer.to(self.buffers[name].dtype), 1 - decay)
            else:
                self.buffers[name].copy_(buffer)

    def begin(self) -> None:
        """Be the student as it is now."""
        self.weights.follow(0.0)
        self.buffers = {name: _copy(buffer) for name, buffer in self._own_buffers().items()}

    def tensors(self) -> Iterator[Tensor]:
        """What it keeps on this rank."""
        yield from (share.own for share in self.weights.shares)
        yield from self.buffers.values()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside it the engine is the teacher, in evaluation mode; afterwards it is the student, bit for bit."""
        if self._within:
            yield
            return
        own, training = self._own_buffers(), self.engine.training
        before = {name: buffer.clone() for name, buffer in own.items()}
        module = self.engine.module
        students = getattr(module, "computes_in", "fp32")
        self._within = True
        self.engine.eval()
        try:
            _put(own, self.buffers)
            module.computes_in = self.computes_in
            with RandomState(self.device), self.weights.in_module(DTYPES[self.computes_in], self.kept):
                yield
        finally:
            module.computes_in = students
            _put(own, before)
            self.engine.train(training)
            self._within = False

    @torch.no_grad()
    def saved(self) -> dict[str, Tensor]:
        """What `state_dict` names, on the host: the average in fp32, the student's where there is none of a weight.

        Buffers that ranks have apart are averaged over the ranks.
        """
        module = self.engine.module
        average = {id(module.get_parameter(name)): value for name, value in self.weights.whole().items()}
        for name in self.kept:
            average.pop(id(getattr(module, name)), None)
        found = {}
        for name, parameter in saved_parts(module)[0].items():
            found[name] = average[id(parameter)] if id(parameter) in average else full_fp32(parameter).cpu()
        with self.in_place():
            buffers = averaged_buffers(module)
            return found | {name: buffer.detach().to("cpu", copy=True) for name, buffer in buffers.items()}

    @torch.no_grad()
    def lend(self, batch: Batch, micro_batch_sizes: tuple[int, int]) -> dict[str, Tensor]:
        """Features of a batch, of unit length and without gradient: image_momentum and text_momentum, (b, D) each.

        Of inner layers, image_momentum_layers.0 and so on, (b, F) each.

        Args:
            batch: this rank's samples; of their views the first ones are encoded.
            micro_batch_sizes: images and texts encoded at once.
        """
        images = batch.images[:1] if "image" in self.lends else ()
        texts = batch.texts[:1] if "text" in self.lends else ()
        parts: dict[str, list[Tensor]] = {}
        micro_batches = [m for m in split(Batch(batch.ids, images, texts), *micro_batch_sizes) if m.images or m.texts]
        plain = {"tokens": False} if getattr(self.engine.module, "tokens", ()) else {}
        with self.in_place():
            for micro_batch in on_device(micro_batches, self.device):
                outputs = self.engine(micro_batch.images, micro_batch.texts, **plain)
                for side in self.lends:
                    if side in outputs:
                        layers = outputs.get(f"{side}_layers", ()) if self.layers else ()
                        lent = flatten({f"{side}_momentum": outputs[side], f"{side}_momentum_layers": tuple(layers)})
                        for name, rows in lent.items():
                            parts.setdefault(name, []).append(rows)
        return {name: torch.cat(found) for name, found in parts.items()}


def build_teacher(config: Config, engine: Any, *, total_steps: int, device: torch.device) -> Teacher | None:
    """The teacher that model.momentum asks for, if it does."""
    if config.model.momentum is None:
        return None
    return Teacher(
        config.model.momentum, engine, precision=config.execution.precision, total_steps=total_steps,
        lends=lent_sides(config), layers=lends_layers(config), device=device,
    )  # fmt: skip


def _copy(buffer: Tensor) -> Tensor:
    wide = buffer.is_floating_point() and buffer.dtype != torch.float64
    return buffer.detach().to(torch.float32 if wide else buffer.dtype, copy=True)


@torch.no_grad()
def _put(buffers: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        buffer.copy_(values[name])
