"""A machine with an accelerator, pretended: what CUDA refuses is refused, and what it computes the CPU computes.

    with accelerator():
        x = torch.randn(4, 3).to(DEVICE)      # lies on the device; operations give what the CPU gives, bit for bit
        x + torch.ones(3)                     # MisplacedError: a tensor of the host meets one of the device
        dist.all_reduce(torch.ones(3))        # MisplacedError: NCCL takes tensors of the device only
        x.cpu(), x.to("cuda"), x[[0, 1]]      # as on CUDA

A device tensor is a wrapper that says `meta` when asked where it is (the only device beside the CPU that autograd of a
CPU build of torch knows), around a CPU tensor that holds the numbers. `cuda` is understood as another name for it. The
rules are those of CUDA: operations take tensors of one device, but for copies, host scalars without dimensions in
element-wise operations, and host indices into device tensors.

It does not see what asks for the type `cuda` by name: kernels for CUDA only, pinned memory, streams, generators.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from amclr_scale.distributed import collectives

CPU, DEVICE = torch.device("cpu"), torch.device("meta")

COPIES = {"copy_", "_to_copy"}
# Operations that are not element-wise and still take a host scalar without dimensions beside device tensors.
SCALARS = {"index_put", "index_put_", "_index_put_impl_", "masked_fill", "masked_fill_", "fill_", "where"}
MADE_ON_THE_HOST = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray)
COLLECTIVES = ("all_reduce", "broadcast", "all_to_all_single", "all_gather", "reduce", "scatter", "send", "recv")
SINGLE = ("_all_gather_single", "_reduce_scatter_single")


class MisplacedError(AssertionError):
    """What CUDA or NCCL would have refused."""


class OnDevice(Tensor):
    """A tensor of the device. `on_host` holds its numbers."""

    on_host: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        made.on_host = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.on_host!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for x in args:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, tuple | list):
            found += _tensors(x)
    return found


def _inner(x: Any) -> Any:
    if isinstance(x, OnDevice):
        return x.on_host
    return type(x)(map(_inner, x)) if type(x) in (tuple, list) else x


def _wrapped(x: Any) -> Any:
    if isinstance(x, Tensor):
        return OnDevice(x)
    return type(x)(map(_wrapped, x)) if type(x) in (tuple, list) else x


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    wanted = kwargs.get("device")
    tensors = _tensors((*args, *kwargs.values()))
    theirs = [x for x in tensors if not isinstance(x, OnDevice)]
    involved, name = len(theirs) < len(tensors), func.overloadpacket.__name__
    if involved and theirs and name not in COPIES:
        _check(func, name, args, theirs)
    to_device = involved if wanted is None else torch.device(wanted).type == DEVICE.type
    if not involved and not to_device:
        return func(*args, **kwargs)
    plain = {key: _inner(value) for key, value in kwargs.items()}
    if wanted is not None:
        plain["device"] = CPU
    out = func(*_inner(args), **plain)
    if name == "copy_":
        return args[0]
    out = _wrapped(out) if to_device else out
    return return_and_correct_aliasing(func, args, kwargs, out) if involved else out


def _check(func: Any, name: str, args: Any, theirs: list[Tensor]) -> None:
    if name in ("index", "index_put", "index_put_", "_index_put_impl_") and isinstance(args[0], OnDevice):
        theirs = [x for x in args[2:] if isinstance(x, Tensor) and not isinstance(x, OnDevice)]
    if torch.Tag.pointwise in func.tags or name in SCALARS:
        theirs = [x for x in theirs if x.dim() > 0]
    if theirs:
        shapes = [tuple(x.shape) for x in theirs]
        raise MisplacedError(f"{func}: tensors of the host, of shapes {shapes}, meet tensors of the device")


class _Operations(TorchDispatchMode):
    """Sees what makes tensors on the device out of nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Names(TorchFunctionMode):
    """`cuda` is a name of the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tuple(map(_renamed, args)), {key: _renamed(value) for key, value in (kwargs or {}).items()}
        device = kwargs.get("device")
        if func in MADE_ON_THE_HOST and device is not None and torch.device(device).type == DEVICE.type:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is Tensor.cuda:
            return args[0].to(DEVICE)
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(DEVICE)
        if func is Tensor.tolist and isinstance(args[0], OnDevice):
            return args[0].on_host.tolist()
        if func in (Tensor.numpy, Tensor.__array__) and isinstance(args[0], OnDevice):
            raise MisplacedError("numpy: can't convert a device tensor; use .cpu() first")
        return func(*args, **kwargs)


def _renamed(x: Any) -> Any:
    if isinstance(x, torch.device) and x.type == "cuda":
        return DEVICE
    return DEVICE if isinstance(x, str) and x.partition(":")[0] == "cuda" else x


def _on_device_only(name: str, plain: Callable[..., Any], sent: set[str]) -> Callable[..., Any]:
    """A collective that takes tensors of the device, and sends what is in them."""

    def run(*args: Any, **kwargs: Any) -> Any:
        for x in _tensors((*args, *kwargs.values())):
            if not isinstance(x, OnDevice):
                raise MisplacedError(f"{name}: NCCL has no tensors of the host, got one of shape {tuple(x.shape)}")
        sent.add(name)
        return plain(*_inner(args), **{key: _inner(value) for key, value in kwargs.items()})

    return run


def _ring(plain: Callable[..., Any], sent: set[str]) -> Callable[..., Any]:
    def run(steps: list[Any]) -> Any:
        for step in steps:
            if not isinstance(step.tensor, OnDevice):
                raise MisplacedError(f"isend, irecv: NCCL has no tensors of the host, got {tuple(step.tensor.shape)}")
        sent.add("batch_isend_irecv")
        return plain([dist.P2POp(step.op, step.tensor.on_host, step.peer, step.group) for step in steps])

    return run


@contextmanager
def accelerator() -> Iterator[set[str]]:
    """A device beside the CPU, and NCCL's rules for what crosses ranks. Gives the names of the collectives used."""
    sent: set[str] = set()
    with ExitStack() as stack:
        for name in COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, _on_device_only(name, getattr(dist, name), sent)))
        for name in SINGLE:
            patched = _on_device_only(name, getattr(collectives, name), sent)
            stack.enter_context(mock.patch.object(collectives, name, patched))
        ring = _ring(dist.batch_isend_irecv, sent)
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", ring))
        stack.enter_context(mock.patch.object(dist, "get_backend", return_value="nccl"))
        plain = torch.autocast

        def cast(device_type: str, **how: Any) -> Any:
            return plain("cpu" if device_type == DEVICE.type else device_type, **how)

        stack.enter_context(mock.patch.object(torch, "autocast", cast))
        stack.enter_context(_Names())
        stack.enter_context(_Operations())
        yield sent
