"""The report of a synthetic study: complete, self-contained, and never saying what was not measured."""

import csv
import json
import re
import statistics
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pytest

from amclr_scale.errors import UserError
from amclr_scale.study.analysis.reading import read_study
from amclr_scale.study.report.claims import NOT_MEASURED, load_claims, measures_of
from amclr_scale.study.report.compose import compose
from amclr_scale.study.report.document import csv_text, escape, page
from amclr_scale.study.report.probe_figures import show_means
from amclr_scale.study.report.write import write_report
from amclr_scale.study.statistics.decisions import estimate
from tests.study import synthetic
from tests.study.synthetic import KEYS, make_study


class Links(HTMLParser):
    """Every address that a page asks for, and every anchor."""

    def __init__(self):
        super().__init__()
        self.sources, self.links, self.ids, self.open = [], [], set(), []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids.add(found.get("id"))
        if "src" in found:
            self.sources.append(found["src"])
        if "href" in found:
            self.links.append((tag, found["href"]))
        if tag not in {"meta", "img", "br", "hr", "link"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_study(
        tmp_path_factory.mktemp("studies") / "one", arms=("clip", "dcl", "sogclr_gamma1", "amclr"), batches=(128, 256),
        failed=["dcl-B128-s0"], curves=True, probe=True,
    )  # fmt: skip
    (folder / "report").mkdir()
    (folder / "report" / "discussion.md").write_text("# What I think\n\nIt is *small*.\n\n```\n# not a heading\n```\n")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def markdown(folder):
    return (folder / "report" / "report.md").read_text()


@pytest.mark.slow
def test_the_page_is_self_contained_and_well_formed(folder):
    text = (folder / "report" / "index.html").read_text()
    parser = Links()
    parser.feed(text)
    assert not parser.open
    assert len(parser.sources) >= 8
    assert all(source.startswith("data:image/svg+xml;base64,") for source in parser.sources)
    assert not [link for tag, link in parser.links if tag == "link"]
    anchors = [link[1:] for tag, link in parser.links if link.startswith("#")]
    assert len(anchors) > 8
    assert set(anchors) <= parser.ids
    assert "@media print" in text
    assert "<script" not in text


def test_every_table_and_figure_has_its_csv_and_every_link_its_file(folder, markdown):
    linked = re.findall(r"\]\(([^)#]+)\)", markdown)
    assert len(linked) > 20
    for name in linked:
        assert (folder / "report" / name).is_file(), name
    content = json.loads((folder / "report" / "report.json").read_text())
    for file in (folder / "report").glob("*.csv"):
        rows = list(csv.DictReader(file.open()))
        assert len(rows) == len(content.pop(file.stem)) > 0
        assert file.name in markdown
    assert not content


def test_chapters(markdown):
    found = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert found == [
        "In brief", "Question and design", "What was found", "Discussion", "Runs", "Scores by method and batch size",
        "Verdicts", "Equivalent batch size", "Costs", "During training", "Batches against the whole set", "Checks",
        "Claims", "Cells without a result", "Limits",
    ]  # fmt: skip
    assert "Does it add up?" in markdown
    assert "### What I think" in markdown  # below the report's own headings
    assert "\n# not a heading" in markdown


def test_the_power_of_the_seeds_needed_is_that_of_a_single_comparison(markdown):
    words = " ".join(markdown.split())
    assert "no difference, in a single comparison (Holm asks for more in a table of several)" in words


def test_the_head_says_what_was_asked_found_and_cannot_be_said(folder, markdown):
    head = markdown.partition("## In brief")[2].partition("## Question and design")[0]
    scores = {
        (row["arm"], row["global_batch_size"]): 100 * float(row["score"])
        for row in csv.DictReader((folder / "report" / "runs.csv").open())
    }
    assert "- **Asked.** Does it add up?\n" in head
    assert "1 of its 24 cells have no result yet" in head
    assert f"at B = 256 AmCLR {scores['amclr', '256']:.1f} % (CLIP {scores['clip', '256']:.1f})" in head
    decided = list(csv.DictReader((folder / "report" / "verdicts_reference_R_1_both_ways.csv").open()))
    better = [row["arm"] for row in decided if row["verdict"] == "better"]
    assert f"Of {len(decided)} against CLIP, B = 256, shown to be better: " in head
    assert all(name.partition(",")[0] in head for name in better)
    undecided = sum(row["verdict"] == "undecided" for row in decided)
    assert f"undecided: {undecided}, which is no evidence for equality" in head
    assert "at B = 128 from 0.99 (" in head
    assert "above guessing" not in head  # CLIP has learned here
    assert "3 seeds find large ones only" in head


def test_numbers_of_the_report_are_those_of_the_runs(folder, markdown):
    study = read_study(folder)
    scores = [
        run.results[KEYS[0]] for run in study.runs if (run.cell.arm, run.cell.global_batch_size) == ("amclr", 128)
    ]
    mean = sum(scores) / 3
    rows = list(csv.DictReader((folder / "report" / "runs.csv").open()))
    row = next(row for row in rows if (row["arm"], row["global_batch_size"]) == ("amclr", "128"))
    assert float(row["score"]) == pytest.approx(mean)
    assert f"| AmCLR | 128 | 3 | {100 * mean:.1f} " in markdown
    assert float(row["hours"]) == pytest.approx(0.02)
    assert int(row["comparisons"]) == 4 * 127


def test_failures_and_checks_are_shown(markdown):
    assert "| dcl-B128-s0 | failed | step 3: loss is &lt;nan&gt; &#124; &#96;x&#96; |" in markdown
    assert "| not run |" not in markdown
    assert "R@1 image to text, emoji/val_style, %:" in markdown  # beside the outcome, which is the mean of both ways
    assert "zero-shot top 1, emoji" not in markdown  # which these runs did not measure
    assert "SogCLR's gradient is DCL's times the temperature" in markdown
    assert "With 3 seeds an interval has 2 degrees of freedom: it reaches 4.30 standard errors" in markdown
    assert "Few optimizer steps" in markdown
    assert "Hardly trained" not in markdown
    assert "`objective.temperature`" in markdown  # CLIP learns it, AmCLR's default is another


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("held_equal", "told"), [("samples", True), ("compute", True), ("steps", False)])
def test_the_head_tells_few_steps_where_a_larger_batch_has_fewer(tmp_path, held_equal, told):
    folder = make_study(tmp_path / "s", arms=("clip",), held_equal=held_equal, items=False)
    head = compose(read_study(folder)).markdown.partition("## Question and design")[0]
    assert ("**Beware.** Few optimizer steps" in head) is told


