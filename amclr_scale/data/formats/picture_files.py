"""Which files of a folder are pictures: by their bytes, whatever they are called; and what was passed over.

found = find_pictures(Path("photos"))
found.pictures                        # sorted
found.told()                          # "passed over 3 files: 2 .heic (needs pillow-heif), 1 .mov"
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from amclr_scale.data.decoding import readable_formats
from amclr_scale.data.indexing import IMAGE_EXTENSIONS

# What lies beside pictures on purpose, and what systems leave behind: not worth a word.
_BESIDE = {
    "txt", "json", "jsonl", "csv", "tsv", "parquet", "npz", "npy", "md", "xml", "yaml", "yml", "tar", "gz", "html",
}  # fmt: skip
_LEFT_BEHIND = {"thumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin"}
_NEEDS = {"heic": "pillow-heif", "heif": "pillow-heif", "svg": "cairosvg", "jxl": "pillow-jxl-plugin"}
_HEAD = 32  # bytes by which Pillow's formats know themselves


@dataclass
class FoundPictures:
    """The pictures of a folder."""

    pictures: list[Path] = field(default_factory=list)
    texts: set[Path] = field(default_factory=set)  # the .txt files beside them
    passed_over: Counter[str] = field(default_factory=Counter)  # by extension

    def has_text(self, picture: Path) -> bool:
        """Whether a .txt of the same name lies beside a picture."""
        return picture.with_suffix(".txt") in self.texts

    def captions(self, picture: Path) -> list[str]:
        """The lines of that file; none where there is none."""
        if not self.has_text(picture):
            return []
        lines = picture.with_suffix(".txt").read_text("utf-8", "replace").splitlines()
        return [line.strip() for line in lines if line.strip()]

    def told(self) -> str:
        """What was passed over, in words; empty where nothing was."""
        if not self.passed_over:
            return ""
        counts = sorted(self.passed_over.items(), key=lambda one: (-one[1], one[0]))
        kinds = [f"{number:,} {kind or 'without extension'}{_how(kind)}" for kind, number in counts]
        return f"passed over {self.passed_over.total():,} files that are no readable pictures: {', '.join(kinds)}"


def _how(extension: str) -> str:
    package = _NEEDS.get(extension.removeprefix("."))
    return f" (needs {package})" if package else ""


def is_hidden(path: Path) -> bool:
    """Whether a name is a system's or an editor's own: .ipynb_checkpoints, ._photo.jpg, __MACOSX, Thumbs.db."""
    return path.name.startswith(".") or path.name.lower() in _LEFT_BEHIND


def find_pictures(folder: Path, *, recursive: bool = True) -> FoundPictures:
    """All pictures in a folder, and below it if `recursive`."""
    found = FoundPictures()
    for path in sorted(folder.iterdir()):
        if is_hidden(path):
            continue
        if path.is_dir():
            if recursive:
                inside = find_pictures(path)
                found.pictures += inside.pictures
                found.passed_over += inside.passed_over
                found.texts |= inside.texts
        elif path.suffix == ".txt":
            found.texts.add(path)
        elif is_picture(path):
            found.pictures.append(path)
        elif path.suffix[1:].lower() not in _BESIDE:
            found.passed_over[path.suffix.lower()] += 1
    found.pictures.sort()
    return found


def holds_picture(folder: Path) -> bool:
    """Whether there is one in a folder or below it; stops at the first."""
    inside = sorted(path for path in folder.iterdir() if not is_hidden(path))
    return any(is_picture(path) for path in inside if path.is_file()) or any(
        holds_picture(path) for path in inside if path.is_dir()
    )


class Classes:
    """Folders of pictures as classes.

    A picture's class is its folder; one that is alone in another (class/images/*.jpg) stands for that.

    Args:
        root: the folder that holds them.
        pictures: all pictures below it.
    """

    def __init__(self, root: Path, pictures: Iterable[Path]):
        self.root = root
        self._direct = {path.parent for path in pictures}
        folders = {folder for one in self._direct for folder in (one, *one.parents) if folder.is_relative_to(root)}
        self._inside = Counter(folder.parent for folder in folders - {root})

    def folder(self, picture: Path) -> Path | None:
        """The folder that names a picture's class; None for a picture that lies in no folder of its own."""
        found = picture.parent
        while self.root not in (found, found.parent) and self._inside[found.parent] == 1:
            found = found.parent
        return None if found == self.root else found


def is_picture(path: Path) -> bool:
    """Whether a file is one: its name says so, or its first bytes do. A name may promise what cannot be kept: such a
    file is listed, and told when it is opened; one that takes a decoder which is not installed is none.
    """
    extension = path.suffix[1:].lower()
    if extension in IMAGE_EXTENSIONS and extension not in _NEEDS:
        return True
    if extension in _BESIDE:
        return False
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    return any(_accepts(name, head) for name in readable_formats())


def _accepts(name: str, head: bytes) -> bool:
    accept = Image.OPEN[name][1]
    try:
        return accept is not None and accept(head) is True
    except Exception:  # a format's own look at bytes that are too few for it
        return False
