"""What `amclr-scale study` answers before a cell runs: mistakes, margins beside scores, what a report would ignore."""

import json
import shutil
from pathlib import Path

import pytest

from amclr_scale.commands.study import main
from amclr_scale.errors import UserError
from amclr_scale.study.planning.cells import base_tree, make_cells
from amclr_scale.study.planning.load import load_plan
from amclr_scale.study.planning.plan import StudyPlan
from amclr_scale.study.planning.planned import Planned
from amclr_scale.study.running.corpora import FILE, check_corpora, keep_corpora
from amclr_scale.study.running.folder import StudyFolder
from amclr_scale.study.running.margin import check_margin
from amclr_scale.study.running.preview import hours
from tests.data.shards import write_shards
from tests.study.synthetic import begin, make_study
from tests.study.test_plan import PLAN

KEY = "emoji/val_style/image_to_text_R@1"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(PLAN + f"folder: {tmp_path / 'study'}\n")
    return file


def planned(file: Path, *words: str) -> tuple[StudyPlan, StudyFolder, list[Planned]]:
    plan = load_plan(file, words)
    return plan, StudyFolder(plan.place), make_cells(plan, base_tree(plan), 4938.0)


def finish(folder: StudyFolder, cell: Planned, score: float) -> None:
    run = folder.runs / cell.name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"# recipe {cell.recipe_hash}\n")
    (run / "evaluation.json").write_text(json.dumps({KEY: score, f"{KEY}/chance": 0.001}))


def test_a_command_without_a_plan_is_told_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err.endswith("the following arguments are required: PLAN\n")


