"""How shards are made of pictures: as they are, reduced, or written anew."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from amclr_scale.config import schema
from amclr_scale.data.decoding import BadSampleError, Sample, decode
from amclr_scale.data.formats.typed_tables import StoredPicture
from amclr_scale.data.indexing import IMAGE_EXTENSIONS
from amclr_scale.data.ingestion import Record

NOTHING_STORED = "neither bytes nor a path are stored"
_WRITTEN = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG", "ppm": "PPM", "bmp": "BMP"}
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "DIB": "bmp"}


@dataclass(frozen=True)
class Encoding:
    """How pictures and captions are stored."""

    resize: int | None  # pixels of the shorter side; larger pictures are reduced, smaller ones kept
    form: str  # keep, jpg, webp, png
    quality: int
    clean: bool


def picture_of(record: Record, images: Path, stored: dict[StoredPicture, bytes | str | None]) -> bytes:
    """The bytes of a record's picture.

    Raises:
        BadSampleError: there is no such file, or nothing is stored.
    """
    held = stored[record.stored] if record.stored else record.image
    if isinstance(held, bytes):
        return held
    try:
        if held is None:
            raise ValueError(NOTHING_STORED)
        return (images / held).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: also a name that no file can have
        raise BadSampleError("no such image", str(error)) from error


def encode(data: bytes, encoding: Encoding) -> tuple[str, bytes, tuple[int, int]]:
    """(extension, bytes, (width, height)) of a picture; decoded in any case, so that a broken one is found.

    What is written anew and of a kind that is only read (GIF, TIFF, HEIF) becomes PNG, which changes no pixel.

    Raises:
        BadSampleError: it cannot be read.
    """
    opened = Sample({"jpg": data}, schema.Data().max_image_pixels, 1).image()
    size, kind = opened.size, opened.format or ""
    extension = _EXTENSIONS.get(kind, kind.lower())
    picture = decode(opened)
    shrink = encoding.resize is not None and min(size) > encoding.resize
    portable = extension in IMAGE_EXTENSIONS and kind != "HEIF"  # which takes a package more to read
    if not shrink and portable and encoding.form in ("keep", extension):
        return extension, data, size
    if shrink and encoding.resize is not None:
        scale = encoding.resize / min(size)
        size = (max(encoding.resize, round(size[0] * scale)), max(encoding.resize, round(size[1] * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    if encoding.form != "keep":
        extension = encoding.form
    elif extension not in _WRITTEN:
        extension = "png"
    out = io.BytesIO()
    picture.save(out, _WRITTEN[extension], quality=encoding.quality)
    return extension, out.getvalue(), size
