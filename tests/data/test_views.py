"""Views are what their recipe says, from random numbers that belong to (seed, pass, id, view) alone."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from amclr_scale.config.schema import ImageAugmentation, TextAugmentation
from amclr_scale.data.augmentation.plans import random_box
from amclr_scale.data.decoding import decode
from amclr_scale.data.image_views import augmented_view, evaluation_view, reduction_for, to_tensor
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.randomness import Draws
from amclr_scale.data.text_views import change_words
from amclr_scale.errors import UserError
from amclr_scale.torchvision_ops import import_torchvision
from tests.data.shards import pair, settings, write_shards, write_tar
from tests.data.test_loader import assert_same, joined, take

PLAIN = ImageAugmentation(crop_scale=(1, 1), flip=0)


@pytest.fixture
def photo():
    """Smooth colours with some detail, 60 x 40."""
    y, x = np.mgrid[0:40, 0:60]
    pixels = np.stack([x * 4, y * 6, 128 + 100 * np.sin(x / 3) * np.cos(y / 4)], -1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def array(picture):
    return np.asarray(picture).astype(float)


def test_a_recipe_without_operations_is_the_centred_square(photo):
    view = augmented_view(photo, 40, PLAIN, Draws(0))
    np.testing.assert_array_equal(array(view), array(photo)[:, 10:50])
    np.testing.assert_array_equal(array(evaluation_view(photo, 40)), array(view))


def test_the_squashed_view_is_torchvisions(photo):
    transforms = import_torchvision().transforms

    squashed = transforms.Resize((40, 40), transforms.InterpolationMode.BICUBIC)(photo)
    np.testing.assert_array_equal(array(evaluation_view(photo, 40, squash=True)), array(squashed))
    assert photo.width != photo.height
    assert (array(evaluation_view(photo, 40)) != array(squashed)).any()


def test_flips_happen_as_often_as_they_should(photo):
    recipe = PLAIN.model_copy(update={"flip": 0.3})
    mirrored = array(augmented_view(photo, 40, PLAIN, Draws(0)))[:, ::-1]
    flipped = [np.array_equal(array(augmented_view(photo, 40, recipe, Draws(i))), mirrored) for i in range(500)]
    assert 0.24 < np.mean(flipped) < 0.36


def test_crops_have_the_area_and_shape_they_should():
    boxes = np.array([random_box(Draws(i), 200, 100, (0.2, 0.8), (0.75, 4 / 3)) for i in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = width * height / 20000
    assert area.min() > 0.19
    assert area.max() < 0.81
    assert (np.abs(np.log(width / height)) < np.log(4 / 3) + 0.03).all()
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= 200).all()
    assert (boxes[:, 3] <= 100).all()


def test_a_crop_that_does_not_fit_is_centred():
    assert random_box(Draws(0), 1000, 10, (0.9, 1.0), (0.75, 4 / 3)) == (493, 0, 506, 10)


def test_the_crop_is_torchvisions(photo):
    """The same box through torchvision's functional, which crops and then resizes."""
    import_torchvision()
    from torchvision.transforms.v2 import functional

    recipe = ImageAugmentation(crop_scale=(0.3, 0.9), flip=0)
    for i in range(20):
        left, upper, right, lower = random_box(Draws(i), 60, 40, recipe.crop_scale, recipe.crop_ratio)
        expected = functional.resized_crop(
            photo, upper, left, lower - upper, right - left, [24, 24], functional.InterpolationMode.BICUBIC
        )
        # A crop by itself repeats its own border; ours sees the pixels beyond it, as a larger picture has them.
        inner = slice(2, -2)
        difference = np.abs(array(augmented_view(photo, 24, recipe, Draws(i))) - array(expected))[inner, inner]
        assert difference.max() <= 12
        assert difference.mean() < 0.7


def test_views_are_pure(photo):
    recipe = ImageAugmentation(randaugment=(2, 9), color_jitter=0.3, grayscale=0.2, amclr=0.5)
    views = [[to_tensor(augmented_view(photo, 24, recipe, Draws(0, i))) for i in range(20)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*views, strict=True))
    assert len({view.numpy().tobytes() for view in views[0]}) == 20


def test_further_views_of_their_own_recipe(tmp_path):
    write_shards(tmp_path, [16])
    plain = {"augmentation": PLAIN, "image_views": 2}
    grey = ImageAugmentation(crop_scale=(1, 1), flip=0, grayscale=1)
    for batch in take(settings(str(tmp_path), image_view=grey, **plain), 2):
        base, *further = batch.images
        assert (base[:, 0] != base[:, 2]).any()
        for view in further:
            assert (view[:, 0] == view[:, 2]).all()
    base_only = take(settings(str(tmp_path), augmentation=PLAIN), 2)
    for batch, alone in zip(take(settings(str(tmp_path), image_view=grey, **plain), 2), base_only, strict=True):
        torch.testing.assert_close(batch.images[0], alone.images[0])


