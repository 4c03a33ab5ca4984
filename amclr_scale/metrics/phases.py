"""Where the seconds of a step go: host clocks on CPU, events on CUDA, so that measuring never waits for the device."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Named stretches of time. `with phases("objective"): ...`, then `seconds()` once in a while.

    Attributes:
        current: the name of the stretch that began last, for error messages.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.current = ""
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str, *, host: bool = False) -> Iterator[None]:
        """Time a block. `host`: by the host's clock even on CUDA (waiting for data is the host's time)."""
        self.current = name
        if not self.cuda or host:
            begin = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begin
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))

    def seconds(self) -> dict[str, float]:
        """Seconds per name since the last call; on CUDA this waits for the device."""
        for name, first, last in self._events:
            last.synchronize()
            self._seconds[name] += first.elapsed_time(last) / 1000
        taken, self._seconds, self._events = dict(self._seconds), defaultdict(float), []
        return taken
