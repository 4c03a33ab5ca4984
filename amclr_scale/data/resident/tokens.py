"""Captions tokenised once: where images are features, training reads nothing else of a sample, and opens no shard.

The rows lie in the cache folder and are mapped into memory, so that all ranks and workers of a machine share one copy,
and the next run with the same captions and tokenizer finds them there. Which captions the views of a sample show is
drawn as `TextViews` draws it, for all samples at once.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from amclr_scale.data.beside.features import Features
from amclr_scale.data.beside.references import References
from amclr_scale.data.decoding import BadSampleError, Sample
from amclr_scale.data.order import Visits
from amclr_scale.data.randomness import ManyDraws, Purpose
from amclr_scale.data.resident.groups import Groups
from amclr_scale.data.storage import locked
from amclr_scale.data.text_views import TextViews
from amclr_scale.data.tokenizers import Tokenizer
from amclr_scale.disk import check_room, is_full, unwritten

_AT_ONCE = 4096  # samples
_TOKENS, _ROWS, _BOUNDS = "tokens", "rows", "bounds"
_KINDS = {_TOKENS: "<i4", _ROWS: "<i8", _BOUNDS: "<i8"}


class ResidentTokens:
    """`tokens(visits, seed)` -> 1 + V of (n, L) int64: what the tokenizer gives for the captions of each view.

    Args:
        folder: that `open_tokens` has found or written. `tokens` has a row for each caption; `rows` is which of them
            each place of a sample has, sample after sample, equal for equal captions of a sample; `bounds`, 1 + N P,
            where the captions of each of the P places begin and end.
        text: which captions the views show.
        length: L.

    Attributes:
        bad: (N,) bool, whose captions cannot be read.
    """

    def __init__(self, folder: Path, text: TextViews, length: int):
        self._tokens = _mapped(folder / _TOKENS).reshape(-1, length)
        self._rows, self._bounds = _mapped(folder / _ROWS), _mapped(folder / _BOUNDS)
        self._base, self._places, self._views = len(text.base), len(text.base) + len(text.further), text.views
        ends = self._bounds[:: self._places]
        self.bad: NDArray[np.bool_] = ends[1:] == ends[:-1]
        self._one_each = len(self._rows) == int((~self.bad).sum())

    def __call__(self, visits: Visits, seed: int) -> tuple[Tensor, ...]:
        if self._one_each:
            rows = [self._rows[self._bounds[visits.ids * self._places]]] * (1 + self._views)
        else:
            rows = self._drawn(visits, seed)
        return tuple(torch.from_numpy(self._tokens[each].astype(np.int64)) for each in rows)

    def _drawn(self, visits: Visits, seed: int) -> list[NDArray[np.int64]]:
        """Rows of the base captions, then of further ones: different from all before it as long as there are such."""
        n, base = np.arange(len(visits)), self._base
        bounds = self._bounds[visits.ids[:, None] * self._places + np.arange(self._places + 1)]
        each = np.diff(bounds, axis=1)
        draws = ManyDraws(seed, Purpose.TEXT, visits.passes, visits.ids, 0)
        there = each[:, :base] > 0
        several = there.sum(1) > 1  # of them a place is drawn first
        place = _position(there, np.where(several, draws.below(there.sum(1)), 0))
        chosen = [self._rows[bounds[n, place] + draws.below(each[n, place], 1 + several)]]
        if not self._views:
            return chosen
        none = bounds[:, base] == bounds[:, -1]
        first = np.where(none, bounds[n, place], bounds[:, base])
        count = np.where(none, bounds[n, place + 1], bounds[:, -1]) - first
        columns = np.arange(count.max())
        there = columns < count[:, None]
        every = self._rows[np.where(there, first[:, None] + columns, first[:, None])]
        for view in range(1, 1 + self._views):
            fresh = there & np.all([every != earlier[:, None] for earlier in chosen], axis=0)
            fresh = np.where(fresh.any(1, keepdims=True), fresh, there)
            draws = ManyDraws(seed, Purpose.TEXT, visits.passes, visits.ids, view)
            chosen.append(every[n, _position(fresh, draws.below(fresh.sum(1)))])
        return chosen


def _position(mask: NDArray[np.bool_], number: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each row, where the `number`-th is that holds, from 0."""
    found: NDArray[np.int64] = (mask.cumsum(1) > number[:, None]).argmax(1)
    return found


