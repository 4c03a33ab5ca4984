"""The whole data set decoded once: pixels of every picture and the text members of every sample, in two flat files.

They lie in the cache folder and are mapped into memory, so that all ranks and workers of a machine share one copy, and
the next run on the same data finds it there. What cannot be read or decoded is remembered with its reason, and fails
again when it is asked for, as it does without.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from amclr_scale.data.decoding import DECODER, BadSampleError, Sample
from amclr_scale.data.storage import locked
from amclr_scale.errors import UserError

Decode = Callable[[Sample], Image.Image]


class ResidentData:
    """What `open_resident` has found or written.

    Attributes:
        sizes: (N, 2) int32, width and height of every picture; 0 where there is none.
        pixels: (bytes,) uint8, mapped: rows of RGB, sample after sample.
    """

    def __init__(self, folder: Path):
        about: dict[str, Any] = json.loads((folder / "about.json").read_text("utf-8"))
        self._members: list[str] = about["members"]
        self._unread = {int(sample): words for sample, words in about["unread"].items()}
        self._undecoded = {int(sample): words for sample, words in about["undecoded"].items()}
        with np.load(folder / "table.npz", allow_pickle=False) as table:
            self.sizes: NDArray[np.int32] = table["sizes"]
            self._text_ends: NDArray[np.int64] = table["text_ends"]  # (N, members); -1: no such member
        counts = self.sizes.astype(np.int64).prod(1) * 3
        self.starts: NDArray[np.int64] = np.concatenate([[0], np.cumsum(counts)])
        ends = np.maximum.accumulate(np.concatenate([[0], self._text_ends.reshape(-1)]))
        self._text_starts = ends[:-1].reshape(self._text_ends.shape)
        self.pixels, self._text = _mapped(folder / "pixels"), _mapped(folder / "text")

    def members(self, sample: int) -> dict[str, bytes]:
        """The sample's text members.

        Raises:
            BadSampleError: the sample cannot be read.
        """
        if sample in self._unread:
            raise BadSampleError(*self._unread[sample])  # a new one: each holds on to the batch that it was raised in
        starts, ends = self._text_starts[sample].tolist(), self._text_ends[sample].tolist()
        return {
            name: self._text[start:end].tobytes()
            for name, start, end in zip(self._members, starts, ends, strict=True)
            if end >= 0
        }

    def size(self, sample: int) -> tuple[int, int]:
        """Width and height of the sample's picture.

        Raises:
            BadSampleError: there is none that can be decoded.
        """
        if sample in self._undecoded:
            raise BadSampleError(*self._undecoded[sample])
        width, height = self.sizes[sample].tolist()
        return width, height

    def picture(self, sample: int) -> Image.Image:
        """The sample's picture, decoded.

        Raises:
            BadSampleError: there is none that can be.
        """
        size = self.size(sample)
        data = self.pixels[self.starts[sample] : self.starts[sample + 1]]
        return Image.frombytes("RGB", size, data.tobytes())


def _mapped(path: Path) -> NDArray[np.uint8]:
    if not path.stat().st_size:  # which cannot be mapped
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, "r")


def open_resident(
    cache: Path,
    name: Sequence[object],
    members: Sequence[str],
    samples: int,
    read: Callable[[int], Sample],
    decode: Decode | None = None,
) -> ResidentData:
    """The data set's decoded form, written first where there is none; of several processes one does it.

    Args:
        cache: the machine's cache folder.
        name: of what is decoded, and how.
        members: text members that are kept.
        samples: N.
        read: a sample by its id.
        decode: its picture; None: pictures are not held.

    Raises:
        UserError: there is no room for it.
    """
    digest = hashlib.sha256(json.dumps([*name, list(members), DECODER]).encode()).hexdigest()[:32]
    target = cache / "resident" / digest
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_dir():
        with locked(target):
            if not target.is_dir():
                partial = target.with_name(f".{digest}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    _write(partial, members, samples, read, decode)
                except OSError as error:
                    shutil.rmtree(partial, ignore_errors=True)
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    raise UserError(
                        f"data.cache: {target.parent} has no room for all {samples:,} pictures, decoded; set "
                        "data.cache to a larger disk, or data.resident to none"
                    ) from error
                partial.replace(target)
    return ResidentData(target)


def _write(
    folder: Path, members: Sequence[str], samples: int, read: Callable[[int], Sample], decode: Decode | None
) -> None:
    sizes = np.zeros((samples, 2), np.int32)
    ends = np.full((samples, len(members)), -1, np.int64)
    faults: dict[str, dict[int, tuple[str, str]]] = {"unread": {}, "undecoded": {}}
    at = 0
    with (folder / "pixels").open("wb") as pixels, (folder / "text").open("wb") as text:
        for sample in track(range(samples), "Decoding", console=Console(stderr=True), transient=True):
            try:
                content = read(sample)
            except BadSampleError as error:
                faults["unread"][sample] = (error.kind, error.detail)
                faults["undecoded"][sample] = (error.kind, error.detail)
                continue
            for column, name in enumerate(members):
                if name in content.members:
                    at += text.write(content.members[name])
                    ends[sample, column] = at
            if decode is None:
                continue
            try:
                picture = decode(content)
            except BadSampleError as error:
                faults["undecoded"][sample] = (error.kind, error.detail)
                continue
            sizes[sample] = picture.size
            pixels.write(picture.tobytes())
        for file in (pixels, text):
            file.flush()
            os.fsync(file.fileno())
    np.savez(folder / "table.npz", sizes=sizes, text_ends=ends)
    (folder / "about.json").write_text(json.dumps({"members": list(members), **faults}), "utf-8")
