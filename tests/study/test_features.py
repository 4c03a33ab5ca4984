"""Arms that read features of another cell: what they may name, and that they run after it and read what it gave."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from amclr_scale.commands.main import main
from amclr_scale.config.load import dump
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.encoders.build import build_model
from amclr_scale.study.planning.cells import base_tree
from amclr_scale.study.planning.load import load_plan
from amclr_scale.study.planning.planned import Planned
from amclr_scale.study.running import features as features_module
from amclr_scale.study.running import run as run_module
from amclr_scale.study.running.folder import StudyFolder
from amclr_scale.study.running.phases import run_phases
from amclr_scale.study.running.pilot import pilot_plan, unmeasured
from amclr_scale.study.running.preview import held, hours
from amclr_scale.study.running.run import Outcome
from amclr_scale.study.running.tuning import plan_cells
from amclr_scale.trained.weights import save_weights
from tests.data.shards import write_shards
from tests.study.fake_study import fake_command
from tests.study.test_plan import PLAN, refusal

DRRHO = "words: [objective.name=drrho, data.image_reference=FEATURES/image.npy, data.text_reference=FEATURES/text.npy]"
B3 = "words: [data.batches=similar, data.communities=FEATURES/communities.npy]"
ARMS = (
    f"arms=[clip, {{name: drrho, like: dcl, features_of: clip-B32, {DRRHO}}}, "
    f"{{name: b3, like: clip, features_of: clip-B32-s0, communities: {{size: 4, skip: 1, neighbours: 3}}, {B3}}}]"
)


class Study:
    """A plan with two arms that read features, whose cells take milliseconds."""

    def __init__(self, tmp_path: Path, *words: str):
        self.file = tmp_path / "tiny.yaml"
        self.file.write_text(PLAN)
        fixed = [f"folder={tmp_path / 'study'}", "batch_sizes=[32]", "execution.retries=0", ARMS]
        self.plan = load_plan(self.file, [*fixed, *words])
        self.tree, self.folder = base_tree(self.plan), StudyFolder(self.plan.place)
        self.how: dict[str, str] = {}
        self.ran: list[str] = []
        self.said: list[str] = []

    def cells(self) -> dict[str, Planned]:
        return {cell.name: cell for cell in plan_cells(self.plan, self.tree, 4938.0, self.folder)[0]}

    def command(self, plan: Any, folder: StudyFolder, cell: Planned, slot: int) -> list[str]:
        if cell.features:
            assert cell.features.made
        self.ran.append(cell.name)
        return fake_command(plan, folder, cell, slot, self.how.get(cell.name, "done"))

    def run(self, pattern: str | None = None) -> Outcome:
        self.folder.write(self.plan, {}, [])
        every = list(self.cells().values())
        return run_phases(
            self.plan, self.tree, 4938.0, self.folder, every, self.said.append, pattern=pattern,
            make_command=self.command,
        )  # fmt: skip


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is asked for; its files are there at once."""
    asked: list[list[str]] = []

    def fake(words: list[str], **_: Any) -> SimpleNamespace:
        asked.append(words[words.index("amclr_scale") + 1 :])
        out = words[words.index("--out") + 1]
        for file in (out, f"{out}.json"):
            Path(file).write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(features_module.subprocess, "run", fake)
    monkeypatch.setattr(run_module, "POLL", 0.02)
    return asked


@pytest.mark.launch
def test_what_others_read_features_of_runs_first_and_is_embedded_once(tmp_path: Path, made: list[list[str]]) -> None:
    study = Study(tmp_path)
    cells = study.cells()
    assert study.run().exit_code == 0
    assert study.ran == ["clip-B32-s0", "clip-B32-s1", "drrho-B32-s0", "b3-B32-s0", "drrho-B32-s1", "b3-B32-s1"]
    folders = {seed: f"features/clip-B32-s{seed}-{cells[f'clip-B32-s{seed}'].recipe_hash}" for seed in (0, 1)}
    outs = [words[words.index("--out") + 1] for words in made]
    assert [out.removeprefix(f"{study.plan.place}/") for out in outs] == [
        *(f"{folders[seed]}/{name}" for seed in (0, 1) for name in ("image.npy", "text.npy")),
        f"{folders[0]}/communities-4-1-3.npy",
    ]
    assert study.said[-1] == "6 of 6 cells are finished"
    assert study.run().exit_code == 0
    for file in study.plan.place.glob("features/*/*"):
        file.unlink()
    assert study.run().exit_code == 0
    assert (len(study.ran), len(made)) == (6, 5)  # nothing twice, nor what nobody is to read any more
    data = cells["drrho-B32-s1"].config.data
    assert (data.image_reference, data.text_reference) == (outs[2], outs[3])
    assert cells["b3-B32-s1"].config.data.communities == outs[4]  # of seed 0, as the plan says
    assert "features of other cells, which run first: drrho of clip-B32, b3 of clip-B32-s0" in held(
        study.plan, list(cells.values()), 4938.0
    )