def _mapped(file: Path) -> NDArray[np.int64]:
    kind = _KINDS[file.name]
    return np.asarray(np.memmap(file, kind, "r")) if file.stat().st_size else np.empty(0, kind)


def rows_of(
    visits: Visits,
    seed: int,
    tokens: ResidentTokens,
    features: Features,
    groups: Groups | None,
    further: int,
    references: Mapping[str, References],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], dict[str, Tensor]] | None:
    """Images, texts and what is given beside them, of some samples; None where one has no row in a table.

    Args:
        seed: of the run.
        tokens, features: of captions and images.
        groups: whose pictures further views show.
        further: image views.
        references: by the name that objectives know them by.
    """
    ids = visits.ids
    if tokens.bad[ids].any() or features.bad[ids].any():
        return None  # another has to stand for it
    sources = groups.all_sources(ids, further, seed, visits.passes) if groups else [ids]
    given = {name: found(ids) for name, found in references.items()}
    return tuple(features(each) for each in sources), tokens(visits, seed), given


def open_tokens(
    cache: Path,
    name: Sequence[object],
    text: TextViews,
    tokenizer: Tokenizer,
    samples: int,
    read: Callable[[int], Sample],
) -> ResidentTokens:
    """Every sample's tokens, written first where there are none; of several processes one does it.

    Args:
        cache: the machine's cache folder.
        name: of the samples, and of how they are read.
        text: which captions the views show.
        tokenizer: what rows come from.
        samples: N.
        read: a sample by its id.

    Raises:
        UserError: there is no room for them.
    """
    places = [[str(place) for place in found] for found in (text.base, text.further)]
    how = [*name, places, tokenizer.fingerprint(), tokenizer.context_length]
    digest = hashlib.sha256(json.dumps(how).encode()).hexdigest()[:32]
    target = cache / "resident" / f"captions-{digest}"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_dir():
        with locked(target):
            if not target.is_dir():
                _make(target, text, tokenizer, samples, read)
    return ResidentTokens(target, text, tokenizer.context_length)


def _make(target: Path, text: TextViews, tokenizer: Tokenizer, samples: int, read: Callable[[int], Sample]) -> None:
    """The folder with the rows. All of it, or nothing."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with ExitStack() as stack:
            files = {name: stack.enter_context((partial / name).open("wb")) for name in _KINDS}
            _write(files, text, tokenizer, samples, read)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not is_full(error):
            raise
        raise unwritten(error, "data.cache", target.parent, ", or data.resident to none") from error
    partial.replace(target)


def _write(
    files: Mapping[str, BinaryIO],
    text: TextViews,
    tokenizer: Tokenizer,
    samples: int,
    read: Callable[[int], Sample],
) -> None:
    """The three files. Not through maps: a disk that fills up under one ends the process without a word."""
    told, rows, ends, written = Console(stderr=True), list[int](), [0], [0, 0]  # tokenised, and places of them
    for first in track(range(0, samples, _AT_ONCE), "Tokenising", console=told, transient=True):
        captions = list[str]()
        for sample in range(first, min(first + _AT_ONCE, samples)):
            own = dict[str, int]()
            for found in _captions(read, sample, text):
                for caption in found:
                    if caption not in own:
                        own[caption] = written[0] + len(captions)
                        captions.append(caption)
                    rows.append(own[caption])
                ends.append(written[1] + len(rows))
        written = [written[0] + len(captions), written[1] + len(rows)]
        parts = {_TOKENS: tokenizer(captions).numpy(), _ROWS: np.array(rows), _BOUNDS: np.array(ends)}
        stored = {part: values.astype(_KINDS[part]).tobytes() for part, values in parts.items()}
        if not first:  # the others are likely to have as many
            needed = sum(map(len, stored.values())) * samples // min(_AT_ONCE, samples)
            folder = Path(files[_TOKENS].name).parent
            check_room(folder, needed, f"the tokens of the captions of {samples:,} samples")
        for part, values in stored.items():
            files[part].write(values)
        rows, ends = [], []


def _captions(read: Callable[[int], Sample], sample: int, text: TextViews) -> list[list[str]]:
    """Of each place; none at all where one cannot be read."""
    places = [*text.base, *text.further]
    try:
        content = read(sample)
        return [content.captions(place, optional=at > 0) for at, place in enumerate(places)]
    except BadSampleError:
        return [[] for _ in places]
