"""CIFAR-10 and CIFAR-100 in their authors' binary files.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.

    cifar-10-batches-bin/    data_batch_1.bin ... data_batch_5.bin, test_batch.bin, batches.meta.txt
    cifar-100-binary/        train.bin, test.bin, fine_label_names.txt

A record is the label (CIFAR-100: the coarse label, then the fine one, which counts) and 3 x 32 x 32 bytes of red, green
and blue. The versions "for Python" are pickles, which run code when they are read: they are refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amclr_scale.data.reading import Reading
from amclr_scale.errors import UserError
from amclr_scale.evaluation.shares import share
from amclr_scale.types import Batch

SIDE = 32
PIXELS = 3 * SIDE * SIDE  # bytes

_KEY = "evaluation.splits"


@dataclass(frozen=True)
class _Form:
    """One of the two data sets."""

    files: dict[str, tuple[str, ...]]  # by split
    names: str
    label_bytes: int  # the last one counts
    pickled: str  # a file of the version that is refused
    archive: str  # of the version that is read


FORMS = (
    _Form(
        {"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        "batches.meta.txt", 1, "batches.meta", "cifar-10-binary.tar.gz",
    ),
    _Form(
        {"train": ("train.bin",), "test": ("test.bin",)},
        "fine_label_names.txt", 2, "meta", "cifar-100-binary.tar.gz",
    ),
)  # fmt: skip


def find_cifar(folder: Path) -> Path | None:
    """The folder itself or the one in it, as the archives unpack, that holds one of them in either version."""
    inside = ("cifar-10-batches-bin", "cifar-100-binary", "cifar-10-batches-py", "cifar-100-python")
    found = (path for path in (folder, *(folder / name for name in inside)) if _form(path) or _pickled(path))
    return next(found, None)


def _form(folder: Path) -> _Form | None:
    return next((form for form in FORMS if (folder / form.names).is_file()), None)


def _pickled(folder: Path) -> _Form | None:
    found = (form for form in FORMS if (folder / form.pickled).is_file())
    return next((form for form in found if (folder / "test_batch").is_file() or (folder / "test").is_file()), None)


class CifarFiles:
    """The images of one split, with the interface of `EvaluationSplit`.

    Args:
        folder: of the binary version.
        split: train or test.

    Raises:
        UserError: it is the pickled version, a file is missing or cut off, or there is no such split.
    """

    def __init__(self, name: str, folder: Path, reading: Reading, split: str):
        form = _form(folder)
        if form is None:
            refused = _pickled(folder)
            assert refused is not None
            raise UserError(
                f"{_KEY}: {name} is the version for Python, whose files are pickles: reading one runs whatever code is "
                f"in it. Take the binary version ({refused.archive} of the data set's own page), or write one folder "
                "of images per class"
            )
        if split not in form.files:
            raise UserError(f"{_KEY}: {name}: expected one of the splits {', '.join(form.files)}, got {split}")
        self.name, self.reading = name, reading
        size = form.label_bytes + PIXELS
        records = np.concatenate([_records(name, folder / file, size) for file in form.files[split]])
        self._pixels = records[:, form.label_bytes :].reshape(-1, 3, SIDE, SIDE)
        self.class_names = [
            line.strip() for line in (folder / form.names).read_text("utf-8").splitlines() if line.strip()
        ]
        self.labels: list[Any] | None = records[:, form.label_bytes - 1].astype(np.int64).tolist()
        self.num_samples = len(records)
        self.caption_lists: list[list[str]] = [[] for _ in range(self.num_samples)]
        self.image_ids = torch.arange(self.num_samples)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """A rank's images, `batch_size` at a time; the last batch may be shorter."""
        mine = share(self.num_samples)
        for start in range(mine.start, mine.stop, batch_size):
            rows = range(start, min(start + batch_size, mine.stop))
            images = torch.stack([self._image(row) for row in rows])
            yield Batch(ids=torch.tensor(rows), images=(images,), texts=(self.reading.tokenizer([""] * len(rows)),))

    def _image(self, row: int) -> Tensor:
        picture = Image.fromarray(np.ascontiguousarray(self._pixels[row].transpose(1, 2, 0)))
        return self.reading.view(picture)


def _records(name: str, file: Path, size: int) -> Any:
    """(n, size) uint8."""
    try:
        content = np.fromfile(file, dtype=np.uint8)
    except OSError as error:
        raise UserError(f"{_KEY}: {name}: {file.name} cannot be read: {error.strerror}") from error
    if not len(content) or len(content) % size:
        raise UserError(
            f"{_KEY}: {name}: {file.name}: expected records of {size:,} bytes, got {len(content):,} bytes in all; is "
            "the file complete?"
        )
    return content.reshape(-1, size)
