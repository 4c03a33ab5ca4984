"""Floating-point operations of a model, and the share of a device's peak that they reach.

Useful operations count each sample once: a forward, and a backward of twice that, which a frozen tower has not; and the
forward of a teacher (`model.momentum`) whose features the objective reads.
Hardware operations also count what is done again to save memory: the second forward of the gradient cache, and
recomputed activations. Utilisation is operations per second over the device's peak for dense matrix products in the
precision used (devices.py). Attention counts its two products in full, masked or not, whichever kernel computes them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class ModelFlops:
    """Operations per sample: all of its views through both towers, forward.

    Attributes:
        image, text: of each side, with its head.
        frozen_image, frozen_text: of these, what no backward follows.
        lent: of a teacher that encodes one view of each sample, without a backward.
    """

    image: int
    text: int
    frozen_image: int = 0
    frozen_text: int = 0
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
        return self.useful() + second_forwards * (self.image + self.text) + again


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Operations of scaled dot-product attention, from the shapes (b, heads, length, width) of what it gets."""
    *batch, length, width = query
    return int(2 * torch.Size(batch).numel() * length * key[-2] * (width + value[-1]))


def flop_counter() -> FlopCounterMode:
    """Torch's counter, and the kernel of attention on CPUs that it does not know."""
    aten: Any = torch.ops.aten
    return FlopCounterMode(display=False, custom_mapping={aten._scaled_dot_product_flash_attention_for_cpu: _attention})


@contextmanager
def frozen_operations(
    model: nn.Module, side: Literal["image", "text"], counter: FlopCounterMode
) -> Iterator[Callable[[], int]]:
    """Count what no backward follows while the model encodes one side: all of it, its tower alone, or nothing.

    Args:
        model: with `image_tower`, `image_head`, `text_tower` and `text_head`.
        counter: is counting.
    """
    tower, head = (getattr(model, f"{side}_{part}") for part in ("tower", "head"))
    if _is_trained(tower):
        yield lambda: 0
        return
    if not _is_trained(head):
        yield counter.get_total_flops
        return
    found = 0

    def around(sign: int) -> Callable[..., None]:
        def add(*_: Any) -> None:
            nonlocal found
            found += sign * counter.get_total_flops()

        return add

    hooks = [tower.register_forward_pre_hook(around(-1)), tower.register_forward_hook(around(1))]
    try:
        yield lambda: found
    finally:
        for hook in hooks:
            hook.remove()


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def count(model: nn.Module, image: tuple[Tensor, ...], text: tuple[Tensor, ...]) -> ModelFlops:
    """Count one forward of each tower by running it on a few samples.

    Args:
        model: as for `frozen_operations`.
        image, text: views of the same n samples, as the model takes them.
    """
    samples = len(image[0])
    found, frozen = [], []
    training, fused = model.training, torch.backends.mha.get_fastpath_enabled()
    model.eval()  # BatchNorm's statistics and dropout's generator stay as they are
    torch.backends.mha.set_fastpath_enabled(False)  # whole layers as one kernel, which tells nothing of what is in it
    try:
        sides: list[tuple[Literal["image", "text"], Any]] = [("image", (image, ())), ("text", ((), text))]
        for side, views in sides:
            counter = flop_counter()
            with torch.no_grad(), counter, frozen_operations(model, side, counter) as of_frozen:
                model(*views)
                frozen.append(round(of_frozen() / samples))
            found.append(round(counter.get_total_flops() / samples))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        model.train(training)
    return ModelFlops(*found, *frozen)
