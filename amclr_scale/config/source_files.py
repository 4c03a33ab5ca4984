"""Objectives in files of their own, as a configuration names them. Imports nothing but Python's own modules."""

import hashlib
from pathlib import Path

from amclr_scale.errors import UserError

NOT_OPTIONS = ("name", "module", "module_sha256")  # keys of the section that say which objective it is


def source_of(path: Path) -> str:
    """The text of such a file.

    Raises:
        UserError: it cannot be read.
    """
    if not path.is_file():
        raise UserError(f"objective.module: expected a Python file, got {path}, which does not exist")
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"objective.module: {path} cannot be read: {error}") from error


def digest(text: str) -> str:
    """What a file's content is known by in `objective.module_sha256`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
