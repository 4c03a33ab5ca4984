"""Crops that are cut on the device are Pillow's, byte for byte, of pictures of any size."""

import numpy as np
import pytest
import torch
from PIL import Image

from amclr_scale.config import schema
from amclr_scale.data.augmentation import cropping
from amclr_scale.data.augmentation.cropping import Cut, check_arithmetic, cropped, cut_of, window_of
from amclr_scale.data.augmentation.plans import crop_box
from amclr_scale.data.randomness import Draws
from amclr_scale.errors import UserError

ANY = schema.ImageAugmentation(crop_scale=(0.02, 1.0), crop_ratio=(0.1, 10.0))
random = np.random.default_rng(0)


def noise(width: int, height: int, hard: bool) -> np.ndarray:
    """`hard`: black and white, between which the filter overshoots."""
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return pixels // 128 * 255 if hard else pixels


def held(sizes, size: int, recipe=ANY):
    """(pixels of all pictures, cuts, Pillow's views); of every third picture no more is held than is needed."""
    parts, cuts, views, start = [], [], [], 0
    for i, (width, height) in enumerate(sizes):
        pixels = noise(width, height, hard=i % 2 == 0)
        box = crop_box(width, height, recipe, Draws(1, i))
        whole = (0, 0, width, height)
        left, upper, right, lower = window_of(box, width, height, size) if i % 3 == 0 else whole
        cuts.append(cut_of(box, width, height, size, (left, upper, right, lower), start))
        parts.append(pixels[upper:lower, left:right].reshape(-1, 3))
        start += len(parts[-1])
        views.append(np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box)))
    expected = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
    return torch.from_numpy(np.concatenate(parts)), torch.tensor(cuts), expected


@pytest.mark.parametrize(
    ("size", "sides", "count"),
    [
        (32, (1, 90), 300),
        (13, (1, 300), 60),
        (1, (1, 40), 200),
        (64, (5, 64), 150),
        (8, (8, 9), 50),
        (8, (900, 1300), 3),
    ],
)
def test_crops_are_pillows(size, sides, count):
    pixels, cuts, expected = held(random.integers(*sides, (count, 2)).tolist(), size)
    assert torch.equal(cropped(pixels, cuts, size), expected)
    some = torch.randperm(count)[: count // 2]  # whatever they are cut with
    assert torch.equal(cropped(pixels, cuts[some], size), expected[some])


def test_photographs(monkeypatch):
    """Both ways up, at the size that most towers see, a few at a time."""
    monkeypatch.setattr(cropping, "AT_ONCE", 500_000)
    recipe = schema.ImageAugmentation(crop_scale=(0.5, 1.0))
    pixels, cuts, expected = held([(500, 375), (375, 500), (256, 341), (640, 224)], 224, recipe)
    assert torch.equal(cropped(pixels, cuts, 224), expected)
    assert cropped(pixels, cuts[:0], 224).shape == (0, 3, 224, 224)


def test_tall_pictures_are_made_in_the_order_that_pillow_makes_them():
    """Around the edge between columns first and rows first, which a wrong rule would put elsewhere."""
    size, sizes = 16, []
    for width in (1, 8, 15, 16, 17, 20, 31, 40):
        edges = {size, 2 * width - size, size + 2 * (width - size)}
        sizes += [(width, edge + by) for edge in edges for by in (-1, 0, 1) if edge + by > 0]
    whole = schema.ImageAugmentation(crop_scale=(0.9, 1.0), crop_ratio=(0.1, 10.0))
    pixels, cuts, expected = held(sizes, size, whole)
    turned = cuts[:, Cut._fields.index("turned")]
    assert 0 < turned.sum() < len(turned)
    assert torch.equal(cropped(pixels, cuts, size), expected)


def test_windows_hold_what_is_read_and_no_more():
    """Every pixel of a window changes the view, and one beyond it does not."""
    box, size = (10, 12, 30, 40), 5
    left, upper, right, lower = window_of(box, 60, 70, size)
    assert left < 10
    assert upper < 12
    assert 30 < right < 60
    assert 40 < lower < 70
    black = Image.new("RGB", (60, 70))
    for x, y, inside in ((left, 20, True), (right - 1, 20, True), (left - 1, 20, False), (right, 20, False)):
        spot = black.copy()
        for row in range(70):
            spot.putpixel((x, row), (255, 255, 255))
        view = spot.resize((size, size), Image.Resampling.BICUBIC, box)
        assert inside or view.getbbox() is None, (x, y)


def test_a_pillow_that_resizes_otherwise_is_noticed(monkeypatch):
    check_arithmetic()
    monkeypatch.setattr(cropping, "_columns_first", lambda width, height, size: False)
    if cropping._tall_ones_differ():
        with pytest.raises(
            UserError, match=r"data\.augment_on: expected a Pillow whose resizing .* set data\.augment_on=w"
        ):
            check_arithmetic()
    monkeypatch.undo()
    monkeypatch.setattr(cropping, "BITS", 12)
    with pytest.raises(UserError, match=r"data\.augment_on"):
        check_arithmetic()


@pytest.mark.parametrize("scale", [0.01, 0.5, 1.0, 3.3, 40.0, cropping.MOST_REDUCED])
def test_sums_of_whole_numbers_stay_below_what_float32_holds(scale):
    """Whatever the pixels are, in whatever order they are added: that is why any device gives the same bytes."""
    size, whole = 3, max(4, round(3 * scale))
    box = (1, 0, max(2, whole - 1), max(1, whole - 2))
    cut = torch.tensor([cut_of(box, whole, whole, size, (0, 0, whole, whole))])
    taps = torch.tensor([2 * int(np.ceil(2 * max(scale, 1))) + 1])
    parts = cropping._Weights(cut, size, taps, torch.device("cpu"))._parts
    assert torch.equal(parts, parts.round())
    assert parts.abs().sum(-1).max() * 255 < 2**24
