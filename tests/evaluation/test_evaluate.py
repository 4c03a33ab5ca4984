"""launch/evaluate.py: from files to a table, results and a sheet; a second model is compared item by item."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from amclr_scale.evaluation.run import Evaluator
from amclr_scale.evaluation.sheet import text_to_image_sheet
from amclr_scale.similarity.collectives import rank, world_size
from tests.evaluation.shards import write_split
from tests.evaluation.test_models import write_run
from tests.evaluation.test_run import model, recipe

N = 20


@pytest.fixture(scope="module")
def main():
    path = Path(__file__).parents[2] / "launch" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("launch_evaluate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs: towers at random, and the same with an image head that knows some of the pairs."""
    root = tmp_path_factory.mktemp("runs")
    split = write_split(root / "split", N)
    config = recipe(str(split))
    encoder = model(config).eval()
    write_run(root / "first", encoder, config)
    batch = next(Evaluator(config).tasks[0].split.batches(N))
    with torch.no_grad():
        out = encoder(batch.images, batch.texts, features=True)
        encoder.image_head[1].weight.copy_(torch.linalg.lstsq(out["image_features"], out["text"]).solution.T)
    write_run(root / "second", encoder, config)
    return root


def test_two_runs_beside_one_another(main, runs, tmp_path, capsys):
    suite = tmp_path / "suite.yaml"
    suite.write_text("evaluation:\n  geometry: true\n")
    words = [str(runs / "first"), str(runs / "second"), "--suite", str(suite), "--sheet", "3"]
    assert main([*words, "--set", "evaluation.resamples=200", "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    split = f"{runs}/split/00000.tar"
    for name in ("first", "second"):
        value = results["results"][name][f"{split}/image_to_text_R@5"]
        assert f"{100 * value:.1f} [" in said
        assert "cross uniformity" in said
    better = results["comparisons"]["second against first"][f"{split}/R@mean"]
    measured = [results["results"][name][f"{split}/R@mean"] for name in ("first", "second")]
    assert better["difference"] == pytest.approx(measured[1] - measured[0])
    assert better["low"] > 0
    assert "second against first: percentage points" in said
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| first | second | chance |" in table
    assert f"| {split}/R@mean | {100 * measured[0]:.1f} [" in table
    for number in (1, 2):
        assert Image.open(tmp_path / "out" / f"sheet_{number}_0.png").size[0] > 600


def test_results_of_a_run_go_into_its_folder(main, runs):
    assert main([str(runs / "first")]) == 0
    results = json.loads((runs / "first" / "evaluation" / "results.json").read_text())
    want = Evaluator(recipe(f"{runs}/split/00000.tar"))(model(recipe()))
    assert results["results"]["first"] == pytest.approx(want, abs=1e-9)


def test_mistakes_are_one_line_and_code_2(main, runs, tmp_path, capsys):
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
    assert "evaluation.split: no such key" in said(str(runs / "first"), "--set", "evaluation.split=x")


def sheet(folder: Path) -> tuple[bytes, tuple[int, int]]:
    config = recipe(str(folder / "split" / "00000.tar"))
    evaluator = Evaluator(config, rank=rank(), world_size=world_size())
    with torch.no_grad():
        drawn = text_to_image_sheet(model(config).eval(), evaluator.tasks[0], 6, 2)
    return drawn.tobytes(), drawn.size


def test_a_sheet_is_the_same_on_any_number_of_ranks(ranks, runs):
    want = sheet(runs)
    for got in ranks(2, sheet, runs):
        assert got == want
