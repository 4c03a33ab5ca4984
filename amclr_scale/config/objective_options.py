"""The options of every objective, read from its source file without importing torch.

An objective is one file with a class `class SogCLR(Objective, name="sogclr")` and a nested dataclass `Config`. So
that adding an objective touches that one file and a configuration is still checked in milliseconds on a login node,
this module parses the files and turns each `Config` into a pydantic model.
"""

import ast
from functools import cache
from pathlib import Path
from typing import Any, Literal, Optional, Union

from pydantic import BaseModel, create_model

from amclr_scale.config.section import Checked

OBJECTIVES = Path(__file__).parent.parent / "objectives"

_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "None": None}


def _annotation(node: ast.expr) -> Any:
    """`float | None` and the like, from its syntax. Only what a YAML value can be is allowed."""
    match node:
        case ast.Name(id=name) if name in _TYPES:
            return _TYPES[name]
        case ast.Constant(value=None):
            return None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union[_annotation(left), _annotation(right)]  # noqa: UP007 - the operands are values here
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            values = choices.elts if isinstance(choices, ast.Tuple) else [choices]
            return Literal[tuple(ast.literal_eval(value) for value in values)]
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return Optional[_annotation(inner)]  # noqa: UP045 - likewise
    raise TypeError(f"{ast.unparse(node)}: an objective's Config may hold int, float, bool, str, Literal and | None")


def _options(config: ast.ClassDef) -> dict[str, tuple[Any, Any]]:
    """Field name -> (type, default or ... where there is none)."""
    return {
        line.target.id: (_annotation(line.annotation), ... if line.value is None else ast.literal_eval(line.value))
        for line in config.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


@cache
def option_models() -> dict[str, type[BaseModel]]:
    """Objective name -> a model of its options, with extra keys forbidden."""
    models: dict[str, type[BaseModel]] = {}
    for file in sorted(OBJECTIVES.glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.ClassDef):
                continue
            name = next(
                (k.value.value for k in node.keywords if k.arg == "name" and isinstance(k.value, ast.Constant)), None
            )
            if not isinstance(name, str):
                continue
            config = next((n for n in node.body if isinstance(n, ast.ClassDef) and n.name == "Config"), None)
            fields = _options(config) if config else {}
            fields.pop("num_samples", None)  # the trainer takes it from the index
            models[name] = create_model(name, __base__=Checked, **fields)  # type: ignore[call-overload]
    return models
