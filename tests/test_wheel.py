"""A wheel holds everything: built from a copy and installed elsewhere, its verbs run where no checkout is known."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.launch

ROOT = Path(__file__).parents[1]
SOURCES = ("amclr_scale", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
SMALL = (
    "train.epochs=null", "train.samples=64", "train.global_batch_size=32", "data.image_size=32", "execution.workers=0",
    "evaluation.splits=[emoji/val_concept]", "evaluation.resamples=0",
)  # fmt: skip
UNHURRIED = ("evaluation.resamples=0", "evaluation.probes=[]")

DRIVER = """
import json, sys
from pathlib import Path
import amclr_scale
from amclr_scale.commands.main import main

words, codes = json.loads(sys.argv[1]), []
for verb in words:
    print("==", *verb, flush=True)
    codes.append(main(verb))
print(json.dumps({"codes": codes, "from": amclr_scale.__file__}))
"""


def run(command, folder, site, **keys):
    environment = {
        **os.environ, "PYTHONPATH": str(site), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, **keys)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Where the wheel is installed."""
    copy, made, site = (tmp_path_factory.mktemp(name) for name in ("copy", "wheel", "site"))
    for name in SOURCES:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(made), "."], copy, "", timeout=240)
    (wheel,) = made.glob("*.whl")
    run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], made, "", timeout=240)
    return site


@pytest.mark.launch
def test_the_verbs_of_an_installed_package_run_from_anywhere(site, tmp_path):
    assert "shards make" in run([str(site / "bin" / "amclr-scale"), "--help"], tmp_path, site)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (40, 40), (60 * number, 10, 200)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"square number {number}")
    verbs = [
        ["--local_rank=0", "train", "--config", "quickstart", *SMALL, "run.name=first"],  # as deepspeed --module has it
        ["evaluate", "runs/first", "--suite", "emoji", *(w for s in UNHURRIED for w in ("--set", s))],
        ["export", "runs/first", "--out", "model"],
        ["embed", "model", "--images", str(pictures), "--out", "rows.npy"],
        ["shards", "make", "folder", "--images", str(pictures), "--out", "shards"],
        ["shards", "index", "shards"],
        ["shards", "tokenizer", "shards", "--entries", "300", "--out", "tokenizer.json"],
        ["fit", "--config", "quickstart", "--gpus", "1", "--device", "cpu", "--memory", "2GiB", "--batch", "64"],
        ["study", "mini_amclr", "--dry-run"],
    ]  # fmt: skip
    said = run([sys.executable, "-c", DRIVER, json.dumps(verbs)], tmp_path, site, timeout=280)
    found = json.loads(said.splitlines()[-1])
    assert found["codes"] == [0] * len(verbs), said[-3000:]
    assert Path(found["from"]).is_relative_to(site)
    assert (tmp_path / "runs" / "first" / "evaluation.json").is_file()
    assert (tmp_path / "model" / "README.md").is_file()
    assert (tmp_path / "rows.npy").is_file()
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.launch
def test_what_starts_other_processes_names_this_python(site, tmp_path):
    words = [f"folder={tmp_path / 'studies'}", "arms=[clip]", "seeds=[0]", "batch_sizes=[128]"]
    run([sys.executable, "-m", "amclr_scale", "study", "mini_amclr", *words, "--slurm", "jobs"], tmp_path, site)
    script = next((tmp_path / "jobs").glob("*.sbatch")).read_text()
    assert f"{sys.executable} -m amclr_scale train" in script
    assert str(ROOT) not in script.replace(sys.executable, "")
