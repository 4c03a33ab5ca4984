"""Pictures and texts of a benchmark that compares some with some: each is encoded once, whoever asks for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amclr_scale.data.text_views import clean_caption
from amclr_scale.errors import UserError
from amclr_scale.evaluation.encode import Encode, encode_images, encode_texts
from amclr_scale.evaluation.image_files import ImageFiles, Item
from amclr_scale.evaluation.retrieval import tie
from amclr_scale.evaluation.shares import gather_rows, share
from amclr_scale.evaluation.suites.files import Files
from amclr_scale.evaluation.suites.opened import Place

Box = tuple[int, int, int, int]
AT_ONCE = 1 << 16  # scores


class Pairs:
    """Collects pictures and texts while a file is read, then encodes all.

    Args:
        folders: where pictures may lie, below the folder of the data set's file; the first that has one is taken.
    """

    def __init__(self, place: Place, folders: Sequence[str]):
        self.place, self._folders = place, folders
        self._root: Path | None = None
        self._pictures = dict[tuple[str, Box | None], int]()
        self._texts = dict[str, int]()

    def picture(self, name: str, box: Box | None = None) -> int:
        """The number of a picture, or of a part of it.

        Raises:
            UserError: its name leads out of the folder of pictures.
        """
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(
                f"--data: {self.place.one.name}: expected names of pictures inside their folder in {self.place.path}, "
                f"got {name[:200]}; take the file as its authors publish it"
            )
        return self._pictures.setdefault((name, box), len(self._pictures))

    def text(self, words: str) -> int:
        """The number of a text."""
        cleaned = clean_caption(words) if self.place.options.clean_captions else words
        return self._texts.setdefault(cleaned, len(self._texts))

    def root(self) -> Path:
        """The folder that the names of pictures begin in.

        Raises:
            UserError: no folder has the first of them.
        """
        if self._root is None:
            name, beside = next(iter(self._pictures))[0], self.place.path.parent
            given = self.place.options.image_root
            tried = [Path(given).expanduser()] if given else [beside / folder for folder in self._folders]
            tried += [] if given else [self.place.root / folder for folder in self._folders]
            found = next((folder for folder in tried if (folder / name).is_file()), None)
            if found is None:
                looked = ", ".join(map(str, dict.fromkeys(tried)))
                raise UserError(
                    f"--data: {self.place.one.name}: expected the picture {name} in one of {looked}, found it in none; "
                    "put the pictures there, or say where they are: --set evaluation.image_root=FOLDER"
                )
            self._root = found
        return self._root

    def files(self) -> Files:
        """The benchmark's own file, and the pictures that it names.

        Raises:
            UserError: some do not exist.
        """
        root = self.root()
        found = {name: root / name for name, _ in self._pictures}
        gone = [path for path in found.values() if not path.is_file()]
        if gone:
            raise UserError(
                f"--data: {self.place.one.name}: {len(gone):,} of {len(found):,} pictures do not exist, the first is "
                f"{gone[0]}; download the rest"
            )
        return {f"file:{self.place.path.name}": self.place.path} | found

    def encoded_here(self) -> int:
        """Pictures and texts that this rank encodes."""
        return len(share(len(self._pictures))) + len(share(len(self._texts)))

    def encode(self, encode: Encode) -> tuple[Tensor, Tensor]:
        """Pictures (P, D) and texts (T, D), unit length, all of them on every rank."""
        place, root = self.place, self.root()
        items = [Item(root / name, box=box) for name, box in self._pictures]
        pictures = ImageFiles(place.one.name, place.data, items, place.reading)
        size = place.options.batch_size
        (image,) = encode_images(encode, pictures, size)
        (text,) = encode_texts(encode, place.reading.tokenizer, list(self._texts), size)
        return gather_rows(image), gather_rows(text)


def scores(image: Tensor, text: Tensor, pictures: Sequence[int], texts: Sequence[int]) -> Tensor:
    """Cosines of pairs, given by their numbers: (n,) on the CPU.

    Args:
        image: (P, D), unit length.
        text: (T, D), unit length.
    """
    rows = torch.tensor([list(pictures), list(texts)], device=image.device).view(2, -1)
    parts = [(image[a] * text[b]).sum(1) for a, b in zip(*(torch.split(row, AT_ONCE) for row in rows), strict=True)]
    return torch.cat(parts).cpu()


def above(first: Tensor, second: Tensor) -> Tensor:
    """Where a score is higher than another by more than rounding (1e-6 in float32); never where one is no number."""
    return first > second + tie(first.dtype)


def entry(place: Place, number: Any, found: Any, **kinds: type | tuple[type, ...]) -> list[Any]:
    """The values of an entry of a benchmark's file, in the order asked for.

    Args:
        number: which entry.
        found: what the file has there.
        kinds: what each value has to be.

    Raises:
        UserError: the entry is no object, or has none of some value.
    """
    values = found if isinstance(found, dict) else {}
    for key, kind in kinds.items():
        if not isinstance(values.get(key), kind) or isinstance(values.get(key), bool):
            raise UserError(
                f"--data: {place.one.name}: entry {number} of {place.path}: expected {', '.join(kinds)}, got "
                f"{str(found)[:200]}; take the file as its authors publish it"
            )
    return [values[key] for key in kinds]


def entries(place: Place, found: Any) -> list[tuple[Any, Any]]:
    """The entries of a list, or of an object as SugarCrepe's, numbered as in the file.

    Raises:
        UserError: there are none.
    """
    listed = (
        list(found.items()) if isinstance(found, dict) else list(enumerate(found if isinstance(found, list) else []))
    )
    if not listed:
        raise UserError(f"--data: {place.one.name}: expected entries in {place.path}, found none")
    return listed
