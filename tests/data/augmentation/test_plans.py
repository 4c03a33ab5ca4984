"""Plans hold what their recipe says, and carried out they are torchvision's operations."""

import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from amclr_scale.config.schema import ImageAugmentation
from amclr_scale.data.augmentation.pictures import apply
from amclr_scale.data.augmentation.plans import (
    _AMCLR,
    _RANDAUGMENT,
    IDENTITY,
    NAMES,
    Operation,
    _amclr_operation,
    encode,
    most_operations,
    plan_view,
)
from amclr_scale.data.randomness import Draws
from amclr_scale.torchvision_ops import import_torchvision

SIDE = 40
PLAIN = {"crop_scale": (1, 1), "flip": 0}


@pytest.fixture
def photo():
    """Smooth colours with some detail."""
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    pixels = np.stack([x * 6, y * 6, 128 + 100 * np.sin(x / 3) * np.cos(y / 4)], -1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def array(picture):
    return np.asarray(picture).astype(float)


def planned(draw, size=SIDE, **recipe):
    return plan_view(60, SIDE, ImageAugmentation(**{**PLAIN, **recipe}), Draws(draw), size)[1]


@pytest.mark.parametrize("name", list(_RANDAUGMENT))
def test_each_randaugment_operation_is_torchvisions(photo, name):
    """Our table and ranges against torchvision's own class, at several magnitudes and both signs."""
    import_torchvision()
    from torchvision.transforms import InterpolationMode, v2

    names = {"identity": "Identity", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX",
             "translate_y": "TranslateY", "autocontrast": "AutoContrast"}  # fmt: skip
    theirs = v2.RandAugment()
    largest, signed, amount = _RANDAUGMENT[name]
    for magnitude in (3, 9, 20):
        their_name = names.get(name, name.capitalize())
        magnitudes, their_sign = theirs._AUGMENTATION_SPACE[their_name]
        table = magnitudes(31, SIDE, SIDE)
        size = 0.0 if table is None else float(table[magnitude])
        assert signed == their_sign
        for sign in (1, -1) if signed else (1,):
            ours = apply(photo, [Operation(name, amount(sign * largest * magnitude / 30, SIDE))])
            expected = theirs._apply_image_or_video_transform(
                photo, their_name, sign * size, InterpolationMode.NEAREST, {}
            )
            assert np.abs(array(ours) - array(expected)).mean() < 0.5, (name, magnitude)


def test_colour_jitter_is_torchvisions(photo):
    """The same factors in the same order through torchvision's functions."""
    import_torchvision()
    from torchvision.transforms.v2 import functional

    theirs = {"brightness": functional.adjust_brightness, "contrast": functional.adjust_contrast,
              "color": functional.adjust_saturation, "hue": functional.adjust_hue}  # fmt: skip
    orders = set()
    for draw in range(200):
        operations, expected = planned(draw, color_jitter=0.4), photo
        for name, factor, _ in operations:
            expected = theirs[name](expected, factor)
            assert -0.1 <= factor <= 0.1 if name == "hue" else 0.6 <= factor <= 1.4
        np.testing.assert_array_equal(array(apply(photo, operations)), array(expected))
        orders.add(tuple(operation.name for operation in operations))
    assert {len(set(order)) for order in orders} == {4}
    assert len(orders) == 24


def test_randaugment_draws_all_operations(photo):
    views = [array(apply(photo, planned(draw, randaugment=(1, 20)))).tobytes() for draw in range(300)]
    assert len(set(views)) >= 20  # 14 operations, nine of them with two signs


def test_jitter_has_the_size_it_should():
    grey = Image.new("RGB", (64, 64), (100, 100, 100))
    levels = [array(apply(grey, planned(draw, color_jitter=0.4))).mean() for draw in range(300)]
    assert 55 < min(levels) < 70
    assert 130 < max(levels) < 145


@pytest.mark.parametrize("name", _AMCLR)
def test_amclrs_operations_keep_the_size_and_change_the_picture(photo, name):
    def results(strength):
        return [apply(photo, _amclr_operation(name, strength, SIDE, Draws(draw))) for draw in range(8)]

    assert all(result.size == photo.size for result in results(1.0))
    difference = max(np.abs(array(result) - array(photo)).mean() for result in results(1.0))
    assert 0.2 < difference < 100
    assert max(np.abs(array(result) - array(photo)).mean() for result in results(2.0)) >= difference


def test_amclrs_operations_do_not_darken_dark_pixels_away(photo):
    """The released code's clamp after normalisation turns more than half of the pixels to the mean."""
    changed = [array(apply(photo, planned(draw, amclr=1))) for draw in range(100)]
    kept = [
        np.abs(np.percentile(c, [10, 50, 90]) - np.percentile(array(photo), [10, 50, 90])).max() < 60 for c in changed
    ]
    assert np.mean(kept) > 0.95


def test_amclrs_eight_are_drawn_evenly_and_at_their_strength():
    plans = [planned(draw, 224, amclr=1, amclr_strength=3.0) for draw in range(800)]
    drawn = {}
    for first, second in plans:
        flips = "flip" in first.name + second.name or first == IDENTITY
        drawn.setdefault("flip" if flips else first.name, []).append(first)
    assert set(drawn) == set(_AMCLR)
    assert all(65 < len(found) < 140 for found in drawn.values())
    assert {one.amount for one in drawn["noise"]} == {0.05 * 3}
    assert len({one.seed for one in drawn["noise"]}) == len(drawn["noise"])
    assert {one.amount for one in drawn["blur"]} == {0.8 * 3}
    assert {one.amount for name in ("central crop", "central crop with a border") for one in drawn[name]} == {157}
    assert all(0.4 <= one.amount <= 1.6 for name in ("brightness", "contrast") for one in drawn[name])


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        ({}, 0),
        ({"flip": 0.5}, 1),
        ({"randaugment": (3, 9)}, 3),
        ({"color_jitter": 0.1}, 4),
        ({"grayscale": 0.1}, 1),
        ({"amclr": 0.3}, 2),
        ({"flip": 0.1, "randaugment": (2, 9), "color_jitter": 0.1, "grayscale": 0.9, "amclr": 0.5}, 10),
    ],
    ids=str,
)
def test_plans_of_a_recipe_have_one_length_and_one_kind_at_each_place(recipe, steps):
    plans = [planned(draw, **recipe) for draw in range(60)]
    assert {len(plan) for plan in plans} == {steps}
    assert most_operations(ImageAugmentation(**{**PLAIN, **recipe})) == steps
    if recipe.get("flip"):
        assert {plan[0] for plan in plans} == {IDENTITY, Operation("flip left-right")}
    if steps == 10:
        assert {plan[7] for plan in plans} == {IDENTITY, Operation("grey")}


