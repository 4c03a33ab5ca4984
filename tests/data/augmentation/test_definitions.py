"""Our own blur and noise are what their names say, and hue is Pillow's for every colour there is."""

import numpy as np
import pytest
import torch
from PIL import Image

from amclr_scale.data.augmentation import colours
from amclr_scale.data.augmentation.batched import apply_all
from amclr_scale.data.augmentation.definitions import _quantiles, blur_weights, noise_table
from amclr_scale.data.augmentation.pictures import apply
from amclr_scale.data.augmentation.plans import Operation, encode
from amclr_scale.data.augmentation.tables import Rows
from amclr_scale.data.randomness import random_words
from amclr_scale.torchvision_ops import import_torchvision


def array(picture):
    return np.asarray(picture).astype(np.int64)


@pytest.mark.parametrize("deviation", [0.05, 0.2, 0.4, 0.8, 1.0, 1.6, 4.0, 40.0])
def test_blur_is_torchvisions_within_a_grey_level(deviation):
    import_torchvision()
    from torchvision.transforms.v2 import functional

    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (60, 47, 3))
    hard = rng.integers(0, 2, (60, 47, 3)) * 255
    for pixels in (noise, hard, np.full_like(noise, 255)):
        picture = Image.fromarray(pixels.astype(np.uint8))
        ours = array(apply(picture, [Operation("blur", deviation)]))
        theirs = array(functional.gaussian_blur(picture, [3, 3], [deviation, deviation]))
        assert np.abs(ours - theirs).max() <= 1
        assert np.mean(ours != theirs) < 1e-3


def test_blur_keeps_one_level_whatever_its_weights():
    for deviation in (0.001, 0.3, 0.77, 900.0):
        centre, edge, corner = blur_weights(deviation)
        assert centre + 4 * edge + 4 * corner == 2**23
        assert centre + 9 >= edge + 6 >= corner >= 0  # but for rounding, of nearly equal ones
    picture = Image.new("RGB", (9, 9), (255, 1, 254))
    assert np.array_equal(array(apply(picture, [Operation("blur", 0.77)])), array(picture))


def test_noise_has_the_distribution_that_it_should():
    from scipy import stats

    z = _quantiles()
    assert abs(z.mean()) < 1e-15
    assert abs((z**2).mean() - 1) < 1e-12
    assert abs((z**4).mean() - 3) < 0.01  # tails that end at 4.4 take little
    assert np.abs(z - stats.norm.ppf((np.arange(2**16) + 0.5) / 2**16)).max() < 1e-3
    for deviation in (0.05, 0.1):
        levels = noise_table(deviation).astype(float)
        assert abs(levels.mean()) < 1e-9
        assert abs(levels.var() - (255 * deviation) ** 2 - 1 / 12) < 0.01  # rounding adds a twelfth
        for level in (-30, -1, 0, 1, 12, 30):
            edges = (np.array([level - 0.5, level + 0.5])) / (255 * deviation)
            expected = np.diff(stats.norm.cdf(edges))[0]
            assert abs(np.mean(levels == level) - expected) < 4e-5


def test_noise_in_a_picture_is_independent_of_place_and_channel():
    grey = Image.new("RGB", (120, 100), (128, 128, 128))
    first, other = (array(apply(grey, [Operation("noise", 0.05, seed)])) - 128.0 for seed in (1, 2))
    assert abs(first.mean()) < 0.3
    assert abs(first.std() - 12.75) < 0.2
    pairs = [(first, other), (first[:, 1:], first[:, :-1]), (first[1:], first[:-1])]
    pairs += [(first[..., a], first[..., b]) for a, b in ((0, 1), (1, 2), (0, 2))]
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03


def test_noise_takes_its_bits_from_the_words_of_its_seed():
    """Sixteen at a time, from the lowest; the last word is not used up by 5 x 3 pixels."""
    grey = Image.new("RGB", (5, 3), (128, 128, 128))
    found = array(apply(grey, [Operation("noise", 0.05, 77)])).reshape(-1) - 128
    words = random_words(12, 77).tolist()
    bits = [word >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    assert found.tolist() == noise_table(0.05)[bits[:45]].tolist()


def test_autocontrast_from_any_darkest_to_any_brightest_level():
    """Float64 times and plus, cut off: a last bit would show at levels that end up whole."""
    rng = np.random.default_rng(0)
    low, high = np.sort(rng.integers(0, 256, (2, 400, 3)), axis=0)
    low[:40], high[40:80] = 0, 255
    levels = np.arange(256).clip(low[..., None], high[..., None]).reshape(400, 3, 16, 16).astype(np.uint8)
    found = apply_all(torch.from_numpy(levels), encode([Operation("autocontrast")], 1).expand(400, 1, 3))
    for row, picture in zip(found.numpy(), levels, strict=True):
        expected = apply(Image.fromarray(picture.transpose(1, 2, 0)), [Operation("autocontrast")])
        assert np.array_equal(row.transpose(1, 2, 0), np.asarray(expected))


def test_hue_and_grey_of_every_colour_there_is():
    """All 2**24; which hue they are moved by is another one for each level of red."""
    green, blue = np.divmod(np.arange(65536), 256)
    for first in range(0, 256, 64):
        reds = np.arange(first, first + 64)
        pixels = np.empty((64, 256, 256, 3), np.uint8)
        pixels[..., 0] = reds[:, None, None]
        pixels[..., 1], pixels[..., 2] = green.reshape(256, 256), blue.reshape(256, 256)
        pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        turns = [((37 * red) % 256 - 127.5) / 255 for red in reds]
        rows = Rows(0.0, torch.tensor(turns, dtype=torch.float64), torch.zeros(64, dtype=torch.int64))
        found = colours.hue(pictures, rows).permute(0, 2, 3, 1).numpy()
        luma = colours.luma(pictures)[:, 0].numpy()
        for k, turn in enumerate(turns):
            expected = np.asarray(apply(Image.fromarray(pixels[k]), [Operation("hue", turn)]))
            assert np.array_equal(found[k], expected), (reds[k], turn)
            assert np.array_equal(luma[k], np.asarray(Image.fromarray(pixels[k]).convert("L")))
