"""Small shards for tests: pictures of one colour, captions that say which sample it is."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from amclr_scale.config import schema

Member = tuple[str, bytes]


def picture(i: int, size: tuple[int, int] = (12, 10), kind: str = "PNG") -> bytes:
    """A picture whose colours say i; the left half is darker, so that a flip shows."""
    image = Image.new("RGB", size, (i % 256, i // 256 % 256, 200))
    image.paste((i % 256, i // 256 % 256, 40), (0, 0, size[0] // 2, size[1]))
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def pair(i: int, **fields: object) -> list[Member]:
    """The members of one whole sample."""
    content = {"captions": [f"sample {i}", f"number {i}", f"the picture {i}"], **fields}
    return [
        (f"{i:06d}.png", picture(i)),
        (f"{i:06d}.txt", f"sample {i}".encode()),
        (f"{i:06d}.json", json.dumps(content).encode()),
    ]


def write_tar(path: Path, members: Sequence[Member], mode: str = "w", form: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, sizes: Sequence[int], first: int = 0) -> list[str]:
    """Shards of the given sizes, samples numbered on."""
    urls = []
    for number, size in enumerate(sizes):
        members = [member for i in range(first, first + size) for member in pair(i)]
        urls.append(str(write_tar(folder / f"{number:05d}.tar", members)))
        first += size
    return urls


def settings(train: str | list[str], **keys: object) -> schema.Data:
    """A small recipe."""
    return schema.Data(
        **{"train": train, "image_size": 8, "context_length": 16, "lanes": 4, "shuffle_window": 2, **keys}
    )
