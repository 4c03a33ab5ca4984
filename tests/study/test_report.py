"""The report of a synthetic study: complete, self-contained, and never saying what was not measured."""

import csv
import json
import re
import statistics
from html.parser import HTMLParser

import pytest
import yaml

from amclr_scale.errors import UserError
from amclr_scale.study.analysis.comparison import Outcome, compare, groups_of, reference_of
from amclr_scale.study.analysis.reading import read_study
from amclr_scale.study.analysis.units import unit_of
from amclr_scale.study.report import curves, plots, probe_figures, rank_scaling
from amclr_scale.study.report.claims import NOT_MEASURED, load_claims, measures_of
from amclr_scale.study.report.compose import compose
from amclr_scale.study.report.document import Figure, csv_text, escape, page
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


@pytest.fixture
def undrawn(monkeypatch):
    """Figures with their numbers but without their pictures, which take seconds."""

    def finish(name, caption, figure, raw):
        plots.pyplot().close(figure)
        return Figure(name, caption, raw, b"", b"")

    monkeypatch.setattr(plots, "finish", finish)
    monkeypatch.setattr(curves, "finish", finish)
    monkeypatch.setattr(probe_figures, "finish", finish)
    monkeypatch.setattr(rank_scaling, "finish", finish)


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


@pytest.mark.usefixtures("undrawn")
def test_arms_are_known_by_what_they_began_as(tmp_path, monkeypatch):
    base = synthetic.ARMS["sogclr"]
    for name, optimizer in (("sogclr_adamw", "adamw"), ("sogclr_nesterov", "sgd")):
        words = (*base[2], f"optimizer.name={optimizer}")
        monkeypatch.setitem(synthetic.ARMS, name, (base[0], base[1], words, f"SogCLR, {optimizer}", 1.0))
    folder = make_study(
        tmp_path / "s", arms=("clip", "sogclr_adamw", "sogclr_nesterov"), batches=(128,), seeds=(0, 1),
        like={"sogclr_adamw": "sogclr", "sogclr_nesterov": "sogclr"},
    )  # fmt: skip
    composed = compose(read_study(folder))
    tables = {table.name: table.raw for table in composed.tables}
    claims = {row["id"]: row["measured_here"] for row in tables["claims"]}
    assert claims["C10"].startswith("sogclr at B = 128, by optimizer.name: adamw: ")
    assert "SogCLR, adamw - CLIP" in claims["C6"]
    assert "SogCLR, sgd - CLIP" not in claims["C6"]  # another optimizer
    numbers = {row["published"]: row["here"] for row in tables["published_numbers"]}
    assert numbers["SogCLR, AdamW"].startswith("SogCLR, adamw, B = 128")
    assert numbers["SogCLR, Nesterov"].startswith("SogCLR, sgd, B = 128")


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


@pytest.mark.usefixtures("undrawn")
def test_an_axis_and_a_grid_speak(tmp_path):
    folder = make_study(
        tmp_path / "s", arms=("sogclr",), batches=(128,), seeds=(0, 1), axes={"objective.gamma": [0.2, 0.8]}
    )
    text = compose(read_study(folder)).markdown
    assert "sogclr at B = 128, by objective.gamma: 0.2: " in text
    grid = make_study(
        tmp_path / "g", arms=("clip",), batches=(128, 256), seeds=(0, 1), held_equal="grid",
        axes={"objective.group_size": [64, 128]}, items=False,
    )  # fmt: skip
    cells = json.loads((grid / "cells.json").read_text())
    for cell in cells["cells"]:
        cell["negatives"] = cell["axes"]["objective.group_size"] - 1
    (grid / "cells.json").write_text(json.dumps(cells))
    study = read_study(grid)
    found = Outcome(study.metrics[0], groups_of(study))
    reference = reference_of(study, found.groups)
    assert reference.variant == (("objective.group_size", 128),)  # the largest groups, wherever they come in the plan
    assert reference.global_batch_size == 256
    figure = plots.heat_map(found, unit_of(study.metrics[0], study.runs), "grid")
    assert {(row["global_batch_size"], row["negatives"]) for row in figure.raw} == {
        (batch, size - 1) for batch in (128, 256) for size in (64, 128)
    }


