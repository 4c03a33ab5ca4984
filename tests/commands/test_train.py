"""The command as a user types it: what it answers to mistakes, and that every launcher trains the same model."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.launch

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SMALL = [
    "--config", "configs/quickstart.yaml", "train.epochs=null", "train.samples=640", "train.global_batch_size=32",
    "evaluation.splits=[]", "run.log_every_steps=1", "execution.threads=1",
]  # fmt: skip
TEACHER = [
    "model.momentum={decay: 0.8}", "evaluation.momentum=true", "evaluation.splits=[emoji/val_style]",
    "evaluation.resamples=0",
]  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


LAUNCHERS = {
    "python": lambda: [sys.executable],
    "deepspeed": lambda: [str(BIN / "deepspeed"), "-q", "--num_gpus", "2", "--master_port", free_port()],
    "torchrun": lambda: [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", free_port()],
}


def train(*words, launcher="python", timeout=120):
    return run([*LAUNCHERS[launcher](), "launch/train.py", *words], timeout)


def run(command, timeout=120):
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "0",
    }
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def mistakes(tmp_path):
    no_captions = tmp_path / "silent"
    no_captions.mkdir(exist_ok=True)
    make_shard_without_captions(no_captions / "00000.tar")
    (tmp_path / "file").write_text("")
    return {
        "unknown key": (
            ["train.global_batchsize=8"],
            "train.global_batchsize: no such key; did you mean 'global_batch_size'?",
        ),
        "wrong type": (["optimizer.lr=fast"], "optimizer.lr: expected a valid number"),
        "missing shard": ([f"data.train={tmp_path}/{{00000..00003}}.tar"], "data.train"),
        "shard without captions": (
            [f"data.train={no_captions}/00000.tar"],
            "expected captions in .txt members, found 40 .png",
        ),
        "output folder": ([f"run.folder={tmp_path}/file/runs"], "run.folder: expected a folder, got"),
        "hub name": (["model.text.name=transformers/distilbert-base-uncased"], "model.text.name"),
        "probe": (["run.probe.samples=100"], "run.probe.samples: expected a multiple of train.global_batch_size = 32"),
        "large probe": (["run.probe.samples=6400"], "run.probe.samples: expected at most the 4938 samples of the data"),
        "tokenizer": (["data.tokenizer=bert-base-uncased"], "data.tokenizer"),
    }


def make_shard_without_captions(path):
    import io
    import tarfile

    from PIL import Image

    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with tarfile.open(path, "w") as tar:
        for number in range(40):
            member = tarfile.TarInfo(f"{number:06d}.png")
            member.size = len(image.getvalue())
            tar.addfile(member, io.BytesIO(image.getvalue()))


KINDS = (
    "unknown key",
    "wrong type",
    "missing shard",
    "shard without captions",
    "output folder",
    "hub name",
    "probe",
    "large probe",
    "tokenizer",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of each mistake, what is to be said of it, and the exit code, output and errors of its command."""
    folders = {kind: tmp_path_factory.mktemp("mistake") for kind in KINDS}
    wanted = {kind: mistakes(folder)[kind] for kind, folder in folders.items()}
    words = [[*SMALL, f"run.folder={folders[kind]}/runs", *wanted[kind][0]] for kind in KINDS]
    done = run([sys.executable, "-m", "tests.commands.copies", json.dumps(words)])
    assert done.returncode == 0, done.stderr
    answers = map(json.loads, done.stdout.splitlines())
    return {kind: (folders[kind], wanted[kind][1], *answer) for kind, answer in zip(KINDS, answers, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mistake_is_told_in_words(made, kind):
    folder, said, code, out, err = made[kind]
    assert code == 2, err
    assert said in err
    assert "Traceback" not in err + out
    assert not (folder / "runs").exists()  # nothing half-written


def test_two_ranks_with_a_mistake_end_at_once(tmp_path):
    words = [*SMALL, f"run.folder={tmp_path}/runs", f"data.train={tmp_path}/nowhere.tar"]
    done = train(*words, launcher="deepspeed")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("data.train: ") == 1  # one voice
    assert "Traceback" not in done.stderr + done.stdout


def test_more_ranks_than_lanes(tmp_path):
    done = train(*SMALL, f"run.folder={tmp_path}/runs", "data.lanes=1", launcher="torchrun")
    assert done.returncode != 0
    assert "data.lanes: expected a multiple of the number of ranks, got 1 lanes for 2 ranks" in done.stderr


def test_a_folder_that_cannot_be_written():
    done = train(*SMALL, "run.folder=/proc/runs")  # not even root writes there
    assert done.returncode == 2
    assert "run.folder: " in done.stderr
    assert "/proc/runs" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_dry_run_prints_configuration_and_arithmetic_and_writes_nothing(tmp_path):
    done = train(*SMALL, f"run.folder={tmp_path}/runs", "--dry-run", "--verbose")
    assert done.returncode == 0, done.stderr
    assert "global batch 32 = 1 ranks x 32" in done.stdout
    assert "20 steps = 640 samples" in done.stdout
    assert "global_batch_size: 32" in done.stdout
    assert not (tmp_path / "runs").exists()


def trace(folder):
    return [r["loss"] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in r]


def probed(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: {k: v for k, v in r.items() if k.startswith("probe/")} for r in lines if "probe_seconds" in r}


def test_every_launcher_and_number_of_ranks_gives_the_same_run(tmp_path):
    """Also where one measures on the way what batches get wrong and has a teacher, and another does not."""
    traces = {}
    for launcher in LAUNCHERS:
        probe = [] if launcher == "deepspeed" else ["run.probe.samples=128", "run.probe.every_samples=256", *TEACHER]
        done = train(*SMALL, f"run.folder={tmp_path}", f"run.name={launcher}", *probe, launcher=launcher)
        assert done.returncode == 0, done.stderr
        traces[launcher] = trace(tmp_path / launcher)
        assert len(traces[launcher]) == 20
        for name in ("config.yaml", "environment.json", "weights.safetensors"):
            assert (tmp_path / launcher / name).stat().st_size > 100
    assert traces["python"][0] > 3.4  # ln 32 = 3.47: an untrained model
    assert traces["python"] == pytest.approx(traces["deepspeed"], rel=1e-4)
    assert traces["deepspeed"] == traces["torchrun"]
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("python", "torchrun"))
    assert one == pytest.approx(two, rel=0.01, abs=0.02)
    recall = "emoji/val_style/image_to_text_R@10"
    assert one[recall] != one[f"momentum/{recall}"] > 0
    assert (tmp_path / "torchrun" / "momentum.safetensors").stat().st_size > 100
    one, two = probed(tmp_path / "python"), probed(tmp_path / "torchrun")
    assert list(one) == list(two) == [8, 16, 20]
    for step, found in one.items():
        assert found == pytest.approx(two[step], rel=1e-3)
        assert 0 < found["probe/gradient_cosine"] < 1