def test_views_of_the_base_view_share_its_crop(tmp_path):
    write_shards(tmp_path, [16])
    crop = ImageAugmentation(crop_scale=(0.2, 0.4))
    data = settings(str(tmp_path), augmentation=crop, image_view=PLAIN, image_view_from="base", image_views=1)
    for batch in take(data, 3):
        torch.testing.assert_close(batch.images[0], batch.images[1])


def test_large_jpegs_are_reduced_but_never_below_the_crop():
    image = Image.new("RGB", (1600, 1200))
    out = io.BytesIO()
    image.save(out, "JPEG")
    recipe = ImageAugmentation(crop_scale=(0.6, 1.0), crop_ratio=(0.75, 4 / 3))
    for size, expected in [(64, 8), (140, 4), (224, 4), (400, 2), (1000, 1)]:
        opened = Image.open(out)
        reduction = reduction_for(opened, size, [recipe])
        assert reduction == expected
        width, height = decode(opened, reduction).size
        assert (width, height) == (1600 // reduction, 1200 // reduction)
        assert reduction == 1 or (0.6 * width * height * 0.75) ** 0.5 >= size


# Text


def words_of(tmp_path, members, steps=6, **keys):
    """(base, further) captions that a loader shows, without its tokenizer."""
    write_tar(tmp_path / "0.tar", members)
    loader = TrainLoader(settings(str(tmp_path), **keys), seed=0, global_batch_size=4)
    shown = []
    tokenizer = loader._parts.pipeline.tokenizer
    loader._parts.pipeline.tokenizer = lambda captions: (shown.append(captions), tokenizer(captions))[1]
    for _ in range(steps):
        next(loader)
    views = 1 + keys.get("text_views", 0)
    return [
        tuple(captions[i] for captions in shown[k : k + views]) for k in range(0, len(shown), views) for i in range(4)
    ]


def test_further_captions_differ_from_the_base_and_from_one_another(tmp_path):
    found = words_of(tmp_path, [m for i in range(8) for m in pair(i)], text_views=2, steps=20)
    for base, *further in found:
        number = base.split()[1]
        assert set(further) == {f"number {number}", f"the picture {number}"}
    assert len({(further[0].split()[0], further[1].split()[0]) for _, *further in found}) == 2  # both orders


def test_a_list_of_captions_is_drawn_from_evenly(tmp_path):
    found = words_of(tmp_path, [m for i in range(8) for m in pair(i)], caption="json.captions", steps=75)
    firsts = [base.split()[0] for (base,) in found]
    assert all(0.25 < firsts.count(word) / len(firsts) < 0.42 for word in ("sample", "number", "the"))


def test_several_places_for_the_caption_are_drawn_from_evenly(tmp_path):
    members = [m for i in range(8) for m in pair(i, paraphrase=f"another {i}")]
    found = words_of(tmp_path, members, caption=["json.paraphrase", "json.captions", "json.nowhere"], steps=75)
    others = [base for (base,) in found if base.startswith("another")]
    assert 0.42 < len(others) / len(found) < 0.58  # by place, though the other one holds three captions


def test_several_places_for_further_captions(tmp_path):
    members = [m for i in range(8) for m in pair(i, paraphrase=f"another {i}", captions=[])]
    found = words_of(tmp_path, members, text_views=1, text_view=["json.captions", "json.paraphrase"])
    assert all(further.startswith("another") for _, further in found)


def test_samples_without_further_captions_show_their_own_and_are_counted(tmp_path):
    """Two of sixteen; the log says so, and the share is what it is."""
    without = {3, 9}
    members = [m for i in range(16) for m in pair(i, **({"captions": None} if i in without else {}))]
    found = words_of(tmp_path, members, text_views=1)
    assert {int(base.split()[1]) for base, further in found if base == further} == without
    loader = TrainLoader(settings(str(tmp_path), text_views=1, image_views=1), seed=0, global_batch_size=16, workers=1)
    assert any("12% of 16 samples looked at have too few captions" in note for note in loader.notes), loader.notes
    next(loader), next(loader)  # every sample twice
    assert loader.repeated()["repeated_texts"] == 2 / 16


def test_as_many_further_captions_as_there_are_captions_repeat_one(tmp_path):
    """Three captions for four views: two further ones are new, which is no reason to refuse the data."""
    write_tar(tmp_path / "0.tar", [m for i in range(8) for m in pair(i)])
    loader = TrainLoader(settings(str(tmp_path), text_views=3), seed=0, global_batch_size=8)
    assert any("100% of 8 samples looked at have too few captions" in note for note in loader.notes), loader.notes
    next(loader)
    assert loader.repeated()["repeated_texts"] == 1 / 3


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"text_view": "json.nonexistent"}, "data.text_view: expected a place .* got json.nonexistent: none of 8"),
        ({"text_view": ["txt"]}, "data.text_views: expected further captions, those of all 8 .* repeat the first"),
        ({}, r"data.text_views: expected further captions, .* \(now json.captions\), data.text_augmentation"),
        ({"text_view": "json.nonexistent", "text_augmentation": {"drop": 0.5}}, "got json.nonexistent: none of 8"),
    ],
    ids=str,
)
def test_further_captions_that_no_sample_has_are_refused(tmp_path, keys, said):
    write_tar(tmp_path / "0.tar", [m for i in range(8) for m in pair(i, captions=None)])
    with pytest.raises(UserError, match=said):
        TrainLoader(settings(str(tmp_path), text_views=1, **keys), seed=0, global_batch_size=4)


