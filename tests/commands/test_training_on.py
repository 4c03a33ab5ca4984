"""A run that had ended and trains on: what is in its folder is of one state of it, also when it is cut off again."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import amclr_scale
from amclr_scale.metrics.run_folder import set_aside_results
from tests.commands.test_randomness import BATCH, STEPS, assert_equal, run

LONGER = (f"train.samples={2 * STEPS * BATCH}", "resume=auto", "resume_changed=train.samples")


def cut_off(folder: str) -> None:
    """Train on, and be killed after the last save, before results are written."""
    with mock.patch("amclr_scale.commands.train.conclude"), pytest.raises(FileNotFoundError):  # no weights are there
        run(folder, "a", "own", *LONGER)


def test_results_of_an_earlier_end_are_not_taken_for_those_of_now(ranks, tmp_path):
    first = ranks(1, run, str(tmp_path), "a", "own")[0]
    here = tmp_path / "a"
    told = (here / "evaluation.json").read_text()
    (here / "evaluation" / "step_00000002").mkdir(parents=True)
    (here / "evaluation" / "results.json").write_text("{}")
    ranks(1, cut_off, str(tmp_path))
    aside = here / "set_aside_results"
    assert not (here / "evaluation.json").exists()
    assert [path.name for path in (here / "evaluation").iterdir()] == ["step_00000002"]
    assert (aside / "evaluation.json").read_text() == told
    assert (aside / "evaluation" / "results.json").exists()
    kept = load_file(aside / "weights.safetensors")
    assert_equal(kept | load_file(aside / "objective.safetensors"), first)
    now = amclr_scale.load(here).module.state_dict()  # of the newest checkpoint
    assert any(not torch.equal(now[name], value) for name, value in kept.items())
    last = ranks(1, run, str(tmp_path), "a", "own", *LONGER)[0]  # makes the results up
    assert_equal({name: last[name] for name in now if name in last}, {n: v for n, v in now.items() if n in last})
    assert (here / "evaluation.json").exists()
    assert not (here / "set_aside_results_2").exists()


def test_nothing_is_written_over(tmp_path):
    assert set_aside_results(tmp_path) is None
    assert not [*tmp_path.iterdir()]
    for place in ("set_aside_results", "set_aside_results_2"):
        (tmp_path / "weights.safetensors").write_text(place)
        assert set_aside_results(tmp_path) == tmp_path / place
    assert Path(tmp_path / "set_aside_results" / "weights.safetensors").read_text() == "set_aside_results"
