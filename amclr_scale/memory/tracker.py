"""Every tensor's memory, from its first operation to its last reference: on CPU, and on tensors without memory.

A `TorchDispatchMode` sees each operation below autograd, in forward, in backward and in DeepSpeed's hooks alike. The
storages of what it returns are counted once, however many views there are, and a weak reference to each says when it is
gone. So the same class predicts (meta tensors, `towers.py`) and measures (CPU tensors, `measure.py`).

It cannot see scratch memory inside a kernel (matrix products, convolutions), Python objects, other threads and worker
processes. It costs some 10 to 30 microseconds per operation on a CPU.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class _Held:
    """What is known of a living storage."""

    label: str
    size: int
    reference: weakref.ref[Any]


class Tracker(TorchDispatchMode):
    """`with Tracker("cpu") as tracker: ...` counts what lives on a device.

    Args:
        device: type of device whose storages count.
        on_change: called after each change with (signed bytes, identity of the storage).

    Attributes:
        label: what new storages are counted as, until it is set to something else; those that were there before the
            tracker saw them are `FOUND`.
        live: bytes by label, now.
        peak: the largest total since `reset_peak`.
        at_peak: bytes by label at that moment.
    """

    FOUND = "found"

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and torch's guard against it takes longer than counting

    def __init__(self, device: str = "cpu", on_change: Callable[[int, int], None] | None = None):
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.on_change = device, on_change
        self.label = "new"
        self.live: Counter[str] = Counter()
        self.total = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self._held: dict[int, _Held] = {}

    def reset_peak(self) -> None:
        """Forget the peak: it is now what is alive."""
        self.peak, self.at_peak = self.total, dict(self.live)

    def add(self, tensors: Iterable[Tensor], label: str) -> None:
        """Count these tensors' storages as `label`, also those that are counted as something else."""
        for tensor in tensors:
            storage = self._storage(tensor)
            if storage is None:
                continue
            held = self._held.get(storage._cdata)
            if held is None:
                self._begin(storage, label)
            elif held.label != label:
                self.live[held.label] -= held.size
                self.live[label] += held.size
                held.label = label
        self._mark()

    def size_of(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of these tensors' storages, each once."""
        found = {s._cdata: s.nbytes() for t in tensors if (s := self._storage(t)) is not None}
        return sum(found.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it was given and what it made."""
        self._each(args, self.FOUND)
        if kwargs:
            self._each(kwargs.values(), self.FOUND)
        out = func(*args, **(kwargs or {}))
        self._each((out,), self.label)
        self._mark()
        return out

    def _each(self, values: Iterable[Any], label: str) -> None:
        for value in values:
            if isinstance(value, Tensor):
                storage = self._storage(value)
                if storage is None:
                    continue
                held = self._held.get(storage._cdata)
                if held is None:
                    self._begin(storage, label)
                elif held.size != (size := storage.nbytes()):  # resized in place, as by out=
                    self._change(held.label, size - held.size, storage._cdata)
                    held.size = size
            elif isinstance(value, tuple | list):
                self._each(value, label)
            elif isinstance(value, dict):
                self._each(value.values(), label)

    def _storage(self, tensor: Tensor) -> Any:
        if tensor.device.type != self.device or tensor.layout is not torch.strided:
            return None
        return tensor.untyped_storage()

    def _begin(self, storage: Any, label: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._held[key] = _Held(label, size, weakref.ref(storage, lambda _: self._end(key)))
        self._change(label, size, key)

    def _end(self, key: int) -> None:
        held = self._held.pop(key)
        self._change(held.label, -held.size, key)

    def _change(self, label: str, size: int, key: int) -> None:
        self.live[label] += size
        self.total += size
        if self.on_change is not None:
            self.on_change(size, key)

    def _mark(self) -> None:
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.live)