def test_changed_words_are_further_captions(tmp_path):
    write_tar(tmp_path / "0.tar", [m for i in range(8) for m in pair(i, captions=None)])
    loader = TrainLoader(
        settings(str(tmp_path), text_views=1, text_augmentation={"drop": 0.9}), seed=0, global_batch_size=8
    )
    next(loader)
    assert loader.repeated()["repeated_texts"] < 0.5


def test_of_remote_shards_training_finds_out(tmp_path, monkeypatch):
    """They are not read before: the first samples tell."""
    write_tar(tmp_path / "0.tar", [m for i in range(8) for m in pair(i, captions=None)])
    monkeypatch.setattr("amclr_scale.data.loader.check_further_captions", lambda *_: [])
    loader = TrainLoader(settings(str(tmp_path), text_views=1), seed=0, global_batch_size=4)
    next(loader)  # half of the data set
    with pytest.raises(UserError, match=r"data\.text_views: expected further captions, those of all 8 samples"):
        next(loader)


def test_a_place_that_no_sample_has_among_others_is_told(tmp_path):
    write_shards(tmp_path, [8])
    data = settings(str(tmp_path), text_views=1, text_view=["json.captions", "json.captoins"])
    loader = TrainLoader(data, seed=0, global_batch_size=4)
    assert loader.notes == ["data: none of 8 samples looked at has a caption at json.captoins"]


def test_image_views_that_repeat_are_counted(tmp_path):
    """Flipped or not: half of the views of the base view equal it, and a third equals one of three before."""
    write_shards(tmp_path, [64])
    plain = {"crop_scale": (1, 1), "flip": 0.5}
    data = settings(str(tmp_path), image_views=1, image_view=plain, image_view_from="base")
    loader = TrainLoader(data, seed=0, global_batch_size=64)
    for _ in range(8):
        batch = next(loader)
    same = (batch.images[1] == batch.images[0]).flatten(1).all(1)
    assert 0 < same.sum() < 64
    assert abs(loader.repeated()["repeated_images"] - 0.5) < 0.08
    loader = TrainLoader(data.model_copy(update={"image_views": 3}), seed=0, global_batch_size=64)
    for _ in range(8):
        next(loader)
    assert abs(loader.repeated()["repeated_images"] - (1 / 2 + 3 / 4 + 7 / 8) / 3) < 0.08


def test_words_change_as_often_as_they_should(tmp_path):
    caption = " ".join(f"w{i}" for i in range(20))
    table = {"w3": ["x"], "w5": ["y", "z"]}
    dropped = [change_words(caption, TextAugmentation(drop=0.25), {}, Draws(i)).split() for i in range(400)]
    assert abs(np.mean([len(words) for words in dropped]) - 15) < 0.4
    swapped = [change_words(caption, TextAugmentation(swap=0.1), {}, Draws(i)).split() for i in range(100)]
    assert all(sorted(words) == sorted(caption.split()) for words in swapped)
    assert any(words != caption.split() for words in swapped)
    recipe = TextAugmentation(synonym=1.0, synonyms="x.json")
    replaced = {change_words(caption, recipe, table, Draws(i)) for i in range(20)}
    assert replaced == {caption.replace("w3 ", "x ").replace("w5", other) for other in "yz"}
    assert change_words("one", TextAugmentation(drop=1.0), {}, Draws(0)) == "one"


def test_word_changes_are_the_same_on_any_number_of_ranks(tmp_path):
    write_shards(tmp_path / "a", [16])
    (tmp_path / "t.json").write_text(json.dumps({"number": ["figure"], "picture": ["image", "photo"]}))
    recipe = {"drop": 0.2, "swap": 0.2, "synonym": 0.5, "synonyms": str(tmp_path / "t.json")}
    data = settings(str(tmp_path / "a"), text_views=1, text_augmentation=recipe)
    assert_same(joined([take(data, 6, rank=r, world_size=2, workers=r) for r in range(2)]), take(data, 6))


def test_a_table_that_is_missing_or_wrong_is_told(tmp_path):
    write_shards(tmp_path, [8])
    for table, words in [(None, "expected a JSON file"), ("/nowhere", "got .*No such file")]:
        data = settings(str(tmp_path), text_views=1, text_augmentation={"synonym": 0.5, "synonyms": table})
        with pytest.raises(UserError, match=rf"data\.text_augmentation\.synonyms: .*{words}"):
            take(data, 1)
