"""One command makes the report of a study: `write_report(folder)`.

    FOLDER/report/index.html     self-contained: pictures inside, nothing fetched, readable in print
    FOLDER/report/report.md      the same, with a PNG per figure beside it
    FOLDER/report/*.csv          one per table and per figure, all digits
    FOLDER/report/report.json    the same records in one file

`publish_report(folder, target)` writes the form that is committed: report.md with at most three pictures, report.json
with six digits of every number.

It can be written at any time: cells without a result are listed with the reason. A `discussion.md` in the report's
folder, written by hand, becomes a chapter of it. Files that the report does not write are left alone.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from amclr_scale.errors import UserError

if TYPE_CHECKING:
    from amclr_scale.study.report.document import Document

NEEDED = {"matplotlib": "matplotlib", "scipy": "scipy", "markdown_it": "markdown-it-py"}
PUBLISHED_DIGITS = 6


def write_report(folder: Path) -> Path:
    """Read a study's folder and write its report; returns the path of index.html.

    Raises:
        UserError: the folder holds no study, a file of it cannot be read, or a package of the extra is missing.
    """
    target = folder / "report"
    _write(_composed(folder, target), target)
    return target / "index.html"


def publish_report(folder: Path, target: Path) -> Path:
    """Write a study's report whole, and its short form into another folder; returns the path of that report.md.

    A discussion.md in the target's folder is taken where the report's own folder has none, and is left there: it is the
    part of a report that no run can write again. Pictures of an earlier report that are no longer shown are deleted.

    Raises:
        UserError: as `write_report`; or the target is the report's own folder, or cannot be written.
    """
    whole = folder / "report"
    if target.resolve() == whole.resolve():
        raise UserError(f"--publish: expected another folder than that of the whole report, got {target}")
    report = _composed(folder, whole, target)
    _write(report, whole)
    from amclr_scale.study.report.compact import compact, headline, palette_png
    from amclr_scale.study.report.document import json_text

    pictures = headline(list(report.figures.values()))
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in report.figures.keys() - {figure.name for figure in pictures}:
            (target / f"{name}.png").unlink(missing_ok=True)
        for figure in pictures:
            (target / f"{figure.name}.png").write_bytes(palette_png(figure.png))
        numbers = json_text([*report.tables, *report.figures.values()], digits=PUBLISHED_DIGITS)
        (target / "report.json").write_text(numbers, "utf-8")
        (target / "report.md").write_text(compact(report), "utf-8")
        discussion = whole / "discussion.md"
        if discussion.exists():
            (target / "discussion.md").write_text(discussion.read_text("utf-8"), "utf-8")
    except OSError as error:
        raise UserError(f"--publish: {target} cannot be written: {error}") from error
    return target / "report.md"


def _composed(folder: Path, *discussed: Path) -> "Document":
    """The report of a study, with the first discussion.md that one of the folders has."""
    absent = [name for module, name in NEEDED.items() if find_spec(module) is None]
    if absent:
        raise UserError(
            f"{', '.join(absent)}: expected for a study's report, got none installed; pip install 'amclr_scale[report]'"
        )
    from amclr_scale.study.analysis.reading import read_study
    from amclr_scale.study.report.compose import compose

    study = read_study(folder)
    found = next((path for place in discussed if (path := place / "discussion.md").exists()), None)
    return compose(study, found.read_text("utf-8") if found else None)


def _write(report: "Document", target: Path) -> None:
    from amclr_scale.study.report.document import csv_text, json_text, page

    target.mkdir(parents=True, exist_ok=True)
    for table in report.tables:
        (target / f"{table.name}.csv").write_text(csv_text(table.raw), "utf-8")
    for figure in report.figures.values():
        (target / f"{figure.name}.csv").write_text(csv_text(figure.raw), "utf-8")
        (target / f"{figure.name}.png").write_bytes(figure.png)
    (target / "report.json").write_text(json_text([*report.tables, *report.figures.values()]), "utf-8")
    (target / "report.md").write_text(report.markdown, "utf-8")
    (target / "index.html").write_text(page(report.markdown, report.figures, target), "utf-8")
