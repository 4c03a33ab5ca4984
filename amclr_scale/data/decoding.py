"""From a sample's bytes to an image and a caption, or to the reason why not.

Everything that can be wrong with a sample ends in one exception, `BadSampleError`, whose kind is counted and whose
shard and key are logged. Nothing is ever unpickled, and no format is read that needs another program (PostScript).
"""

import hashlib
import io
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from PIL import __version__ as pillow_version

from amclr_scale.data.formats.members import Flag, ShardReader
from amclr_scale.data.indexing import IMAGE_EXTENSIONS

# What a picture may be, whatever its member is called.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "PPM", "TIFF", "AVIF", "JPEG2000", "ICO", "HEIF")
# What decides, beside a file's bytes, which pixels `decode` makes of it. Pixels that are kept are named by it, so count
# the number up when the same file becomes other pixels.
DECODER = (pillow_version, 3)
PARAPHRASES = "paraphrases"  # a member that lies beside the shard (data/beside/paraphrases.py)

# Our own limits are `data.max_image_pixels` and `data.max_image_mib`, checked before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None
# Bytes for a pixel while a picture becomes RGB, at most, as measured: of its mode (Pillow holds it, and what `decode`
# makes of it), and of its format's decoder (coefficients of progressive JPEGs, canvases, planes).
_OF_MODE = {"1": 5, "L": 5, "P": 5, "RGB": 4, "RGBX": 4, "I": 24, "F": 28, "CMYK": 8, "YCbCr": 8, "LAB": 8, "HSV": 8}
_OF_TRANSPARENT, _OF_SIXTEEN_BITS = 16, 14
_OF_FORMAT = {"JPEG": 6, "WEBP": 16, "AVIF": 10, "HEIF": 12, "JPEG2000": 20}
_OF_OTHERS = 2
_ICON, _PNG, _JP2, _CODESTREAM = b"\0\0\1\0", b"\x89PNG\r\n\x1a\n", b"jP  ", b"\xff\x4f\xff\x51"
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # the brands that its files begin with
_TILE = (322, 323)  # TIFF tags TileWidth and TileLength
# Programs that draw pictures write their whole settings into them: text is no reason to refuse whole pixels.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**24, 2**26


@cache
def readable_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow knows; HEIF where pillow-heif is installed."""
    Image.init()
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


class BadSampleError(Exception):
    """A sample that cannot be used. `kind` is one of a few fixed words."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind


def check_whole(reader: ShardReader, row: int) -> None:
    """Raise `BadSampleError` for a row of which the index knows that it cannot be used."""
    flag = int(reader.members.flag[row])  # numpy compares slowly with an enumeration, and this is for every sample
    if flag == Flag.DUPLICATE_KEY:
        raise BadSampleError("duplicate key")
    if flag == Flag.CUT:
        raise BadSampleError("truncated")


@dataclass(frozen=True)
class Field:
    """Where in a sample something is: a member, or a field of its JSON member. Written `txt` or `json.captions`."""

    member: str
    path: tuple[str, ...] = ()

    @classmethod
    def parse(cls, words: str) -> "Field":
        member, *path = words.split(".")
        return cls(member, tuple(path))

    def __str__(self) -> str:
        return ".".join((self.member, *self.path))


