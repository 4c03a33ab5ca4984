"""Which backend computes blocks, and in which precision.

A further backend is one file with a class like `TorchBlocks` and a `Backend` that describes it, and one line in
`SIMILARITY_BACKENDS` (config/backends.py).
"""

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch import Tensor

from amclr_scale.config.backends import SIMILARITY_BACKENDS
from amclr_scale.similarity.blocks import Blocks, Workspace
from amclr_scale.similarity.precision import AT_ONCE, WIDE_PRODUCTS, Form, form_of
from amclr_scale.similarity.settings import Settings

Maker = Callable[[Settings, torch.dtype, Form, torch.device], Blocks]


@dataclass(frozen=True)
class Backend:
    """What a backend says about itself.

    Attributes:
        make: settings, the type of similarities, the form of operands, the device -> `Blocks`.
        missing: what a device lacks for it; "" if nothing.
        workspace: settings, form, device -> what it holds while it works.
        fast_narrow: whether products of 16-bit operands are faster than float32's on a device.
    """

    make: Maker
    missing: Callable[[torch.device], str]
    workspace: Callable[[Settings, Form, torch.device], Workspace]
    fast_narrow: Callable[[torch.device], bool]


def _torch(settings: Settings, dtype: torch.dtype, form: Form, device: torch.device) -> Blocks:
    from amclr_scale.similarity.torch_backend import TorchBlocks

    return TorchBlocks(settings, dtype, form, device)


def _torch_workspace(settings: Settings, form: Form, device: torch.device) -> Workspace:
    from amclr_scale.similarity.torch_backend import BUFFERS, tile_shape

    rows, columns = tile_shape(settings, device)
    return Workspace(rows, columns, BUFFERS * (8 if form == "fp64" else 4))


def _triton(settings: Settings, dtype: torch.dtype, form: Form, device: torch.device) -> Blocks:
    from amclr_scale.similarity.triton_backend import TritonBlocks

    return TritonBlocks(settings, dtype, form, device)


@lru_cache(maxsize=8)
def _triton_missing(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if device.type == "cpu":
        return "" if interpreted else "Triton has no kernels for CPUs (TRITON_INTERPRET=1 interprets them, for tests)"
    if device.type != "cuda":
        return f"Triton has no kernels for {device.type}"
    if interpreted:
        return "TRITON_INTERPRET=1 is set, which is for CPUs"
    if not WIDE_PRODUCTS:
        return f"torch {torch.__version__} has no products of 16-bit matrices with float32 results; 2.8 has"
    if not torch.cuda.is_available():
        return ""  # asked for a plan, about a machine that has one
    capability = torch.cuda.get_device_capability(device)
    return "" if capability >= (8, 0) else f"compute capability {capability[0]}.{capability[1]} is below 8.0"


def _triton_workspace(settings: Settings, form: Form, device: torch.device) -> Workspace:
    from amclr_scale.similarity.triton_tiles import span_bytes, span_shape

    rows, columns = span_shape(settings, form)
    converted = {"bf16": 2, "fp16": 4, "split": 10}.get(form, 0)  # of float32 features
    return Workspace(rows, columns, span_bytes(form), converted, AT_ONCE)


TRITON = Backend(_triton, _triton_missing, _triton_workspace, fast_narrow=lambda device: True)
TORCH = Backend(
    _torch, lambda device: "", _torch_workspace, fast_narrow=lambda device: device.type == "cuda" and WIDE_PRODUCTS
)


def described(name: str) -> Backend:
    """The backend of this name in `SIMILARITY_BACKENDS`."""
    module, attribute = SIMILARITY_BACKENDS[name].split(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)
    return backend


def chosen(settings: Settings, device: torch.device) -> str:
    """The name of the backend that `settings.backend` means on a device.

    Raises:
        ValueError: it was asked for by name and cannot work there.
    """
    name = settings.backend
    if name == "auto":
        usable = [name for name in SIMILARITY_BACKENDS if not described(name).missing(device)]
        return usable[0] if device.type == "cuda" else "torch"
    if missing := described(name).missing(device):
        raise ValueError(f"backend: expected one that works on {device}, got {name}: {missing}")
    return name


def form_in_force(settings: Settings, features: torch.dtype, device: torch.device) -> Form:
    """The form of operands for features of this type."""
    return form_of(settings, features, fast_narrow=described(chosen(settings, device)).fast_narrow(device))


def blocks_for(settings: Settings, dtype: torch.dtype, *features: Tensor | None) -> Blocks:
    """The backend for these features, of which the widest type counts; `dtype` is that of similarities."""
    given = [x for x in features if x is not None]
    device = given[0].device
    form = form_in_force(settings, reduce(torch.promote_types, (x.dtype for x in given)), device)
    return described(chosen(settings, device)).make(settings, dtype, form, device)


def workspace(settings: Settings, device: torch.device) -> Workspace:
    """What the backend in force holds while it works on float32 features."""
    form = form_in_force(settings, torch.float32, device)
    return described(chosen(settings, device)).workspace(settings, form, device)


FORMS = {
    "fp64": "float64 operands",
    "fp32": "float32 operands",
    "bf16": "bfloat16 operands",
    "fp16": "float16 operands",
    "split": "operands split in two bfloat16 each",
}


def describe(settings: Settings, device: torch.device, features: torch.dtype = torch.float32) -> str:
    """In words: the backend and the precision in force for features of this type, and why not another backend."""
    name, form = chosen(settings, device), form_in_force(settings, features, device)
    why = TRITON.missing(device) if name == "torch" and device.type == "cuda" else ""
    reason = f"; not triton: {why}" if settings.backend == "auto" and why else ""
    sums = "float64" if form == "fp64" else "float32"
    return f"{name} backend on {device.type}, {FORMS[form]}, similarities and sums {sums}{reason}"


def similarity_dtype(*features: Tensor) -> torch.dtype:
    """float32, or float64 if any of the features is float64."""
    return torch.float64 if any(x.dtype == torch.float64 for x in features) else torch.float32


def check_features(image: Tensor, text: Tensor) -> None:
    """Refuse what cannot be contrasted.

    Raises:
        ValueError: not two matrices of one shape with at least one row, of floating-point numbers, on one device.
    """
    if image.ndim != 2 or image.shape[0] == 0:
        raise ValueError(f"image: expected (b, D) with at least one row, got {tuple(image.shape)}")
    if text.shape != image.shape:
        raise ValueError(f"text: expected {tuple(image.shape)}, the shape of image, got {tuple(text.shape)}")
    for name, x in (("image", image), ("text", text)):
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected floating-point features, got {x.dtype}")
    if text.device != image.device:
        raise ValueError(f"text: expected features on {image.device}, the device of image, got {text.device}")
