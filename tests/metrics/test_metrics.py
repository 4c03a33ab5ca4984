"""What a run reports about itself."""

import json
import math
import time

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from amclr_scale.config.load import load
from amclr_scale.errors import UserError
from amclr_scale.metrics import run_folder
from amclr_scale.metrics.best import BestSoFar
from amclr_scale.metrics.curve import _figure, draw, read
from amclr_scale.metrics.flops import ModelFlops, count
from amclr_scale.metrics.log import RunLog, duration
from amclr_scale.metrics.phases import Phases


class Linears(nn.Module):
    def __init__(self):
        super().__init__()
        self.image_tower, self.text_tower = nn.Linear(10, 20), nn.Linear(6, 4)
        self.image_head, self.text_head = nn.Identity(), nn.Identity()

    def forward(self, images, texts):
        return [self.image_tower(x) for x in images] + [self.text_tower(x) for x in texts]


def test_operations_are_counted_per_sample_and_view():
    flops = count(Linears(), (torch.zeros(3, 10), torch.zeros(3, 10)), (torch.zeros(3, 6),))
    assert flops == ModelFlops(image=2 * 2 * 10 * 20, text=2 * 6 * 4)
    assert flops.useful() == 3 * (800 + 48)
    assert flops.hardware(second_forwards=0.5, recomputed_image=1.0, recomputed_text=0.0) == 3 * 848 + 424 + 800


def test_phases_add_up_and_start_again():
    phases = Phases(torch.device("cpu"))
    for _ in range(2):
        with phases("a"):
            assert phases.current == "a"
            time.sleep(0.02)
    with phases("b", host=True):
        pass
    seconds = phases.seconds()
    assert seconds["a"] >= 0.04
    assert seconds["b"] < seconds["a"]
    assert phases.seconds() == {}


@pytest.fixture
def log(tmp_path):
    config = load(None, ["train.epochs=1"])
    with RunLog(tmp_path, config, speaks=True, total_steps=4) as log:
        yield log


def step(n, loss):
    keys = ("epoch", "lr", "grad_norm", "logit_scale", "samples_per_second", "data_wait_share", "peak_memory_gib")
    return {"step": n, "samples": n * 8, "loss": loss, "objective/objective": loss, **dict.fromkeys(keys, 0.5)}


def test_records_are_one_json_object_each_and_know_no_nan(log, tmp_path, capsys):
    log.step(step(1, 2.5), 4)
    log.step(step(2, math.nan), 4)
    first, second = read(tmp_path)
    assert (first["loss"], second["loss"]) == (2.5, None)
    assert first["time"] == pytest.approx(time.time(), abs=60)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step      1/4")


@pytest.mark.filterwarnings("error")
def test_a_name_that_the_font_lacks_is_no_matter_of_the_learning_curve(tmp_path):
    folder = tmp_path / "\u732b"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "samples": 8, "objective": 2.5}\n')
    assert draw(folder).is_file()


def test_the_learning_curve_is_a_picture(log, tmp_path):
    log.step(step(1, 2.5), 4)
    log.step(step(2, 2.0), 4)
    log.write({"step": 2, "samples": 16, "eval/emoji/val_style/image_to_text_R@1": 0.25})
    assert draw(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_the_learning_curve_shows_chance_intervals_and_every_line():
    names = {f"eval/photos/{name}": 0.25 for name in ("text_to_image_R@1", "text_to_image_filtered_R@1")}
    details = {f"{name}/{end}": n for name in names for end, n in (("low", 0.2), ("high", 0.3), ("chance", 0.1))}
    figure = _figure([{"samples": n, **names, **details} for n in (8, 16)], "a run")
    try:
        _, below = figure.axes
        drawn = {line.get_label(): line for line in below.lines if not line.get_label().startswith("_")}
        assert list(drawn) == ["photos: R@1 text to image", "photos: R@1 text to image, filtered", "chance"]
        thin, wide, _ = drawn.values()  # of equal values: neither hides the other
        assert wide.get_linewidth() > 2 * thin.get_linewidth()
        assert wide.get_zorder() < thin.get_zorder()
        assert [
            line.get_ydata()[0] for line in below.lines if line.get_linestyle() == ":" and len(line.get_ydata())
        ] == [10, 10]
        bands = [band.get_paths()[0].vertices[:, 1] for band in below.collections]
        assert [(band.min(), band.max()) for band in bands] == [(pytest.approx(20), pytest.approx(30))] * 2
        figure.canvas.draw()
        assert figure.legends[0].get_window_extent().y1 <= below.get_window_extent().y0  # outside the data
    finally:
        plt.close(figure)


def test_another_rank_is_silent(tmp_path, capsys):
    with RunLog(tmp_path, load(None, ["train.epochs=1"]), speaks=False, total_steps=4) as log:
        log.step(step(1, 2.5), 4)
        log.say("hello")
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_the_run_folder_holds_what_is_needed_to_repeat_it(tmp_path):
    config = load(None, ["train.epochs=1", f"run.folder={tmp_path}", "run.name=a"])
    run_folder.create(tmp_path / "a", config, "cpu", 2)
    assert load(tmp_path / "a" / "config.yaml") == config
    environment = json.loads((tmp_path / "a" / "environment.json").read_text())
    assert environment["ranks"] == 2
    assert environment["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"run\.name: .* holds a run already"):
        run_folder.check_writable(config)


@pytest.mark.slow
def test_wandb_offline_writes_files_to_sync_later(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = load(None, ["train.epochs=1", "run.wandb=offline"])
    with RunLog(tmp_path, config, speaks=True, total_steps=1) as log:
        log.step(step(1, 2.5), 1)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_a_run_killed_before_its_first_checkpoint_begins_its_records_again(log, tmp_path):
    log.step(step(1, 2.5), 4)
    log.step(step(2, 2.0), 4)
    run_folder.create(tmp_path, load(None, ["train.epochs=1"]), "cpu", 1, resumed_at=None)
    assert read(tmp_path) == []
    assert [json.loads(line)["step"] for line in (tmp_path / run_folder.DROPPED).read_text().splitlines()] == [1, 2]


def test_scores_and_their_best_in_one_line(tmp_path):
    """Also in a run that goes on; what is lower is better where the score says so, and no detail has a best."""
    names = ("a/image_to_text_R@1", "a/image_to_text_R@1/high", "a/image_to_text_median_rank", "b/zero_shot_top1")
    measured = [(8, (0.25, 0.9, 3, 0.1)), (16, (0.5, 0.8, 2, float("nan"))), (24, (0.4, 0.7, 2, 0.1))]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, values in measured[:2]:
            known = {
                f"eval/{name}": None if math.isnan(value) else value for name, value in zip(names, values, strict=True)
            }
            file.write(json.dumps({"step": step, "samples": 4 * step, **known}) + "\n")
    scores = BestSoFar(tmp_path / "metrics.jsonl")
    results = dict(zip(names, measured[2][1], strict=True))
    scores.add(24, results)
    assert [scores.step(name) for name in names] == [16, None, 16, 8]
    assert scores.line(24, 48000, results) == (
        "eval at 48,000 samples: a R@1 image to text 40.0 (best 50.0), b zero-shot top 1 10.0 (best 10.0)"
    )
    assert (
        BestSoFar(tmp_path / "absent").line(1, 2, {"a/image_to_text_R@1": 0.5}).endswith("1 numbers, in metrics.jsonl")
    )
    assert [duration(seconds) for seconds in (0.4, 65, 93784)] == ["0:00:00", "0:01:05", "26:03:04"]
