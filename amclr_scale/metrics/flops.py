"""Floating-point operations of a model, and the share of a device's peak that they reach.

Useful operations count each sample once: a forward, and a backward of twice that. Hardware operations also count what
is done again to save memory: the second forward of the gradient cache, and recomputed activations. Utilisation is
operations per second over the device's peak for dense matrix products in the precision used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Dense peak in FLOP/s, from the vendor's data sheets: (bf16 or fp16 with fp32 accumulation, fp32 or tf32).
PEAKS = {
    "B200": (2.25e15, 1.1e15),
    "H200": (989e12, 494e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989e12, 494e12),
    "A100": (312e12, 156e12),
    "A800": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "RTX 4090": (165e12, 82.6e12),
    "V100": (125e12, 15.7e12),
}


def device_peak(device: torch.device, precision: str) -> float | None:
    """FLOP/s of one device, None where no data sheet says (CPUs: it depends on clock and cores)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((low if precision != "fp32" else full for key, (low, full) in PEAKS.items() if key in name), None)


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
