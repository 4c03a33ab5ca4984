"""The scripts of examples/ run as they stand, on few samples, and learn."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*_loop.py")))
def test_a_loop_learns(name, monkeypatch, capsys):
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(sys, "argv", [name, "160", "12"])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    losses = [float(one) for one in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]


def test_a_pipeline_of_webdatasets_stages_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """The same losses and samples as without a stop."""

    def steps(until, saved):
        monkeypatch.setattr(sys, "argv", ["webdataset_pipeline.py", "64", str(until), str(tmp_path / saved)])
        runpy.run_path(str(EXAMPLES / "webdataset_pipeline.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    whole = steps(4, "whole.pt")
    assert len(whole) == 4
    assert steps(2, "cut.pt") + steps(4, "cut.pt") == whole
