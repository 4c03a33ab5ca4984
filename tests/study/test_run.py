"""The runner: what becomes of cells that finish, fail, stop early, and of a study that is ended in the middle."""

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from amclr_scale.checkpoint import lock
from amclr_scale.config.load import dump
from amclr_scale.errors import UserError
from amclr_scale.study.planning.cells import base_tree, make_cells
from amclr_scale.study.planning.load import load_plan
from amclr_scale.study.planning.plan import Expected, StudyPlan
from amclr_scale.study.planning.planned import Planned
from amclr_scale.study.running import pilot
from amclr_scale.study.running import run as run_module
from amclr_scale.study.running.folder import StudyFolder
from amclr_scale.study.running.pilot import rate
from amclr_scale.study.running.preview import hours, piece
from amclr_scale.study.running.progress import Rates, duration
from amclr_scale.study.running.run import Runner
from tests.study.fake_study import fake_command, run_fakes
from tests.study.test_plan import PLAN

pytestmark = pytest.mark.launch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "POLL", 0.02)


def make(tmp_path: Path, *words: str) -> tuple[StudyPlan, list[Planned]]:
    file = tmp_path / "tiny.yaml"
    file.write_text(PLAN)
    plan = load_plan(file, [f"folder={tmp_path / 'study'}", "batch_sizes=[32]", *words])
    return plan, make_cells(plan, base_tree(plan), 4938.0)


def attempts(plan: StudyPlan) -> list[tuple[str, str, Any]]:
    return [(one["cell"], one["status"], one["exit_code"]) for one in StudyFolder(plan.place).recorded()]


@pytest.mark.usefixtures("quick")
def test_all_arms_of_a_seed_come_before_the_next_seed_and_finished_cells_are_skipped(tmp_path: Path) -> None:
    plan, cells = make(tmp_path)
    said: list[str] = []
    outcome = run_fakes(plan, cells, {}, said)
    assert (outcome.done, outcome.exit_code) == (4, 0)
    order = ["clip-B32-s0", "sogclr-B32-s0", "clip-B32-s1", "sogclr-B32-s1"]
    assert attempts(plan) == [(name, "done", 0) for name in order]
    assert [line.split()[1].rstrip(":") for line in said] == order
    assert "training in clip-B32-s0, done" in (plan.place / "logs" / "clip-B32-s0.log").read_text()
    assert run_fakes(plan, cells, {}).exit_code == 0
    assert len(attempts(plan)) == 4


@pytest.mark.usefixtures("quick")
def test_a_piece_of_a_study_saves_when_its_time_is_over_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, cells = make(tmp_path)
    ready, said = plan.place / "runs" / "sogclr-B32-s0" / "ready", list[str]()

    def clock() -> float:
        """Its time is over as soon as the slow cell would save, however long this machine takes to start it."""
        return time.monotonic() + 1000 * ready.exists()

    monkeypatch.setattr(run_module, "time", SimpleNamespace(**{**vars(time), "monotonic": clock}))
    outcome = run_fakes(plan, cells, {"sogclr-B32-s0": "slow"}, said, until=time.monotonic() + 500)
    assert (outcome.done, outcome.interrupted, outcome.exit_code) == (1, True, 75)
    assert attempts(plan)[-1] == ("sogclr-B32-s0", "interrupted", 75)
    assert said[-1] == "--minutes: 1 cells save their state; the same command goes on"
    assert run_fakes(plan, cells, {}, until=time.monotonic() - 1).exit_code == 75  # not a cell is started
    assert len(attempts(plan)) == 2
    assert run_fakes(plan, cells, {}).exit_code == 0


def test_what_a_piece_will_finish_is_said(tmp_path: Path) -> None:
    plan, cells = make(tmp_path, "expected={samples_per_second: 100, seconds_per_cell: 2}")
    seconds = [cell.samples / 100 + 2 for cell in cells]
    assert len(set(seconds)) == 1
    folder, minutes = StudyFolder(plan.place), seconds[0] / 60
    said = piece(plan, folder, cells, 2.25 * minutes)
    assert "finish 2 of 4 cells (clip-B32-s0 to sogclr-B32-s0); clip-B32-s1 takes about" in said
    assert said.endswith("and gets 25% of it")
    assert piece(plan, folder, cells, 99 * minutes).endswith(
        "finish 4 of 4 cells (clip-B32-s0 to sogclr-B32-s1); then all are finished"
    )
    twice = plan.model_copy(update={"execution": plan.execution.model_copy(update={"jobs": 2})})
    assert "finish 2 of 4" in piece(twice, folder, cells, 2.25 * minutes)  # the rate is that of all jobs
    blind = plan.model_copy(update={"expected": None})
    assert "unknown until a cell has run" in piece(blind, folder, cells, 5)
    on_cpu = plan.model_copy(update={"expected": Expected(device="H100")})
    assert "unknown until a cell has run" in piece(on_cpu, folder, cells, 5)  # an H100 says nothing of a CPU
    on_gpu = on_cpu.model_copy(update={"execution": plan.execution.model_copy(update={"device": "cuda"})})
    assert "finish 4 of 4" in piece(on_gpu, folder, cells, 5)


