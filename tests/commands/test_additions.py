"""What others add, each in one file of additions/ with one registration, run by the main job."""

import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from amclr_scale.commands.make_shards import main as make_shards
from amclr_scale.config import schema
from amclr_scale.config.backends import SIMILARITY_BACKENDS
from amclr_scale.data.formats.members import ChangedShardError
from amclr_scale.data.formats.shards import SHARD_FORMATS
from amclr_scale.data.indexing import open_index
from amclr_scale.data.ingestion import FORMATS as ANNOTATION_FORMATS
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.similarity import using
from amclr_scale.similarity.torch_backend import BUFFERS
from tests.data.test_loader import assert_same, take
from tests.evaluation.shards import COLOURS, picture, write_split
from tests.memory.test_account import found as accounted
from tests.similarity.definition import draw
from tests.similarity.test_contrast import OPTIONS, worst_error
from tests.similarity.test_pairwise import worst_error as pairwise_error

pytestmark = pytest.mark.launch

ROOT = Path(__file__).parents[2]
SMALL = [
    "--config", "quickstart", "train.epochs=null", "train.samples=256", "train.global_batch_size=64",
    "evaluation.splits=[]", "run.log_every_steps=1", "execution.threads=1", "execution.workers=0",
]  # fmt: skip


ADDITIONS = ["backend", "hook", "optimizer", "score", "evaluator", "tower", "shard_format", "split_format"]
ALL = ["optimizer.name=signum", "optimizer.options.forget=0.5", "optimizer.lr=1e-4", "execution.zero_stage=2"]
TOWERS = ["model.image.name=colours", "model.image.width=24", "model.text.name=words"]
JOBS = {  # a run's name -> its further words
    "whole": [*ALL, "evaluation.splits=[HELD_OUT]", "evaluation.every_samples=128", "evaluation.evaluators=[nearness]"],
    "stopped": [*ALL, "train.max_hours=1e-9"],  # after its first step
    "stopped again": [*ALL, "resume=auto"],
    "another": [*ALL, "optimizer.options.forget=0.9", "execution.similarity.backend=dense"],
    "towers": [
        *TOWERS,
        "execution.micro_batch_size=16",
        "execution.memory_report=true",
        "data.train=ZIPS",
        "data.cache=ZIPS",
        "data.image_size=32",
        "evaluation.splits=[LIST]",
    ],
}


@pytest.fixture(scope="module", autouse=True)
def registered_here_only():
    """Other tests of the same process do not know the formats that are registered here."""
    before = [(table, dict(table)) for table in (ANNOTATION_FORMATS, SHARD_FORMATS)]
    yield
    for table, as_it_was in before:
        table.clear()
        table.update(as_it_was)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards as tars, from annotations in a format of one's own, and the same samples in zips."""
    importlib.import_module("tests.commands.additions.annotations")
    folder = tmp_path_factory.mktemp("made")
    for i in range(128):
        (folder / f"{i}.png").write_bytes(picture(i))
    sections = [f"[{i}.png]\ncaption = picture {i} {COLOURS[i % 6]}\n" for i in range(128)]
    (folder / "captions.ini").write_text("\n".join([*sections, "[bare.png]"]), "utf-8")
    (folder / "some.list").write_text(
        "\n".join(f"{i}.png | picture {i} | {COLOURS[i % 6]}" for i in range(24)), "utf-8"
    )
    words = ["ini", "--annotations", str(folder / "captions.ini"), "--out", str(folder / "tars"), "--per-shard", "50"]
    assert make_shards(words) == 0
    (folder / "zips").mkdir()
    for path in (folder / "tars").glob("*.tar"):
        with tarfile.open(path) as tar, zipfile.ZipFile(folder / "zips" / f"{path.stem}.zip", "w") as zipped:
            for member in tar:
                zipped.writestr(member.name, tar.extractfile(member).read())
    return folder


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, made):
    """The folder of the runs, and what was said."""
    folder = tmp_path_factory.mktemp("runs")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    held_out = str(write_split(folder / "held_out", 23))
    lines = [[*SMALL, f"run.folder={folder}", f"run.name={name.split()[0]}", *words] for name, words in JOBS.items()]
    typed = "\n".join(map(json.dumps, lines))
    for name, place in (("HELD_OUT", held_out), ("ZIPS", made / "zips"), ("LIST", made / "some.list")):
        typed = typed.replace(name, str(place))
    command = [sys.executable, "-m", "tests.commands.additions.job", *ADDITIONS]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input=typed,
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    codes = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("exit code ")]
    assert codes == [75 if name == "stopped" else 0 for name in JOBS], done.stderr + done.stdout
    return folder, done.stdout


