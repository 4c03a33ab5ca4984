"""What others add, each in one file of additions/ with one registration, run by the main job."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from amclr_scale.data.tokenizers import load_tokenizer
from tests.evaluation.shards import write_split

pytestmark = pytest.mark.launch

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config", "quickstart", "train.epochs=null", "train.samples=256", "train.global_batch_size=64",
    "evaluation.splits=[]", "run.log_every_steps=1", "execution.threads=1", "execution.workers=0",
]  # fmt: skip


ADDITIONS = ["hook", "optimizer", "score", "evaluator", "tower"]
ALL = ["optimizer.name=signum", "optimizer.options.forget=0.5", "optimizer.lr=1e-4", "execution.zero_stage=2"]
TOWERS = ["model.image.name=colours", "model.image.width=24", "model.text.name=words"]
JOBS = {  # a run's name -> its further words
    "whole": [*ALL, "evaluation.splits=[HELD_OUT]", "evaluation.evaluators=[nearness]"],
    "stopped": [*ALL, "train.max_hours=1e-9"],  # after its first step
    "stopped again": [*ALL, "resume=auto"],
    "another": [*ALL, "optimizer.options.forget=0.9"],
    "towers": [*TOWERS, "execution.micro_batch_size=16", "execution.memory_report=true"],
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """The folder of the runs, and what was said."""
    folder = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    held_out = str(write_split(folder / "held_out", 23))
    lines = [[*SMALL, f"run.folder={folder}", f"run.name={name.split()[0]}", *words] for name, words in JOBS.items()]
    typed = "".join(json.dumps(words).replace("HELD_OUT", held_out) + "\n" for words in lines)
    command = [sys.executable, "-m", "tests.commands.additions.job", *ADDITIONS]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input=typed,
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    codes = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("exit code ")]
    assert codes == [75 if name == "stopped" else 0 for name in JOBS], done.stderr + done.stdout
    return folder, done.stdout


def numbers(folder):
    return json.loads((folder / "evaluation.json").read_text())


def losses(folder):
    return [r["loss"] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in r]


def test_a_hook(jobs):
    """One with a state, which goes on where a stopped run left it."""
    folder, _ = jobs
    whole = numbers(folder / "whole")
    assert whole["mean_scale_steps"] == 4
    assert numbers(folder / "stopped") == {name: whole[name] for name in ("mean_scale", "mean_scale_steps")}
    assert (folder / "stopped/checkpoints/step_00000001/mean_scale.safetensors").exists()


def test_an_optimizer(jobs):
    """One with an option and a state of its own, under ZeRO."""
    folder, said = jobs
    assert "objective clip, our own Signum, on cpu" in said
    whole, goes_on, another = (losses(folder / name) for name in ("whole", "stopped", "another"))
    assert goes_on == whole
    assert whole[0] == another[0]
    assert whole[-1] != another[-1]
    assert "options:\n    forget: 0.5" in (folder / "whole/config.yaml").read_text()


def test_scores_of_rankings(jobs):
    """A share and one that is none: measured with errors and chance, shown, drawn."""
    folder, said = jobs
    found = {name.partition("held_out/")[2]: value for name, value in numbers(folder / "whole").items()}
    assert 1 / 23 < found["image_to_text_MRR"] < 1
    assert found["image_to_text_MRR/chance"] == pytest.approx(sum(1 / n for n in range(1, 24)) / 23)
    assert 1 < found["text_to_image_mean_rank"] < 23
    assert found["text_to_image_mean_rank/chance"] == pytest.approx(12)
    assert found["text_to_image_mean_rank/low"] < found["text_to_image_mean_rank"]
    assert "median rank" in said
    assert "mean rank" in said
    shown = f"{100 * found['image_to_text_MRR']:.1f} [{100 * found['image_to_text_MRR/low']:.1f}, "
    assert shown in said


def test_an_evaluator(jobs):
    folder, said = jobs
    found = {name.partition("held_out/")[2]: value for name, value in numbers(folder / "whole").items()}
    assert -1 <= found["pairs_least"] < found["pairs_cosine"] < 1
    assert found["pairs_cosine/stderr"] > 0
    assert ": nearness" in said
    assert f"{found['pairs_cosine']:.4g} [" in said


def test_towers(jobs):
    """Trained through the gradient cache, and in the account of memory."""
    folder, said = jobs
    vocabulary = load_tokenizer("emoji", 32).vocab_size
    parameters = 49 * 24 + vocabulary * 64 + (24 + 64) * 128 + 2  # towers, heads, scale and bias
    assert f"{parameters:,} parameters" in said
    found = losses(folder / "towers")
    assert found[-1] != found[0]
    memory = json.loads((folder / "towers/memory.json").read_text())
    step = memory["phases"]["optimizer"]
    assert step["measured"] == pytest.approx(step["predicted"], rel=0.05)
