"""Floating-point operations of a model, and the share of a device's peak that they reach.

Useful operations count each sample once: a forward, and a backward of twice that. Hardware operations also count what
is done again to save memory: the second forward of the gradient cache, and recomputed activations. Utilisation is
operations per second over the device's peak for dense matrix products in the precision used (devices.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class ModelFlops:
    """Operations per sample: all of its views through both towers, forward."""

    image: int
    text: int

    def useful(self) -> float:
        """Forward and backward, once."""
        return 3.0 * (self.image + self.text)

    def hardware(self, *, second_forwards: float, recomputed_image: float, recomputed_text: float) -> float:
        """With what is done again.

        Args:
            second_forwards: share of micro-batches that the gradient cache encodes twice.
            recomputed_image, recomputed_text: share of a tower's blocks that backward runs again.
        """
        again = recomputed_image * self.image + recomputed_text * self.text
        return self.useful() + second_forwards * (self.image + self.text) + again


def count(model: nn.Module, image: tuple[Tensor, ...], text: tuple[Tensor, ...]) -> ModelFlops:
    """Count one forward of each tower by running it on a few samples.

    Args:
        image, text: views of the same n samples, as the model takes them.
    """
    samples = len(image[0])
    found = []
    training = model.training
    model.eval()  # BatchNorm's statistics and dropout's generator stay as they are
    try:
        for images, texts in ((image, ()), ((), text)):
            counter = FlopCounterMode(display=False)
            with torch.no_grad(), counter:
                model(images, texts)
            found.append(round(counter.get_total_flops() / samples))
    finally:
        model.train(training)
    return ModelFlops(*found)
