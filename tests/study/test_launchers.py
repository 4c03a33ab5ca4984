"""How the runner starts a cell: command lines, GPUs, and job arrays under a pretended SLURM."""

import base64
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from amclr_scale.study.analysis.reading import read_study
from amclr_scale.study.planning.cells import base_tree
from amclr_scale.study.running import run as run_module
from amclr_scale.study.running.folder import StudyFolder
from amclr_scale.study.running.run import command, devices
from amclr_scale.study.running.slurm import write_jobs
from tests.study.test_run import make

pytestmark = pytest.mark.launch

ROOT = Path(__file__).parents[2]


def test_command_lines_of_the_launchers(tmp_path: Path) -> None:
    plan, cells = make(tmp_path, "execution.words=[execution.workers=1]", "wandb_group=g", "execution.jobs=2")
    words = command(plan, StudyFolder(plan.place), cells[0])
    assert words[:4] == [sys.executable, "-m", "amclr_scale", "train"]
    assert {"resume=auto", "run.name=clip-B32-s0", "run.wandb_group=g", "execution.workers=1", "seed=0"} <= set(words)
    assert any(word.startswith("execution.threads=") for word in words)
    for launcher, part in (("torchrun", "--nproc-per-node=2"), ("deepspeed", "deepspeed.launcher.launch")):
        plan, cells = make(tmp_path, f"execution.launcher={launcher}", "execution.ranks=2")
        assert part in command(plan, StudyFolder(plan.place), cells[0])


def test_ranks_as_an_axis_are_one_recipe_started_in_several_ways(tmp_path: Path) -> None:
    words = ["arms=[clip]", "seeds=[0]", "axes={execution.ranks: [1, 2, 8]}"]
    plan, cells = make(tmp_path, *words, "execution={launcher: torchrun, ranks_per_node: 4, device: cuda}")
    folder = StudyFolder(plan.place)
    assert [cell.name for cell in cells] == ["clip-B32-ranks1-s0", "clip-B32-ranks2-s0", "clip-B32-ranks8-s0"]
    assert len({cell.recipe_hash for cell in cells}) == 1
    for cell, ranks in zip(cells, (1, 2, 8), strict=True):
        assert f"--nproc-per-node={ranks}" in command(plan, folder, cell)
        assert not [word for word in cell.words if "ranks" in word]
    scripts = write_jobs(plan, folder, cells, tmp_path / "jobs")
    found = {script.name: script.read_text() for script in scripts}
    assert list(found) == ["tiny-ranks1.sbatch", "tiny-ranks2.sbatch", "tiny-ranks8.sbatch"]
    assert "--nodes=2\n#SBATCH --ntasks-per-node=4\n#SBATCH --gpus-per-node=4\n" in found["tiny-ranks8.sbatch"]
    assert "tiny-ranks2.commands" in found["tiny-ranks2.sbatch"]


