"""Write the index of some shards: counts, a fingerprint, and where every member lies.

    amclr-scale shards index FOLDER                               FOLDER/index.json, or index.bin
    amclr-scale shards index '/data/cc3m/{00000..00331}.tar' --workers 16
    amclr-scale shards index 'https://host/{00000..00331}.tar' --out index/index.json

Shards may be .tar or .tar.gz, local or remote. Each is read once, its member table is written at once (members/ beside
the index), and an interrupted run goes on where it stopped. Damage and repeated keys are listed and do not stop the
run: what is whole can be trained on, and data.max_bad_fraction judges the rest.

More than 10,000 shards are written in a binary form, of which each rank reads a part; the ending of --out (.json or
.bin) says otherwise. Both give the same order and ids.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from amclr_scale.commands.words import check_at_least, command_parser, run_command
from amclr_scale.config import schema
from amclr_scale.data.index import Index
from amclr_scale.data.indexes.binary import BINARY, MANY, write_binary_index
from amclr_scale.data.indexes.entries import Shard, write_index
from amclr_scale.data.indexing import build
from amclr_scale.data.sources import INDEX_NAMES, is_remote, resolve_all, shards_in
from amclr_scale.data.storage import make_storage
from amclr_scale.errors import UserError


def shards_of(names: list[str]) -> list[str]:
    """The shards themselves, also where a folder has an index already."""
    urls = list[str]()
    for name in names:
        folder = Path(name).expanduser()
        local = not is_remote(name) and folder.is_dir()
        urls += shards_in(folder) if local else [url for source in resolve_all(name, "shards") for url in source.urls]
    if not urls:
        raise UserError(f"shards: expected tar shards, found none in {', '.join(names)}")
    return urls


def table_name(url: str) -> str:
    """A file name for a shard's member table."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", url.rstrip("/").rsplit("/", 1)[-1]) + ".npz"


def index_name(shards: int) -> str:
    """What an index of so many shards is called if nobody says otherwise."""
    return INDEX_NAMES[shards > MANY]


def repeated(shard: Shard) -> Iterator[str]:
    """How many samples of a shard have a key that it had before, in words."""
    if n := shard.repeated:
        yield (
            f"{n:,} of {shard.num_samples:,} samples {'have keys' if n > 1 else 'has a key'} that the shard had "
            "before: training counts them as bad (data.max_bad_fraction), and evaluation refuses them; give each its "
            "own key"
        )


def work(argv: list[str]) -> None:
    """What `main` does, without the words for mistakes."""
    parser = command_parser("shards index", __doc__)
    parser.add_argument("shards", nargs="+", help="a folder, paths with brace patterns, or urls")
    parser.add_argument("--out", type=Path, help="index file to write, .json or .bin (default: beside the first shard)")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: this one)")
    parser.add_argument("--cache", help="folder for fetched and unpacked shards, as data.cache")
    parser.add_argument("--allow-pipe", action="store_true", help="run the commands of pipe: urls")
    arguments = parser.parse_args(argv)
    check_at_least(arguments, 0, "workers")
    urls = shards_of(arguments.shards)
    if arguments.out is None and is_remote(urls[0]):
        raise UserError("--out: expected a file to write, since the shards are remote")
    out = (arguments.out or Path(urls[0]).absolute().parent / index_name(len(urls))).absolute()
    if out.suffix not in (".json", BINARY):
        raise UserError(f"--out: expected a file that ends in .json or {BINARY}, got {out}")
    if len({table_name(url) for url in urls}) != len(urls):
        raise UserError(
            "shards: expected different file names (member tables are named after them); index each folder alone"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    storage = make_storage(schema.Data(cache=arguments.cache, allow_pipe=arguments.allow_pipe))
    urls = [url if is_remote(url) else str(Path(url).absolute()) for url in urls]
    shards = build(urls, [out.parent / "members" / table_name(url) for url in urls], storage, arguments.workers)
    if out.suffix == BINARY:
        write_binary_index(out, shards)
    else:
        write_index(out, out.parent.name, shards)
    index = Index(shards, storage)
    for shard in shards:
        for words in [*shard.damage, *repeated(shard)]:
            print(f"{shard.url}: {words}", file=sys.stderr)
    for other in (out.with_name(name) for name in INDEX_NAMES if out.name in INDEX_NAMES and name != out.name):
        if other.is_file():
            print(f"{other} is there too: remove one of the two, or name one in data.train", file=sys.stderr)
    print(f"{out}: {index.num_samples:,} samples in {len(shards):,} shards, fingerprint {index.fingerprint}")


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 a mistake, told in words, 1 a full or closed disk."""
    return run_command(work, argv)
