"""Pictures that would take memory without bound are refused before they are decoded, whatever says their size."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib

import pytest
from PIL import Image, ImageFile, TiffImagePlugin

from amclr_scale.data.decoding import BadSampleError, Sample, _sizes_inside, bytes_per_pixel, readable_formats

SIDE = 20_000
LIMITS = (100_000_000, 1)


def png(width, height, colour=6):
    """The first row of a picture of zeros, which says that more follow."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = zlib.compress(bytes(1 + width * {6: 4, 2: 3, 0: 1}[colour]))
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


def icon(content, side=16, count=1, before=b""):
    """An icon with the same picture so many times; or with another `before` it."""
    pictures = ([before] if before else []) + [content] * count
    at, entries = 6 + 16 * len(pictures), b""
    for picture in pictures:
        start = at + (len(before) if picture is content else 0)
        entries += struct.pack("<BBBBHHII", side, side, 0, 0, 1, 32, len(picture), start)
    return struct.pack("<HHH", 0, 1, len(pictures)) + entries + before + content


def saved(form, size=(12, 10), mode="RGB", **options):
    out = io.BytesIO()
    Image.new(mode, size).save(out, form, **options)
    return out.getvalue()


def jpeg2000(side):
    """A small picture whose code says another size than its box."""
    content = bytearray(saved("JPEG2000"))
    at = content.index(b"\xff\x4f\xff\x51")
    content[at + 8 : at + 16] = struct.pack(">II", side, side)
    return bytes(content)


def tiled(side):
    """A small TIFF whose only tile says that it is large."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    values = {256: 16, 257: 16, 258: (8, 8, 8), 259: 1, 262: 2, 277: 3, 322: side, 323: side, 324: (8,), 325: (768,)}
    for tag, value in values.items():
        tags[tag] = value
    out = io.BytesIO()
    out.write(b"II*\0" + struct.pack("<I", 8))
    tags.save(out)
    return out.getvalue() + bytes(768)


HOSTILE = {
    "png": lambda: png(SIDE, SIDE),
    "icon": lambda: icon(png(SIDE, SIDE)),
    "one of many in an icon": lambda: icon(png(SIDE, SIDE), count=7),
    "last in an icon": lambda: icon(png(SIDE, SIDE), before=saved("PNG", (16, 16))),
    "bitmap in an icon": lambda: icon(struct.pack("<IiiHHI", 40, SIDE, 2 * SIDE, 1, 32, 0) + bytes(100)),
    "jpeg 2000": lambda: jpeg2000(SIDE),
    "gif": lambda: b"GIF89a" + struct.pack("<HH", SIDE, SIDE) + saved("GIF")[10:],
    "bmp": lambda: saved("BMP")[:18] + struct.pack("<ii", SIDE, SIDE) + saved("BMP")[26:],
    "tile of a tiff": lambda: tiled(SIDE),
    "ppm": lambda: b"P6 %d %d 255\n" % (SIDE, SIDE) + bytes(100),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_too_many_pixels_are_found_before_any_is_decoded(kind, monkeypatch):
    if kind == "jpeg 2000" and "JPEG2000" not in readable_formats():
        pytest.skip("this build of Pillow has no JPEG 2000")
    content = HOSTILE[kind]()
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail(f"{image.size} is decoded"))
    with pytest.raises(BadSampleError) as refused:
        Sample({"png": content}, *LIMITS).image()
    assert refused.value.kind == "too many pixels"
    assert f"{SIDE} x {SIDE}" in refused.value.detail


def test_memory_is_bounded_by_what_decoding_takes():
    """10^8 pixels are the limit for JPEGs, and fewer where each takes more."""
    opaque, transparent = png(9000, 9000, 2), png(9000, 9000, 6)
    assert Sample({"png": opaque}, *LIMITS).image().size == (9000, 9000)
    with pytest.raises(BadSampleError, match=r"9000 x 9000 with 18 bytes for each .* data.max_image_mib=1024"):
        Sample({"png": transparent}, *LIMITS).image()
    assert Sample({"png": transparent}, *LIMITS, 2048).image().size == (9000, 9000)


def test_honest_icons_and_pictures_are_opened():
    for content in (saved("ICO", (16, 16)), icon(saved("PNG", (16, 16))), saved("ICO", (32, 32), bitmap_format="bmp")):
        assert Sample({"png": content}, *LIMITS).image().size in ((16, 16), (32, 32))
    if "JPEG2000" in readable_formats():
        assert Sample({"png": saved("JPEG2000")}, *LIMITS).image().size == (12, 10)


MEASURE = """
import io, json, os, sys
from PIL import Image
from amclr_scale.data.decoding import Sample, bytes_per_pixel, decode, readable_formats
side = 800
readable_formats()
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
out = {}
for mode, form, options in json.load(sys.stdin):
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, form, **options)
    reading, writing = os.pipe()
    if not os.fork():
        before = resident()
        image = Sample({"png": file.getvalue()}, 10**9, 1).image()
        each = bytes_per_pixel(image)
        decode(image)
        os.write(writing, json.dumps([each, (resident() - before) / side**2]).encode())
        os._exit(0)
    os.wait()
    out[f"{mode} {form} {options}"] = json.loads(os.read(reading, 999))
print(json.dumps(out))
"""


@pytest.mark.slow
def test_the_bound_is_above_what_is_measured():
    """In a process for each, so that none profits from another one's memory."""
    cases = [
        (mode, form, options)
        for mode in ("L", "P", "RGB", "RGBA", "CMYK", "I;16")
        for form, options in (
            ("PNG", {}), ("TIFF", {"compression": "tiff_lzw"}), ("JPEG", {"progressive": True, "quality": 95}),
            ("WEBP", {}), ("AVIF", {"speed": 10}), ("JPEG2000", {}), ("BMP", {}), ("GIF", {}),
        )
        if form in readable_formats() and writes(mode, form, options)
    ]  # fmt: skip
    assert len(cases) > 20
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], input=json.dumps(cases), capture_output=True, text=True, check=True,
        timeout=120, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert len(found) == len(cases)
    beyond = {kind: numbers for kind, numbers in found.items() if numbers[1] > numbers[0] + 2}
    assert beyond == {}
    assert max(measured for _, measured in found.values()) > 8  # what is measured is there


def writes(mode, form, options):
    try:
        Image.new(mode, (4, 4)).save(io.BytesIO(), form, **options)
    except (OSError, KeyError, ValueError):
        return False
    return True


def test_a_bound_for_every_mode():
    for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "I;16", "I", "F"):
        assert bytes_per_pixel(Image.new(mode, (1, 1))) >= 6


def test_a_pixel_of_32_bits_takes_more_than_one_of_16():
    """As integers become RGB over an array of 64 bits; Pillow calls them I, and those of 16 bits I;16 or I;16B."""
    each = {mode: bytes_per_pixel(Image.new(mode, (1, 1))) for mode in ("I", "I;16", "I;16B", "L")}
    assert each["I"] > each["I;16"] == each["I;16B"] > each["L"]


def test_a_picture_that_begins_inside_of_a_jpeg_2000():
    """Its size is that from its first to its last column and row, not up to the last ones of the canvas."""
    inside = struct.pack(">4I", 100, 50, 40, 20)
    code = b"\xff\x4f\xff\x51" + bytes(4) + inside + bytes(40)
    assert _sizes_inside(code) == _sizes_inside(bytes(4) + b"jP  " + bytes(30) + code) == [(60, 30)]
    assert _sizes_inside(code[:8] + struct.pack(">4I", 40, 20, 100, 50) + bytes(40)) == [(0, 0)]
