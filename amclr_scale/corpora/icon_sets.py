"""What the archive `@iconify/json` holds: sets of icons by as many artists, each with a name and a licence.

A set is one JSON file, json/PREFIX.json: `icons` (name to SVG body, and a box where it differs from the set's), `info`
(name, author, licence, category), `categories` (category to names), `suffixes` and `prefixes` (which ends of a name
tell variants of one icon apart). An icon that is `hidden` has been withdrawn by its artist.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amclr_scale.errors import UserError

# Licences by SPDX that allow pictures to be changed and passed on by anybody, with credit where they ask for it.
KEPT_LICENCES = {
    "MIT": "free, with its notice",
    "ISC": "free, with its notice",
    "BSD-3-Clause": "free, with its notice",
    "Apache-2.0": "free, with its notice",
    "MPL-2.0": "free; changed files stay under it",
    "OFL-1.1": "free; derivatives stay under it",
    "CC0-1.0": "public domain",
    "Unlicense": "public domain",
    "CC-BY-3.0": "free, with credit",
    "CC-BY-4.0": "free, with credit",
    "CC-BY-SA-3.0": "free, with credit; derivatives stay under it",
    "CC-BY-SA-4.0": "free, with credit; derivatives stay under it",
}


def why_left_out(spdx: str) -> str:
    """Why pictures of a licence are not in the corpus; "" for one that is kept."""
    if spdx in KEPT_LICENCES:
        return ""
    if "-NC" in spdx:
        return "no commercial use"
    if "-ND" in spdx:
        return "no derivatives"
    if "GPL" in spdx:
        return "GPL, which would bind whatever is made with the pictures"
    return "a licence that is not on the list"


@dataclass(frozen=True)
class IconSet:
    """A set without its pictures.

    Attributes:
        names: of the icons that are not withdrawn, sorted.
        hidden: how many are.
        group: the archive's own word for what the set is about (`UI 24px`, `Logos`, ...); "" without one.
        categories: name to the first of its categories, in lower case; not all sets have any.
        ends: (first words, last words) of names that tell variants apart, as the set itself declares them.
    """

    prefix: str
    title: str
    author: str
    author_url: str
    licence: str
    licence_title: str
    licence_url: str
    group: str
    names: tuple[str, ...]
    hidden: int
    categories: dict[str, str]
    ends: tuple[frozenset[str], frozenset[str]]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def describe(prefix: str, content: dict[str, Any]) -> IconSet:
    """What a set's JSON says about it."""
    info = content["info"]
    author, licence = info.get("author", {}), info.get("license", {})
    icons: dict[str, dict[str, Any]] = content["icons"]
    categories: dict[str, str] = {}
    for category, names in content.get("categories", {}).items():
        for name in names:
            categories.setdefault(name, category.lower())
    ends = tuple(
        frozenset(word for end in content.get(key, {}) for word in end.split("-") if word)
        for key in ("prefixes", "suffixes")
    )
    return IconSet(
        prefix=prefix,
        title=_text(info.get("name")) or prefix,
        author=_text(author.get("name")),
        author_url=_text(author.get("url")),
        licence=_text(licence.get("spdx")),
        licence_title=_text(licence.get("title")),
        licence_url=_text(licence.get("url")),
        group=_text(info.get("category")),
        names=tuple(sorted(name for name, icon in icons.items() if not icon.get("hidden"))),
        hidden=sum(bool(icon.get("hidden")) for icon in icons.values()),
        categories=categories,
        ends=(ends[0], ends[1]),
    )


def unpack(archive: Path, folder: Path) -> list[IconSet]:
    """Write PREFIX.json of every set into `folder`, and describe the sets, by prefix.

    Raises:
        UserError: there are none in the archive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = list[IconSet]()
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            file = tar.extractfile(member) if path.parts[1:2] == ("json",) and path.suffix == ".json" else None
            if file is not None:
                raw = file.read()
                found.append(describe(path.stem, json.loads(raw)))
                (folder / path.name).write_bytes(raw)
    if not found:
        raise UserError(f"--archive: {archive}: expected sets of icons at package/json/*.json, found none")
    return sorted(found, key=lambda one: one.prefix)


def drawings(file: Path, size: int) -> Iterator[tuple[str, str]]:
    """(name, SVG of size x size) of the icons of a set that are not withdrawn, by name; the whole box, centred."""
    content = json.loads(file.read_bytes())
    for name, icon in sorted(content["icons"].items()):
        if icon.get("hidden"):
            continue
        box = {key: icon.get(key, content.get(key)) for key in ("left", "top", "width", "height")}
        left, top = (box[key] or 0 for key in ("left", "top"))
        width, height = (box[key] or 16 for key in ("width", "height"))
        yield (
            name,
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{size}" height="{size}" color="#000">{icon["body"]}</svg>',
        )
