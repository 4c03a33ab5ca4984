"""Draw the icons of one set: SVG to pixels on white by resvg, blank ones told apart, equal ones known by their hash.

System fonts are not used, so that every machine draws the same. An unfinished set leaves nothing: the table of a set
appears when all its pictures have been written.
"""

import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from amclr_scale.corpora.icon_sets import drawings
from amclr_scale.errors import UserError

FORMATS = {"webp": {"format": "WEBP", "lossless": True, "quality": 50}, "png": {"format": "PNG"}}


def resvg() -> Any:
    """The package that draws.

    Raises:
        UserError: it is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise UserError(
            "amclr-scale corpus icons: expected the package resvg-py, found none; pip install 'amclr_scale[corpus]'"
        ) from error
    return resvg_py


@dataclass(frozen=True)
class Drawing:
    """One picture of a set's table."""

    name: str
    digest: str  # of its pixels
    offset: int  # in the set's file of pictures
    length: int


@dataclass(frozen=True)
class RenderJob:
    """A set to draw.

    Attributes:
        source: its JSON.
        out: folder for PREFIX.pictures and PREFIX.table.json.
        size: pixels of a side.
        form: a key of `FORMATS`.
    """

    source: Path
    out: Path
    size: int
    form: str

    @property
    def pictures(self) -> Path:
        """All pictures of the set, one after another."""
        return self.out / f"{self.source.stem}.pictures"

    @property
    def table(self) -> Path:
        """Which picture lies where, and what came to nothing."""
        return self.out / f"{self.source.stem}.table.json"

    def drawn(self) -> tuple[list[Drawing], dict[str, int]]:
        """The pictures, by name, and how many icons came to nothing, by reason."""
        content = json.loads(self.table.read_text())
        return [Drawing(*row) for row in content["drawn"]], content["rejected"]


def render(job: RenderJob) -> str:
    """Draw a set, unless that is done; its prefix."""
    if job.table.is_file():
        return job.source.stem
    job.out.mkdir(parents=True, exist_ok=True)
    drawn = list[tuple[str, str, int, int]]()
    rejected = {"blank": 0, "broken": 0}
    offset = 0
    with job.pictures.open("wb") as file:
        for name, svg in drawings(job.source, job.size):
            picture = draw(svg)
            if picture is None or picture.getcolors(1):  # one colour
                rejected["broken" if picture is None else "blank"] += 1
                continue
            data = encode(picture, job.form)
            drawn.append((name, hashlib.sha256(picture.tobytes()).hexdigest()[:20], offset, len(data)))
            file.write(data)
            offset += len(data)
    partial = job.table.with_name(f".{job.table.name}.{os.getpid()}")
    partial.write_text(json.dumps({"drawn": drawn, "rejected": rejected}))
    partial.replace(job.table)
    return job.source.stem


def draw(svg: str) -> Image.Image | None:
    """The picture as RGB; None for an SVG that cannot be drawn."""
    try:
        png = resvg().svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    except ValueError:
        return None
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def encode(picture: Image.Image, form: str) -> bytes:
    """Without loss; a picture of greys as such, where the format has them."""
    if form == "png" and len({band.tobytes() for band in picture.split()}) == 1:
        picture = picture.getchannel(0)
    out = io.BytesIO()
    picture.save(out, **FORMATS[form])  # type: ignore[arg-type]
    return out.getvalue()
