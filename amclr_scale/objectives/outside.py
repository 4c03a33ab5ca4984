"""Objectives in files outside the package, which a configuration names by `objective.module`.

A file is known by its content: the copy in a run folder is the same module as the file that it was copied from.
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path

from amclr_scale.config.source_files import digest, source_of
from amclr_scale.errors import UserError
from amclr_scale.objectives.base import OUTSIDE, Objective


def outside(path: str | Path, name: str, sha256: str | None = None) -> type[Objective]:
    """The objective called `name` in a Python file, which is imported.

    Args:
        sha256: what the file was when the configuration was read (its `digest`); None: it does not matter.

    Raises:
        UserError: the file is another by now, cannot be imported, or has no such objective.
    """
    text = source_of(Path(path))
    if sha256 not in (None, digest(text)):
        raise UserError(f"objective.module: {path} has changed since the configuration was read; start again")
    found = _objectives(str(path), digest(text))
    if name not in found:
        raise UserError(f"objective.name: {path} has no objective {name!r}; it has {', '.join(found) or 'none'}")
    return found[name]


@cache
def _objectives(path: str, content: str) -> dict[str, type[Objective]]:
    module_name = OUTSIDE + content
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise UserError(f"objective.module: expected a Python file (.py), got {path}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # where a dataclass looks up the names in its annotations
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise UserError(f"objective.module: {path} cannot be imported: {type(error).__name__}: {error}") from error
    classes = [one for one in vars(sys.modules[module_name]).values() if isinstance(one, type)]
    ours = [one for one in classes if issubclass(one, Objective) and one.__module__ == module_name]
    return {one.name: one for one in ours if "name" in vars(one)}
