"""`data.augment_on: device` gives the batches that workers make, to the last bit, whoever holds the pixels."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from amclr_scale.config import schema
from amclr_scale.config.checks import check
from amclr_scale.config.load import load, recipe
from amclr_scale.data.augmentation import on_device, shipping
from amclr_scale.data.image_views import augmented_view, count_repeated, to_tensor
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.randomness import Draws
from tests.data.shards import pair, settings, write_tar
from tests.data.test_loader import assert_same, joined, take
from tests.engine.test_waits import ASKING
from tests.pretended_device import DEVICE, accelerator

EVERYTHING = schema.ImageAugmentation(
    crop_scale=(0.1, 1.0), randaugment=(2, 9), color_jitter=0.4, grayscale=0.3, amclr=0.5, amclr_strength=1.5
)
PLAIN = schema.ImageAugmentation(crop_scale=(0.5, 1.0), flip=0.0)
FIXED = schema.ImageAugmentation(crop_scale=(1, 1), flip=0, amclr=1.0)


def stored(width: int, height: int, i: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(out, kind)
    return out.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Pictures of many sizes, some much larger than views of 8 pixels; one broken, one without wrong pictures."""
    random, members = np.random.default_rng(2), []
    for i in range(40):
        (name, _), *others = pair(i, concept="abcd"[i % 4])
        width, height = random.integers(4, 90 if i % 3 else 16, 2).tolist()
        members += [
            (name, stored(width, height, i, "JPEG" if i % 5 == 0 else "PNG") if i != 17 else b"broken"),
            *others,
        ]
        if i % 4:
            members.append((name.replace(".png", ".neg.png").replace(".jpg", ".neg.png"), stored(11, 9, i + 100)))
    write_tar(tmp_path / "shards" / "0.tar", members)
    return str(tmp_path / "shards")


def on(place, data, **how):
    return take(data.model_copy(update={"augment_on": place}), 6, **how)


CASES = {
    "crops": {"augmentation": PLAIN},
    "views of the image": {"augmentation": EVERYTHING, "image_views": 2, "image_view": FIXED},
    "views of the base view": {
        "augmentation": EVERYTHING, "image_views": 2, "image_view": FIXED, "image_view_from": "base",
    },
    "wrong pictures": {"augmentation": EVERYTHING, "image_negatives": 2, "image_views": 1},
    "of a group": {
        "augmentation": EVERYTHING, "image_views": 2, "image_view_from": "group", "image_group": "json.concept",
        "resident": "host",
    },
    "held": {"augmentation": EVERYTHING, "image_views": 1, "image_view_from": "base", "resident": "host"},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_batches_are_those_of_the_workers(shards, name):
    data = settings(shards, max_bad_fraction=1.0, **CASES[name])
    expected = on("workers", data)
    assert_same(on("device", data), expected)
    assert_same(joined([on("device", data, rank=rank, world_size=2) for rank in range(2)]), expected)
    if data.resident == "host":
        assert_same(on("workers", data.model_copy(update={"resident": "device"})), expected)
    for ours, theirs in zip(on("device", data), expected, strict=True):
        assert ours.given.keys() == theirs.given.keys()
        assert all(torch.equal(ours.given[key], theirs.given[key]) for key in theirs.given)
    if "image_negatives" in CASES[name]:
        masks = torch.cat([batch.given["image_negative_mask"] for batch in expected])
        assert 0 < masks.sum() < masks.numel()


def test_pictures_are_sent_or_views_of_them_and_the_batches_are_the_same(shards, monkeypatch):
    """A worker sends a large picture's views in place of its pixels; how large does not show."""
    data = settings(shards, max_bad_fraction=1.0, **CASES["views of the image"])
    expected, sizes = on("workers", data), []
    for most in (0, shipping.MOST_SENT, 10**9):
        monkeypatch.setattr(shipping, "MOST_SENT", most)
        loader = TrainLoader(data.model_copy(update={"augment_on": "device"}), seed=0, global_batch_size=8)
        part = loader._parts[0]
        sizes.append(len(part.pixels))
        loader.close()
        assert_same(on("device", data), expected)
    assert sizes[0] == 8 * 3 * 64
    assert sizes[1] <= shipping.MOST_SENT * sizes[0]
    assert sizes[2] > 2 * sizes[1]


def test_a_strip_of_few_pixels_that_is_too_long_is_sent_as_its_view():
    """Its rows would have more pixels than sums without rounding can have."""
    size, strip = 224, Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 45_000, 3), dtype=np.uint8))
    recipe = schema.ImageAugmentation(crop_scale=(0.99, 1.0), crop_ratio=(11_000, 12_000))
    shipment = shipping.Shipment(size, 1, range(0))
    rows = shipment.rows([strip], [(recipe, Draws(3))])
    assert len(shipment.pixels()) == size**2 < strip.width * strip.height < shipping.MOST_SENT * size**2
    views = on_device.DeviceViews(size, torch.device("cpu"), range(0))
    (found,) = views(views.stage([((torch.stack(rows),), shipment.pixels())]))
    assert torch.equal(found[0], to_tensor(augmented_view(strip, size, recipe, Draws(3))))


