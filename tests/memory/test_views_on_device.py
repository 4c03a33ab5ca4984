"""What the device holds for a moment while it makes views, as the account says."""

import numpy as np
import pytest
import torch
from PIL import Image

from amclr_scale.config.schema import ImageAugmentation
from amclr_scale.data.augmentation import cropping
from amclr_scale.data.augmentation.batched import AT_ONCE, BYTES_EACH, apply_all
from amclr_scale.data.augmentation.cropping import START
from amclr_scale.data.augmentation.on_device import DeviceViews, held_for_a_moment
from amclr_scale.data.augmentation.plans import NAMES, Operation, encode, most_operations
from amclr_scale.data.augmentation.shipping import Shipment
from amclr_scale.data.randomness import Draws
from amclr_scale.memory.tracker import Tracker


@pytest.mark.parametrize("at_once", [cropping.AT_ONCE, 2**17])
@pytest.mark.parametrize(("size", "sides"), [(32, (30, 60)), (48, (100, 300)), (64, (8, 20))])
def test_what_making_views_holds_for_a_moment(size, sides, at_once, monkeypatch):
    """As large as batches of photographs make it, also of pictures that are enlarged: by the tracker."""
    monkeypatch.setattr(cropping, "AT_ONCE", at_once)
    recipe, random = ImageAugmentation(crop_scale=(0.5, 1), amclr=1.0, randaugment=(2, 9)), np.random.default_rng(0)
    shipment, rows = Shipment(size, most_operations(recipe), range(0)), []
    for i in range(512):
        width, height = random.integers(*sides, 2).tolist()
        rows += shipment.rows([Image.new("RGB", (width, height))], [(recipe, Draws(i))])
    views = DeviceViews(size, torch.device("cpu"), range(0))
    staged = views.stage([((torch.stack(rows),), shipment.pixels())])
    with Tracker("cpu") as tracker:
        made = sum(view.numel() for view in views(staged))
    assert tracker.peak <= 2 * made + staged.pixels[0].numel() + held_for_a_moment(512, size)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("further", "of_base"), [(0, False), (3, False), (3, True)])
def test_of_several_views_no_more_than_one_is_there_twice(further, of_base, groups, monkeypatch):
    """Batches that are large beside what is held for a moment; their pixels come at once, or a part at a time."""
    monkeypatch.setattr("amclr_scale.data.augmentation.batched.AT_ONCE", 2**16)
    monkeypatch.setattr("amclr_scale.data.augmentation.cropping.AT_ONCE", 2**14)
    monkeypatch.setattr("amclr_scale.data.augmentation.on_device.AT_ONCE", 2**30 if groups == 1 else 1)
    size, recipe, parts = 32, ImageAugmentation(crop_scale=(0.5, 1), flip=0.5, color_jitter=0.4), []
    later, picture = range(1, 1 + further) if of_base else range(0), Image.new("RGB", (45, 40))
    for part in range(groups):
        shipment, samples = Shipment(size, most_operations(recipe), later), 1024 // groups
        rows = [
            shipment.rows([picture] * (1 + further), [(recipe, Draws(part, i, v)) for v in range(1 + further)])
            for i in range(samples)
        ]
        views = [torch.stack(view) for view in zip(*rows, strict=True)]
        for view in later:
            views[view][:, START] += torch.arange(samples) * size**2
        parts.append((tuple(views), shipment.pixels()))
    views = DeviceViews(size, torch.device("cpu"), later)
    staged = views.stage(parts)
    views(staged)  # tables are made
    with Tracker("cpu") as tracker:
        made = sum(view.numel() for view in views(staged))
    own = tracker.peak - tracker.at_peak[Tracker.FOUND]  # not what is on the host, beside a GPU
    assert own <= made + held_for_a_moment(1024, size) + 2**20  # rows and places, few beside real batches


@pytest.mark.parametrize("name", NAMES)
def test_no_operation_holds_more_than_is_said(name, monkeypatch):
    amounts = {"posterize": 4.0, "central crop": 20.0, "central crop with a border": 20.0, "noise": 0.05, "hue": 0.2}
    plans = torch.stack([encode([Operation(name, amounts.get(name, 0.3), 5)], 1)] * 400)
    pictures = torch.randint(0, 256, (400, 3, 24, 24), dtype=torch.uint8)
    monkeypatch.setattr("amclr_scale.data.augmentation.batched.AT_ONCE", 2**19)
    apply_all(pictures, plans)  # tables are made
    with Tracker("cpu") as tracker:
        apply_all(pictures, plans)
    assert AT_ONCE > 2**19
    assert tracker.peak <= 2 * pictures.numel() + BYTES_EACH * 2**19 + 2**16