@pytest.mark.launch
def test_a_cell_is_not_started_without_what_it_reads(tmp_path: Path, made: list[list[str]]) -> None:
    study = Study(tmp_path)
    study.how = {"clip-B32-s1": "fails"}
    outcome = study.run("drrho-*")  # what they need is not named, and runs all the same
    assert study.ran == ["clip-B32-s0", "clip-B32-s1", "drrho-B32-s0"]
    assert outcome.exit_code == 1
    assert outcome.failed == ("clip-B32-s1", "drrho-B32-s1")
    assert "drrho-B32-s1: not started, for there are no features of clip-B32-s1" in study.said
    study.how = {}
    assert study.run("drrho-*").exit_code == 0
    assert study.ran[3:] == ["clip-B32-s1", "drrho-B32-s1"]


@pytest.mark.launch
def test_a_study_that_is_asked_to_end_while_it_embeds_goes_on(
    tmp_path: Path, made: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path, "seeds=[0]")

    def slow(words: list[str], **_: Any) -> SimpleNamespace:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not ended")

    original = signal.signal(signal.SIGTERM, before := lambda *_: None)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(features_module.subprocess, "run", slow)
            assert study.run().exit_code == 75
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, original)
    assert "SIGTERM: features of clip-B32-s0 are not made yet; the same command goes on" in study.said
    assert (study.ran, made) == (["clip-B32-s0"], [])
    assert study.run().exit_code == 0
    assert (study.ran[1:], len(made)) == (["drrho-B32-s0", "b3-B32-s0"], 3)


@pytest.mark.slow
def test_job_arrays_that_lack_features_are_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study(tmp_path, "seeds=[0]")
    cell = study.cells()["clip-B32-s0"]
    run = study.folder.runs / cell.name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"# recipe {cell.recipe_hash}\n{dump(cell.config)}")
    (run / "evaluation.json").write_text("{}")
    monkeypatch.setattr(features_module, "FOLLOW", (sys.executable, "-c", "raise SystemExit(3)"))
    words = [f"folder={study.plan.place}", "batch_sizes=[32]", "seeds=[0]", ARMS]
    assert main(["study", str(study.file), *words, "--slurm", str(tmp_path / "jobs")]) == 2
    told = capsys.readouterr()
    assert "features of clip-B32-s0: failed with exit code 3" in told.out
    assert "--slurm: 2 cells lack features of others, which could not be made; see" in told.err


def test_another_model_is_another_recipe_of_what_reads_its_features(tmp_path: Path) -> None:
    here, there = Study(tmp_path).cells(), Study(tmp_path, "lr.base=1e-4").cells()
    assert here["clip-B32-s0"].recipe_hash != there["clip-B32-s0"].recipe_hash
    assert here["b3-B32-s1"].config.data.communities != there["b3-B32-s1"].config.data.communities


def test_a_pilot_leaves_out_what_reads_features(tmp_path: Path) -> None:
    short = pilot_plan(Study(tmp_path, "reference.arm=drrho").plan)
    assert ([arm.name for arm in short.arms], short.reference.arm) == (["clip"], "clip")
    study = Study(tmp_path)
    left_out = "; without drrho, b3: trained beside features that a cell of this study has yet to make"
    assert unmeasured(study.plan) == left_out
    cells = list(study.cells().values())
    assert f"--pilot measures samples/s in 30 steps of every arm and batch size{left_out}" in hours(
        study.plan, study.folder, cells
    )
    study.folder.path.mkdir()
    study.folder.write_rates({cell.setting: 100.0 for cell in cells if not cell.features})
    told = hours(study.plan, study.folder, cells).splitlines()
    assert told[0] == "time: unknown until a cell has run"
    assert told[1].endswith(f"come on top{left_out}")


