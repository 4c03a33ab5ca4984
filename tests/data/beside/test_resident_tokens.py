"""Captions tokenised once, beside features of images: the batches of the shards, of which nothing is read any more."""

import errno
import logging
from collections import namedtuple

import pytest
import torch

from amclr_scale.commands.embedding.of_towers import write_features
from amclr_scale.config.augmentation import TextAugmentation
from amclr_scale.data import loader
from amclr_scale.data.pipeline import Pipeline
from amclr_scale.data.resident import tokens
from amclr_scale.errors import UserError
from tests.data.beside.test_features import config
from tests.data.shards import pair, write_tar
from tests.data.test_loader import assert_same, joined, take


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """24 samples, one of them without a picture and one without a caption, and features of their images."""
    folder = tmp_path_factory.mktemp("tokens")
    members = [member for i in range(24) for member in pair(i)]
    members[3 * 5] = members[3 * 5][0], b"no picture"
    members[3 * 9 + 1] = members[3 * 9 + 1][0], b" "
    write_tar(folder / "0.tar", members)
    list(write_features(config(folder, ("image",)), device="cpu", batch_size=7))
    return folder


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"caption": "json.captions"},
        {"caption": ["txt", "json.captions"]},
        {"text_views": 1},
        {"text_views": 2, "text_augmentation": TextAugmentation(drop=0.3, swap=0.3)},
        {"labels": "json.captions"},
    ],
)
def test_batches_are_those_of_the_shards(made, changed, caplog):
    caplog.set_level(logging.WARNING)
    found = []
    for held in ("none", "host"):
        caplog.clear()
        data = config(made, ("image",)).data.model_copy(update={"resident": held, **changed})
        batches = take(data, 9)
        found.append((batches, [record.getMessage() for record in caplog.records if record.name == loader.__name__]))
    assert_same(found[1][0], found[0][0])
    for ours, theirs in zip(found[1][0], found[0][0], strict=True):
        torch.testing.assert_close(dict(ours.given), dict(theirs.given), rtol=0, atol=0)
    assert found[1][1] == found[0][1]
    assert "no features" in " ".join(found[0][1])


def test_ranks_and_workers_get_the_same(made):
    data = config(made, ("image",)).data.model_copy(update={"resident": "host"})
    plain = take(data, 6)
    assert_same(joined([take(data, 6, rank=rank, world_size=2, workers=rank) for rank in range(2)]), plain)


def test_one_caption_each_is_read_once(made, monkeypatch):
    """Whole parts come from tables: a sample is opened only where another has to stand for it."""
    opened = []
    plain = Pipeline._views
    monkeypatch.setattr(Pipeline, "_views", lambda self, *of: opened.append(of[0]) or plain(self, *of))
    data = config(made, ("image",)).data.model_copy(update={"resident": "host", "max_bad_fraction": 1.0})
    batches = take(data, 30, global_batch_size=2)
    assert sum(len(batch) for batch in batches) == 60
    assert {5, 9} <= set(opened)
    assert len(opened) < 20  # of 60: parts of two with one that cannot be used, and its replacement

    monkeypatch.setattr(tokens, "_write", lambda *_: pytest.fail("written twice"))
    assert_same(take(data, 30, global_batch_size=2), batches)


@pytest.mark.parametrize("free", [100, 2**40])
def test_a_disk_without_room_for_them_is_told(made, tmp_path, monkeypatch, free):
    """Where it shows before they are written, and where it shows on the way; nothing half-written is kept."""
    data = config(made, ("image",)).data.model_copy(update={"resident": "host", "cache": str(tmp_path)})
    usage = namedtuple("usage", "total free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**50, free))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    needed = r"expected .* bytes free in .* for the tokens of the captions of 24 samples"
    said = needed if free == 100 else r"the disk of .* is full"
    with pytest.raises(UserError, match=rf"^data\.cache: {said}.*, or data\.resident to none$"):
        take(data, 1)
    assert [path.suffix for path in (tmp_path / "resident").iterdir()] == [".lock"]