def test_workers_and_several_parts(shards, monkeypatch):
    monkeypatch.setattr("amclr_scale.data.loader._PART", 3)
    data = settings(shards, max_bad_fraction=1.0, **CASES["views of the base view"])
    expected = on("workers", data)
    assert_same(on("device", data, workers=2), expected)
    monkeypatch.setattr(on_device, "AT_ONCE", 1)  # one part at a time on the device
    assert_same(on("device", data), expected)
    loader = TrainLoader(data.model_copy(update={"augment_on": "device"}), seed=0, global_batch_size=8)
    assert_same(list(loader.peek(16)), expected[:2])
    assert_same([next(loader) for _ in range(2)], expected[:2])
    loader.close()


class OfPixels(TorchDispatchMode):
    """Notes operations on pixels whose answer the host needs before it can go on. Rows and places are the host's."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        pixels = any(isinstance(each, torch.Tensor) and each.dtype in (torch.uint8, torch.float32) for each in args)
        self.asked += [name] * (name in ASKING and pixels)
        return func(*args, **(kwargs or {}))


def test_the_device_is_not_asked(shards):
    data = settings(shards, max_bad_fraction=1.0, augment_on="device", **CASES["views of the base view"])
    loader = TrainLoader(data, seed=0, global_batch_size=8)
    next(loader)  # tables are made
    part = loader._parts[1]
    staged = loader._device_views.stage([(part.images, part.pixels)])
    with OfPixels() as noting:
        loader._device_views(staged)
    loader.close()
    assert not noting.asked


@pytest.mark.parametrize("name", ["views of the image", "views of the base view", "wrong pictures"])
def test_no_tensor_of_the_host_meets_one_of_the_device(shards, name):
    """On a pretended accelerator, which refuses what a GPU does."""
    data = settings(shards, max_bad_fraction=1.0, augment_on="device", **CASES[name])
    loader = TrainLoader(data, seed=0, global_batch_size=8)
    expected, part, of_base = next(loader).images, loader._parts[0], loader._parts.pipeline.of_base
    loader.close()
    with accelerator():
        views = on_device.DeviceViews(8, DEVICE, of_base)
        found = views(views.stage([(part.images, part.pixels)]))
        assert all(view.device == DEVICE for view in found)
        repeated = int(count_repeated(found[: 1 + data.image_views]))
        here = [view.cpu() for view in found]
    assert repeated == int(count_repeated(expected[: 1 + data.image_views]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(here, expected, strict=True))


def test_views_that_repeat_are_counted(shards):
    same = schema.ImageAugmentation(crop_scale=(1, 1), flip=0.5)
    shares = []
    for place in ({}, {"augment_on": "device"}, {"resident": "device"}):
        data = settings(shards, max_bad_fraction=1.0, image_views=1, augmentation=same, **place)
        loader = TrainLoader(data, seed=0, global_batch_size=8)
        for _ in range(5):
            next(loader)
        shares.append(loader.repeated()["repeated_images"])
        loader.close()
    assert shares[0] == shares[1] == shares[2] > 0.3


def test_it_is_no_part_of_the_recipe():
    """A run goes on either way."""
    here, there = (recipe(load("quickstart", [f"data.augment_on={place}"])) for place in ("workers", "device"))
    assert here == there


def test_features_in_place_of_pictures_leave_nothing_to_augment(tmp_path):
    config = schema.Config(
        data=settings("emoji/train", augment_on="device", features={"image": str(tmp_path / "f.npy")})
    )
    assert any(line.startswith("data.augment_on: expected workers beside") for line in check(config, 1))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", [name for name in CASES if name != "of a group"])
def test_a_gpu_makes_the_same_bytes_and_is_not_waited_for(shards, name):
    """One that is waited for raises an error in this mode of torch's."""
    data = settings(shards, max_bad_fraction=1.0, **CASES[name])
    expected = on("workers", data)
    torch.cuda.init()
    loader = TrainLoader(
        data.model_copy(update={"augment_on": "device"}), seed=0, global_batch_size=8, workers=2, in_thread=True
    )
    found = [next(loader)]  # tables are made
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += [next(loader) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        loader.close()
    assert all(view.is_cuda for batch in found for view in batch.images)
    here = [replace(batch, images=tuple(view.cpu() for view in batch.images)) for batch in found]
    assert_same(here, expected)
