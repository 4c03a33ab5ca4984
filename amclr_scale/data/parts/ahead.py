"""The next batch, put together in a thread while the present one is trained on.

Copying a large batch's parts into pinned memory takes the host a fifth of a millisecond per picture or so, and a GPU
that has finished its step would wait for it. Copies run without Python's lock, beside the thread that launches kernels.
"""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
Owner = TypeVar("Owner")
_PATIENCE = 30.0  # seconds until one that does not end is left behind


class Ahead(Generic[T]):
    """`take()` gives what `make(owner)` returned, one call ahead; an error is raised where its result would be taken.

    Args:
        owner: is not kept: when nobody else has it any more, the thread ends.
        make: called in the thread, again and again, one call after another.
    """

    def __init__(self, owner: Owner, make: Callable[[Owner], T]):
        self._owner, self._ready = weakref.ref(owner), queue.Queue[T | BaseException](1)
        self._make: Callable[[Any], T] = make
        weakref.finalize(owner, self._end)
        self._ended = threading.Event()
        self._room = threading.Semaphore(1)  # one is made while none is waiting
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._run, args=(device,), name="batches", daemon=True)
        self._thread.start()

    def take(self) -> T:
        """The next one, and the one after it is begun."""
        found = self._ready.get()
        self._room.release()
        if isinstance(found, BaseException):
            self._ready.put(found)  # nothing comes after it: who asks again is told again
            raise found
        return found

    def close(self) -> None:
        """Drop what is under way; returns when the thread has ended."""
        self._end()
        self._thread.join(_PATIENCE)

    def _end(self) -> None:
        self._ended.set()
        self._room.release()

    def _run(self, device: int | None) -> None:
        if device is not None:
            torch.cuda.set_device(device)  # a thread begins at the first one, and pinning would open a context there
        while True:
            self._room.acquire()
            owner = self._owner()
            if owner is None or self._ended.is_set():
                return
            try:
                self._ready.put(self._make(owner))
            except BaseException as error:  # told where it is waited for
                self._ready.put(error)
                return
            del owner  # not held while this waits
