"""Captions tokenised once: where images are features and a sample has one caption, training reads nothing else of it.

The rows lie in the cache folder and are mapped into memory, so that all ranks and workers of a machine share one copy,
and the next run with the same captions and tokenizer finds them there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from amclr_scale.data.beside.features import Features
from amclr_scale.data.beside.references import References
from amclr_scale.data.decoding import BadSampleError, Field, Sample
from amclr_scale.data.formats.npy import map_npy
from amclr_scale.data.storage import locked
from amclr_scale.data.tokenizers import Tokenizer
from amclr_scale.disk import check_room, is_full, unwritten

_AT_ONCE = 4096  # samples
_FILE = "tokens.npy"
_UNREAD = -1  # in a row's first place: the caption cannot be read


class _SeveralError(Exception):
    """A sample has several captions, of which every epoch draws one."""


class ResidentTokens:
    """`tokens(samples)` -> (n, L) int64, the rows that the tokenizer gives for their captions.

    Attributes:
        bad: (N,) bool, whose caption cannot be read.
    """

    def __init__(self, file: Path):
        self._rows: NDArray[np.int32] = map_npy(file)
        self.bad: NDArray[np.bool_] = np.asarray(self._rows[:, 0] == _UNREAD)

    def __call__(self, samples: Sequence[int] | NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._rows[samples].astype(np.int64))


def rows_of(
    ids: NDArray[np.int64], tokens: ResidentTokens, features: Features, references: Mapping[str, References]
) -> tuple[tuple[Tensor], tuple[Tensor], dict[str, Tensor]] | None:
    """Images, texts and what is given beside them, of some samples; None where one has no row in a table.

    Args:
        ids: (n,).
        tokens, features: of captions and images.
        references: by the name that objectives know them by.
    """
    if tokens.bad[ids].any() or features.bad[ids].any():
        return None  # another has to stand for it
    return (features(ids),), (tokens(ids),), {name: found(ids) for name, found in references.items()}


def open_tokens(
    cache: Path,
    name: Sequence[object],
    place: Field,
    tokenizer: Tokenizer,
    samples: int,
    read: Callable[[int], Sample],
) -> ResidentTokens | None:
    """Every sample's tokens, written first where there are none; None where a sample has several captions.

    Args:
        cache: the machine's cache folder.
        name: of the samples, and of how they are read.
        place: of the caption.
        samples: N.
        read: a sample by its id.

    Raises:
        UserError: there is no room for them.
    """
    how = [*name, str(place), tokenizer.fingerprint(), tokenizer.context_length]
    digest = hashlib.sha256(json.dumps(how).encode()).hexdigest()[:32]
    target = cache / "resident" / f"tokens-{digest}"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_dir():
        with locked(target):
            if not target.is_dir():
                _make(target, place, tokenizer, samples, read)
    return ResidentTokens(target / _FILE) if (target / _FILE).is_file() else None


def _make(target: Path, place: Field, tokenizer: Tokenizer, samples: int, read: Callable[[int], Sample]) -> None:
    """The folder with the rows; empty where a sample has several captions. All of it, or nothing."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write(partial / _FILE, place, tokenizer, samples, read)
    except _SeveralError:
        (partial / _FILE).unlink()
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not is_full(error):
            raise
        raise unwritten(error, "data.cache", target.parent, ", or data.resident to none") from error
    partial.replace(target)


def _write(file: Path, place: Field, tokenizer: Tokenizer, samples: int, read: Callable[[int], Sample]) -> None:
    """The rows as a .npy file. Not through a map: a disk that fills up under one ends the process without a word."""
    shape, told = (samples, tokenizer.context_length), Console(stderr=True)
    with file.open("wb") as out:
        header = {"descr": "<i4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)  # type: ignore[no-untyped-call]
        for first in track(range(0, samples, _AT_ONCE), "Tokenising", console=told, transient=True):
            part = np.full((min(_AT_ONCE, samples - first), shape[1]), _UNREAD, "<i4")
            ids, captions = list[int](), list[str]()
            for sample in range(first, first + len(part)):
                try:
                    found = read(sample).captions(place)
                except BadSampleError:
                    continue
                if len(found) > 1:
                    raise _SeveralError
                ids.append(sample - first)
                captions.append(found[0])
            part[ids] = tokenizer(captions).numpy()
            if not first:  # by now they are likely to have one caption each
                check_room(file.parent, part.itemsize * samples * shape[1], f"the tokens of {samples:,} captions")
            out.write(part.data)
        out.flush()
        os.fsync(out.fileno())