def test_evaluations_are_said_with_their_best(jobs):
    _, said = jobs
    lines = [line for line in said.splitlines() if line.startswith("eval at ")][:2]  # of the first run
    assert [line.split(":")[0] for line in lines] == ["eval at 128 samples", "eval at 256 samples"]
    for line in lines:
        assert re.search(r": held_out R@1 image to text [\d.]+ \((the best|best [\d.]+)\), ", line)


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
    assert another[0] == pytest.approx(whole[0], rel=1e-6)  # by another backend
    assert whole[-1] != another[-1]
    assert "options:\n    forget: 0.5" in (folder / "whole/config.yaml").read_text()


def test_a_backend_of_similarities(jobs):
    assert "dense backend on cpu, float32 operands" in jobs[1]


@pytest.fixture
def dense():
    name = importlib.import_module("tests.commands.additions.backend").__name__
    SIMILARITY_BACKENDS["dense"] = f"{name}:DENSE"
    yield
    del SIMILARITY_BACKENDS["dense"]


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("options", OPTIONS)
def test_such_a_backend_is_the_definition(options):
    with using(backend="dense"):
        assert worst_error(draw(45, 40, 0, dtype=torch.float32, extra=7), **options) < 2e-6
        assert pairwise_error(45, 40, 0, {"backend": "dense"}, dtype="float32") < 2e-6


@pytest.mark.usefixtures("dense")
def test_the_account_of_a_backend():
    whole, tiles = (
        accounted(f"execution.similarity.backend={name}", "execution.similarity.chunk=1000", batch=4000)
        for name in ("dense", "torch")
    )
    more = 4 * 4 * 4000**2 - BUFFERS * 4 * 1000**2
    assert whole.in_phase("objective") - tiles.in_phase("objective") == more


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


def test_a_format_of_annotations(made):
    index = open_index(schema.Data(caption="json.captions"), str(made / "tars"))
    assert index.num_samples == 128
    (reject,) = map(json.loads, (made / "tars/rejects.jsonl").read_text().splitlines())
    assert (reject["kind"], reject["image"]) == ("no caption", "bare.png")


def test_a_format_of_shards(made, jobs, tmp_path):
    """The batches of the same samples in tars, from several workers too; and a shard that changed is refused."""
    importlib.import_module("tests.commands.additions.shard_format")
    data = {"image_size": 8, "lanes": 4, "shuffle_window": 2, "cache": str(tmp_path)}
    tars, zips = (schema.Data(train=str(made / kind), **data) for kind in ("tars", "zips"))
    want = take(tars, 3, global_batch_size=64)
    assert_same(take(zips, 3, global_batch_size=64), want)
    assert_same(take(zips, 3, global_batch_size=64, workers=2), want)
    index = open_index(zips)
    assert index.reader(0).key(3) == open_index(tars).reader(0).key(3)
    path = Path(index.shards[1].url)
    content = bytearray(path.read_bytes())
    member = index.reader(1).members.of_row(0)["png"]
    content[member[0] + 60] ^= 255
    path.write_bytes(content)
    with pytest.raises(ChangedShardError, match=r"00001\.zip: it has changed"):
        index.reader(1).read(0, frozenset({"png"}))

    state = json.loads((jobs[0] / "towers/checkpoints/step_00000004/state.json").read_text())
    assert state["data_fingerprint"] == index.fingerprint


def test_a_format_of_evaluation_data(jobs):
    folder, said = jobs
    found = numbers(folder / "towers")
    assert found["some.list/image_to_text_R@1/chance"] == pytest.approx(1 / 24)
    assert found["some.list/zero_shot_top1/chance"] == pytest.approx(1 / 6)
    assert "6 classes: a patch of black" in said
