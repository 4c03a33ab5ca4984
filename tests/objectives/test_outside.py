"""An objective in a file outside the package, with trainable parts and views under names of its own, through the job.

tests/objectives/toy.py is the whole of it: nothing in the package knows it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from amclr_scale import objectives
from amclr_scale.commands import evaluate
from amclr_scale.config.load import load
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.errors import UserError
from amclr_scale.evaluation.models import load_model
from amclr_scale.memory.account import account
from amclr_scale.memory.random_embeddings import made_together
from amclr_scale.memory.towers import parameter_sizes, trace
from amclr_scale.objectives.base import Objective
from amclr_scale.planner.traffic import on_the_wire
from amclr_scale.trained.export import export
from amclr_scale.types import Embeddings
from tests.objectives.harness import global_batch, my_rows

pytestmark = pytest.mark.launch

TOY = Path(__file__).with_name("toy.py")
ROOT = Path(__file__).parents[2]
SECTION = {"name": "toy", "module": str(TOY)}
D, M = 128, 8
PARTS = D * D + D + M * D  # of the predictor and the prototypes
WORDS = [
    "train.epochs=null", "train.samples=128", "train.global_batch_size=32", "data.image_views=2",
    "evaluation.splits=[]", "evaluation.resamples=0", "run.log_every_steps=1", "execution.threads=1",
    "optimizer.warmup_samples=32", "checkpoint.every_samples=64", "objective.name=toy",
]  # fmt: skip


def job(*words, ranks=1, package=ROOT):
    """The main job as a user starts it, of the package in that folder."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    environment["PYTHONPATH"] = str(package)
    launcher = [sys.executable]
    if ranks > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port]
    command = [*launcher, "-m", "amclr_scale", "train", *map(str, words)]
    done = subprocess.run(
        command, cwd=package, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps on one rank, whose objective's file is gone by now."""
    folder = tmp_path_factory.mktemp("outside")
    file = folder / "mine.py"
    shutil.copyfile(TOY, file)
    words = ["--config", "quickstart", *WORDS, f"objective.module={file}", f"run.folder={folder}"]
    job(*words, "run.name=whole", "execution.memory_report=true")
    file.unlink()
    return folder / "whole"


def objective_of_steps(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["objective/objective"] for record in records if "objective/objective" in record}


@pytest.mark.slow
def test_it_trains_and_its_memory_was_predicted(run):
    found = objective_of_steps(run)
    assert found[4] < found[1] - 0.1
    weights = load_file(run / "weights.safetensors")
    assert weights["parts.prototypes"].shape == (M, D)
    assert weights["parts.predict.weight"].shape == (D, D)
    report = json.loads((run / "memory.json").read_text())
    for name, phase in report["phases"].items():
        assert phase["predicted"] == pytest.approx(phase["measured"], rel=0.05), name


@pytest.mark.slow
def test_it_is_the_same_as_a_file_among_the_packages_own(run, tmp_path):
    """One file more in objectives/ of a copy of the package, and nothing else."""
    copied = tmp_path / "amclr_scale"
    objects = copied / "objectives"
    objects.mkdir(parents=True)
    for folder, inside in ((ROOT / "amclr_scale", copied), (ROOT / "amclr_scale/objectives", objects)):
        for path in folder.iterdir():
            if path.name not in ("objectives", "__pycache__"):
                (inside / path.name).symlink_to(path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copyfile(TOY, objects / "mine.py")
    job("--config", "quickstart", *WORDS, f"run.folder={tmp_path}", "run.name=inside", package=tmp_path)
    assert objective_of_steps(tmp_path / "inside") == objective_of_steps(run)
    assert "module" not in (tmp_path / "inside/config.yaml").read_text()


@pytest.mark.slow
def test_it_goes_on_from_the_copy_in_its_run_folder_on_two_ranks_at_stage_1(run):
    half = run / "checkpoints" / "step_00000002"
    words = ["--config", run / "config.yaml", f"resume={half}", "run.name=other", "evaluation.splits=[]"]
    said = job(*words, "execution.zero_stage=1", "execution.micro_batch_size=8", ranks=2)
    assert "2 ranks x 16, encoded 8 at once" in said
    whole, other = objective_of_steps(run), objective_of_steps(run.parent / "other")
    assert set(other) == {3, 4}
    assert other[4] == pytest.approx(whole[4], rel=1e-5)


@pytest.mark.slow
def test_it_is_evaluated_and_exported_without_its_code(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "from_elsewhere")
    poisoned = tmp_path / "from_elsewhere" / "objective.py"
    poisoned.write_text("raise SystemExit('ran')\n")
    loaded = load_model(str(poisoned.parent))
    assert loaded.config.objective["name"] == "toy"
    assert not any(name.startswith("parts.") for name in loaded.model.state_dict())
    words = ["--set", "evaluation.splits=[emoji/val_concept]", "--output", str(tmp_path / "results")]
    assert evaluate.main([str(poisoned.parent), *words]) == 0
    assert "emoji/val_concept" in capsys.readouterr().out
    export(run, tmp_path / "exported")
    assert (tmp_path / "exported" / "objective.py").read_text() == TOY.read_text()
    assert load(tmp_path / "exported" / "config.yaml").objective["prototypes"] == M


def small(*words, world_size=1):
    given = ["data.image_size=32", "data.context_length=16", "train.epochs=1", "execution.threads=1", *words]
    return load(None, [*given, "train.global_batch_size=64"], world_size)


TOYS = ("data.image_views=2", "objective.name=toy", f"objective.module={TOY}")


def test_the_account_has_its_parts():
    with_parts, plain = small(*TOYS), small("data.image_views=2", "objective.name=cyclip", "data.image_views=0")
    assert sum(parameter_sizes(with_parts)) - sum(parameter_sizes(plain)) == PARTS

    def component(config, name):
        found = account(config, world_size=1, num_samples=4096, device="cpu")
        return next(c.bytes for c in found.components if c.name == name)

    assert component(with_parts, "parameters") - component(plain, "parameters") == 4 * PARTS
    assert component(with_parts, "optimizer states") - component(plain, "optimizer states") == 8 * PARTS
    image, text = (trace(with_parts, modality, "cpu") for modality in ("image", "text"))
    assert image.outputs == 4 * D * (1 + 2 + 1)  # embedding, two views, prediction
    assert text.outputs == 4 * D * (1 + 1)
    assert image.shared == text.shared == 4 * M * D
    small("objective.name=clip")  # the next one has none of it
    assert sum(parameter_sizes(small("objective.name=clip"))) == sum(parameter_sizes(plain))


def test_the_wire_has_its_parts():
    def gradients(*words):
        config = small(*words, "execution.zero_stage=1", world_size=2)
        found = on_the_wire(config, world_size=2, num_samples=4096, device_type="cpu")
        return found.messages.by_purpose()["gradients"].payload_bytes

    assert gradients(*TOYS) - gradients("objective.name=clip") == 4 * PARTS


def test_in_any_loop():
    e = my_rows(global_batch(0, views=2))
    width = e.image.shape[1]
    toy = objectives.create("toy", module=str(TOY), prototypes=3)
    parts = toy.model_parts(toy.config, width).double()
    made = parts({"image": e.image, "text": e.text})
    loss = toy(replace(e, text_views=(), shared=made.pop("shared"), **made))
    loss.value.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in parts.parameters())
    assert all(view.grad.abs().max() > 0 for view in e.image_views)
    seen = (e.image_views[0] + 2 * e.image_views[1]) / 3
    by_hand = sum((F.normalize(made[f"{side}_predicted"], dim=1) - seen).square() for side in ("image", "text"))
    share = (e.image @ F.normalize(parts.prototypes, dim=1).T).softmax(1).mean(0)
    wanted = loss.metrics["clip"] + 0.1 * (by_hand.sum(1).mean() + share.square().sum()).item()
    assert loss.metrics["objective"] == pytest.approx(wanted, abs=1e-12)
    assert "toy" not in Objective.registry
    assert objectives.create("softer", module=str(TOY), num_samples=5).config.gamma == 0.8


def test_what_is_missing_is_named():
    toy = objectives.create("toy", module=str(TOY))
    e = my_rows(global_batch(0, views=1))
    with pytest.raises(UserError, match=r"embeddings\.image_views: toy needs 2, got 1; set data\.image_views"):
        toy(e)
    with pytest.raises(UserError, match=r"embeddings\.image_predicted: the objective reads it, got nothing"):
        toy(my_rows(global_batch(0, views=2)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nowhere_at_all\n", r"odd\.py cannot be imported: ModuleNotFoundError: No module named"),
        ("x = 1\n", r"odd\.py has no objective 'toy'; it has none"),
    ],
)
def test_a_file_that_is_no_objective(tmp_path, text, said):
    (tmp_path / "odd.py").write_text(text)
    with pytest.raises(UserError, match=said):
        objectives.create("toy", module=str(tmp_path / "odd.py"))


def test_a_file_that_changes_between_reading_and_importing_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    shutil.copyfile(TOY, file)
    config = small(*TOYS[:2], f"objective.module={file}")
    objectives.from_section(config.objective)
    file.write_text(TOY.read_text().replace("/ 3", "/ 4"))
    with pytest.raises(UserError, match="has changed since the configuration was read"):
        objectives.from_section(config.objective)


def test_inputs_of_every_kind_reach_the_objective():
    """Whatever a batch or a model gives under a kind's name is an attribute, and rows are checked."""
    e = global_batch(0)
    given = {"labels": torch.arange(len(e.image)), "image_tokens": torch.randn(len(e.image), 3, 6)}
    full = replace(e, image_negatives=(e.text, e.image), **given)
    assert torch.equal(full.labels, given["labels"])
    assert len(full.image_negatives) == 2
    again = Embeddings.from_flat(full.flat())
    assert list(again.flat()) == list(full.flat())
    doubled = full.map(lambda name, x: 2 * x)
    assert torch.equal(doubled.labels, 2 * given["labels"])
    with pytest.raises(UserError, match=r"embeddings\.references: the objective reads it, got nothing"):
        full.references  # noqa: B018
    assert not hasattr(full, "references")


BOTH = """
from dataclasses import dataclass
import torch
from amclr_scale.objectives.base import Objective
class Product(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = torch.nn.Bilinear(width, width, 1)
    def forward(self, outputs):
        IF return {"match": self.net(outputs["image"], outputs["text"])}
class Both(Objective, name="both"):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        pass
    @staticmethod
    def model_parts(options, width):
        return Product(width)
    def forward(self, embeddings):
        raise NotImplementedError
"""


def test_parts_that_read_both_modalities(tmp_path):
    careless, careful = tmp_path / "careless.py", tmp_path / "careful.py"
    careless.write_text(BOTH.replace("IF ", ""))
    careful.write_text(BOTH.replace("IF ", 'if not {"image", "text"} <= set(outputs): return {}\n        '))
    section = {"name": "both", "module": str(careful)}
    assert made_together(json.dumps(section), 4) == ("match",)
    assert made_together(json.dumps(SECTION), 4) == made_together('{"name": "clip"}', 4) == ()
    assert made_together('{"name": "full_bank", "negatives": 50}', 4) == ()
    model = DualEncoder(
        *(torch.nn.Flatten() for _ in range(4)), temperature=0.1, logit_bias=0.0, image_mean=(0.0,) * 3,
        image_std=(1.0,) * 3,
    )  # fmt: skip
    model.take_parts(objectives.parts_of({"name": "both", "module": str(careless)}, 12))
    image, text = torch.zeros(2, 3, 2, 2), torch.ones(2, 12)
    assert model((image,), (text,))["match"].shape == (2, 1)
    with pytest.raises(UserError, match=r"its model_parts read 'text' in a call that encodes image and image_views"):
        model((image,))
    model.take_parts(objectives.parts_of(section, 12))
    assert "match" not in model((image,))
