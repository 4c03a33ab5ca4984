"""A small archive of icon sets in the layout of `@iconify/json`, made by hand."""

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from amclr_scale.corpora.npm import NpmPackage

CONCEPTS = [f"thing-{letter}{other}" for letter in "abcdefgh" for other in "abcdefgh"]


def drawing(number: int, shape: int) -> str:
    """A body that no other (number, shape) has: one rectangle in a box of 24."""
    place = f'x="{number % 8 * 2 + 1}" y="{number // 8 * 2 + 1}" width="{3 + shape % 4}" height="{3 + shape // 4}"'
    return f'<rect {place} fill="currentColor"/>'


def icon_set(prefix: str, shape: int, **info: Any) -> dict[str, Any]:
    """A set that draws every concept, in the shape that is its artist's."""
    icons = {f"{name}-outline": {"body": drawing(i, shape)} for i, name in enumerate(CONCEPTS)}
    about = {"name": prefix.title(), "author": {"name": f"{prefix} artist"}, "license": {"title": "MIT", "spdx": "MIT"}}
    categories = {"First Half": [f"{name}-outline" for name in CONCEPTS[:32]], "Rest": [f"{CONCEPTS[40]}-outline"]}
    return {
        "prefix": prefix,
        "info": {**about, "category": "UI 24px", **info},
        "icons": icons,
        "width": 24,
        "height": 24,
        "categories": categories,
    }


def sets() -> dict[str, dict[str, Any]]:
    """Six sets by six artists, and what is left out of a corpus: licences, withdrawn, blank, broken and equal icons."""
    found = {f"set{i}": icon_set(f"set{i}", i) for i in range(6)}
    found["free"] = icon_set("free", 7, license={"title": "NC", "spdx": "CC-BY-NC-4.0"})
    found["brands"] = icon_set("brands", 8, name="Some Brands", category="Logos", license={"spdx": "GPL-3.0"})
    found["set0"]["icons"] |= {
        "gone": {"body": drawing(1, 9), "hidden": True},
        "empty": {"body": '<path d="M0 0h1" fill="#fff"/>'},
        "broken": {"body": "<rect"},
        "copy": {"body": drawing(0, 0)},
        f"{CONCEPTS[1]}-filled": {"body": drawing(1, 0)},
    }
    for i in range(6):
        found[f"set{i}"]["icons"]["wide"] = {"body": f'<rect x="{i}" width="48" height="24"/>', "width": 48}
    return found


def write_archive(path: Path, content: dict[str, dict[str, Any]]) -> NpmPackage:
    """Write the archive; what pins it."""
    with tarfile.open(path, "w:gz") as tar:
        for name, raw in {
            "package/package.json": b"{}",
            **{f"package/json/{prefix}.json": json.dumps(one).encode() for prefix, one in content.items()},
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    return NpmPackage("@small/json", "1.0.0", path.name, f"sha512-{digest}")