def test_cells_that_run_at_once_have_gpus_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "execution={launcher: deepspeed, ranks: 2, jobs: 2, device: cuda}"
    plan, cells = make(tmp_path, words)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [devices(plan.execution, slot) for slot in (0, 1)] == [["0", "1"], ["2", "3"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert devices(plan.execution, 1) == ["6", "7"]
    [world] = [word for word in command(plan, StudyFolder(plan.place), cells[0], 1) if word.startswith("--world_info=")]
    assert json.loads(base64.urlsafe_b64decode(world.partition("=")[2])) == {"localhost": ["6", "7"]}


def test_a_job_array_gives_every_task_the_words_of_its_cell(tmp_path: Path) -> None:
    plan, cells = make(
        tmp_path, "arms=[clip, amclr]", "execution={launcher: deepspeed, ranks: 16}", "words=[data.lanes=16]"
    )
    folder = StudyFolder(plan.place)
    [script] = write_jobs(plan, folder, cells, tmp_path / "jobs")
    text = script.read_text()
    assert "#SBATCH --array=1-4" in text
    assert "#SBATCH --nodes=2" in text
    assert "#SBATCH --ntasks-per-node=8" in text
    subprocess.run(["bash", "-n", str(script)], check=True)
    reads = next(line for line in text.splitlines() if line.startswith("eval"))
    read = ["bash", "-c", f'SLURM_ARRAY_TASK_ID=3\n{reads}\nprintf "%s\\n" "$@"']
    found = subprocess.run(read, check=True, capture_output=True, text=True).stdout.splitlines()
    assert found == [cells[2].name, *run_module.cell_words(plan, folder, cells[2])]
    assert "data.image_view={amclr: 1.0, crop_scale: [1, 1], flip: 0}" in found
    assert shlex.join(found) in (tmp_path / "jobs" / "tiny.commands").read_text()


# SLURM as a job array meets it: tasks one after the other, and what scontrol requeues is started again. srun trains in
# the first start of the first task; the others end as a mistake, a lost node and a finished run do.
SLURM = {
    "sbatch": """
for task in $(seq "$(sed -n 's/^#SBATCH --array=1-//p' "$1")"); do
    restarts=0
    while true; do
        rm -f "$BOARD/requeue"
        SLURM_JOB_ID=$((400 + task)) SLURM_ARRAY_JOB_ID=400 SLURM_ARRAY_TASK_ID=$task SLURM_RESTART_COUNT=$restarts \\
            SLURM_JOB_NODELIST=here bash "$1"
        echo "task $task, start $restarts: $?, $(cat "$BOARD/requeue" 2> /dev/null || echo left)" >> "$BOARD/ended"
        [ -e "$BOARD/requeue" ] || break
        restarts=$((restarts + 1))
    done
done
""",
    "scontrol": """
case $1 in
    show) echo 127.0.0.1 ;;
    requeue) echo "requeued $2" > "$BOARD/requeue" ;;
esac
""",
    "srun": """
shift 2 # --kill-on-bad-exit=1 and the interpreter
export SLURM_STEP_NUM_TASKS=1 SLURM_STEP_TASKS_PER_NODE=1 SLURM_PROCID=0 SLURM_LOCALID=0
case $SLURM_ARRAY_TASK_ID.$SLURM_RESTART_COUNT in
    1.0) exec "$PYTHON" "$@" ;;
    1.1) exit 2 ;;
    2.0) exit 1 ;;
esac
""",
}


@pytest.mark.timeout(900)  # a loaded machine took four minutes
@pytest.mark.launch
def test_a_real_cell_begins_in_a_job_array_ends_under_torchrun_and_is_reported(tmp_path: Path) -> None:
    short = "'evaluation.splits=[emoji/val_style]', evaluation.resamples=20, evaluation.classes=null"
    words = ["arms=[clip, dcl]", "seeds=[0]", "budget.samples=64", "execution.words=[execution.workers=0]"]
    plan, cells = make(tmp_path, *words, f"words=[{short}, train.max_hours=1e-9]")
    folder, board = StudyFolder(plan.place), tmp_path / "board"
    folder.write(plan, base_tree(plan), cells)
    [script] = write_jobs(plan, folder, cells, tmp_path / "jobs")
    board.mkdir()
    for name, text in SLURM.items():
        (board / name).write_text(f"#!/bin/bash\n{text}")
        (board / name).chmod(0o755)
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "BOARD": str(board), "PYTHON": sys.executable,
        "PATH": f"{board}:{os.environ['PATH']}",
    }  # fmt: skip

    def launch(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)

    ran = launch("sbatch", str(script))
    assert (board / "ended").read_text().splitlines() == [
        "task 1, start 0: 75, requeued 400_1",  # train.max_hours: after the first of two steps
        "task 1, start 1: 2, left",
        "task 2, start 0: 1, requeued 400_2",
        "task 2, start 1: 0, left",
    ], ran.stdout + ran.stderr
    clip, dcl = read_study(plan.place).missing
    assert (clip.cell.cell, clip.status, clip.message) == ("clip-B32-s0", "failed", "logs/tiny-400_1.out")
    assert (dcl.cell.cell, dcl.status) == ("dcl-B32-s0", "failed")  # its second start ended well, and left nothing
    tried = (plan.place / "logs" / "clip-B32-s0.attempts.jsonl").read_text().splitlines()
    assert [json.loads(line)["status"] for line in tried] == ["interrupted", "failed"]
    assert json.loads(tried[0])["seconds"] >= 1
    study = [sys.executable, str(ROOT / "launch" / "study.py"), str(tmp_path / "tiny.yaml"), *words, f"words=[{short}]"]
    here = [f"folder={plan.place}", "batch_sizes=[32]", "execution.launcher=torchrun", "--cells", "clip-*"]
    done = launch(*study, *here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 cells are finished" in done.stdout
    assert [(one["cell"], one["status"]) for one in folder.recorded()] == [("clip-B32-s0", "done")]
    listed = json.loads((plan.place / "cells.json").read_text())
    run = folder.runs / "clip-B32-s0"
    assert (run / "config.yaml").read_text().startswith(f"# recipe {listed['cells'][0]['recipe_hash']}\n")
    assert len(json.loads((run / "environment.json").read_text())["resumed"]) == 1
    assert [one["step"] for one in folder.records("clip-B32-s0")] == [1, 2]
    assert listed["metrics"][0]["keys"][0] in json.loads((run / "evaluation.json").read_text())
    assert (
        "| dcl-B32-s0 | failed | its last attempt ended well, but there is no evaluation.json |"
        in (plan.place / "report" / "report.md").read_text()
    )
