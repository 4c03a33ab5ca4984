"""Find what is nearest to a text or a picture among embeddings that `amclr-scale embed` has written.

    amclr-scale embed runs/first photos/            # writes photos.npy, photos.txt, photos.npy.json
    amclr-scale search photos.npy "a red apple"
    amclr-scale search photos.npy holiday.jpg --count 20

Prints cosine similarity and name of each, the nearest first, and draws the pictures into INDEX_search.png where the
names are pictures. The query is embedded by the model that the index was made with; --model names another place of it.
A model that has been trained on since, or another one, is refused: embed again.
"""

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

import amclr_scale
from amclr_scale.commands.words import check_place, command_parser, run_command
from amclr_scale.data.decoding import BadSampleError, Sample, decode
from amclr_scale.data.formats.npy import map_npy
from amclr_scale.data.indexing import IMAGE_EXTENSIONS
from amclr_scale.errors import UserError

if TYPE_CHECKING:
    from amclr_scale.trained.model import Model

Matrix = npt.NDArray[np.float32]
CELL, GAP, ACROSS = 160, 8, 6  # pixels, pixels, pictures in a row
ROWS = 2**16  # compared at once


def read_index(file: Path) -> tuple[list[str], Matrix, dict[str, Any]]:
    """Names, embeddings (n, D), and what `embed` wrote down about them.

    Raises:
        UserError: it is no such file, or a part of it is missing.
    """
    try:
        about = file.with_name(f"{file.name}.json")
        known: dict[str, Any] = json.loads(about.read_text("utf-8")) if about.is_file() else {}
        if file.suffix == ".parquet":
            table = import_module("pyarrow.parquet").read_table(file)
            flat = table.column("embedding").combine_chunks().flatten().to_numpy()
            return table.column("name").to_pylist(), flat.reshape(table.num_rows, -1), known
        # As bytes: a text may hold other marks that Python, reading text, would take for the end of a line.
        names = file.with_suffix(".txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]
        rows = map_npy(file)
        if not isinstance(rows, np.ndarray) or rows.ndim != 2:
            raise ValueError("it holds no table of numbers")
        if len(names) != len(rows):
            raise ValueError(f"{len(rows):,} rows, and {len(names):,} names in {file.with_suffix('.txt')}")
        return names, rows, known
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"index: expected NAME.npy with NAME.txt, or NAME.parquet, as amclr-scale embed writes them, got {file}: "
            f"{error}"
        ) from error


def nearest(table: Matrix, query: Matrix, count: int) -> list[tuple[int, float]]:
    """(row, cosine) of the `count` rows nearest to a query, the nearest first; of equals the earlier one."""
    scores = np.concatenate([table[start : start + ROWS] @ query for start in range(0, len(table), ROWS)])
    order = np.argsort(-scores, kind="stable")[:count]
    return [(int(row), float(scores[row])) for row in order]


def printable(name: str) -> str:
    """A name whose bytes may be no UTF-8, as any terminal takes it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def check_model(model: "Model", place: str, args: argparse.Namespace, known: dict[str, Any], width: int) -> None:
    """Refuse a model that an index was not made with: its space is another one, whatever its width.

    Args:
        place: where the model was found.
        known: what `embed` wrote down.
        width: of the index.

    Raises:
        UserError: it is another one.
    """
    if width != model.config.model.embedding_width:
        raise UserError(
            f"--model: expected one whose embeddings are {width} wide, as in {args.index}, got "
            f"{model.config.model.embedding_width} of {place}"
        )
    from amclr_scale.trained.model import DIGEST

    if DIGEST in known and known[DIGEST] != model.digest():
        raise UserError(
            f"--model: expected the model that {args.index} was made with, got {place}, which has other weights or "
            "reads in another way now; embed again, or name what it was then, such as a checkpoint"
        )


def sheet(pictures: list[tuple[Path, float]], title: str) -> Image.Image:
    """The pictures in rows, each above its similarity."""
    font = ImageFont.load_default(14)
    across, down = min(ACROSS, len(pictures)), -(-len(pictures) // ACROSS)
    page = Image.new("RGB", (GAP + across * (CELL + GAP), 40 + down * (CELL + 24 + GAP)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((GAP, GAP), title, "black", font=ImageFont.load_default(18))
    for place, (path, score) in enumerate(pictures):
        x, y = GAP + place % ACROSS * (CELL + GAP), 40 + place // ACROSS * (CELL + 24 + GAP)
        try:
            shown = decode(Sample({"jpg": path.read_bytes()}, 10**9, 1).image())
        except (OSError, BadSampleError):  # it has changed since it was embedded
            draw.text((x, y), "not readable", "black", font=font)
        else:
            shown.thumbnail((CELL, CELL))
            page.paste(shown, (x, y))
        draw.text((x, y + CELL + 2), f"{score:.3f}", "black", font=font)
    return page


def work(argv: list[str]) -> None:
    """What `main` does, without the words for mistakes."""
    parser = command_parser("search", __doc__)
    parser.add_argument("index", type=Path, help="NAME.npy or NAME.parquet of amclr-scale embed")
    parser.add_argument("query", help="a text, or the path of a picture")
    parser.add_argument("--count", type=int, default=12, help="how many (default: 12)")
    parser.add_argument("--model", help="default: the one that the index was made with")
    parser.add_argument("--sheet", type=Path, help="where the pictures go (default: INDEX_search.png)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise UserError(f"--count: expected at least 1, got {args.count}")
    check_place("--sheet", args.sheet)
    if args.sheet and args.sheet.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--sheet: expected the name of a picture, such as found.png, got {args.sheet}")
    picture = Path(args.query).is_file()
    if not picture and Path(args.query).suffix[1:].lower() in IMAGE_EXTENSIONS:
        raise UserError(f"query: expected a text, or the path of a picture, got {args.query}, where no file is")
    names, table, known = read_index(args.index)
    place = args.model or known.get("model")
    if place is None:
        raise UserError(f"--model: expected the model that {args.index} was made with, which is not written beside it")
    model = amclr_scale.load(place, args.device)
    check_model(model, place, args, known, table.shape[1])
    embedded = model.encode_image([args.query]) if picture else model.encode_text([args.query])
    found = nearest(table, embedded[0].numpy(), args.count)
    for row, score in found:
        print(f"{score:.3f}  {printable(names[row])}")
    paths = [(Path(known.get("folder", ".")) / names[row], score) for row, score in found]
    shown = [(path, score) for path, score in paths if path.is_file()]
    if shown:
        out = args.sheet or args.index.with_name(f"{args.index.stem}_search.png")
        sheet(shown, args.query).save(out)
        print(f"pictures in {out}", file=sys.stderr)


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 a mistake, told in words."""
    return run_command(work, argv, "--sheet")
