"""What others add, each in one file of additions/ with one registration, run by the main job."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config", "quickstart", "train.epochs=null", "train.samples=256", "train.global_batch_size=64",
    "evaluation.splits=[]", "run.log_every_steps=1", "execution.threads=1", "execution.workers=0",
]  # fmt: skip


def run(folder, names, *runs, codes=None):
    """Run jobs with these additions, one after the other."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    words = "".join(json.dumps([*SMALL, f"run.folder={folder}", *words]) + "\n" for words in runs)
    command = [sys.executable, "-m", "tests.commands.additions.job", *names]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input=words, capture_output=True, text=True, timeout=200, check=False
    )
    ended = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("exit code ")]
    assert ended == (codes or [0] * len(runs)), done.stderr + done.stdout
    return done.stdout


def numbers(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_a_hook(tmp_path):
    """One with a state, in a run that is stopped after its first step and goes on."""
    stopped = ["run.name=stopped", "train.max_hours=1e-9"]
    run(tmp_path, ["hook"], ["run.name=whole"], stopped, ["run.name=stopped", "resume=auto"], codes=[0, 75, 0])
    whole = numbers(tmp_path / "whole")
    assert whole["mean_scale_steps"] == 4
    assert numbers(tmp_path / "stopped") == whole
    assert (tmp_path / "stopped/checkpoints/step_00000001/mean_scale.safetensors").exists()