class Sample:
    """The members of one sample, decoded when asked for."""

    def __init__(
        self, members: Mapping[str, bytes], max_image_pixels: int, max_caption_characters: int,
        max_image_mib: int = 1024,
    ):  # fmt: skip
        self.members, self.max_image_bytes = members, max_image_mib << 20
        self.max_image_pixels, self.max_caption_characters = max_image_pixels, max_caption_characters
        self._parsed = dict[str, Any]()

    def image(self, member: str | None = None) -> Image.Image:
        """The image, opened but not decoded.

        Args:
            member: that it is in; None: the first that is called as pictures are.

        Raises:
            BadSampleError: there is none, it is empty, not an image, has too many pixels, or would take too much
                memory.
        """
        extension = member or next((e for e in IMAGE_EXTENSIONS if e in self.members), None)
        if extension is None:
            raise BadSampleError("missing image")
        if not self.members[extension]:
            raise BadSampleError("empty member", f".{extension}")
        data = self.members[extension]
        for width, height in _sizes_inside(data):
            self._check(width, height, _OF_TRANSPARENT + _OF_OTHERS)
        try:
            image = Image.open(io.BytesIO(data), formats=readable_formats())
        except UnidentifiedImageError as error:
            if data[4:8] == b"ftyp" and data[8:12] in _HEIF:
                raise BadSampleError("no decoder", "HEIC: pip install pillow-heif") from error
            raise BadSampleError("corrupt image", "no known format") from error
        except Exception as error:  # decoders of broken files raise whatever they like
            raise BadSampleError("corrupt image", str(error)) from error
        self._check(image.width, image.height, bytes_per_pixel(image))
        tags = getattr(image, "tag_v2", {})
        with suppress(TypeError, ValueError):
            width, height = (int(tags.get(tag, 0)) for tag in _TILE)
            self._check(width, height, _OF_TRANSPARENT)
        return image

    def _check(self, width: int, height: int, each: int) -> None:
        """Raise `BadSampleError` for so many pixels, with so many bytes for each while they are decoded."""
        if width * height > self.max_image_pixels:
            limit = f"more than data.max_image_pixels={self.max_image_pixels:,}"
            raise BadSampleError("too many pixels", f"{width} x {height}: {limit}")
        if width * height * each > self.max_image_bytes:
            words = f"{width} x {height} with {each} bytes for each while it is decoded"
            raise BadSampleError(
                "too many pixels", f"{words}: more than data.max_image_mib={self.max_image_bytes >> 20}"
            )

    def value(self, field: Field) -> Any:
        """What is at a field; None where the sample has no such thing.

        Raises:
            BadSampleError: the member is empty, not UTF-8, or not JSON.
        """
        if field.member not in self.members:
            return None
        if not field.path and field.member not in ("json", PARAPHRASES):
            return self._text(field.member).strip()
        if field.member not in self._parsed:
            try:
                self._parsed[field.member] = json.loads(self._text(field.member))
            except (ValueError, RecursionError) as error:
                raise BadSampleError("corrupt json", str(error)) from error
        value = self._parsed[field.member]
        for name in field.path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def _text(self, member: str) -> str:
        if not self.members[member]:
            raise BadSampleError("empty member", f".{member}")
        try:
            return self.members[member].decode("utf-8-sig")  # Windows writes a byte order mark in front
        except UnicodeDecodeError as error:
            raise BadSampleError("text not UTF-8", f".{member}: {error.reason} at byte {error.start}") from error

    def captions(self, field: Field, optional: bool = False) -> list[str]:
        """The captions at a field: one, or as many as its list has; none only where they are `optional`.

        Raises:
            BadSampleError: there are none, or one is too long.
        """
        value = self.value(field)
        listed = value if isinstance(value, list) else [value]
        captions = [caption.strip() for caption in listed if isinstance(caption, str) and caption.strip()]
        if not captions and optional:
            return []
        if not captions:
            there = (
                f": expected a text or a list of texts, got {json.dumps(value)[:60]}"
                if value not in (None, "", [])
                else ""
            )
            raise BadSampleError("missing caption", f"{field}{there}")
        if max(map(len, captions)) > self.max_caption_characters:
            limit = f"more than data.max_caption_characters={self.max_caption_characters:,}"
            raise BadSampleError("huge caption", f"{max(map(len, captions)):,} characters: {limit}")
        return captions


def class_number(value: Any) -> int:
    """Of what a sample says of its class: 63 bits, equal for equal values."""
    words = json.dumps(value, sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "big") >> 1


def bytes_per_pixel(image: Image.Image) -> int:
    """What decoding it takes at most, for each pixel, beside the file itself."""
    mode = image.mode
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        own = _OF_TRANSPARENT
    else:
        own = _OF_SIXTEEN_BITS if mode.startswith("I;") else _OF_MODE.get(mode, _OF_TRANSPARENT)
    return own + _OF_FORMAT.get(image.format or "", _OF_OTHERS)


