"""launch/evaluate.py: from files to a table, results and a sheet; a second model is compared item by item."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from amclr_scale.commands.evaluate import main, suites_by_name
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.encoders.dual_encoder import Normalise
from amclr_scale.errors import UserError
from amclr_scale.evaluation import sheet as sheets
from amclr_scale.evaluation.models import load_model
from amclr_scale.evaluation.progress import EvaluationProgress
from amclr_scale.evaluation.run import Evaluator
from amclr_scale.evaluation.sheet import text_to_image_sheet
from amclr_scale.evaluation.table import DETAILS
from tests.evaluation.shards import picture, write_split
from tests.evaluation.test_models import write_run
from tests.evaluation.test_run import model, recipe

N = 20
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs: towers at random, and the same with an image head that knows the pairs."""
    root = tmp_path_factory.mktemp("runs")
    split = write_split(root / "split", N)
    config = recipe(str(split))
    encoder = model(config).eval()
    write_run(root / "first", encoder, config)
    batch = next(Evaluator(config).tasks[0].split.batches(N))
    with torch.no_grad():
        out = encoder(batch.images, batch.texts, features=True)
        # Not lstsq: its default driver on CPU (gelsy) did not give the same answer twice for the same input.
        head = torch.linalg.pinv(out["image_features"].double()) @ out["text"].double()
        encoder.image_head[1].weight.copy_(head.T)
    write_run(root / "second", encoder, config)
    return root


@pytest.mark.parametrize("words", [["--set", "evaluation.resamples=0"], ["--suite", "sugarcrepe"]])
def test_a_place_that_cannot_take_results_is_told_before_anything_is_measured(runs, tmp_path, capsys, words):
    (tmp_path / "file").touch()
    if "sugarcrepe" in words:
        (tmp_path / "sugarcrepe").mkdir()
        told = {"0": {"filename": "a.jpg", "caption": "a", "negative_caption": "b"}}
        (tmp_path / "sugarcrepe" / "swap_obj.json").write_text(json.dumps(told))
        (tmp_path / "val2017").mkdir()
        (tmp_path / "val2017" / "a.jpg").write_bytes(picture(0))
        words = [*words, "--data", str(tmp_path)]
    for place in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/results")):
        assert main([str(runs / "first"), *words, "--output", str(place)]) == 2
        said = capsys.readouterr()
        assert f"--output: expected a folder that can be written, got {place}: " in said.err
        assert "R@1" not in said.out
        assert "Swap" not in said.out


def test_a_number_of_captions_that_is_none(runs, capsys):
    assert main([str(runs / "first"), "--sheet", "-1"]) == 2
    assert "--sheet: expected 0 or more, got -1" in capsys.readouterr().err


