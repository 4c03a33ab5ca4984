"""Make `import torchvision` work beside a torch that it was not built for.

A torchvision wheel built for CUDA does not load its C++ library beside a CPU-only torch. Its Python code then
registers shape functions for operators that nobody has defined, and the import ends in
"operator torchvision::nms does not exist". Transforms and models need none of these operators, so defining
their schemas is enough: calling one still raises, importing does not. Where torchvision is whole this does nothing.
"""

import importlib
from types import ModuleType
from typing import Any

import torch

# The operators whose shape functions torchvision registers while it is imported.
SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

_definitions: list[torch.library.Library] = []  # a Library that is collected takes its schemas with it


def import_torchvision() -> ModuleType:
    """`import torchvision`, mended if need be. Call it before importing timm, open_clip or transformers' image parts.

    Raises:
        ImportError: torchvision is not installed, or is broken in another way.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise ImportError(f"torchvision: cannot be imported beside torch {torch.__version__}: {error}") from error
    untyped: Any = torch.library.Library
    library = untyped("torchvision", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _definitions.append(library)
    return importlib.import_module("torchvision")
