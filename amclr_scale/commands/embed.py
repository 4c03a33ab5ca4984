"""Embed a folder of images, the lines of a text file, or the pairs of a data set with a trained model.

    amclr-scale embed my_model photos/
    amclr-scale embed my_model --texts captions.txt --out captions.parquet
    amclr-scale embed my_model --shards /data/cc3m --side image --out cc3m.npy

--shards takes what data.train does: an index, a folder, brace patterns, urls. Rows are then in the order of ids, and
named by shard and key; --side text embeds each sample's first caption. Beside NAME.npy (float32, one row each, unit
length) a NAME.txt names the rows; a .parquet (needs pyarrow) holds both columns, `name` and `embedding`. NAME.npy.json
says which model they are of, and `amclr-scale search NAME.npy "a red apple"` finds the nearest. Rows are written as
they are made. What --shards gives can be data.image_reference or data.text_reference of a run on the same shards.

    amclr-scale embed --config RECIPE [key=value ...]

writes the files that data.features of a recipe names: what its frozen towers give for every sample of data.train,
before their heads. Training with the same recipe then reads them instead of running these towers.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import amclr_scale
from amclr_scale.commands.words import check_at_least, check_place, command_parser, run_command
from amclr_scale.data.formats.picture_files import find_pictures, is_picture
from amclr_scale.data.formats.shards import shard_suffixes
from amclr_scale.data.names import short_names
from amclr_scale.data.sources import INDEX_NAMES
from amclr_scale.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from amclr_scale.trained.model import Model

SHOWN = 10  # pictures that cannot be used, told by name
Rows = Iterator[tuple[list[str], npt.NDArray[np.float32]]]


def listed(model: "Model", args: argparse.Namespace) -> tuple[int, Rows]:
    """The images below a folder in the order of their names, or the lines of a file: how many at most, and rows."""
    size = args.batch_size
    if args.texts:
        names = lines_of(args.texts)
    else:
        pictures = find_pictures(Path(args.images))
        if pictures.passed_over:
            print(pictures.told(), file=sys.stderr)
        names = [str(path) for path in pictures.pictures]
    if not names:
        if args.texts:
            raise UserError(f"--texts: expected a file with lines, got {args.texts}")
        given = f"got {args.images}; shards are --shards {args.images}"
        raise UserError(f"--images: expected a folder with images, {given}")
    check_names(args.out, names)
    parts = (names[start : start + size] for start in range(0, len(names), size))
    if args.texts:
        return len(names), ((part, model.encode_text(part, size).numpy()) for part in parts)
    return len(names), ((kept, model.encode_image(pixels, size).numpy()) for kept, pixels in usable(model, parts))


def usable(model: "Model", parts: Iterable[list[str]]) -> Iterator[tuple[list[str], "Tensor"]]:
    """The pictures of each part that can be decoded, and their pixels. At the end the others are told.

    Raises:
        UserError: there is none.
    """
    import torch

    found, bad = 0, []
    for part in parts:
        decoded: dict[str, Tensor] = {}
        for path in part:
            try:
                decoded[path] = model.pixels(path)
            except UserError as error:
                bad.append(str(error))
        found += len(decoded)
        if decoded:
            yield list(decoded), torch.stack(list(decoded.values()))
    if not found:
        raise UserError(f"{bad[0]}; nor can any other of the {len(bad)} pictures" if bad[1:] else bad[0])
    if bad:
        more = f"\n... and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else ""
        print("\n".join(bad[:SHOWN]) + f"{more}\n{len(bad):,} pictures have no row", file=sys.stderr)


def lines_of(file: str) -> list[str]:
    """The lines of a text file as wc counts them: a rarer separator inside a caption makes no row of its own."""
    try:
        text = Path(file).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--texts: {file}: expected a file with one text a line, in UTF-8, got: {error}") from error
    return text.removesuffix("\n").split("\n") if text else []


def of_shards(model: "Model", args: argparse.Namespace) -> tuple[int, Rows, str]:
    """The samples of a data set in the order of ids: how many, their rows, and the data set's fingerprint."""
    from amclr_scale.data.evaluation_split import EvaluationSplit

    caption = args.caption or model.config.data.caption
    data = model.config.data.model_copy(update={"caption": caption})
    split = EvaluationSplit(args.shards, data, reading=model.reading, key="--shards")

    def rows() -> Rows:
        if args.side == "text":
            for start in range(0, split.num_samples, args.batch_size):
                part = split.captions[start : start + args.batch_size]
                ids = range(start, start + len(part))
                yield [split.key(sample) for sample in ids], model.encode_text(part, args.batch_size).numpy()
        else:
            for batch in split.batches(args.batch_size):
                embedded = model.encode_image(batch.images[0], args.batch_size).numpy()
                yield [split.key(sample) for sample in batch.ids.tolist()], embedded

    return split.num_samples, rows(), split.index.fingerprint


def check_names(out: Path, names: Iterable[str]) -> None:
    """Refuse names of rows that the file of names cannot hold: a line each, or a column of UTF-8.

    Raises:
        UserError: which one, and what to do.
    """
    for name in names:
        if out.suffix == ".npy" and "\n" in name:
            raise UserError(
                f"--out: expected names without a line break, since {out.with_suffix('.txt')} has one a line, got "
                f"{name!r}; rename it, or write NAME.parquet"
            )
        if out.suffix != ".npy" and any("\ud800" <= one <= "\udfff" for one in name):
            raise UserError(
                f"--out: expected names in UTF-8, as {out} holds them, got {name!r}; rename it, or write NAME.npy"
            )


