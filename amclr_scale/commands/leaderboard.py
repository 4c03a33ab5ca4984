"""Compare runs: suites, retrieval, samples seen, batch and objective, sorted by a column.

    amclr-scale leaderboard runs/*
    amclr-scale leaderboard runs/A runs/B --suite datacomp38 --sort "Average over 38" --format markdown
    amclr-scale leaderboard runs/* --sort samples --format csv --output runs.csv

Reads what `amclr-scale evaluate RUN --suite NAME --data FOLDER` and training have left in the folders. Columns whose
numbers were taken on other data, over other data sets or by other settings are marked, and it is said why.
"""

import sys
from pathlib import Path

from amclr_scale.commands.words import command_parser, run_command
from amclr_scale.errors import UserError
from amclr_scale.evaluation.suites.catalogue import SUITES
from amclr_scale.evaluation.suites.leaderboard import leaderboard, read_rows
from amclr_scale.evaluation.suites.leaderboard_formats import FORMATS


def _run(argv: list[str]) -> None:
    parser = command_parser("leaderboard", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or folders of evaluate --output")
    parser.add_argument("--suite", action="append", default=[], choices=list(SUITES), help="only this; may be repeated")
    parser.add_argument("--sort", metavar="COLUMN", help="a column, or how its name ends; arm, batch, samples")
    parser.add_argument("--format", choices=list(FORMATS), default="text")
    parser.add_argument("--output", metavar="FILE", help="write there instead of printing")
    options = parser.parse_args(argv)
    written = FORMATS[options.format](leaderboard(read_rows(options.runs, options.suite), options.sort))
    if options.output is None:
        sys.stdout.write(written)
        return
    file = Path(options.output).expanduser()
    if not file.parent.is_dir():
        raise UserError(f"--output: expected a file in a folder that exists, got {options.output}")
    file.write_text(written, "utf-8")
    print(f"{file}: {options.format}")


def main(argv: list[str]) -> int:
    """Run, and say a user's mistake in one line."""
    return run_command(_run, argv, "--output")