@pytest.mark.parametrize(
    ("recipe", "last", "digest"),
    [
        ({"flip": 0.5, "color_jitter": 0.4, "grayscale": 0.2, "amclr": 0.5}, (15, 0, 45, 33), 123028924),
        ({"flip": 0, "amclr": 1, "amclr_strength": 2}, (15, 0, 45, 33), 4098050980),
        ({"flip": 1, "color_jitter": 1.5}, (15, 0, 45, 33), 1813439070),
    ],
    ids=["everything", "without flips", "without amclr"],
)
def test_a_recipe_draws_next_year_what_it_draws_today(recipe, last, digest):
    """A resumed run sees the pictures that it would have seen: no change of the code may change the draws."""
    whole = ImageAugmentation(crop_scale=(0.2, 1.0), randaugment=(2, 9), **recipe)
    boxes, found = [], 0
    for draw in range(400):
        draws = Draws(3, draw)
        box, operations = plan_view(60, SIDE, whole, draws, SIDE)
        boxes.append(box)
        words = [f"{name} {float(amount)!r} {seed}" for name, amount, seed in operations]
        found = zlib.crc32(" ".join([*words, str(draws.bits())]).encode(), found)
    assert boxes[-1] == last
    assert found == digest


def test_a_plan_travels_as_integers():
    operations = [Operation("noise", 0.05, 2**64 - 2), Operation("rotate", -1 / 3), Operation("hue", 0.5, 1)]
    plan = encode(operations, 5)
    assert (plan.shape, plan.dtype) == ((5, 3), torch.int64)
    amounts = plan[:, 1].contiguous().view(torch.float64).tolist()
    back = [
        Operation(NAMES[code], amount, seed % 2**64)
        for code, amount, seed in zip(plan[:, 0].tolist(), amounts, plan[:, 2].tolist(), strict=True)
    ]
    assert back == [*operations, IDENTITY, IDENTITY]
    assert encode([], 0).shape == (0, 3)
    with pytest.raises(ValueError, match="expected at most 2 operations, got 3"):
        encode(operations, 2)
