"""What the command that rebuilds the embedded corpus refuses, and which differences it finds.

That it gives the same bytes is `amclr-scale corpus emoji --check`, which downloads five packages.
"""

import shutil

import pytest

from amclr_scale.corpora import emoji
from amclr_scale.data.sources import CORPORA
from amclr_scale.errors import UserError


def test_packages_that_are_missing_or_others_are_told(tmp_path):
    words = ["--out", str(tmp_path / "out"), "--sources", str(tmp_path)]
    with pytest.raises(UserError, match=f"--sources: expected {emoji.NAMES.file} in "):
        emoji.work(words)
    (tmp_path / emoji.NAMES.file).write_bytes(b"another release")
    with pytest.raises(UserError, match=f"{emoji.NAMES.file}: expected sha256 {emoji.NAMES.sha256}, got "):
        emoji.work(words)
    assert not (tmp_path / "out").exists()


def test_where_to_write_is_asked_for_and_never_written_over(tmp_path):
    with pytest.raises(UserError, match=r"--out: expected a folder to write \(or --check\)"):
        emoji.work([])
    with pytest.raises(UserError, match="--out: expected a folder that does not exist yet, got "):
        emoji.work(["--out", str(tmp_path)])


def test_a_corpus_that_differs_is_noticed(tmp_path):
    shipped = CORPORA / "emoji"
    for name in ("train", "val_style", "val_concept"):
        (tmp_path / name).mkdir()
        for path in (shipped / name).iterdir():
            if path.is_file():
                shutil.copy(path, tmp_path / name)
    shutil.copy(shipped / "classes.json", tmp_path)
    assert emoji.compare(tmp_path, shipped) == []
    shard = min((tmp_path / "val_style").glob("*.gz"))
    shard.write_bytes(shard.read_bytes() + b"x")
    (tmp_path / "train" / "99999.tar.gz").touch()
    assert sorted(emoji.compare(tmp_path, shipped)) == ["train/99999.tar.gz", f"val_style/{shard.name}"]
