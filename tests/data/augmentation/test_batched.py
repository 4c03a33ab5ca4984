"""Operations on many pictures at once give the bytes that Pillow gives for each."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from amclr_scale.config.schema import ImageAugmentation
from amclr_scale.data.augmentation import batched
from amclr_scale.data.augmentation.batched import apply_all
from amclr_scale.data.augmentation.pictures import _OPERATIONS, apply
from amclr_scale.data.augmentation.plans import NAMES, Operation, encode, most_operations, plan_view
from amclr_scale.data.image_views import augmented_view, to_tensor
from amclr_scale.data.randomness import Draws
from tests.engine.test_waits import Asked
from tests.pretended_device import DEVICE, accelerator

SIDES = (1, 2, 3, 8, 13, 33)
FACTORS = (0.0, 1e-9, 0.1, 0.4, 1 / 3, 0.7, 0.9999, 1.0, 1.0001, 1.3, 1.9, 2.0, 5.0, 1000.0)
SIGNED = tuple(sign * magnitude / 30 for magnitude in (0, 1, 5, 7, 9, 14, 20, 29, 30) for sign in (1, -1))


def amounts_of(name: str, side: int) -> tuple[float, ...]:
    """What recipes permit, from edge to edge."""
    match name:
        case "brightness" | "color" | "contrast" | "sharpness":
            return FACTORS
        case "shear_x" | "shear_y":
            return tuple(0.3 * share for share in SIGNED)
        case "translate_x" | "translate_y":
            return tuple({int(150 / 331 * share * side) for share in SIGNED})
        case "rotate":
            return tuple(30.0 * share for share in SIGNED)
        case "posterize":
            return (8, 7, 6, 5, 4)
        case "solarize":
            return (0.0, 0.5, 1.0, 127.5, 195.5, 254.9, 255.0)
        case "hue":
            return (-0.5, -0.4999, -0.25, -1 / 255, -0.001, 0.0, 0.001, 0.1, 1 / 3, 0.4, 0.5)
        case "blur":
            return (0.01, 0.08, 0.4, 0.8, 1.6, 8.0, 800.0)
        case "noise":
            return (0.0, 0.001, 0.05, 0.1, 0.5, 5.0)
        case "central crop" | "central crop with a border":
            return tuple({max(1, round(side * share)) for share in (0.1, 0.3, 0.5, 0.8, 0.9, 0.97, 1.0)})
        case _:
            return (0.0,)


def pictures(side: int) -> torch.Tensor:
    """(n, 3, side, side): noise, edges, ramps, one level, dark and bright ones, channels without anything."""
    rng = np.random.default_rng(side)
    noise = rng.integers(0, 256, (4, 3, side, side))
    y, x = np.mgrid[0:side, 0:side]
    board = np.stack([(x + y) % 2, x // 2 % 2, y // 3 % 2]) * 255
    ramp = np.stack([x * 255 // max(1, side - 1), y * 255 // max(1, side - 1), 255 - (x + y) % 256])
    flat = np.stack([np.full((3, side, side), level) for level in (0, 1, 127, 254, 255)])
    red = noise[0] * np.array([1, 0, 0])[:, None, None]
    two = np.where(noise[1] < 200, 90, 91)
    one_pixel = np.zeros((3, side, side), int)
    one_pixel[:, side // 2, side // 3] = (255, 128, 3)
    grey = np.broadcast_to(noise[2][:1], (3, side, side))
    made = [*noise, board, ramp, *flat, red, two, one_pixel, grey, noise[3] // 16, 255 - noise[3] // 16]
    return torch.from_numpy(np.stack(made).astype(np.uint8))


def by_pillow(rows: torch.Tensor, plans: list[list[Operation]]) -> torch.Tensor:
    found = [
        apply(Image.fromarray(row.permute(1, 2, 0).contiguous().numpy()), plan)
        for row, plan in zip(rows, plans, strict=True)
    ]
    return torch.stack([to_tensor(picture) for picture in found])


def in_batches(rows: torch.Tensor, plans: list[list[Operation]]) -> torch.Tensor:
    steps = max(len(plan) for plan in plans)
    return apply_all(rows, torch.stack([encode(plan, steps) for plan in plans]))


@pytest.mark.parametrize("name", NAMES)
def test_each_operation_is_pillows_byte_for_byte(name):
    """All pictures with all amounts, in one batch, in a mixed order."""
    for side in SIDES:
        base = pictures(side)
        cases = [
            (row, Operation(name, a, 2**64 - 1 - 7 * row)) for row in range(len(base)) for a in amounts_of(name, side)
        ]
        random.Random(side).shuffle(cases)
        rows, plans = base[[row for row, _ in cases]], [[operation] for _, operation in cases]
        found, expected = in_batches(rows, plans), by_pillow(rows, plans)
        differ = [cases[i] for i in range(len(cases)) if not torch.equal(found[i], expected[i])]
        assert differ == [], side


@pytest.mark.parametrize("name", NAMES)
def test_at_the_usual_size_too(name):
    rows = pictures(224)[[0, 4, 5, 12]]
    amounts = amounts_of(name, 224)
    plans = [[Operation(name, amounts[(5 * k + 1) % len(amounts)], 2**63 + k)] for k in range(len(rows))]
    assert torch.equal(in_batches(rows, plans), by_pillow(rows, plans))


def recipe(rng: random.Random) -> ImageAugmentation:
    return ImageAugmentation(
        crop_scale=rng.choice([(0.2, 1.0), (1.0, 1.0)]),
        flip=rng.choice([0, 0.5, 1]),
        randaugment=rng.choice([None, (1, 30), (2, 9), (3, 0), (4, 17)]),
        color_jitter=rng.choice([0, 0.1, 0.4, 1.0, 3.0]),
        grayscale=rng.choice([0, 0.2, 1]),
        amclr=rng.choice([0, 0.5, 1]),
        amclr_strength=rng.choice([0.05, 0.5, 1.0, 3.0, 12.0]),
    )


@pytest.mark.parametrize("size", [2, 17, 32])
def test_whole_recipes_are_the_same_views(size):
    rng = random.Random(size)
    noise = np.random.default_rng(size)
    seen = set[str]()
    for batch in range(15):
        drawn = recipe(rng)
        views, squares, plans = [], [], []
        for sample in range(24):
            shape = (rng.randint(1, 60), rng.randint(1, 60), 3)
            picture = Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8).clip(0, rng.choice([255, 140])))
            views.append(to_tensor(augmented_view(picture, size, drawn, Draws(batch, sample))))
            box, operations = plan_view(*picture.size, drawn, Draws(batch, sample), size)
            squares.append(to_tensor(picture.resize((size, size), Image.Resampling.BICUBIC, box)))
            plans.append(encode(operations, most_operations(drawn)))
            seen |= {operation.name for operation in operations}
        assert torch.equal(apply_all(torch.stack(squares), torch.stack(plans)), torch.stack(views)), drawn
    assert seen == set(NAMES)


def mixed(n: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures, and plans that hold every operation several times."""
    rng = random.Random(0)
    every = [Operation(name, amount, 5) for name in NAMES for amount in amounts_of(name, side)[:6]]
    rows = pictures(side)
    rows = rows[torch.arange(n) % len(rows)]
    return rows, torch.stack([encode([rng.choice(every) for _ in range(6)], 6) for _ in range(n)])