def test_two_runs_beside_one_another(runs, tmp_path, capsys):
    suite = tmp_path / "suite.yaml"
    suite.write_text("evaluation:\n  geometry: true\n")
    words = [str(runs / "first"), str(runs / "second"), "--suite", f"shapes={suite}", "--sheet", "3"]
    assert main([*words, "--set", "evaluation.resamples=200", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    split = "split"  # the folder's name
    (heading,) = [line for line in said.splitlines() if line.split()[-1:] == ["chance"]]
    assert heading.split() == ["first", "second", "chance"]
    (row,) = [line for line in said.splitlines() if line.strip().startswith("R@5 image to text, %")]
    for name in ("first", "second"):
        value = results["results"][name][f"{split}/image_to_text_R@5"]
        assert f" {100 * value:.1f} [" in row
    assert row.split()[-1] == f"{100 * results['results']['first'][f'{split}/image_to_text_R@5/chance']:.2f}"
    assert said.count("cross uniformity") == 1
    better = results["comparisons"]["second against first"][f"{split}/R@mean"]
    measured = [results["results"][name][f"{split}/R@mean"] for name in ("first", "second")]
    assert better["difference"] == pytest.approx(measured[1] - measured[0])
    assert better["low"] > 0
    assert "second against first: percentage points" in said
    table = (tmp_path / "out" / "results.md").read_text()
    assert table.startswith("# Evaluation: shapes\n")
    assert results["suites"] == ["shapes"]
    assert "/first, in fp32, by shapes, " in said
    assert suites_by_name(["a/mine.yaml", "b=c.yaml"]) == {"mine": "a/mine.yaml", "b": "c.yaml"}
    with pytest.raises(
        UserError, match=r"^--suite: expected names that differ, got a twice; such as --suite other=b/a"
    ):
        suites_by_name(["a.yaml", "b/a.yaml"])
    assert "| first (fp32) | second (fp32) | chance |" in table
    assert f"| {split}/R@mean | {100 * measured[0]:.1f} [" in table
    for number in (1, 2):
        assert Image.open(tmp_path / "out" / f"sheet_{number}_0.png").size[0] > 600


def test_results_of_a_run_go_into_its_folder(runs):
    assert main([str(runs / "first")]) == 0
    results = json.loads((runs / "first" / "evaluation" / "results.json").read_text())
    want = Evaluator(recipe(f"{runs}/split/00000.tar"))(model(recipe()))
    assert results["results"]["first"] == pytest.approx(want, abs=1e-9)


def pictures(folder, names, texts=()):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
    for name in texts:
        (folder / name).with_suffix(".txt").write_text(f"about {name}")
    return folder


@pytest.mark.parametrize("named", [False, True])
def test_a_folder_of_any_kind_gives_numbers_or_words(runs, tmp_path, capsys, named):
    """Never an empty table: `evaluate RUN --set evaluation.splits=[FOLDER]`."""
    classes, flat = ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg"], ["0.jpg", "1.jpg", "2.jpg"]
    good = {
        "classes": (classes, (), ["zero_shot_top1"]),
        "classes with texts": (classes, classes, ["zero_shot_top1", "image_to_text_R@1"]),
        "classes with some texts": (classes, classes[:1], ["zero_shot_top1"]),
        "photos": (flat, flat, ["image_to_text_R@1"]),
    }
    for kind, (names, texts, wanted) in good.items():
        folder = pictures(tmp_path / kind, names, texts)
        split = "mine" if named else kind
        given = f"{{mine: {folder}}}" if named else f"[{folder}]"
        words = ["--set", f"evaluation.splits={given}", "--set", "evaluation.resamples=0"]
        assert main([str(runs / "first"), *words, "--output", str(tmp_path / "out")]) == 0
        (found,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"].values()
        assert all(f"{split}/{name}" in found for name in wanted)
        assert f"{split}/zero_shot_top1" in found or "zero_shot_top1" not in wanted
        assert "zero-shot" in capsys.readouterr().out or "zero_shot_top1" not in wanted
    empty, films = tmp_path / "empty", tmp_path / "films"
    empty.mkdir()
    films.mkdir()
    (films / "0.mov").write_bytes(bytes(100))
    bad = {
        "expected a .txt beside each picture, or a folder for each class, got 3 pictures without either":
            pictures(tmp_path / "bare", flat),
        "expected a text beside each picture, got none for 1 of 3, the first is 2.jpg; write 2.txt":
            pictures(tmp_path / "gaps", flat, flat[:2]),
        "expected a folder with an index.json": empty,
        "expected pictures or shards, found neither; passed over 1 files that are no readable pictures: 1 .mov": films,
    }  # fmt: skip
    for words, folder in bad.items():
        given = f"{{mine: {folder}}}" if named else f"[{folder}]"
        assert main([str(runs / "first"), "--set", f"evaluation.splits={given}"]) == 2
        said = capsys.readouterr()
        assert said.err.strip().startswith("evaluation.splits: ")
        assert words in said.err
        assert said.out == ""


@pytest.mark.launch
def test_two_ranks_of_a_launcher_give_the_numbers_of_one(runs, tmp_path):
    """The tool itself under torchrun: every number, interval, comparison and picture."""
    words = [str(runs / "first"), str(runs / "second"), "--sheet", "2", "--set", "evaluation.geometry=true"]
    words += ["--set", "evaluation.batch_size=3", "--output"]
    assert main([*words, str(tmp_path / "one")]) == 0
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "launch/evaluate.py", *words, str(tmp_path / "two")],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("results.json and results.md in") == 1
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["results"].keys() == two["results"].keys() == {"first", "second"}
    for name, found in one["results"].items():
        other = two["results"][name]
        assert found.keys() == other.keys()
        counted = {key for key in found if key.rpartition("/")[2] in DETAILS or f"{key}/chance" in found}
        assert len(counted) > 40
        assert {key: found[key] for key in counted} == {key: other[key] for key in counted}
        assert found == pytest.approx(other, abs=1e-6)  # geometry: features are float32, and batches differ in size
    assert one["comparisons"] == two["comparisons"]
    for sheet in ("sheet_1_0.png", "sheet_2_0.png"):
        assert (tmp_path / "one" / sheet).read_bytes() == (tmp_path / "two" / sheet).read_bytes()


def test_temperatures_of_every_sample(runs, tmp_path, capsys):
    log_u = torch.zeros(30)
    log_u[20:] = -torch.inf  # not met yet
    state = {"text_state.temperature": torch.full((30, 2), 0.03), "text_state.log_u": torch.zeros(30, 2)}
    state |= {"image_state.temperature": torch.linspace(0.01, 0.0293, 30), "image_state.log_u": log_u}
    save_file(state, runs / "first" / "objective.safetensors")
    try:
        words = [str(runs / "first"), str(runs / "second"), "--output", str(tmp_path)]
        assert main([*words, "--set", "evaluation.resamples=0"]) == 0
    finally:
        (runs / "first" / "objective.safetensors").unlink()
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())["temperatures"]
    assert found.keys() == {"first"}
    image, text = found["first"]["image"], found["first"]["text"]
    seen = state["image_state.temperature"][:20].double()
    counts, edges = np.histogram(seen.numpy(), bins=20)
    assert image["counts"] == counts.tolist()
    assert image["edges"] == pytest.approx(edges.tolist(), abs=1e-9)
    assert image["mean"] == pytest.approx(float(seen.mean()))
    assert image["not_met"] == 10
    assert (text["counts"], text["not_met"]) == ([60], 0)
    assert "temperatures of 20 images: mean 0.0163" in said
    assert "10 not met yet" in said
    assert "## first: temperatures" in (tmp_path / "results.md").read_text()


def test_other_statistics_of_pixels(runs, tmp_path):
    words = [str(runs / "second"), "--set", "evaluation.resamples=0", "--set", "data.image_mean=[0.1,0.9,0.5]"]
    assert main([*words, "--set", "data.image_std=[0.5,0.1,0.3]", "--output", str(tmp_path)]) == 0
    got = json.loads((tmp_path / "results.json").read_text())["results"]["second"]
    encoder = load_model(str(runs / "second")).model
    encoder.normalise = Normalise((0.1, 0.9, 0.5), (0.5, 0.1, 0.3))
    config = recipe(f"{runs}/split/00000.tar", resamples=0)
    assert got == pytest.approx(Evaluator(config).measure(encoder), abs=1e-9)
    assert got != pytest.approx(Evaluator(config).measure(load_model(str(runs / "second")).model), abs=1e-3)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, terminal):
    monkeypatch.setattr("amclr_scale.evaluation.progress.EVERY", 0.0)
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    with EvaluationProgress("my model", 10, console=console) as progress:
        encode = progress.watch(lambda **inputs: inputs)
        encode(images=(torch.zeros(4, 1),), features=True)
        if not terminal:
            assert out.getvalue() == "my model: 4 of 10 encoded (40%) in 0 s\n"
        progress.more(5)
        encode(texts=(torch.zeros(11, 1),))
    assert progress.done == progress.total == 15
    assert ("15/15" in out.getvalue()) == terminal
    assert ("\x1b" in out.getvalue()) == terminal
    quiet = io.StringIO()
    with EvaluationProgress(
        "another rank", 10, speaks=False, console=Console(file=quiet, force_terminal=True)
    ) as other:
        other.watch(lambda **inputs: inputs)(images=(torch.zeros(4, 1),))
    assert quiet.getvalue() == ""


