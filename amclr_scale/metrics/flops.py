"""Floating-point operations of a model, and the share of a device's peak that they reach.

Useful operations count each sample once: a forward, and a backward of twice that, which what is frozen has not; and the
forward of a teacher (`model.momentum`) whose features the objective reads.
Hardware operations also count what is done again to save memory: the second forward of the gradient cache, and
recomputed activations. Utilisation is operations per second over the device's peak for dense matrix products in the
precision used (devices.py). Attention counts its two products in full, masked or not, whichever kernel computes them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class ModelFlops:
    """Operations per sample: all of its views through both towers, forward.

    Attributes:
        image, text: of each side, with its head.
        frozen_image, frozen_text: of these, what no backward follows.
        once_image, once_text: of these, what no second pass of the gradient cache repeats.
        lent: of a teacher that encodes one view of each sample, without a backward.
    """

    image: int
    text: int
    frozen_image: int = 0
    frozen_text: int = 0
    once_image: int = 0
    once_text: int = 0
    lent: int = 0

    def useful(self) -> float:
        """Forward and backward, once."""
        return 3.0 * (self.image + self.text) - 2.0 * (self.frozen_image + self.frozen_text) + self.lent

    def hardware(self, *, second_forwards: float, recomputed_image: float, recomputed_text: float) -> float:
        """With what is done again.

        Args:
            second_forwards: share of micro-batches that the gradient cache encodes twice.
            recomputed_image, recomputed_text: share of a tower's blocks that backward runs again.
        """
        again = recomputed_image * (self.image - self.frozen_image) + recomputed_text * (self.text - self.frozen_text)
        twice = self.image - self.once_image + self.text - self.once_text
        return self.useful() + second_forwards * twice + again


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Operations of scaled dot-product attention, from the shapes (b, heads, length, width) of what it gets."""
    *batch, length, width = query
    return int(2 * torch.Size(batch).numel() * length * key[-2] * (width + value[-1]))


def flop_counter() -> "FlopCounterMode":
    """Torch's counter, and the kernel of attention on CPUs that it does not know."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which takes half a second

    aten: Any = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={aten._scaled_dot_product_flash_attention_for_cpu: _attention})


@dataclass
class Frozen:
    """Operations of one side.

    Attributes:
        no_backward: before the first module that is trained; all, where none is.
        once: of a tower that is frozen as a whole, which no second pass repeats.
    """

    no_backward: int = 0
    once: int = 0


@contextmanager
def frozen_operations(model: nn.Module, side: Literal["image", "text"], counter: "FlopCounterMode") -> Iterator[Frozen]:
    """Count what no backward follows while the model encodes one side; known afterwards.

    Args:
        model: with `image_tower`, `image_head`, `text_tower` and `text_head`.
        counter: is counting.
    """
    tower, head = (getattr(model, f"{side}_{part}") for part in ("tower", "head"))
    found, begun = Frozen(), False

    def begin(*_: Any) -> None:
        nonlocal begun
        if not begun:
            begun, found.no_backward = True, counter.get_total_flops()

    def leave(*_: Any) -> None:
        found.once = counter.get_total_flops()

    trained = [m for part in (tower, head) for m in part.modules() if _has_trained(m)]
    hooks = [module.register_forward_pre_hook(begin) for module in trained]
    if not any(p.requires_grad for p in tower.parameters()):
        hooks.append(tower.register_forward_hook(leave))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    if not trained:
        found.no_backward = counter.get_total_flops()


def _has_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def count(model: nn.Module, image: tuple[Tensor, ...], text: tuple[Tensor, ...]) -> ModelFlops:
    """Count one forward of each tower by running it on a few samples.

    Args:
        model: as for `frozen_operations`.
        image, text: views of the same n samples, as the model takes them.
    """
    samples = len(image[0])
    found, frozen, once = [], [], []
    training, fused = model.training, torch.backends.mha.get_fastpath_enabled()
    thinned = [m for m in model.modules() if type(m).__name__ == "PatchDropout" and m.training]
    model.eval()  # BatchNorm's statistics and dropout's generator stay as they are
    for module in thinned:  # what it drops is not computed
        module.train()
    torch.backends.mha.set_fastpath_enabled(False)  # whole layers as one kernel, which tells nothing of what is in it
    try:
        sides: list[tuple[Literal["image", "text"], Any]] = [("image", (image, ())), ("text", ((), text))]
        for side, views in sides:
            counter = flop_counter()
            with (
                torch.random.fork_rng(devices=[]),
                torch.no_grad(),
                counter,
                frozen_operations(model, side, counter) as of_frozen,
            ):
                model(*views)
            frozen.append(round(of_frozen.no_backward / samples))
            once.append(round(of_frozen.once / samples))
            found.append(round(counter.get_total_flops() / samples))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        model.train(training)
    return ModelFlops(*found, *frozen, *once)