def test_a_report_refuses_what_it_would_take_no_notice_of(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "margin=2 points", "--report", "seeds=[0]", "--cells", "clip-*"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert [line.partition(":")[0] for line in told] == ["margin", "seeds", "--cells"]
    assert "so margin=2 points would change nothing; leave it out" in told[0]
    with pytest.raises(SystemExit) as refused:
        main([str(file), "--report", "--dry-run"])
    assert refused.value.code == 2


@pytest.mark.slow
def test_a_report_of_another_folder_needs_no_plan_that_is_valid_today(file: Path, tmp_path: Path) -> None:
    make_study(tmp_path / "old", arms=("clip",), batches=(128,), seeds=(0,), items=False)
    file.write_text(PLAN.replace("margin: 1 point", "margin: 0.01"))
    assert main([str(file), "--report", f"folder={tmp_path / 'old'}"]) == 0
    assert (tmp_path / "old" / "report" / "report.md").is_file()


def test_what_is_wrong_with_data_plan_and_cells_is_told_at_once(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["num_samples=null", "words=['evaluation.splits=[emoji/val_style]', data.train=/nowhere]"]
    arms = "arms=[clip, {name: mine, like: dcl, words: [objective.gama=1]}]"
    assert main([str(file), *words, arms, "--dry-run"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert [line.partition(":")[0] for line in told] == ["data.train", "objective.gama"]


def test_a_margin_that_swallows_half_of_what_the_reference_scores_is_refused(file: Path) -> None:
    plan, folder, cells = planned(file, "margin=20 points")
    reference, other = (next(c for c in cells if c.name == name) for name in ("clip-B64-s0", "sogclr-B64-s0"))
    check_margin(plan, folder, cells)  # nothing has run: nothing is known
    finish(folder, reference, 0.301)
    with pytest.raises(UserError) as told:
        check_margin(plan, folder, cells)
    assert str(told.value).startswith(
        "margin: expected at most 15 points, half of what clip-B64-s0 scores above guessing (30.1 - 0.1), got 20 points"
    )
    folder.write(plan, {}, [])
    narrow, _, _ = planned(file, "margin=2 points")
    folder.check(narrow, cells)  # nothing has been compared yet: the margin may still change
    check_margin(narrow, folder, cells)
    finish(folder, other, 0.3)
    with pytest.raises(UserError, match=r"margin: .* has results beside the reference's under margin 20 points, got 2"):
        folder.check(narrow, cells)
    check_margin(plan, folder, cells)  # too late to change it: the report says no match


def test_a_margin_is_not_judged_before_all_learning_rates_of_the_reference_have_run(file: Path) -> None:
    words = ["axes={optimizer.lr: [1e-3, 4e-3]}", "tuning={seeds: [3, 4]}", "margin=20 points"]
    plan, folder, cells = planned(file, *words)
    *first, last = (cell for cell in cells if cell.role == "tuning" and cell.arm == "clip")
    for cell in first:
        finish(folder, cell, 0.101)  # half of that is less than the margin
    check_margin(plan, folder, cells)  # and the other rate may score more: the study goes on where it was interrupted
    finish(folder, last, 0.301)
    with pytest.raises(UserError, match="margin: expected at most 15 points, half of what"):
        check_margin(plan, folder, cells)


def test_a_first_preview_offers_a_pilot_for_its_hours(file: Path) -> None:
    plan, folder, cells = planned(file)
    told = "time: unknown until a cell has run; --pilot measures samples/s in 30 steps of every arm and batch size"
    assert hours(plan, folder, cells) == told
    folder.path.mkdir()
    folder.write_rates({cell.variant: 100.0 for cell in cells})
    assert hours(plan, folder, cells).splitlines() == [
        "time: unknown until a cell has run",
        "by the pilot's samples/s: 51 s of training, 1 at once; start and evaluation of every cell come on top",
    ]


FROM_HERE = [
    "num_samples=null", "budget={samples: 128, epochs: null}", "lr={rule: none, base: 1e-3}",
    "words=['evaluation.splits=[emoji/val_style]', data.train=corpus, 'data.cache=null']",
]  # fmt: skip


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan whose first cell has read one/corpus; two/ has another corpus of that name, and three/ none."""
    for name, first in (("one", 0), ("two", 100)):
        write_shards(tmp_path / name / "corpus", [5, 3], first)
    (tmp_path / "three").mkdir()
    file = tmp_path / "tiny.yaml"
    file.write_text(PLAN + f"folder: {tmp_path / 'study'}\n")
    monkeypatch.chdir(tmp_path / "one")
    begin(file, FROM_HERE)
    return file


def test_another_corpus_of_the_same_name_is_refused(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(begun), *FROM_HERE, "--dry-run"]) == 0
    monkeypatch.chdir(tmp_path / "two")
    capsys.readouterr()
    assert main([str(begun), *FROM_HERE, "--dry-run"]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith(f'data.train: expected the samples that runs in {tmp_path / "study"} have read as "corpus"')
    assert f"now {tmp_path / 'two'}, then {tmp_path / 'one'}: go on from there, or begin another study" in told
    monkeypatch.chdir(tmp_path / "three")
    assert main([str(begun), *FROM_HERE, "--dry-run"]) == 2
    assert f"got 'corpus', which is none of them; relative paths are read from {tmp_path / 'three'}" in (
        capsys.readouterr().err
    )
    shutil.copytree(tmp_path / "one" / "corpus", tmp_path / "three" / "corpus")  # the same samples, elsewhere
    assert main([str(begun), *FROM_HERE, "--dry-run"]) == 0


def test_what_no_run_has_read_may_change_and_an_older_study_goes_on(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(tmp_path / "study" / FILE, tmp_path / "kept.json")
    monkeypatch.chdir(tmp_path / "two")
    assert main([str(begun), *FROM_HERE, "--dry-run"]) == 0
    shutil.move(tmp_path / "kept.json", tmp_path / "study" / FILE)
    assert main([str(begun), *FROM_HERE, "--dry-run"]) == 2
    shutil.rmtree(tmp_path / "study" / "runs")
    assert main([str(begun), *FROM_HERE, "--dry-run"]) == 0


def with_checkpoint(run: Path, fingerprint: str) -> None:
    """Files of a run that has trained on such samples."""
    folder = run / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": 4, "data_fingerprint": fingerprint}))


def test_a_run_says_itself_what_it_has_read(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Studies from before data.json, and runs that were copied from another study."""
    one = json.loads((tmp_path / "study" / FILE).read_text())['"corpus"']["fingerprint"]
    (run,) = (tmp_path / "study" / "runs").iterdir()
    with_checkpoint(run, f"{one}-0a1b2c3d-image_reference:4e5f6a7b")  # with communities and a file of references
    assert main([str(begun), *FROM_HERE, "--dry-run"]) == 0
    (tmp_path / "study" / FILE).unlink()
    assert main([str(begun), *FROM_HERE, "--dry-run"]) == 0
    monkeypatch.chdir(tmp_path / "two")
    assert main([str(begun), *FROM_HERE, "--dry-run"]) == 2
    told = capsys.readouterr().err.strip()
    assert f'have read as "corpus" (fingerprint {one}, of {run.name}), got others' in told
    assert f"now {tmp_path / 'two'}: go on from where those are, or begin another study" in told


def test_a_corpus_that_no_run_has_read_may_become_another(begun: Path, tmp_path: Path) -> None:
    """Of an arm that has not begun, beside one that has."""
    shutil.copytree("corpus", "other")
    both = "arms=[{name: clip}, {name: moved, like: clip, words: [data.train=other]}]"
    plan = load_plan(begun, [*FROM_HERE, both])
    folder, cells = StudyFolder(plan.place), make_cells(plan, base_tree(plan), 8.0)
    keep_corpora(folder, check_corpora(plan, folder, cells))
    kept = json.loads((folder.path / FILE).read_text())
    assert sorted(kept) == ['"corpus"', '"other"', "measured on emoji/val_style"]
    shutil.rmtree("other")
    write_shards(Path("other"), [5, 3], 200)
    now = check_corpora(plan, folder, cells)
    assert now['"corpus"'] == kept['"corpus"']
    assert now['"other"']["fingerprint"] != kept['"other"']["fingerprint"]


@pytest.mark.parametrize("content", ["[]", "null", '{"a": 1}', '{"a": {}}', "{"])
def test_a_file_of_data_that_is_none(content: str, begun: Path, tmp_path: Path) -> None:
    plan = load_plan(begun, FROM_HERE)
    (tmp_path / "study" / FILE).write_text(content)
    with pytest.raises(UserError, match=r"data\.json: expected the data of a study"):
        check_corpora(plan, StudyFolder(plan.place), make_cells(plan, base_tree(plan), 8.0))
