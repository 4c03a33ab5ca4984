"""Where the seconds of a step go: host clocks on CPU, events on CUDA, so that measuring never waits for the device.

A step's phases: `data`, `pass_1`, `objective`, `pass_2`, `reduce` (gradients between ranks at ZeRO stages 1 to 3; at
stage 0 they meet during pass_2), `optimizer`; and `teacher`, of one that lends features, before `pass_1` or after it.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class Phases:
    """Named stretches of time. `with phases("objective"): ...`, then `seconds()` once in a while.

    Attributes:
        current: the name of the stretch that began last, for error messages.
        observe: entered around each stretch with its name, while somebody looks at more than seconds; None: nobody.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.observe: Callable[[str], AbstractContextManager[None]] | None = None
        self.current = ""
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str, *, host: bool = False) -> Iterator[None]:
        """Time a block. `host`: by the host's clock even on CUDA (waiting for data is the host's time)."""
        self.current = name
        with self.observe(name) if self.observe else nullcontext():
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
