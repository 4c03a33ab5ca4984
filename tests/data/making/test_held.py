"""What people hold that is no shards yet is answered with the command that makes shards of it."""

import shlex
from pathlib import Path

import pytest

from amclr_scale.data.indexing import open_index
from amclr_scale.errors import UserError
from tests.data.shards import picture, settings

SHARDS = "--out SHARDS"


def test_a_folder_of_pictures_a_table_and_annotations_are_told_how_they_become_shards(tmp_path: Path) -> None:
    (tmp_path / "photos" / "dogs").mkdir(parents=True)
    (tmp_path / "photos" / "dogs" / "a.JPG").write_bytes(picture(0))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    for name in ("a.csv", "a.parquet", "a.jsonl", "a.doc"):
        (tmp_path / name).write_text("x")
    (tmp_path / "list.json").write_text('[{"image": "a.jpg", "caption": "x"}]')
    (tmp_path / "coco.json").write_text('{"images": [], "annotations": []}')
    (tmp_path / "of karpathy.json").write_text('{"images": []}')
    (tmp_path / "my photos").mkdir()
    (tmp_path / "my photos" / "a.png").write_bytes(picture(0))

    def told(name: str) -> str:
        with pytest.raises(UserError) as refused:
            open_index(settings(str(tmp_path / name)))
        return str(refused.value)

    folder = told("photos")
    assert folder.startswith("data.train: ")
    assert folder.endswith(f"shards make folder --images {tmp_path / 'photos'} {SHARDS}")
    for name in ("a.csv", "a.parquet", "a.jsonl"):
        assert told(name).endswith(f"shards make table --annotations {tmp_path / name} --images FOLDER {SHARDS}")
    assert told("my photos").endswith(f"shards make folder --images '{tmp_path / 'my photos'}' {SHARDS}")
    for name, kind in {"list.json": "annotations", "coco.json": "coco", "of karpathy.json": "karpathy"}.items():
        path = str(tmp_path / name)
        assert told(name) == (
            f"{path}: expected an index (JSON with a `shardlist`), got what looks like annotations; make shards of "
            f"them first: amclr-scale shards make {kind} --annotations {shlex.quote(path)} --images FOLDER {SHARDS}"
        )
    assert not [name for name in ("notes", "a.doc", "gone") if "shards make" in told(name)]
