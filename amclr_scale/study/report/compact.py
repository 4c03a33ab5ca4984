"""A report in the form that is committed: the same words and tables, at most three pictures, no CSV.

The numbers of every table and figure are in report.json. Pictures that are left out are named where they would stand;
the whole report is written again from the study's folder with `amclr-scale study PLAN --report`.
"""

import io
from collections.abc import Sequence

from PIL import Image

from amclr_scale.study.report.document import Document, Figure, Table

MOST_PICTURES = 3
# What a study is about, first to last: its scores, what only some studies measure, its comparisons.
HEADLINE = (
    "by_batch_",
    "by_ranks",
    "gradient_batch_and_negatives",
    "probe_gradient_by_batch",
    "probe_estimator_error",
    "probe_gradient_cosine",
    "differences_pairs_",
    "differences_reference_",
    "differences_same_batch_",
)
NOTE = (
    "This is the short form of the report: all of its words and tables, at most three of its pictures. The numbers "
    "behind every table and picture are in [report.json](report.json). `amclr-scale study PLAN --report` writes the "
    "whole of it, with every picture on one page and a CSV file for each, from the folder of the runs."
)


def headline(figures: Sequence[Figure]) -> list[Figure]:
    """The pictures that a reader needs most, at most three, in the order of the report."""
    telling = [figure for figure in figures if not _one_batch_size(figure)] or list(figures)
    chosen = [next((one for one in telling if one.name.startswith(kind)), None) for kind in HEADLINE]
    wanted = dict.fromkeys([*(one.name for one in chosen if one), *(one.name for one in telling)])
    names = list(wanted)[:MOST_PICTURES]
    return [figure for figure in figures if figure.name in names]


def palette_png(png: bytes) -> bytes:
    """A drawing with 64 colours, which are enough for lines on white: a quarter of the bytes."""
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def _one_batch_size(figure: Figure) -> bool:
    """Whether a figure over batch sizes has one of them only, so that its axis says nothing."""
    over_batches = figure.name.startswith("by_batch_") or figure.name.endswith("_by_batch")
    return over_batches and len({row.get("global_batch_size") for row in figure.raw}) < 2


def compact(report: Document) -> str:
    """The report as Markdown with the headline's pictures only, and without links to CSV files."""
    shown = {figure.name for figure in headline(list(report.figures.values()))}
    title, *rest = report.parts
    blocks: list[str] = [title if isinstance(title, str) else title.markdown(), NOTE]
    left_out: list[Figure] = []
    for part in rest:
        if isinstance(part, Figure) and part.name not in shown:
            left_out.append(part)
            continue
        if part and left_out:
            blocks.append(_named(left_out))
            left_out = []
        blocks.append(part.markdown() if isinstance(part, Table | Figure) else part)
    if left_out:
        blocks.append(_named(left_out))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _named(figures: Sequence[Figure]) -> str:
    """What stands in the place of pictures that are left out."""
    return "\n".join(["Not drawn here:", "", *(f"- `{one.name}`: {one.caption}" for one in figures)])