def test_a_row_does_not_depend_on_the_others_or_on_pieces(monkeypatch):
    rows, plans = mixed(200, 13)
    given = rows.clone()
    together = apply_all(rows, plans)
    assert torch.equal(rows, given)
    some = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:40]
    assert torch.equal(apply_all(rows[some], plans[some]), together[some])
    assert torch.equal(torch.cat([apply_all(rows[i : i + 1], plans[i : i + 1]) for i in range(30)]), together[:30])
    monkeypatch.setattr(batched, "AT_ONCE", 2 * 3 * 13 * 13)
    assert torch.equal(apply_all(rows, plans), together)
    padded = torch.cat([plans, torch.zeros(200, 2, 3, dtype=torch.int64)], 1)
    assert torch.equal(apply_all(rows, padded), together)


def test_any_memory_layout_and_nothing_at_all():
    rows, plans = mixed(60, 13)
    last = rows.contiguous(memory_format=torch.channels_last)
    assert torch.equal(apply_all(last, plans), apply_all(rows, plans))
    assert torch.equal(apply_all(rows, plans[:, :0]), rows)
    assert apply_all(rows[:0], plans[:0]).shape == (0, 3, 13, 13)


def test_nothing_waits_for_the_device():
    rows, plans = mixed(200, 13)
    apply_all(rows, plans)  # which fills the tables
    with Asked() as asked:
        apply_all(rows, plans)
    assert asked.times == 0


def test_rows_with_one_amount_are_changed_together(monkeypatch):
    """However they lie among others; factors that are drawn from a range are one call for all."""
    called = []
    for name in ("rotate", "color"):
        original = batched._OPERATIONS[name]
        monkeypatch.setitem(
            batched._OPERATIONS, name, lambda rows, said, f=original: (called.append(len(rows)), f(rows, said))[1]
        )
    signs = [(-1) ** row for row in range(12)]
    plans = [[Operation("rotate", 9.0 * sign), Operation("color", 1 + 0.01 * row)] for row, sign in enumerate(signs)]
    in_batches(pictures(8)[:12], plans)
    assert called == [6, 6, 12]


def test_tensors_of_the_host_and_of_a_device_do_not_meet():
    rows, plans = mixed(60, 8)
    with accelerator():
        found = apply_all(rows.to(DEVICE), plans)
        assert found.device == DEVICE
        assert torch.equal(found.cpu(), apply_all(rows, plans))


@pytest.mark.parametrize(
    ("rows", "plans"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 3, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.zeros(2, 1, 3, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, 1, 3, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 1, 3)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 1, 3, dtype=torch.int64, device="meta")),
    ],
)
def test_other_shapes_and_places_are_refused(rows, plans):
    with pytest.raises(ValueError, match="expected"):
        apply_all(rows, plans)


def test_every_name_has_both_executors():
    assert set(_OPERATIONS) == set(NAMES) == {"identity", *batched._OPERATIONS}
    assert all(math.isfinite(amount) for name in NAMES for amount in amounts_of(name, 8))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_gives_the_same_bytes():
    for side in (1, 2, 13, 224):
        rows, plans = mixed(400 if side < 100 else 60, side)
        assert torch.equal(apply_all(rows.cuda(), plans).cpu(), apply_all(rows, plans))
