"""The short form of a report: what it leaves out it names, what it links to is there."""

import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from amclr_scale.commands import study as command
from amclr_scale.errors import UserError
from amclr_scale.study.report import curves, plots, probe_figures, rank_scaling
from amclr_scale.study.report.compact import MOST_PICTURES, compact, headline, palette_png
from amclr_scale.study.report.compose import demoted
from amclr_scale.study.report.document import Document, Figure, Table
from amclr_scale.study.report.write import publish_report
from tests.study.synthetic import make_study

COMMITTED = Path(__file__).parents[2] / "docs" / "studies"


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGBA", (8, 4), (200, 30, 60, 255)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def quickly_drawn(monkeypatch):
    """Figures with their numbers and a picture of a few pixels."""

    def finish(name, caption, figure, raw):
        plots.pyplot().close(figure)
        return Figure(name, caption, raw, png(), b"<svg/>")

    for module in (plots, curves, probe_figures, rank_scaling):
        monkeypatch.setattr(module, "finish", finish)


def figure(name: str, *batches: int) -> Figure:
    return Figure(name, f"caption of {name}", [{"global_batch_size": batch} for batch in batches], png(), b"")


def linked(markdown: str) -> list[str]:
    return [name for name in re.findall(r"\]\(([^)#]+)\)", markdown) if "://" not in name]


def test_pictures_that_are_left_out_are_named_where_they_would_stand():
    report = Document()
    report.say("# Title", "## One")
    report.figure(figure("by_batch_score", 16, 32))
    report.say("")
    report.figure(figure("memory", 16))
    report.figure(figure("throughput", 16))
    report.table(Table("runs", ["a"], [["1"]], [{"a": 1}]))
    report.figure(figure("by_ranks"))
    report.figure(figure("differences_reference_score"))
    report.figure(figure("differences_same_batch_score"))
    text = compact(report)
    assert linked(text) == [
        "report.json", "by_batch_score.png", "by_ranks.png", "differences_reference_score.png",
    ]  # fmt: skip
    memory, throughput = "- `memory`: caption of memory", "- `throughput`: caption of throughput"
    assert f"Not drawn here:\n\n{memory}\n{throughput}\n\n| a |" in text
    assert text.endswith(
        "Not drawn here:\n\n- `differences_same_batch_score`: caption of differences_same_batch_score\n"
    )
    assert text.count("Not drawn here:") == 2


def test_an_axis_of_one_batch_size_is_no_headline():
    figures = [figure("by_batch_score", 16, 16), figure("memory", 16), figure("probe_gradient_by_batch", 16)]
    assert [one.name for one in headline([*figures, figure("probe_estimator_error", 16)])] == [
        "memory", "probe_estimator_error",
    ]  # fmt: skip
    assert [one.name for one in headline([figure("by_batch_score", 16)])] == ["by_batch_score"]
    assert headline([]) == []


@pytest.mark.slow
@pytest.mark.usefixtures("quickly_drawn")
def test_one_command_publishes_a_report_and_keeps_its_discussion(tmp_path, capsys):
    folder = make_study(tmp_path / "one", arms=("clip", "dcl"), batches=(128, 256), seeds=(0, 1), curves=True)
    target = tmp_path / "docs" / "one"
    target.mkdir(parents=True)
    (target / "discussion.md").write_text("Told by hand: ![mine](mine.png)\n")
    for stale in ("memory.png", "mine.png"):
        (target / stale).write_bytes(png())
    assert command.report(folder, target) == 0
    assert capsys.readouterr().out == f"report: {target / 'report.md'}\n"
    text = (target / "report.md").read_text()
    assert "## Discussion\n\nTold by hand" in text
    assert (target / "discussion.md").exists()
    assert (target / "mine.png").exists(), "a picture that the report does not make is not its to delete"
    assert not (target / "memory.png").exists()
    pictures = [name for name in linked(text) if name.endswith(".png") and name != "mine.png"]
    assert len(pictures) == MOST_PICTURES
    assert {file.name for file in target.iterdir()} == {
        "report.md", "report.json", "discussion.md", "mine.png", *pictures,
    }  # fmt: skip
    whole = (folder / "report" / "report.md").read_text()
    assert "Told by hand" in whole
    short, long = ((place / "report.json").read_text() for place in (target, folder / "report"))
    assert json.loads(short) == json.loads(long, parse_float=lambda digits: float(f"{float(digits):.6g}"))
    assert len(short) < len(long)
    rows = [line for line in whole.splitlines() if line.startswith("| ")]
    assert [line for line in text.splitlines() if line.startswith("| ")] == rows


def test_the_short_form_does_not_overwrite_the_whole(tmp_path):
    with pytest.raises(UserError, match="--publish: expected another folder"):
        publish_report(tmp_path, tmp_path / "report")


def test_a_palette_keeps_the_colours_of_a_drawing():
    with Image.open(io.BytesIO(palette_png(png()))) as small:
        assert small.mode == "P"
        assert small.convert("RGB").getpixel((3, 2)) == (200, 30, 60)


@pytest.mark.parametrize("folder", sorted(COMMITTED.iterdir()), ids=lambda folder: folder.name)
def test_a_committed_study_is_in_the_short_form(folder):
    text = (folder / "report.md").read_text()
    pictures = [name for name in linked(text) if name.endswith(".png")]
    assert len(pictures) <= MOST_PICTURES
    assert {file.name for file in folder.iterdir()} == {"report.md", "report.json", "discussion.md", *pictures}
    for name in linked(text):
        assert (folder / name).exists(), name
    records = json.loads((folder / "report.json").read_text())
    for name in re.findall(r"^- `(\w+)`: ", text, re.MULTILINE):
        assert records[name], name
    assert demoted((folder / "discussion.md").read_text()) in text


def test_the_documentation_is_small():
    """Pages stay small, and what a study publishes; more studies are more evidence."""
    pages, studies = 0, dict.fromkeys((folder.name for folder in COMMITTED.iterdir()), 0)
    for file in COMMITTED.parent.rglob("*"):
        if file.is_file() and COMMITTED in file.parents:
            studies[file.relative_to(COMMITTED).parts[0]] += file.stat().st_size
        elif file.is_file():
            pages += file.stat().st_size
    assert pages < 0.8e6
    assert max(studies.values()) < 0.5e6, studies
    assert sum(studies.values()) < 0.3e6 * len(studies)