def _sizes_inside(data: bytes) -> list[tuple[int, int]]:
    """Sizes of pictures that Pillow decodes though it goes by another size, or while it opens a file.

    Those of an icon's pictures, and of a JPEG 2000's code beside that of its box.
    """
    found = []
    if data[:4] == _ICON:
        for entry in range(int.from_bytes(data[4:6], "little")):
            at = int.from_bytes(data[18 + 16 * entry : 22 + 16 * entry], "little")
            head = data[at : at + 24]
            if head[:8] == _PNG:
                found.append((_number(head[16:20], "big"), _number(head[20:24], "big")))
            elif _number(head[:4], "little") != 12:  # OS/2's, whose sides have 16 bits
                found.append((_number(head[4:8], "little"), _number(head[8:12], "little") // 2))  # with its mask below
    elif data[:4] == _CODESTREAM or data[4:8] == _JP2:
        at = data.find(_CODESTREAM) + 8
        right, bottom, left, top = (int.from_bytes(data[at + i : at + i + 4], "big") for i in range(0, 16, 4))
        found.append((max(right - left, 0), max(bottom - top, 0)))
    return found


def _number(data: bytes, order: Literal["big", "little"]) -> int:
    return abs(int.from_bytes(data, order, signed=True))


def decode(image: Image.Image, reduction: int = 1) -> Image.Image:
    """All pixels, as RGB of 8 bits; transparent ones on white. Of an animation the first picture; never rotated.

    Args:
        image: from `Sample.image`.
        reduction: decode a JPEG at 1/1, 1/2, 1/4 or 1/8 of its size, which saves most of the time of a large one;
            other formats come whole.

    Raises:
        BadSampleError: the data is damaged.
    """
    wide = image.mode == "F" or (image.mode == "I" and image.format == "TIFF")
    stored = next((str(tile[3]) for tile in getattr(image, "tile", ())), "")
    try:
        low = _low_bytes(image) if stored == _OF_48_BITS and "transparency" in image.info else None
        if reduction > 1 and image.format == "JPEG":
            image.draft("RGB", (image.width // reduction, image.height // reduction))
        image.load()
        keyed = "transparency" in image.info  # a palette's entries, or the one colour or shade that a PNG leaves out
        if image.mode == "RGB" and not keyed:
            return image
        if wide:
            return _scaled(image)
        if image.mode[0] == "I":  # 16 bits, of which Pillow's own conversion shows all above 255 as white
            shades = np.asarray(image)
            eight = (shades >> 8).clip(0, 255).astype(np.uint8)
            if keyed:
                eight = np.where(shades == image.info["transparency"], np.uint8(255), eight)
            return Image.fromarray(eight).convert("RGB")
        if low is not None:
            return _without_colour(image, low)
        if keyed or image.mode in ("RGBA", "LA", "PA"):
            if keyed and stored in _STEPS:  # Pillow spreads shades over 8 bits, and leaves the transparent one
                image.info["transparency"] *= _STEPS[stored]
            canvas = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
        return image.convert("RGB")
    except BadSampleError:
        raise
    except Exception as error:  # decoders of broken files raise whatever they like
        raise BadSampleError("corrupt image", str(error)) from error


_OF_48_BITS, _OTHER_BYTES = "RGB;16B", "RGB;16L"  # how Pillow calls 16 bits a channel, and the other order of bytes
_STEPS = {"L;2": 85, "L;4": 17}  # between shades of so many bits, of 255


def _low_bytes(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The lower 8 of 16 bits (height, width, 3) of a PNG that is not decoded yet; Pillow keeps the higher ones."""
    file: Any = image.fp  # type: ignore[attr-defined]  # of an image that was opened
    at = file.tell()
    file.seek(0)
    other: Any = Image.open(io.BytesIO(file.read()), formats=("PNG",))
    file.seek(at)
    other.tile = [(kind, box, start, _OTHER_BYTES) for kind, box, start, _ in other.tile]
    return np.asarray(other)


def _without_colour(image: Image.Image, low: npt.NDArray[np.uint8]) -> Image.Image:
    """White where a pixel has all 48 bits of the colour that is left out: those that share the higher ones stay."""
    high, here = np.array(image), np.ones(low.shape[:2], dtype=bool)
    for channel, part in enumerate(image.info["transparency"]):
        here &= high[..., channel] == part >> 8
        here &= low[..., channel] == part & 255
    high[here] = 255
    return Image.fromarray(high)


_SMALLEST, _LARGEST = 340, 341  # TIFF tags SMinSampleValue and SMaxSampleValue


def _scaled(image: Image.Image) -> Image.Image:
    """Pixels of 32 bits, which may have any range, by the range that the file itself names.

    Raises:
        BadSampleError: it names none.
    """
    tags = getattr(image, "tag_v2", {})
    if _SMALLEST not in tags or _LARGEST not in tags:
        kind = "floating-point" if image.mode == "F" else "32-bit integer"
        raise BadSampleError("pixels of unknown range", f"{kind} pixels, and no SMinSampleValue, SMaxSampleValue")
    low, high = (float(np.max(tags[tag])) for tag in (_SMALLEST, _LARGEST))
    values = (np.asarray(image, dtype=np.float64) - low) / max(high - low, np.finfo(float).tiny)
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8)).convert("RGB")
