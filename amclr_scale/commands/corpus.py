"""Make a corpus from public packages.

    amclr-scale corpus icons --out corpora/icons --workers 2     350,000 icons with names, by 200 artists
    amclr-scale corpus emoji --out /tmp/emoji                     what ships with this package, made again

icons: the archive comes from npm's registry (104 MB, checked), or from a file. Drawing needs `pip install
'amclr_scale[corpus]'`. An interrupted run goes on; any number of processes writes the same bytes. docs/data.md says
what is in it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from amclr_scale.commands.words import run_command
from amclr_scale.errors import UserError, did_you_mean, one_of


def _icons(argv: list[str]) -> None:
    from amclr_scale.corpora import icons
    from amclr_scale.corpora.rendering import FORMATS

    parser = argparse.ArgumentParser(
        prog="amclr-scale corpus icons", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the splits, the credits and the report")
    parser.add_argument("--archive", type=Path, help=f"{icons.PACKAGE.file}; default: fetched by npm")
    parser.add_argument("--size", type=int, default=48, help="pixels of a side")
    parser.add_argument("--form", choices=sorted(FORMATS), default="webp", help="of the pictures; both without loss")
    parser.add_argument("--per-shard", type=int, default=10_000, help="samples of a shard")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: this one)")
    arguments = parser.parse_args(argv)
    for option, least in (("size", 8), ("per_shard", 1), ("workers", 0)):
        if getattr(arguments, option) < least:
            raise UserError(f"--{option.replace('_', '-')}: expected {least} or more, got {getattr(arguments, option)}")
    settings = icons.Settings(arguments.size, arguments.form, arguments.per_shard)
    report = icons.make(arguments.out, settings, arguments.archive, arguments.workers)
    why = ", ".join(f"{n:,} {reason}" for reason, n in report["rejected"].items())
    print(f"{arguments.out}: read {report['read']:,} icons, kept {report['kept']:,} ({why})")
    print(", ".join(f"{split} {about['samples']:,}" for split, about in report["splits"].items()))


def _emoji(argv: list[str]) -> None:
    from amclr_scale.corpora import emoji

    emoji.work(argv)


CORPORA: dict[str, Callable[[list[str]], None]] = {"icons": _icons, "emoji": _emoji}


def work(argv: list[str]) -> None:
    """What `main` does, without the words for mistakes."""
    usage = f"usage: amclr-scale corpus {{{','.join(CORPORA)}}} ...\n\n{__doc__}"
    if argv[:1] in (["-h"], ["--help"]):
        print(usage)
        return
    if not argv:
        raise UserError(f"amclr-scale corpus: expected {one_of(CORPORA)}\n\n{usage}")
    if argv[0] not in CORPORA:
        raise UserError(
            f"amclr-scale corpus: expected {one_of(CORPORA)}, got {argv[0]!r}{did_you_mean(argv[0], CORPORA)}"
        )
    CORPORA[argv[0]](argv[1:])


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 a mistake, told in words, 1 a full or closed disk."""
    return run_command(work, argv)
