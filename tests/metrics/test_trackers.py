"""What a run sends beside its folder, as those packages themselves read it."""

import importlib.util
import sys

import pytest
from PIL import Image

from amclr_scale.config.load import load
from amclr_scale.errors import UserError
from amclr_scale.metrics.log import RunLog
from amclr_scale.metrics.trackers import EVENTS, check_trackers


def say(folder, words, steps):
    """As much as a run says; a picture at its end."""
    Image.new("RGB", (5, 4), (200, 30, 40)).save(folder / "sheet.png")
    with RunLog(folder, load(None, ["train.epochs=1", *words]), speaks=True, total_steps=9) as log:
        for step in steps:
            log.write(
                {"step": step, "samples": 8 * step, "loss": 10.0 - step, "words": "no number", "off": float("nan")}
            )
        log.picture("sheet/val", folder / "sheet.png")


@pytest.mark.slow
def test_tensorboard_has_numbers_and_pictures_and_hides_what_a_resumed_run_makes_again(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    say(tmp_path, ["run.tensorboard=true"], [1, 2, 3, 4])
    records = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(records[:2]))  # as resuming after step 2 leaves them
    say(tmp_path, ["run.tensorboard=true"], [3, 4, 5])
    found = events.EventAccumulator(str(tmp_path / EVENTS)).Reload()
    assert [(one.step, one.value) for one in found.Scalars("loss")] == [(n, 10.0 - n) for n in (1, 2, 3, 4, 5)]
    assert set(found.Tags()["scalars"]) == {"samples", "loss"}
    picture = found.Images("sheet/val")[-1]
    assert (picture.step, picture.width, picture.height) == (5, 5, 4)


@pytest.mark.slow
def test_trackio_has_numbers_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    say(tmp_path, ["run.trackio=true", "run.wandb_project=p"], [1, 2])
    (run,) = SQLiteStorage.get_runs("p")
    logs = SQLiteStorage.get_logs("p", run)
    assert [(one["step"], one["loss"]) for one in logs if "loss" in one] == [(1, 9.0), (2, 8.0)]
    assert len(list((tmp_path / "kept").rglob("*.png"))) == 1


@pytest.mark.parametrize("words", ["run.wandb=offline", "run.tensorboard=true", "run.trackio=true"])
def test_a_package_that_is_missing_is_named(monkeypatch, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    package = words.partition("=")[0]
    with pytest.raises(UserError, match=rf"{package}: the package .* is not installed: pip install"):
        check_trackers(load(None, ["train.epochs=1", words]))
    check_trackers(load(None, ["train.epochs=1"]))


def test_a_folder_of_that_name_is_no_package(monkeypatch, tmp_path):
    """trackio is not installed here, or is found behind the folder, which then has its place."""
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=r"^run.trackio: the package trackio is not installed: pip install"):
        check_trackers(load(None, ["train.epochs=1", "run.trackio=true"]))
