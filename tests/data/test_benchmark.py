"""The benchmark measures what it says: the same samples through both loaders."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from amclr_scale.config import schema
from amclr_scale.data.indexing import open_index
from amclr_scale.errors import UserError

TOOL = Path(__file__).parents[2] / "tools/benchmark_loader.py"


@pytest.fixture
def tool():
    specification = importlib.util.spec_from_file_location("benchmark_loader", TOOL)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_a_recipe_alone(tool, capsys, tmp_path):
    out, recipe = tmp_path / "out.json", ["data.train=emoji/val_concept", "data.image_size=16"]
    words = ["--config", "quickstart", "--samples", "64", "--workers", "0", "1", "--json", str(out), "--words", *recipe]
    tool.main([*words, "train.global_batch_size=32"])
    figures = json.loads(out.read_text())
    assert all(rate > 0 for rate in figures["0 workers"].values())
    assert math.isnan(figures["1 workers"]["samples_per_cpu_s"])  # workers' seconds are not known while they live
    assert capsys.readouterr().out.count("samples/s") == 2


def test_it_runs(tool, capsys, tmp_path):
    words = [
        "emoji/val_concept",
        "--samples",
        "256",
        "--rounds",
        "1",
        "--workers",
        "0",
        "--image-size",
        "16",
        "--resident",
        "none",
        "host",
        "--augment-on",
        "workers",
        "device",
        "--randaugment",
        "1",
        "7",
    ]
    tool.main([*words, "--json", str(tmp_path / "out.json")])
    figures = json.loads((tmp_path / "out.json").read_text())
    rates = (
        "reading by offset",
        "reading front to back",
        "ours 0 workers",
        "ours (host) 0 workers",
        "ours, on the device 0 workers",
        "ours (host), on the device 0 workers",
        "webdataset 0 workers",
    )
    assert set(figures) == set(rates)
    assert all(figure["samples_per_s"] > 0 for figure in figures.values())
    assert figures["reading by offset"]["samples_per_cpu_s"] > figures["ours 0 workers"]["samples_per_cpu_s"]
    assert "ours / webdataset" in capsys.readouterr().out


def test_where_a_samples_time_goes(tool, capsys, tmp_path):
    words = ["--photos", "12", "--samples", "12", "--batch", "6", "--rounds", "1", "--image-size", "32", "--parts"]
    tool.main([*words, "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    named = {
        "reading",
        "decoding",
        "decoding at full size",
        "crop and change",
        "to tensors",
        "tokens",
        "joining a batch",
    }
    assert {*named, "pixels for the device", "out of a worker (wall)", "pixels out of a worker (wall)"} <= set(found)
    assert all(ms > 0 for ms in found.values())
    assert capsys.readouterr().out.count("ms per sample") == len(found)
    with pytest.raises(UserError, match="--batch: expected at most the 12 samples that are measured, got 13"):
        tool.main(["--photos", "12", "--batch", "13", "--parts"])


def test_the_order_of_one_window_is_a_uniform_shuffle(tool):
    """One lane, one window over all shards: nothing is left of the shards."""
    same, again = tool.shuffle_quality(20, 200, lanes=1, window=20, batch=100)
    assert 0.95 < same < 1.05
    assert 0.9 < again < 1.1
    same, again = tool.shuffle_quality(20, 200, lanes=1, window=1, batch=100)
    assert same > 15  # a shard at a time
    assert again > 5


def test_both_ways_of_reading_find_every_sample(tool, tmp_path):
    name = tool.make_photos(tmp_path, 7, per_shard=3)
    index = open_index(schema.Data(train=name))
    assert tool.read_by_offset(index) == tool.read_front_to_back(index) == 7
    data = schema.Data(train=name, lanes=1, image_size=32)
    assert tool.ours(data, 4, 2, 0) == tool.plain_webdataset(index, data, 4, 2, 0) == 8
