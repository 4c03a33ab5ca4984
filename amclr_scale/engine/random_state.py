"""Remember where the random number generators were, and go back there: a second forward drops out the same units."""

from types import TracebackType

import torch


class RandomState:
    """State of torch's CPU generator and, on CUDA, of the device's.

    `with state:` runs its block from that state and puts the generators back where they were.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu, self.cuda = self._read()

    def _read(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None

    def _write(self, cpu: torch.Tensor, cuda: torch.Tensor | None) -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self.device)

    def __enter__(self) -> None:
        self.outside = self._read()
        self._write(self.cpu, self.cuda)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write(*self.outside)