def test_the_probe_is_drawn_over_epochs_and_batch_sizes(folder, markdown):
    def read(name):
        return list(csv.DictReader((folder / "report" / f"{name}.csv").open()))

    curve = [row for row in read("probe_estimator_error") if row["global_batch_size"] == "256"]
    assert {row["title"] for row in curve} == {"AmCLR"}  # the others have no average that was measured
    truth = [
        statistics.mean(synthetic.probed("amclr", 256, seed, samples)["probe/estimator_error"] for seed in (0, 1, 2))
        for samples in (2048, 4096, 6144, 8192)
    ]
    assert [float(row["estimator_error"]) for row in curve] == pytest.approx(truth)
    assert [float(row["epochs"]) for row in curve] == pytest.approx([0.415, 0.83, 1.245, 1.66])
    ages = [row for row in read("probe_error_by_age") if row["global_batch_size"] == "256"]
    assert [float(row["estimator_error"]) / truth[-1] for row in ages] == pytest.approx(range(1, 11))
    interval = estimate([synthetic.probed("amclr", 256, seed, 8192)["probe/gradient_cosine"] for seed in (0, 1, 2)])
    last = {(row["title"], row["global_batch_size"]): row for row in read("probe_last")}
    by_batch = {(row["title"], row["global_batch_size"]): row for row in read("probe_gradient_by_batch")}
    for rows in (last, by_batch):
        row = rows["AmCLR", "256"]
        assert float(row["gradient_cosine"]) == pytest.approx(interval.value)
        assert [float(row[f"gradient_cosine_{end}"]) for end in ("low", "high")] == pytest.approx(interval.interval())
        assert rows["CLIP", "128"]["expected_gradient_norm_ratio"] == ""  # nobody could say
        assert rows["CLIP", "256"]["expected_gradient_norm_ratio"] == "1.0"
    assert last["CLIP", "256"]["estimator_error"] == ""
    assert last["DCL", "128"]["seeds"] == "2"
    assert "K = 2,048 training samples" in markdown
    assert "| AmCLR | 128 | 3 | 1.66 | 0.0055 " in markdown