def test_what_will_be_encoded_is_known(runs):
    evaluator = Evaluator(recipe(f"{runs}/split/00000.tar", "emoji/val_concept"))
    calls = []

    def encode(**inputs):
        calls.append(sum(len(inputs[kind][0]) for kind in ("images", "texts") if inputs.get(kind)))
        return model(recipe()).eval()(**inputs)

    small = Evaluator(recipe(f"{runs}/split/00000.tar"))
    with torch.no_grad():
        small.measure(encode)
    assert sum(calls) == small.items()
    assert evaluator.items() > small.items()


def test_mistakes_are_one_line_and_code_2(runs, tmp_path, capsys):
    def said(*words: str) -> str:
        assert main([*words]) == 2
        return capsys.readouterr().err.strip()

    assert said(str(tmp_path)).startswith("checkpoint: expected a run folder")
    suite = tmp_path / "suite.yaml"
    suite.write_text("optimizer:\n  lr: 1\n")
    assert "expected the sections evaluation and data only, got optimizer" in said(
        str(runs / "first"), "--suite", str(suite)
    )
    assert said(str(runs / "first"), "--set", "evaluation.splits=[]").startswith(
        "--suite: expected something to measure"
    )
    loaded = load_model(str(runs / "second"))
    other = loaded.config.model_copy(
        update={"evaluation": loaded.config.evaluation.model_copy(update={"resize": "squash"})}
    )
    write_run(tmp_path / "other", loaded.model, other)
    assert said(str(runs / "first"), str(tmp_path / "other")).startswith(
        "evaluation.resize: expected one value for all models that are compared, got 'crop' and 'squash'"
    )
    assert "evaluation.split: no such key" in said(str(runs / "first"), "--set", "evaluation.split=x")
    trap = tmp_path / "sprung"
    chosen = {
        "data": loaded.config.data.model_copy(update={"allow_pipe": True}),
        "evaluation": loaded.config.evaluation.model_copy(update={"splits": [f"pipe:touch {trap}"]}),
    }
    write_run(tmp_path / "from elsewhere", loaded.model, loaded.config.model_copy(update=chosen))
    assert said(str(tmp_path / "from elsewhere")).startswith("data.allow_pipe: pipe:touch")
    assert not trap.exists()


