"""How `amclr-scale evaluate` calls models beside one another, and what it says of a folder that is none."""

import json

from amclr_scale.commands.evaluate import main
from amclr_scale.evaluation.models import load_model
from tests.evaluation import test_evaluate
from tests.evaluation.test_models import write_run

runs = test_evaluate.runs  # a fixture


def test_models_of_one_name_do_not_take_the_place_of_one_another(runs, tmp_path, monkeypatch, capsys):
    """The second is given as the first is called: x/first, and first in this folder."""
    monkeypatch.chdir(runs)
    other = load_model("second")
    write_run(tmp_path / "first", other.model, other.config)
    given = [str(tmp_path / "first"), "first", "first"]
    assert main([*given, "--set", "evaluation.resamples=0", "--output", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(told["results"]) == ["first", "first (2)", "first (3)"]
    assert told["results"]["first (2)"] == told["results"]["first (3)"] != told["results"]["first"]
    assert list(told["comparisons"]) == ["first (2) against first", "first (3) against first"]
    assert "first (3)" in capsys.readouterr().out


def test_a_folder_of_runs_is_told_with_the_runs_in_it(runs, capsys):
    assert main([str(runs)]) == 2
    said = capsys.readouterr().err
    assert f"does not exist; name the runs in it: {runs / 'first'}, {runs / 'second'}\n" in said