def test_published_numbers_stand_beside_the_nearest_batch_size(folder):
    rows = {row["published"]: row for row in csv.DictReader((folder / "report" / "published_numbers.csv").open())}
    assert len(rows) == 12
    assert rows["AmCLR, AdamW"]["here"].startswith("AmCLR, B = 128")
    assert rows["CLIP, gathered over 2 GPUs, AdamW"]["here"].startswith("CLIP, B = 256")  # theirs: 512
    assert rows["AmCLR, AdamP"]["here"] == ""  # trained with AdamW here
    assert float(rows["AmCLR, AdamW"]["claimed_zero_shot_top1"]) == 25.87


def test_claims_that_nothing_was_measured_for_are_listed_as_such(folder, markdown):
    rows = {row["id"]: row for row in csv.DictReader((folder / "report" / "claims.csv").open())}
    assert list(rows) == [f"C{i}" for i in range(1, 20)]
    spoken = {name for name, row in rows.items() if row["measured_here"]}
    assert spoken == {"C1", "C3", "C5", "C6"}  # C2 needs SogCLR or CLIP with views
    assert "AmCLR" in rows["C1"]["measured_here"]
    assert "SogCLR - DCL" not in rows["C6"]["measured_here"]  # no such arm in this study
    assert (
        "cosine with the whole set's gradient, by B: CLIP (128: 0.9914, 256: 0.9957); DCL (128: 0.9910"
        in (rows["C6"]["measured_here"])
    )
    assert markdown.count(NOT_MEASURED) >= 14


def test_claims_file_is_complete():
    found = load_claims()
    kinds = {"difference", "reference", "axis", "cost", "speed", "weights", "probe", "ranks"}
    for claim in found["claims"]:
        assert {"id", "claim", "source", "scale", "doubt"} <= set(claim), claim["id"]
        assert claim["source"] in found["sources"]
        assert measures_of(claim) or claim.get("elsewhere"), claim["id"]
        assert {measure["kind"] for measure in measures_of(claim)} <= kinds
    assert {number["source"] for number in found["numbers"]} <= set(found["sources"])
    assert {number["batch"] for number in found["numbers"]} == {128, 256, 512}


def test_a_study_without_a_finished_cell_has_a_report(tmp_path):
    folder = make_study(
        tmp_path / "s", arms=("clip",), batches=(128, 256), seeds=(0,), unfinished=["clip-B128-s0", "clip-B256-s0"]
    )
    index = write_report(folder)
    assert "0 of 2 finished" in index.read_text()
    assert "| clip-B128-s0, clip-B256-s0 | not run | - |" in (folder / "report" / "report.md").read_text()
    assert "nan" not in (folder / "report" / "report.md").read_text()


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("amclr_scale.study.report.write.NEEDED", {"no_such_module": "no-such-package"})
    with pytest.raises(UserError, match=r"no-such-package: expected .* pip install 'amclr_scale\[report\]'"):
        write_report(tmp_path)


def test_text_of_others_cannot_break_the_page():
    assert escape("a|b <script> `x` *y*\nz") == "a&#124;b &lt;script&gt; &#96;x&#96; \\*y\\*<br>z"
    assert csv_text([{"a": 1.5, "b": None}, {"a": float("nan"), "c": 'x,"y"'}]) == 'a,b,c\n1.5,,\n,,"x,""y"""\n'


def test_pictures_of_a_discussion_travel_with_the_page(tmp_path):
    (tmp_path / "mine.png").write_bytes(b"\x89PNG")
    text = page("# A\n\n## B\n\n![mine](mine.png)\n\n![gone](gone.png)\n", {}, tmp_path)
    assert "data:image/png;base64,iVBORw==" in text
    assert 'src="gone.png"' in text
    assert "<title>A</title>" in text


def test_long_intervals_do_not_hide_the_means():
    """Of two seeds they reach 12.7 standard errors."""
    figure, axes = plt.subplots()
    axes.errorbar([16, 64], [0.4, 0.9], [5.0, 0.1])
    assert show_means(axes, [1.0, 0.4, 0.9])
    assert axes.get_ylim() == pytest.approx((-0.2, 1.6))
    axes.cla()
    axes.errorbar([16, 64], [0.4, 0.9], [0.1, 0.1])
    whole = axes.get_ylim()
    assert not show_means(axes, [1.0, 0.4, 0.9])
    assert axes.get_ylim() == whole
    plt.close(figure)