def sheet(folder: Path) -> tuple[bytes, tuple[int, int]]:
    config = recipe(str(folder / "split" / "00000.tar"))
    evaluator = Evaluator(config, rank=rank(), world_size=world_size())
    with torch.no_grad():
        drawn = text_to_image_sheet(model(config).eval(), evaluator.tasks[0], 6, 2)
    return drawn.tobytes(), drawn.size


def test_a_sheet_says_which_images_are_tied(runs, monkeypatch):
    """A model that sees no difference finds nothing, though the right image may stand first."""
    config, drawn, real = recipe(str(runs / "split")), [], sheets._draw
    monkeypatch.setattr(sheets, "_draw", lambda name, parts, *a, **k: drawn.append(parts) or real(name, parts, *a, **k))

    def blind(**inputs):
        return {kind[:-1]: torch.ones(len(views[0]), 8) / 8**0.5 for kind, views in inputs.items() if views}

    picture = text_to_image_sheet(blind, Evaluator(config).tasks[0], 6, 2)
    ((found, missed),) = drawn
    assert not found
    assert [row.tied for row in missed] == [5, 5]
    untied = [dataclasses.replace(row, tied=1) for row in missed]
    white = {n: Image.new("RGB", (96, 96)) for row in missed for n in (*row.found, row.right)}
    marked, plain = (real("a", [[], rows], white, shares=0.0).tobytes() for rows in (missed, untied))
    assert marked != plain
    assert picture.size[0] > 600


def test_the_sheets_of_a_run_are_those_of_the_command(runs):
    """One per split with retrieval, by its name, of the model in evaluation mode, which goes on training after it."""
    config = recipe(str(runs / "split" / "00000.tar"))
    trained = model(config).train()
    with torch.no_grad():
        (drawn,) = Evaluator(config).sheets(trained, 2).values()
    assert (drawn.tobytes(), drawn.size) == sheet(runs)
    assert trained.training


def test_a_sheet_is_the_same_on_any_number_of_ranks(ranks, runs):
    want = sheet(runs)
    for got in ranks(2, sheet, runs):
        assert got == want