@pytest.mark.usefixtures("quick")
def test_a_failing_cell_is_recorded_with_its_last_words_and_the_others_run(tmp_path: Path) -> None:
    plan, cells = make(tmp_path, "execution.retries=1")
    how = {"clip-B32-s0": "fails", "sogclr-B32-s0": "mistake", "clip-B32-s1": "once"}
    said: list[str] = []
    outcome = run_fakes(plan, cells, how, said)
    assert (outcome.done, outcome.exit_code) == (2, 1)
    assert sorted(outcome.failed) == ["clip-B32-s0", "sogclr-B32-s0"]
    tried = attempts(plan)
    assert tried.count(("clip-B32-s0", "failed", 1)) == 2
    assert tried.count(("sogclr-B32-s0", "failed", 2)) == 1, "a mistake does not mend itself"
    assert [one for one in tried if one[0] == "clip-B32-s1"] == [
        ("clip-B32-s1", "failed", 1),
        ("clip-B32-s1", "done", 0),
    ]
    message = StudyFolder(plan.place).recorded()[0]["message"]
    assert message.splitlines()[-1] == "the reason, in the last line"
    assert any("logs/clip-B32-s0.log" in line for line in said)


@pytest.mark.usefixtures("quick")
def test_a_cell_that_ends_early_with_its_state_saved_goes_on(tmp_path: Path) -> None:
    plan, cells = make(tmp_path, "execution.retries=0")
    assert run_fakes(plan, cells, {"clip-B32-s0": "early"}).exit_code == 0
    assert [one[1:] for one in attempts(plan) if one[0] == "clip-B32-s0"] == [("interrupted", 75), ("done", 0)]


@pytest.mark.usefixtures("quick")
def test_jobs_run_at_once(tmp_path: Path) -> None:
    plan, cells = make(tmp_path, "execution.jobs=2", "seeds=[0]")
    assert run_fakes(plan, cells, {cell.name: "meets" for cell in cells}).exit_code == 0
    assert {attempt[1:] for attempt in attempts(plan)} == {("done", 0)}


def start_study(tmp_path: Path, how: str, *words: str) -> tuple[StudyPlan, "subprocess.Popen[bytes]"]:
    """A study as a process, its first two cells running."""
    plan, _ = make(tmp_path, "batch_sizes=[32, 64]")
    study = [sys.executable, "-m", "tests.study.fake_study", str(tmp_path / "tiny.yaml"), str(plan.place), how, *words]
    process = subprocess.Popen(study, cwd=ROOT)
    ready = [plan.place / "runs" / cell / "ready" for cell in ("clip-B32-s0", "clip-B64-s0")]
    until = time.monotonic() + 120
    while not all(file.exists() for file in ready) and time.monotonic() < until:
        time.sleep(0.02)
    return plan, process


def wait_until_gone(plan: StudyPlan) -> bool:
    """Whether the processes of the running cells end soon."""
    pids = [int(file.read_text().split()[0]) for file in plan.place.glob("runs/*/started")]
    until = time.monotonic() + 120
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return len(pids) == 2


def test_a_study_that_is_asked_to_end_lets_its_cells_save_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "ENDING", 0.2)
    plan, process = start_study(tmp_path, "slow")
    cells = make_cells(plan, base_tree(plan), 4938.0)
    with pytest.raises(UserError, match=r"folder: .* is being written by another job"):
        run_fakes(plan, cells, {})
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
    assert len(list(plan.place.glob("runs/*/saved"))) == 2
    assert {one[1:] for one in attempts(plan)} == {("interrupted", 75)}
    assert run_fakes(plan, cells, {}).exit_code == 0
    assert [status for _, status, _ in attempts(plan)].count("done") == len(cells) == 8


def test_a_study_that_is_killed_leaves_no_cell_running_and_goes_on_later(tmp_path: Path) -> None:
    plan, process = start_study(tmp_path, "slow")
    process.kill()
    process.wait()
    assert wait_until_gone(plan)
    assert len(list(plan.place.glob("runs/*/saved"))) == 2, "SIGTERM came from the kernel, and they saved"
    assert attempts(plan) == []
    with (plan.place / "attempts.jsonl").open("a") as file:
        file.write('{"cell": "cut')
    cells = make_cells(plan, base_tree(plan), 4938.0)
    assert run_fakes(plan, cells, {}).exit_code == 0
    assert [one for one in attempts(plan) if one[1] == "interrupted"] == [
        ("clip-B32-s0", "interrupted", None), ("clip-B64-s0", "interrupted", None),
    ]  # fmt: skip


def test_a_cell_that_does_not_end_is_killed_after_the_grace(tmp_path: Path) -> None:
    plan, process = start_study(tmp_path, "stubborn", "execution.grace_seconds=0.3")
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
    assert wait_until_gone(plan)
    assert {one[1:] for one in attempts(plan)} == {("interrupted", -signal.SIGKILL)}


