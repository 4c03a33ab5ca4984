"""One command makes the report of a study: `write_report(folder)`.

    FOLDER/report/index.html     self-contained: pictures inside, nothing fetched, readable in print
    FOLDER/report/report.md      the same, with a PNG per figure beside it
    FOLDER/report/*.csv          one per table and per figure, all digits
    FOLDER/report/report.json    the same records in one file

It can be written at any time: cells without a result are listed with the reason. A `discussion.md` in the report's
folder, written by hand, becomes a chapter of it. Files that the report does not write are left alone.
"""

from importlib.util import find_spec
from pathlib import Path

from amclr_scale.errors import UserError

NEEDED = {"matplotlib": "matplotlib", "scipy": "scipy", "markdown_it": "markdown-it-py"}


def write_report(folder: Path) -> Path:
    """Read a study's folder and write its report; returns the path of index.html.

    Raises:
        UserError: the folder holds no study, a file of it cannot be read, or a package of the extra is missing.
    """
    absent = [name for module, name in NEEDED.items() if find_spec(module) is None]
    if absent:
        raise UserError(
            f"{', '.join(absent)}: expected for a study's report, got none installed; pip install 'amclr_scale[report]'"
        )
    from amclr_scale.study.analysis.reading import read_study
    from amclr_scale.study.report.compose import compose
    from amclr_scale.study.report.document import csv_text, json_text, page

    target = folder / "report"
    study = read_study(folder)
    discussion = target / "discussion.md"
    composed = compose(study, discussion.read_text("utf-8") if discussion.exists() else None)
    target.mkdir(parents=True, exist_ok=True)
    for table in composed.tables:
        (target / f"{table.name}.csv").write_text(csv_text(table.raw), "utf-8")
    for figure in composed.figures.values():
        (target / f"{figure.name}.csv").write_text(csv_text(figure.raw), "utf-8")
        (target / f"{figure.name}.png").write_bytes(figure.png)
    (target / "report.json").write_text(json_text([*composed.tables, *composed.figures.values()]), "utf-8")
    (target / "report.md").write_text(composed.markdown, "utf-8")
    index = target / "index.html"
    index.write_text(page(composed.markdown, composed.figures, target), "utf-8")
    return index