@pytest.mark.usefixtures("undrawn")
def test_ranks_speed_up_a_recipe_and_are_held_to_the_same_scores(tmp_path):
    folder = make_study(
        tmp_path / "s", arms=("clip", "dcl"), batches=(128, 256, 512), axes={"execution.ranks": [1, 2, 4]},
        unfinished=["clip-B128-s1-ranks2"],
    )  # fmt: skip
    composed = compose(read_study(folder))
    [table] = [one for one in composed.tables if one.name == "scaling"]
    rows = {(row["title"], row["global_batch_size"], row["ranks"]): row for row in table.raw}
    assert len(rows) == 2 * 3 * 3
    for (_, batch, ranks), row in rows.items():
        seeds = (0, 2) if row["title"] == "CLIP" and (batch, ranks) == (128, 2) else (0, 1, 2)
        speed = [synthetic.throughput(1, ranks, seed) / synthetic.throughput(1, 1, seed) for seed in seeds]
        assert (row["seeds"], row["local_batch_size"]) == (len(seeds), batch / ranks)
        assert row["speed_up"] == pytest.approx(statistics.mean(speed))
        assert row["efficiency"] == pytest.approx(statistics.mean(speed) / ranks)
        assert (row["efficiency_low"], row["efficiency_high"]) == pytest.approx(
            estimate([one / ranks for one in speed]).interval()
        )
    # b = 128: 128 on one rank, 256 on two, 512 on four; 32 samples a rank were only run on four
    weak = rows["DCL", 512, 4]["efficiency_at_equal_local_batch"]
    assert weak == pytest.approx(rows["DCL", 512, 4]["efficiency"])  # throughput here does not depend on B
    assert rows["DCL", 128, 4]["efficiency_at_equal_local_batch"] is None
    assert {(row["line"], row["ranks"]) for row in composed.figures["by_ranks"].raw} == {
        (f"{arm}, B = {batch}", ranks) for arm in ("CLIP", "DCL") for batch in (128, 256, 512) for ranks in (1, 2, 4)
    }
    tables = {one.name: one.raw for one in composed.tables}
    assert not tables.keys() & composed.figures.keys()  # each has a CSV of its own
    assert {row["why"] for row in tables["agreement"]} == {"one recipe, run in two ways"}
    claims = {row["id"]: row["measured_here"] for row in tables["claims"]}
    assert "CLIP, B = 256: 2 ranks 1.76 [1.72, 1.80] times the samples/s of 1" in claims["C17"]
    apart = max(100 * row["largest_difference"] for row in tables["agreement"])
    assert re.search(rf"- \*\*Must agree\.\*\* 18 pairs of cells;.*, {apart:.2f} points\.\n", composed.markdown)


@pytest.mark.usefixtures("undrawn")
def test_the_head_says_which_batch_size_a_method_is_worth(tmp_path):
    folder = make_study(tmp_path / "s", arms=("clip", "dcl"), batches=(128, 512, 2048), noise=0.0005, items=False)
    composed = compose(read_study(folder))
    head = composed.markdown.partition("## In brief")[2].partition("## Question and design")[0]
    [rows] = [one.raw for one in composed.tables if one.name == "equivalent_batch"]
    known = [row for row in rows if row["crossings"] and not (row["low_open"] and row["high_open"])]
    assert known
    for row in known:
        batches = (
            f"DCL, B = {row['global_batch_size']:,} scores what CLIP does at {float(row['crossings']):,.0f} (95 %: "
        )
        assert batches in head.partition("**Worth in batch size.**")[2]


