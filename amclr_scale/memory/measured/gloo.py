"""A tracker of a running job on a CPU, which waits until gloo's own threads have let go of what they exchanged.

Gloo works in threads of its own. Each holds the tensors of an exchange until it looks for the next one, so for a moment
after `wait` has returned; if that is the last reference, it needs Python's lock to drop it, and gets that when the main
thread pauses. So whether a buffer counts when the next one is made would depend on luck, by a whole exchange.

While somebody looks, each collective is therefore waited for where it is called, until these threads sleep again. The
order of collectives is the same on every rank and stays as it was, so nothing can wait for ever and no number changes.
Sends and receives are left alone: two ranks that both wait for their send would wait for ever.
"""

import os
import time
from typing import Any

import torch
from torch.distributed import Work

from amclr_scale.memory.tracker import Tracker

THREADS, NAME = "/proc/self/task", b"pt_gloo_runloop"  # PyTorch's name of them
TURNS, TURN, PATIENCE = 2, 0.0002, 0.5  # looks at which all sleep; seconds between two, and at the most
_ONE_SIDED = ("send", "recv_", "recv_any_source_")


class WaitingTracker(Tracker):
    """A `Tracker` for CPU tensors of which other ranks get some."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, count, and if it is a collective, wait for all of it."""
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace == "c10d" and func._schema.name.removeprefix("c10d::") not in _ONE_SIDED:
            for part in out if isinstance(out, tuple | list) else (out,):
                if isinstance(part, torch.ScriptObject):
                    Work.unbox(part).wait()
            until_asleep()
        return out


def until_asleep() -> None:
    """Give gloo's threads the time and Python's lock, until they have nothing left to do (Linux; elsewhere a pause)."""
    if not os.path.isdir(THREADS):
        time.sleep(10 * TURN)
        return
    asleep, end = 0, time.monotonic() + PATIENCE
    while asleep < TURNS and time.monotonic() < end:
        time.sleep(TURN)
        asleep = 0 if any(map(_runs, os.listdir(THREADS))) else asleep + 1


def _runs(thread: str) -> bool:
    """Whether this is one of gloo's threads, and at work."""
    try:
        with open(f"{THREADS}/{thread}/stat", "rb") as file:
            name, _, rest = file.read().partition(b"(")[2].rpartition(b")")
    except OSError:  # it has ended
        return False
    return name == NAME and rest.split(maxsplit=1)[0] == b"R"