@pytest.mark.usefixtures("quick")
def test_runs_of_another_recipe_are_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    plan, cells = make(tmp_path)
    folder = StudyFolder(plan.place)
    run_fakes(plan, cells, {})
    for cell in cells:
        (folder.runs / cell.name / "config.yaml").write_text(f"# recipe {cell.recipe_hash}\n{dump(cell.config)}")
    folder.check(plan, cells)
    changed, other = make(tmp_path, "lr.base=3e-4")
    with pytest.raises(UserError) as told:
        folder.check(changed, other)
    assert str(told.value).startswith(f"folder: {plan.place} holds runs of another recipe:")
    assert "optimizer.lr: there 0.002, in the plan 0.0003 (in 4 cells, such as clip-B32-s0)" in str(told.value)
    more, cells_more = make(tmp_path, "seeds=[0, 1, 2]")
    folder.check(more, cells_more)  # more cells are welcome
    strict, same = make(tmp_path, "margin=2 points")
    with pytest.raises(UserError, match=r"margin: .* beside the reference's under margin 1 point, got 2 points"):
        folder.check(strict, same)
    _, fewer = make(tmp_path, "seeds=[0]")
    assert folder.others(fewer) == ["clip-B32-s1", "sogclr-B32-s1"]


@pytest.mark.usefixtures("quick")
def test_times_are_predicted_from_cells_that_ran(tmp_path: Path) -> None:
    plan, cells = make(tmp_path, "arms=[clip, amclr]", "batch_sizes=[32, 64]", "seeds=[0]")
    folder = StudyFolder(plan.place)
    assert Rates(folder, cells).predict(cells[0]) is None
    run_fakes(plan, cells[:1], {})
    (plan.place / "attempts.jsonl").write_text(
        "".join(json.dumps({"cell": "clip-B32-s0", "seconds": seconds}) + "\n" for seconds in (4.0, 6.0))
    )
    rates = Rates(folder, cells)
    named = {cell.name: rates.predict(cell) for cell in cells}
    # all attempts at a cell count; two views cost twice
    assert named == {"clip-B32-s0": 10.0, "clip-B64-s0": 10.0, "amclr-B32-s0": 20.0, "amclr-B64-s0": 20.0}
    with (plan.place / "attempts.jsonl").open("a") as file:  # one that was interrupted, and goes on
        file.write(json.dumps({"cell": "clip-B64-s0", "seconds": 30.0}) + "\n")
    resumed = Rates(folder, cells)
    assert resumed.predict(cells[1]) == 10.0  # what is not finished says nothing yet
    resumed.add(cells[1], 5.0)
    assert cells[1].name == "clip-B64-s0"
    assert resumed.predict(cells[1]) == 35.0
    assert [duration(seconds) for seconds in (45, 720, 7200)] == ["45 s", "12 min", "2.0 h"]


def test_the_rate_of_a_pilot_leaves_the_first_steps_out() -> None:
    records = [{"step": step, "samples": 32 * step, "samples_per_second": 1.0} for step in (1, 2, 3, 4)]
    records += [{"step": 5, "samples": 160, "samples_per_second": 64.0}]  # 0.5 s
    records += [{"step": 6, "samples": 192, "samples_per_second": 32.0}]  # 1 s
    assert rate(records) == pytest.approx(64 / 1.5)


@pytest.mark.usefixtures("quick")
def test_a_pilot_measures_every_variant_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(PLAN)
    words = ["arms=[clip]", "held_equal=wall_clock", "budget={samples: null, hours: 0.1}", "execution.jobs=2"]
    plan = load_plan(file, [*words, f"folder={tmp_path / 'study'}"])
    monkeypatch.setattr(pilot, "Runner", functools.partial(Runner, make_command=fake_command))
    folder, tree, said = StudyFolder(plan.place), base_tree(plan), list[str]()
    folder.path.mkdir()
    outcome = pilot.run_pilot(plan, tree, 4938.0, folder, said.append)
    assert outcome
    assert outcome.exit_code == 0
    # steps 5 and 6 of 32 samples at 500 and 600 per second
    expected = pytest.approx(64 / (32 / 500 + 32 / 600))
    assert folder.rates == {"clip-B32": expected, "clip-B64": expected}
    assert pilot.run_pilot(plan, tree, 4938.0, folder, said.append) is None
    planned = make_cells(plan, tree, 4938.0, rates=folder.rates)
    assert "by the pilot's samples/s: 12 min of training, 2 at once" in hours(plan, folder, planned)  # 4 x 0.1 h
    cells = {cell.name: cell.samples for cell in planned}
    assert cells["clip-B32-s1"] == 32 * int(360 * folder.rates["clip-B32"] / 32)


def test_a_study_can_be_planned_from_its_folder_alone(tmp_path: Path) -> None:
    plan, cells = make(
        tmp_path, "arms=[clip, amclr]", "words=['evaluation.splits=[emoji/val_style]', optimizer.lr=3e-4]"
    )
    folder = StudyFolder(plan.place)
    folder.write(plan, base_tree(plan), [])
    again = load_plan(plan.place / "study.yaml")
    there = make_cells(again, base_tree(again), 4938.0)
    assert [(cell.name, cell.recipe_hash) for cell in there] == [(cell.name, cell.recipe_hash) for cell in cells]