def test_a_study_without_a_finished_cell_has_a_report(tmp_path):
    folder = make_study(
        tmp_path / "s", arms=("clip",), batches=(128, 256), seeds=(0,), unfinished=["clip-B128-s0", "clip-B256-s0"]
    )
    index = write_report(folder)
    assert "0 of 2 finished" in index.read_text()
    assert "| clip-B128-s0, clip-B256-s0 | not run | - |" in (folder / "report" / "report.md").read_text()
    assert "nan" not in (folder / "report" / "report.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_time_given_is_held_against_time_taken(tmp_path):
    folder = make_study(
        tmp_path / "s", arms=("clip", "amclr"), batches=(128,), seeds=(0,), held_equal="wall_clock", items=False
    )
    plan = yaml.safe_load((folder / "study.yaml").read_text())
    plan["budget"] = {"hours": synthetic.SAMPLES / 400 / 3600}  # what CLIP takes; AmCLR has half the samples/s
    (folder / "study.yaml").write_text(yaml.safe_dump(plan))
    text = compose(read_study(folder)).markdown
    assert "The logged steps took 100% to 200% of it. More than 10% off: amclr-B128-s0 (200%)." in text


@pytest.mark.usefixtures("undrawn")
def test_one_seed_decides_nothing(tmp_path):
    folder = make_study(tmp_path / "s", arms=("clip", "amclr"), batches=(128,), seeds=(0,))
    text = compose(read_study(folder)).markdown
    assert "One seed: there is no interval, and nothing can be decided." in text
    assert "**better**" not in text
    assert not re.search(r"\bnan\b", text)


@pytest.mark.usefixtures("undrawn")
def test_a_reference_that_has_hardly_learned_is_pointed_out(tmp_path, monkeypatch):
    monkeypatch.setitem(synthetic.ARMS, "clip", (0.008, 0.0, ("objective.name=clip",), "CLIP", 1.0))
    folder = make_study(tmp_path / "s", arms=("clip", "amclr"), batches=(128,), noise=0.0)
    text = compose(read_study(folder)).markdown
    assert "**Hardly trained**: CLIP, B = 128 (0.7 % after 64 steps)" in text
    assert "**The reference is among them**" in text
    head = text.partition("## In brief")[2].partition("## Question and design")[0]
    assert "- **Beware.** Hardly trained, the reference among them: CLIP (B = 128)." in head
    assert "CLIP, B = 128 scores no more than the margin above guessing" in head


@pytest.mark.usefixtures("undrawn")
def test_a_wide_range_of_costs_is_drawn_on_a_log_axis(tmp_path):
    study = read_study(make_study(tmp_path / "s", arms=("clip",), batches=(16, 512), seeds=(0,), items=False))
    found = Outcome(study.metrics[0], groups_of(study))
    looks, unit = plots.Looks(["CLIP"]), unit_of(study.metrics[0], study.runs)
    figure = plots.score_by_cost(found, unit, looks, "optimizer_steps", "optimizer steps", "by_steps", "")
    assert [row["optimizer_steps"] for row in figure.raw] == [512, 16]
    assert plots.ticks_of(16, 512) == [10, 20, 50, 100, 200, 500, 1000]


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


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("batches", "tables"), [((128,), 1), ((128, 256), 2)])
def test_at_one_batch_size_a_comparison_is_told_once(tmp_path, batches, tables):
    composed = compose(read_study(make_study(tmp_path / "s", arms=("clip", "dcl"), batches=batches)))
    assert sum(table.name.startswith("verdicts_") for table in composed.tables) == tables
    assert f"- global batch size{'s' if tables == 2 else ''}: 128" in composed.markdown


@pytest.mark.usefixtures("undrawn")
def test_pairs_that_a_plan_names_are_a_family_of_their_own(tmp_path):
    folder = make_study(tmp_path / "s", arms=("clip", "sogclr", "amclr"), batches=(128, 256))
    plan = yaml.safe_load((folder / "study.yaml").read_text())
    (folder / "study.yaml").write_text(yaml.safe_dump(plan | {"pairs": [["amclr", "sogclr"]]}))
    study = read_study(folder)
    composed = compose(study)
    [rows] = [one.raw for one in composed.tables if one.name.startswith("verdicts_pairs_")]
    assert [(row["arm"], row["against"]) for row in rows] == [
        (f"AmCLR, B = {batch}", f"SogCLR, B = {batch}") for batch in (128, 256)
    ]
    found = Outcome(study.metrics[0], groups_of(study))
    pairs = [
        tuple(
            next(g for g in found.groups if (g.arm, g.global_batch_size) == (arm, batch)) for arm in ("amclr", "sogclr")
        )
        for batch in (128, 256)
    ]
    for row, one in zip(rows, compare(found, pairs, study.margin), strict=True):
        assert row["difference"] == one.difference.seeds.value
        assert row["p_different_holm"] == one.decision.p_different
    head = composed.markdown.partition("## Question and design")[0]
    assert "Pairs that the plan names: AmCLR, B = 128, against SogCLR: better; AmCLR, B = 256, against SogCLR: " in head
