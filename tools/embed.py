"""Embed a folder of images, or the lines of a text file, with a trained model.

    python tools/embed.py my_model --images photos/ --out photos.npy
    python tools/embed.py my_model --texts captions.txt --out captions.parquet

Beside NAME.npy (float32, one row each, unit length) a NAME.txt names the rows; a .parquet (needs pyarrow) holds both
columns, `name` and `embedding`.
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import numpy.typing as npt

import amclr_scale
from amclr_scale.data.indexing import IMAGE_EXTENSIONS
from amclr_scale.errors import UserError


def names_of(args: argparse.Namespace) -> list[str]:
    """What is embedded: the images below a folder in the order of their names, or the lines of a file."""
    if args.texts:
        return Path(args.texts).read_text("utf-8").splitlines()
    found = sorted(p for p in Path(args.images).rglob("*") if p.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
    if not found:
        raise UserError(f"--images: expected a folder with images ({', '.join(IMAGE_EXTENSIONS)}), got {args.images}")
    return [str(path) for path in found]


def write(out: Path, names: list[str], rows: npt.NDArray[np.float32]) -> None:
    """One file or two, by the ending."""
    if out.suffix == ".npy":
        np.save(out, rows)
        out.with_suffix(".txt").write_text("\n".join(names) + "\n", "utf-8")
        return
    if out.suffix != ".parquet":
        raise UserError(f"--out: expected a name that ends in .npy or .parquet, got {out}")
    try:
        pa, pq = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(f"--out: {out} needs pyarrow: pip install pyarrow ({error})") from error
    flat = pa.array(rows.reshape(-1))
    pq.write_table(pa.table({"name": names, "embedding": pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])}), out)


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 a mistake, told in words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run folder, a checkpoint, or an exported folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", help="a folder")
    what.add_argument("--texts", help="a file with one text a line")
    parser.add_argument("--out", type=Path, required=True, help="NAME.npy or NAME.parquet")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    try:
        if args.out.suffix not in (".npy", ".parquet"):
            raise UserError(f"--out: expected a name that ends in .npy or .parquet, got {args.out}")
        names = names_of(args)
        model = amclr_scale.load(args.model, args.device)
        encode = model.encode_text if args.texts else model.encode_image
        write(args.out, names, encode(names, batch_size=args.batch_size).numpy())
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(names)} rows -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
