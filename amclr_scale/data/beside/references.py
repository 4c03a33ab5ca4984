"""Features of a frozen model beside a data set: NAME.npy, a row for every sample in the order of ids.

    amclr-scale embed MODEL --shards DATA --side image --out NAME.npy

writes one, and beside it a NAME.npy.json that says of which samples. Files are mapped: processes of a machine share
the pages that they read, and nothing else is held.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amclr_scale.config import schema
from amclr_scale.data.formats.npy import map_npy
from amclr_scale.data.index import Index
from amclr_scale.errors import AbsentDataError, UserError

SIDES = ("image", "text")
_SMALL = 2**24  # bytes of a file whose rows all count in its digest
_ROWS = 256  # of a larger one
FINGERPRINT = "samples"  # in NAME.npy.json: `Index.fingerprint` of what was embedded


class References:
    """`references(samples)` -> (n, R) float32, their rows.

    Args:
        key: of the configuration that names the files.
        files: one for each data set of `data.train`, or one for all of them.
        index: of the samples.

    Raises:
        UserError: a file cannot be read, is of other samples, or does not have a row for each.
    """

    writes = "amclr-scale embed MODEL --shards writes them"
    kinds = "f"  # of numpy's types

    def __init__(self, key: str, files: str | Sequence[str], index: Index):
        self.key, self.index = key, index
        names = [files] if isinstance(files, str) else list(files)
        parts = [len(index.shards)] if len(names) == 1 else index.parts
        if len(names) != len(parts):
            raise UserError(
                f"{key}: expected one file, or one for each of {len(parts)} in data.train, got {len(names)}"
            )
        self.files = [Path(name).expanduser() for name in names]
        self.tables = [open_table(key, file, self.kinds, self.writes) for file in self.files]
        if len({table.shape[1] for table in self.tables}) > 1:
            widths = ", ".join(f"{file}: {table.shape[1]}" for file, table in zip(self.files, self.tables, strict=True))
            raise UserError(f"{key}: expected files of one width, got {widths}")
        shards = np.concatenate([[0], np.cumsum(parts)])
        self._first: list[int] = index.first_id[shards].tolist()
        for place, file in enumerate(self.files):
            self._check(place, file, slice(int(shards[place]), int(shards[place + 1])))

    def _check(self, place: int, file: Path, shards: slice) -> None:
        """That a file is of these shards' samples, all of them."""
        expected, found = self._first[place + 1] - self._first[place], len(self.tables[place])
        of = fingerprint_of(file)
        if of is not None and of != self.index.fingerprint_of(shards):
            raise UserError(
                f"{self.key}: {file}: expected rows of the samples in data.train, got those of another data set "
                f"({found:,} rows, fingerprint {of}); {self.writes}"
            )
        if found < expected:
            raise UserError(
                f"{self.key}: {file}: expected {expected:,} rows, one for each sample in the order of ids, got "
                f"{found:,}: sample {self._named(self._first[place] + found)} has none; {self.writes}"
            )
        if found > expected:
            raise UserError(
                f"{self.key}: {file}: expected {expected:,} rows, one for each sample in the order of ids, got "
                f"{found:,}; is this of the same data set?"
            )

    def __call__(self, samples: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Rows of some samples.

        Raises:
            UserError: one of them holds no numbers.
        """
        rows = np.empty((len(samples), self.tables[0].shape[1]), np.float32)
        for i, sample in enumerate(samples):
            place = sum(first <= sample for first in self._first[1:])
            rows[i] = self.tables[place][sample - self._first[place]]
        bad = ~np.isfinite(rows).all(1)
        if bad.any():
            sample = int(samples[int(bad.argmax())])
            place = sum(first <= sample for first in self._first[1:])
            raise UserError(
                f"{self.key}: {self.files[place]}: expected finite numbers for sample {self._named(sample)}, got "
                "others; embed the data set again"
            )
        return torch.from_numpy(rows)

    def digest(self) -> str:
        """8 hex digits of the content: of all rows of a small file, of some all over a larger one, and of its shape."""
        found = hashlib.sha256()
        for table in self.tables:
            n = len(table)
            whole = table.nbytes <= _SMALL or n <= _ROWS
            rows = table[np.linspace(0, n - 1, n if whole else _ROWS).round().astype(np.int64)]
            found.update(f"{table.shape} {table.dtype.str} ".encode() + rows.tobytes())
        return found.hexdigest()[:8]

    def _named(self, sample: int) -> str:
        shard, row = self.index.locate(sample)
        reader = self.index.reader(shard)
        return f"{sample} ({reader.key(row)} of {reader.url})"


def open_references(data: schema.Data, index: Index) -> dict[str, References]:
    """The references that a recipe names, by the name that objectives know them by."""
    named = {f"{side}_reference": getattr(data, f"{side}_reference") for side in SIDES}
    return {name: References(f"data.{name}", files, index) for name, files in named.items() if files}


def open_table(key: str, file: Path, kinds: str = "f", writes: str = References.writes) -> NDArray[Any]:
    """A file's rows, mapped: (n, R) of floating-point numbers.

    Args:
        kinds: of numpy's types that they may have.
        writes: which command does.

    Raises:
        UserError: it is no such file.
    """
    try:
        table = map_npy(file)
    except (OSError, ValueError) as error:
        kind = AbsentDataError if isinstance(error, FileNotFoundError) else UserError
        raise kind(f"{key}: {file}: expected a .npy file, got: {error}; {writes}") from error
    if not isinstance(table, np.memmap) or table.ndim != 2 or table.dtype.kind not in kinds or not table.shape[1]:
        form = f"{getattr(table, 'dtype', type(table).__name__)} of shape {getattr(table, 'shape', '?')}"
        raise UserError(f"{key}: {file}: expected rows of floating-point numbers, (samples, width), got {form}")
    return table


def fingerprint_of(file: Path) -> str | None:
    """Of the samples that a file is of, where what is beside it says so."""
    try:
        about = json.loads(file.with_name(f"{file.name}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    found = about.get(FINGERPRINT) if isinstance(about, dict) else None
    return found if isinstance(found, str) else None


def reference_widths(data: schema.Data) -> tuple[dict[str, int], list[str]]:
    """R of each reference that a recipe names, and those of which it is not known, as the file is not here."""
    widths, unknown = dict[str, int](), list[str]()
    for side in SIDES:
        name = f"{side}_reference"
        files = getattr(data, name)
        if not files:
            continue
        file = Path(files if isinstance(files, str) else files[0]).expanduser()
        if file.is_file():
            widths[name] = open_table(f"data.{name}", file).shape[1]
        else:
            unknown.append(name)
    return widths, unknown