@pytest.mark.parametrize(
    ("arm", "told"),
    [
        (
            f"like: dcl, {DRRHO}",
            "arms.x.features_of: expected the cell that makes FEATURES/image.npy, such as clip-B64",
        ),
        (f"like: dcl, features_of: clip-B48, {DRRHO}", "arms.x.features_of: expected a cell of an arm above this one"),
        (f"like: dcl, features_of: x-B32, {DRRHO}", "(clip-B32-s0, clip-B32-s1, clip-B64-s0, clip-B64-s1)"),
        ("like: dcl, features_of: clip-B64", "arms.x.features_of: no word reads it; name a file in words, such as"),
        (
            "like: clip, features_of: clip-B64, words: [data.communities=FEATURES/communities.npz]",
            "arms.x.words: expected FEATURES/ and one of image.npy, text.npy, communities.npy, got communities.npz",
        ),
        (f"like: clip, features_of: clip-B64, communities: {{size: 1}}, {B3}", "arms.1.communities.size: "),
        (
            f"like: dcl, features_of: clip-B64, communities: {{size: 4}}, {DRRHO}",
            "arms.x.communities: no word reads FEATURES/communities.npy, so nothing is grown; name it in words",
        ),
        ("like: clip, communities: {skip: 4}", "arms.x.communities: no word reads FEATURES/communities.npy"),
    ],
)
def test_features_that_cannot_be_made_are_refused_in_words(tmp_path: Path, arm: str, told: str) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(PLAN)
    assert told in refusal(file, f"arms=[clip, {{name: x, {arm}}}]")


def test_features_of_cells_that_wait_or_read_features_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(PLAN)
    sweep = "axes={optimizer.lr: [1e-3, 2e-3]}"
    assert "the learning rate of clip-B32-s0 is chosen only later" in refusal(file, ARMS, "batch_sizes=[32]", sweep)
    chain = ARMS.replace("features_of: clip-B32-s0", "features_of: drrho-B32")
    assert "arms.b3.features_of: drrho-B32-s0 reads features itself" in refusal(file, chain, "batch_sizes=[32]")
    hours = ["held_equal=wall_clock", "budget={samples: null, hours: 1}", "batch_sizes=[32]"]
    assert "arms.b3.features_of: held_equal wall_clock times every arm before" in refusal(file, ARMS, *hours)
    sets = "axes={data.train: [emoji/train, emoji/val_concept]}"
    other = ["words=['evaluation.splits=[emoji/val_style]']", "batch_sizes=[32]"]
    each = ARMS.replace("features_of: clip-B32", f"{sets.replace('=', ': ')}, features_of: clip-B32", 1)
    assert "data.train: expected one data set for all that read features of one cell, got emoji/" in refusal(
        file, each, *other
    )
    two = "words=['evaluation.splits=[emoji/val_style]', 'data.train=[emoji/train, emoji/val_concept]']"
    assert "data.train: expected one data set where an arm has features_of" in refusal(
        file, ARMS, "batch_sizes=[32]", two
    )


@pytest.mark.slow
def test_the_commands_make_files_that_a_run_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "train", [24])
    data = f"data.train={tmp_path / 'train' / '00000.tar'}"
    tiny = [
        data, "data.image_size=32", "data.context_length=8", "model.embedding_width=8", "model.text.width=16",
        "model.image.width=8", "evaluation.splits=[emoji/val_style]",
    ]  # fmt: skip
    study = Study(tmp_path, f"words={tiny}", "seeds=[0]")
    cells = study.cells()
    config, words = cells["clip-B32-s0"].config, load_tokenizer("emoji", 8)
    model = build_model(
        config.model, vocab_size=words.vocab_size, pad_id=words.pad_id, context_length=8, image_size=32,
        image_mean=config.data.image_mean, image_std=config.data.image_std,
    )  # fmt: skip
    run = study.folder.runs / "clip-B32-s0"
    run.mkdir(parents=True)
    study.folder.logs.mkdir()
    save_weights(run, model, torch.nn.Module(), speaks=True)
    (run / "config.yaml").write_text(f"# recipe {cells['clip-B32-s0'].recipe_hash}\n{dump(config)}")
    (run / "evaluation.json").write_text("{}")
    codes = []

    def here(words: list[str], **_: Any) -> SimpleNamespace:
        assert words[: words.index("amclr_scale")] == [*run_module.FOLLOW, sys.executable, "-m"]
        codes.append(main(words[words.index("amclr_scale") + 1 :]))
        return SimpleNamespace(returncode=codes[-1])

    monkeypatch.setattr(subprocess, "run", here)
    features_module.make_features(study.folder, list(cells.values()), list(cells.values()), "cpu", study.said.append)
    assert codes == [0, 0, 0]
    read = cells["b3-B32-s0"].features
    assert read is not None
    assert read.made
    assert [np.load(file).shape for file in read.files] == [(24, 8), (24, 8), (24,)]
    assert np.bincount(np.load(read.files[2])).tolist() == [4] * 6
