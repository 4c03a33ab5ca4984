"""Remember where the random number generators were, and go back there: a second forward drops out the same units."""

from types import TracebackType

import torch


class RandomState:
    """State of torch's CPU generator and, on CUDA, of the device's.

    `with state:` runs its block from that state and puts the generators back where they were.

    Args:
        device: cpu: of CUDA's current device too where the process uses one, for what is called may move its inputs.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._on_cuda = device if device.type == "cuda" else torch.device("cuda")  # the current one
        self.cpu, self.cuda = self._read()

    def _read(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        cuda = self.device.type == "cuda" or torch.cuda.is_initialized()
        return torch.get_rng_state(), torch.cuda.get_rng_state(self._on_cuda) if cuda else None

    def _write(self, cpu: torch.Tensor, cuda: torch.Tensor | None) -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self._on_cuda)

    def __enter__(self) -> None:
        self.outside = self._read()
        self._write(self.cpu, self.cuda)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write(*self.outside)