def write(out: Path, total: int, width: int, rows: Rows) -> int:
    """One file or two, by the ending, batch by batch; they get their names when all is written. Returns the rows.

    Args:
        total: rows at most.
    """
    with ExitStack() as stack:
        new = stack.enter_context(unfinished(out))
        if out.suffix != ".npy":
            pa, pq = _pyarrow(out)
            schema = pa.schema([("name", pa.string()), ("embedding", pa.list_(pa.float32(), width))])
            done = 0
            with pq.ParquetWriter(new, schema) as writer:
                for names, embedded in rows:
                    column = pa.FixedSizeListArray.from_arrays(pa.array(embedded.reshape(-1)), width)
                    writer.write_table(pa.table({"name": names, "embedding": column}, schema=schema))
                    done += len(names)
            return done
        new_names = stack.enter_context(unfinished(out.with_suffix(".txt")))
        with new_names.open("w", encoding="utf-8", errors="surrogateescape") as names_file, new.open("w+b") as file:
            done = 0
            header(file, total, width)
            for names, embedded in rows:
                check_names(out, names)
                file.write(np.asarray(embedded, np.float32).tobytes())
                done += len(names)
                names_file.write("".join(f"{name}\n" for name in names))
            file.seek(0)
            header(file, done, width)  # as long as the first: numpy leaves room for a number that grows
        return done


def header(file: IO[bytes], rows: int, width: int, kind: str = "<f4") -> None:
    """What a .npy begins with; `kind` is numpy's of its numbers."""
    formats: Any = np.lib.format  # typed in some versions of numpy only
    formats.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": (rows, width)})


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A name beside `path` to write under, which becomes `path` at the end, and nothing after an error."""
    new = path.with_name(f".{path.name}.unfinished")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _pyarrow(out: Path) -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(f"--out: {out} needs pyarrow: pip install pyarrow ({error})") from error


def of_recipe(args: argparse.Namespace) -> None:
    """`--config`: features of a recipe's frozen towers."""
    from amclr_scale.commands.embedding.of_towers import run  # which needs what trains

    words = [word for word in (args.model, args.folder, *args.words) if word is not None]
    run(args.config, words, device=args.device, batch_size=args.batch_size)


def work(argv: list[str]) -> None:
    """Check the command, embed, write."""
    parser = command_parser("embed", __doc__)
    parser.add_argument("model", nargs="?", help="a run folder, a checkpoint, or an exported folder")
    what = parser.add_mutually_exclusive_group()
    parser.add_argument("folder", nargs="?", help="of images; the same as --images")
    what.add_argument("--images", help="a folder")
    what.add_argument("--texts", help="a file with one text a line")
    what.add_argument("--shards", help="a data set, named as in data.train")
    what.add_argument(
        "--config", metavar="RECIPE", help="a recipe with data.features, and words that override its keys"
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=["image", "text"], default="image", help="with --shards: which half")
    parser.add_argument("--caption", help="with --shards: where captions are, as data.caption; default: the model's")
    parser.add_argument("--out", type=Path, help="NAME.npy or NAME.parquet (default: what is embedded, .npy)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_intermixed_args(argv)
    check_at_least(args, 1, "batch_size")
    if args.config:
        of_recipe(args)
        return
    given = [args.folder, args.images, args.texts, args.shards]
    if args.model is None or args.words or len([one for one in given if one]) != 1:
        parser.error("expected MODEL and one of a folder of images, --texts and --shards; or --config RECIPE")
    args.images = args.images or args.folder
    given = args.images or args.texts or args.shards
    stem = short_names([given])[given].replace("/", "_")
    args.out = args.out or Path(f"{Path(stem).stem}_embedded.npy" if args.texts else f"{stem}.npy")
    described, rows_named = args.out.with_name(f"{args.out.name}.json"), args.out.with_suffix(".txt")
    if args.texts and rows_named.absolute() == Path(args.texts).absolute():
        raise UserError(f"--out: {args.out} would write names of rows over {args.texts}; choose another name")
    if args.out.suffix == ".npy" and rows_named.exists() and not described.exists():
        raise UserError(
            f"--out: {args.out} would write names of rows over {rows_named}, which is of no earlier embeddings "
            f"({described.name} is not there); choose another name"
        )
    if args.images and not Path(args.images).is_dir():
        fix = f"shards are --shards {args.images}"
        if Path(args.images).is_file() and not args.images.endswith((*shard_suffixes(), *INDEX_NAMES)):
            fix = f"a file with a text on each line is --texts {args.images}"
            if is_picture(Path(args.images)):
                fix = "put the picture into one"
        raise UserError(f"--images: expected a folder, got {args.images}; {fix}")
    if args.out.suffix not in (".npy", ".parquet"):
        raise UserError(f"--out: expected a name that ends in .npy or .parquet, got {args.out}")
    check_place("--out", args.out)
    if args.out.suffix == ".parquet":
        _pyarrow(args.out)  # before the work
    model = amclr_scale.load(args.model, args.device)
    from amclr_scale.data.beside.references import FINGERPRINT
    from amclr_scale.trained.model import DIGEST

    about = {"model": str(Path(args.model).absolute()), DIGEST: model.digest(), "folder": str(Path.cwd())}
    if args.shards:
        total, rows, about[FINGERPRINT] = of_shards(model, args)
    else:
        total, rows = listed(model, args)
    total = write(args.out, total, model.config.model.embedding_width, rows)
    described.write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    print(f"{total:,} rows -> {args.out}")


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 a mistake, told in words, 1 a full or closed disk."""
    return run_command(work, argv)
