"""Image numbers of a conversion fit below the number of samples, whatever is broken."""

import json
import tarfile

import pytest

from amclr_scale.commands import make_shards
from amclr_scale.data.loader import TrainLoader
from tests.data.shards import picture, settings

NAMES = ["0.png", "0.png", "1.png", "2.png", "3.png", "9.png", "caf\u00e9.png", "0.png"]
LEFT = ["0.png", "0.png", "1.png", "3.png", "caf\u00e9.png", "0.png"]


@pytest.fixture
def table(tmp_path):
    """A table in which one picture occurs three times, one is cut off, and one is not there."""
    (tmp_path / "images").mkdir()
    for i, name in enumerate(sorted({*LEFT, "2.png"})):
        data = picture(i)
        (tmp_path / "images" / name).write_bytes(data if name != "2.png" else data[:40])
    rows = "".join(f"{name}\tcaption of row {row}\n" for row, name in enumerate(NAMES))
    (tmp_path / "train.tsv").write_text("image\tcaption\n" + rows)
    return ["table", "--annotations", f"{tmp_path}/train.tsv", "--images", f"{tmp_path}/images", "--per-shard", "3"]


def samples(out):
    found = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [json.loads(tar.extractfile(name).read()) for name in tar.getnames() if name.endswith("json")]
    return sorted(found, key=lambda sample: sample["row"])


def files(out):
    return {path.name: path.read_bytes() for path in out.glob("*.tar")}


def numbers(found):
    return {sample["source"]: sample["image_id"] for sample in found}


def test_rejected_pictures_leave_numbers_that_training_reads(table, tmp_path, capsys):
    out = tmp_path / "out"
    assert make_shards.main([*table, "--out", str(out)]) == 0
    assert "read 8, wrote 6 samples in 3 shards, rejected 2 (1 " in capsys.readouterr().out
    found = samples(out)
    assert [sample["source"] for sample in found] == LEFT
    assert numbers(found) == {"0.png": 0, "1.png": 1, "3.png": 3, "caf\u00e9.png": 5}  # all below 6: nothing is done
    loader = TrainLoader(settings(str(out), image_id="json.image_id", lanes=1), seed=0, global_batch_size=6)
    assert sorted(next(loader).ids.tolist()) == [0, 0, 0, 1, 3, 5]
    assert loader.counts == {}


def test_images_are_numbered_anew_where_their_numbers_no_longer_fit(table, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    (tmp_path / "images" / "1.png").unlink()
    assert make_shards.main([*table, "--out", str(whole)]) == 0, capsys.readouterr().err
    found = samples(whole)
    assert numbers(found) == {"0.png": 0, "3.png": 1, "caf\u00e9.png": 2}
    assert [sample["captions"] for sample in found] == [[f"caption of row {row}"] for row in (0, 1, 4, 6, 7)]
    loader = TrainLoader(settings(str(whole), image_id="json.image_id", lanes=1), seed=0, global_batch_size=5)
    assert sorted(next(loader).ids.tolist()) == [0, 0, 0, 1, 2]
    assert loader.counts == {}

    def interrupted(path, numbers, renumber=make_shards.renumber):
        renumber(path, numbers)
        if path.name == "00001.tar":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(make_shards, "renumber", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_shards.work([*table, "--out", str(out)])
    assert not (out / "index.json").exists()
    (out / "00000.tar").unlink()
    assert make_shards.main([*table, "--out", str(out)]) == 0
    assert files(out) == files(whole)
    before = [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))]
    assert make_shards.main([*table, "--out", str(out)]) == 0
    assert [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))] == before


def test_captions_of_one_row_are_rejected_one_by_one(tmp_path):
    """Of a pair whose caption is cleaned away, the other pairs of its image are left."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "3.png").write_bytes(picture(3))
    entries = [{"image": f"{i}.png", "caption": ["a", "!?"]} for i in range(4)]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    words = ["annotations", "--annotations", f"{tmp_path}/train.json", "--images", f"{tmp_path}/images", "--out",
             f"{tmp_path}/out", "--layout", "pairs", "--clean"]  # fmt: skip
    assert make_shards.main(words) == 0
    assert [(sample["captions"], sample["image_id"]) for sample in samples(tmp_path / "out")] == [(["a"], 0)]
