"""The data set held decoded: the same batches as from shards, to the last bit, in host memory and on a device."""

import logging

import numpy as np
import pytest
from PIL import Image

from amclr_scale.config import schema
from amclr_scale.config.checks import check
from amclr_scale.data import loader
from amclr_scale.data.decoding import BadSampleError
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.resident import pictures, store
from amclr_scale.errors import UserError
from tests.data.shards import pair, picture, settings, write_tar
from tests.data.test_loader import assert_same, joined, take

EVERYTHING = {
    "image_views": 1, "text_views": 1,
    "augmentation": schema.ImageAugmentation(
        crop_scale=(0.3, 1.0), randaugment=(2, 7), color_jitter=0.4, grayscale=0.3
    ),
}  # fmt: skip
GEOMETRY = {
    "image_views": 1, "text_views": 1,
    "augmentation": schema.ImageAugmentation(crop_scale=(0.2, 1.0), crop_ratio=(0.5, 2.0), grayscale=0.3),
}  # fmt: skip


@pytest.fixture
def damaged(tmp_path):
    """Two shards of squares, with a sample that has no caption, one no picture, one a broken picture."""
    rng = np.random.default_rng(0)
    members = []
    for i in range(40):
        (name, _), *others = pair(i)
        noise = Image.fromarray(rng.integers(0, 256, (13, 13, 3), dtype=np.uint8))
        noise.save(tmp_path / "noise.png")
        sample = [(name, (tmp_path / "noise.png").read_bytes()), *others]
        sample = sample[:1] if i == 3 else sample[1:] if i == 17 else sample
        members += [(name, picture(0)[:40]), *others] if i == 30 else sample
    write_tar(tmp_path / "shards" / "00000.tar", members[:60])
    write_tar(tmp_path / "shards" / "00001.tar", members[60:])
    return str(tmp_path / "shards")


@pytest.mark.parametrize("view_from", ["image", "base"])
def test_batches_are_those_of_the_shards(damaged, view_from, caplog):
    caplog.set_level(logging.WARNING)
    for resident, recipe in (("host", EVERYTHING), ("host", GEOMETRY), ("device", GEOMETRY), ("device", EVERYTHING)):
        data = settings(damaged, image_view_from=view_from, max_bad_fraction=1.0, **recipe)
        faults = []
        for held in ("none", resident):
            caplog.clear()
            batches = take(data.model_copy(update={"resident": held}), 12)
            faults.append((batches, [r.getMessage() for r in caplog.records if r.name == loader.__name__]))
        assert_same(faults[1][0], faults[0][0])
        assert faults[1][1] == faults[0][1]
        assert len({message.split(": ")[2] for message in faults[0][1]}) == 3


def test_a_bad_picture_holds_on_to_no_batch(damaged):
    """An exception keeps the frames that it is raised through, and one that is raised again keeps all of them."""
    batches = TrainLoader(settings(damaged, max_bad_fraction=1.0, resident="host"), seed=0, global_batch_size=8)
    next(batches)
    found = []
    for _ in range(2):
        with pytest.raises(BadSampleError, match="missing image") as caught:
            batches._parts.pipeline.resident.picture(17)
        found.append(caught.value)
    batches.close()
    assert found[0] is not found[1]


def test_any_number_of_ranks_and_workers(damaged):
    data = settings(damaged, max_bad_fraction=1.0, **GEOMETRY)
    expected = take(data, 4)
    for held in ("host", "device"):
        resident = data.model_copy(update={"resident": held})
        assert_same(joined([take(resident, 4, rank=rank, world_size=2) for rank in range(2)]), expected)
        assert_same(take(resident, 2, workers=2, start_step=2), expected[2:])
        ahead = loader.TrainLoader(resident, seed=0, global_batch_size=8)
        assert_same(list(ahead.peek(16)), expected[:2])
        ahead.close()


def test_it_is_decoded_once_for_all_runs_of_the_same_data(damaged, monkeypatch):
    data = settings(damaged, max_bad_fraction=1.0, resident="host", **EVERYTHING)
    expected = take(data, 3)
    monkeypatch.setattr(store, "_write", lambda *_: pytest.fail("decoded again"))
    assert_same(take(data, 3), expected)
    for other in ({"image_size": 9}, {"image_group": "cls"}):  # other pixels, other members
        with pytest.raises(pytest.fail.Exception, match="decoded again"):
            take(data.model_copy(update=other), 1)
    monkeypatch.setattr(store, "DECODER", ("a later Pillow, or other rules of ours",))
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        take(data, 1)


def test_what_cannot_be_held_is_refused(tmp_path, damaged, monkeypatch):
    long = [member for i in range(8) for member in ((f"{i}.png", picture(i, (900, 2))), (f"{i}.txt", b"a line"))]
    write_tar(tmp_path / "long" / "0.tar", long)

    with pytest.raises(
        UserError, match=r"data\.resident: expected pictures of .* = 800, .*, got 1,800 and 900; set data"
    ):
        take(settings(str(tmp_path / "long"), resident="device", image_size=4, max_bad_fraction=1.0), 1)
    monkeypatch.setattr(pictures, "AT_ONCE", 3000)
    write_tar(tmp_path / "large" / "0.tar", [("0.png", picture(0, (60, 51))), ("0.txt", b"a line")])
    with pytest.raises(
        UserError, match=r"data\.resident: expected pictures of at most 3,000 pixels, .*, got 3,060 and"
    ):
        take(settings(str(tmp_path / "large"), resident="device", lanes=1, max_bad_fraction=1.0), 1)
    config = schema.Config(data=settings(damaged, resident="host", stream=True))
    assert any(line.startswith("data.resident: expected none with data.stream") for line in check(config, 1))


def test_further_views_are_other_pictures_of_the_group(tmp_path):
    """Pictures of one colour say whose they are; groups of 4, 3 and 1, and one whose other picture is broken."""
    concepts = ["a", "b", "a", "c", "b", "a", "a", "b", "d", "d"]
    members = []
    for i, concept in enumerate(concepts):
        (name, _), *others = pair(i, concept=concept)
        members += [(name, picture(20 * i, (10, 10)) if i != 9 else b"broken"), *others]
    write_tar(tmp_path / "shards" / "0.tar", members)
    plain = schema.ImageAugmentation(crop_scale=(1, 1), flip=0)
    recipe = {"augmentation": plain, "image_views": 2, "image_view_from": "group", "image_group": "json.concept"}
    data = settings(str(tmp_path / "shards"), max_bad_fraction=1.0, **recipe)
    host, device = (take(data.model_copy(update={"resident": held}), 30) for held in ("host", "device"))
    assert_same(device, host)
    shown = {i: set() for i in range(10)}
    for batch in host:
        for row, sample in enumerate(batch.ids.tolist()):
            base, *further = (int(view[row, 0, 0, 0]) // 20 for view in batch.images)
            assert base == sample
            shown[sample].update(further)
            if concepts[sample] in "ab":
                assert len({base, *further}) == 3  # as long as there are others
    for sample in range(9):
        others = {i for i, concept in enumerate(concepts) if concept == concepts[sample] and i not in (sample, 9)}
        assert shown[sample] == (others or {sample})
    ranks = [take(data.model_copy(update={"resident": "host"}), 4, rank=rank, world_size=2) for rank in range(2)]
    assert_same(joined(ranks), host[:4])
    wrong = settings(str(tmp_path), image_view_from="group")
    assert [line.partition(":")[0] for line in check(schema.Config(data=wrong), 1)][:2] == [
        "data.image_group", "data.resident",
    ]  # fmt: skip
