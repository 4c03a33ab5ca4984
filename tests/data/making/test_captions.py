"""What `shards make` says of captions: what training would not read is a reject, and both counts are of the same."""

import json
from pathlib import Path

import pytest

from amclr_scale.commands.make_shards import main as make_shards
from amclr_scale.data.loader import TrainLoader
from tests.data.shards import picture, settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    return tmp_path


def test_captions_that_training_would_not_read_are_rejected(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "word " * 3000
    entries = [
        {"image": "0.png", "caption": "short"}, {"image": "1.png", "caption": long},
        {"image": "2.png", "caption": [long, "the other"]}, {"image": "3.png", "caption": "short too"},
    ]  # fmt: skip
    (folder / "a.json").write_text(json.dumps(entries))
    make = ["annotations", "--annotations", str(folder / "a.json")]
    assert make_shards([*make, "--out", str(folder / "out")]) == 0
    said = capsys.readouterr()
    assert "a.json: JSON; read 4, of which 1 cannot be used\n" in said.err
    assert (
        "read 4, wrote 3 samples in 1 shards, rejected 1 (1 huge caption; rejects.jsonl); left out 1 huge caption"
        in (said.out)
    )
    listed = [json.loads(line) for line in (folder / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(one["row"], one["of_caption"]) for one in listed] == [(1, False), (2, True)]
    assert listed[0]["detail"] == "14,999 characters: more than --max-caption-characters=10,000"
    loader = TrainLoader(settings(str(folder / "out"), lanes=1), seed=0, global_batch_size=3)
    next(loader)
    assert loader.counts == {}

    assert make_shards([*make, "--out", str(folder / "cleaned"), "--clean"]) == 0, "30 words are stored"
    assert "rejected 0\n" in capsys.readouterr().out
    assert make_shards([*make, "--out", str(folder / "all"), "--max-caption-characters", "15000"]) == 0
    assert "read 4, wrote 4 samples" in capsys.readouterr().out
    assert make_shards([*make, "--out", str(folder / "none"), "--max-caption-characters", "0"]) == 2
    assert "--max-caption-characters: expected at least 1, got 0" in capsys.readouterr().err


def test_words_that_stand_for_nothing_are_counted_and_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = ["a dog", "NaN", "nan", "None", "", "NaN"]
    (folder / "a.csv").write_text("image,caption\n" + "".join(f"{n}.png,{cell}\n" for n, cell in enumerate(cells)))
    assert make_shards(["table", "--annotations", str(folder / "a.csv"), "--out", str(folder / "out")]) == 0
    said = capsys.readouterr()
    assert "captions in caption; read 6, of which 1 cannot be used\n" in said.err
    assert "captions that may stand for nothing, and are kept: 2 'NaN', 1 'nan', 1 'None'; " in said.err
    assert "read 6, wrote 5 samples in 1 shards, rejected 1 (1 no caption; rejects.jsonl)" in said.out


def test_a_folder_that_paths_do_not_start_from_is_what_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tables").mkdir()
    (folder / "tables" / "a.csv").write_text("image,caption\n0.png,a dog\n1.png,a cat\n2.png,\n")
    make = ["table", "--annotations", str(folder / "tables" / "a.csv")]
    assert make_shards([*make, "--out", str(folder / "out")]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(
        "--images: expected the folder that image paths start from; all 3 of 3 records were rejected"
    )
    assert str(folder / "tables") in told
    assert make_shards([*make, "--images", str(folder), "--out", str(folder / "found")]) == 0


def test_where_no_picture_is_stored_the_folder_of_images_is_not_to_blame(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    stored = pa.array([{"bytes": None, "path": None}] * 2, kind)
    parquet.write_table(pa.table({"image": stored, "caption": ["a dog", "a cat"]}), tmp_path / "a.parquet")
    make = ["table", "--annotations", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "out")]
    assert make_shards(make) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "--annotations: all 2 of 2 records were rejected (2 no such image; rejects.jsonl)"


def test_a_sample_per_caption_is_counted_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [{"image": "0.png", "caption": ["one", "two"]}, {"image": "1.png", "caption": []}]
    (folder / "a.json").write_text(json.dumps(entries))
    pairs = ["annotations", "--annotations", str(folder / "a.json"), "--layout", "pairs"]
    assert make_shards([*pairs, "--out", str(folder / "out")]) == 0
    said = capsys.readouterr()
    assert "read 3, of which 1 cannot be used\n" in said.err
    assert "stand for nothing" not in said.err
    assert "read 3, wrote 2 samples in 1 shards, rejected 1" in said.out
