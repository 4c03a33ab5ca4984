"""`evaluation.suites`: measured at the end of a run, on its ranks; it goes on behind what is done; others find it."""

import json
import shutil

import pytest

from amclr_scale.commands.evaluate import main as evaluate
from amclr_scale.commands.leaderboard import main as compare
from amclr_scale.config.load import build, dump
from amclr_scale.errors import UserError
from amclr_scale.evaluation.suites.of_runs import RunSuites, numbers_of
from amclr_scale.metrics.scores import score_of, words_of
from amclr_scale.study.planning.amounts import unit_of_key
from amclr_scale.trained.portable import portable
from tests.commands.test_train import SMALL, train
from tests.evaluation.suites.made import pictures
from tests.study.test_cells import planned


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two of SugarCrepe's seven files."""
    root = tmp_path_factory.mktemp("data")
    pictures(root / "val2017", ["a.jpg", "b.jpg"])
    (root / "sugarcrepe").mkdir()
    for name in ("swap_obj", "add_att"):
        told = {}
        for i in range(6):
            right, wrong = [f"a red house {i} {name}", f"{i} b"][:: 1 if i % 3 else -1]
            told[str(i)] = {"filename": f"{'ab'[i % 2]}.jpg", "caption": right, "negative_caption": wrong}
        (root / "sugarcrepe" / f"{name}.json").write_text(json.dumps(told))
    return root


def recipe(**suites):
    return build({"train": {"samples": 256}, "evaluation": {"suites": suites}})


def test_what_is_not_there_is_refused_by_its_key(data, tmp_path):
    found = RunSuites(recipe(sugarcrepe=str(data)))
    assert found.words[0].startswith(f"sugarcrepe: 2 of 7 data sets in {data}; missing: ")
    for suites, told in (
        ({"sugarcrepe": "/nowhere"}, r"^evaluation.suites.sugarcrepe: expected the folder that holds .* got /nowhere$"),
        ({"aro": str(data)}, r"^evaluation.suites.aro: .*: expected at least one data set of aro, found none; looked"),
        ({"sugarcrepes": str(data)}, r"^evaluation.suites.sugarcrepes: expected one of .* did you mean 'sugarcrepe'"),
        ({"sugarcrepe": None}, r"^evaluation.suites.sugarcrepe: expected the folder .* on this machine, got null"),
    ):
        with pytest.raises(UserError, match=told):
            RunSuites(recipe(**suites))
    assert RunSuites(recipe()).suites == {}
    config = recipe(sugarcrepe=str(data))
    (tmp_path / "config.yaml").write_text(dump(config))
    assert portable(config).evaluation.suites == {}  # an export keeps no paths


def test_numbers_are_flat_and_known_to_studies():
    one = {"number": "zero_shot_top1", "numbers": {"zero_shot_top1": 0.5, "zero_shot_top1/low": 0.4, "other": 1.0}}
    found = numbers_of({
        "suite": "datacomp38", "sets": {"vtab/dtd": one},
        "columns": {"Average over 38": {"value": 0.5}, "ImageNet": {"value": None}},
    })  # fmt: skip
    assert found == {
        "datacomp38/suite_Average_over_38": 0.5,
        "datacomp38/vtab-dtd/zero_shot_top1": 0.5,
        "datacomp38/vtab-dtd/zero_shot_top1/low": 0.4,
    }
    assert {unit_of_key(name) for name in list(found)[:2]} == {"points"}
    assert score_of("datacomp38/suite_Average_over_38").unit == "points"
    assert words_of("datacomp38/suite_Average_over_38") == "suite Average over 38"


def test_numbers_of_suites_are_outcomes(tmp_path):
    measured = 'words=["evaluation.suites={sugarcrepe: /data}"]'
    for key in ("suite_Mean_over_7", "suite_Swap_object"):
        assert len(planned(tmp_path, measured, f"metrics=[{{name: a, keys: [sugarcrepe/{key}]}}]")) == 8
    with pytest.raises(
        UserError, match=r"sugarcrepe/suite_Mean: sugarcrepe has no such number; did you mean 'suite_Me"
    ):
        planned(tmp_path, measured, "metrics=[{name: a, keys: [sugarcrepe/suite_Mean]}]")


@pytest.mark.slow
def test_two_ranks_then_one_that_goes_on_then_the_command(data, tmp_path, capsys):
    run = tmp_path / "runs" / "a"
    words = [*SMALL, "train.samples=64", "optimizer.warmup_samples=0", "data.lanes=2", f"run.folder={tmp_path}/runs",
             "run.name=a", "resume=auto", f"evaluation.suites={{sugarcrepe: {data}}}"]  # fmt: skip
    done = train(*words, launcher="torchrun", timeout=400)
    assert done.returncode == 0, done.stderr
    assert f"evaluation.suites: sugarcrepe: 2 of 7 data sets in {data}; missing: " in done.stdout
    results = json.loads((run / "evaluation.json").read_text())
    table = json.loads((run / "evaluation" / "sugarcrepe.json").read_text())
    assert results["sugarcrepe/suite_Mean_over_7"] == table["columns"]["Mean over 7"]["value"]
    assert results["sugarcrepe/swap_obj/right/low"] <= results["sugarcrepe/swap_obj/right"]
    assert "sugarcrepe/suite_Mean_over_7" not in (run / "metrics.jsonl").read_text()
    # Killed behind the first data set, and started again on one rank.
    (run / "evaluation.json").unlink()
    shutil.rmtree(run / "evaluation" / "sugarcrepe", ignore_errors=False)
    kept = table["sets"]["add_att"]
    (run / "evaluation" / "sugarcrepe").mkdir()
    (run / "evaluation" / "sugarcrepe" / "add_att.json").write_text(json.dumps(kept))
    done = train(*words, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("measured before") == 1
    again = json.loads((run / "evaluation.json").read_text())
    assert again == results
    # The command finds the same weights and data, and measures nothing.
    assert evaluate([str(run), "--suite", "sugarcrepe", "--data", str(data)]) == 0
    assert capsys.readouterr().out.count("measured before") == 2
    assert evaluate([str(run), "--suite", "sugarcrepe", "--data", str(data), "--output", str(tmp_path / "anew")]) == 0
    assert "measured before" not in capsys.readouterr().out
    assert numbers_of(json.loads((tmp_path / "anew" / "sugarcrepe.json").read_text())) == results
    assert 0 < results["sugarcrepe/suite_Mean_over_7"] < 1
    assert compare([str(run), "--suite", "sugarcrepe", "--format", "markdown"]) == 0
    assert "(2 of 7)" in capsys.readouterr().out
