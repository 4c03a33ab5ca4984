"""One forward without memory says how long captions may be, how large images, and how wide their features are."""

import pytest
import torch
from torch import nn

from amclr_scale.config.schema import ImageTower, TextTower
from amclr_scale.encoders import image_towers
from amclr_scale.encoders.image_towers import IMAGE_TOWERS, build_image_tower
from amclr_scale.encoders.text_towers import build_text_tower
from amclr_scale.encoders.trial import largest, trial
from amclr_scale.errors import UserError
from amclr_scale.torchvision_ops import import_torchvision

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
BASE = {**SMALL, "vocab_size": 64, "pad_token_id": 1, "max_position_embeddings": 26}
SHIFTED = {  # positions begin behind the padding's number, whatever the type is called
    "roberta": {},
    "longformer": {"attention_window": [4]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}


def tower(folder, length: int, *, pretrained: bool, vocab_size: int = 64):
    words = TextTower(name=f"transformers/{folder}", pretrained=pretrained, pooling="mean")
    return build_text_tower(words, vocab_size=vocab_size, pad_id=1, end_id=2, context_length=length)


@pytest.mark.parametrize("kind", SHIFTED)
def test_the_longest_caption(tmp_path, kind):
    import_torchvision()
    from transformers import AutoConfig, AutoModel

    AutoModel.from_config(AutoConfig.for_model(kind, **BASE, **SHIFTED[kind])).save_pretrained(tmp_path)
    ids = torch.randint(3, 60, (2, 26))
    made, width = tower(tmp_path, 24, pretrained=True)
    assert made.eval()(ids[:, :24]).shape == (2, width)
    with pytest.raises(UserError, match=r"^data.context_length: expected at most 24 for .*, got 26"):
        tower(tmp_path, 26, pretrained=True)
    made, width = tower(tmp_path, 26, pretrained=False)  # at random: with as many positions as it takes
    assert made.eval()(ids).shape == (2, width) == (2, 32)


def test_an_output_narrower_than_the_inside(tmp_path):
    """As OPT-350m."""
    import_torchvision()
    from transformers import OPTConfig

    narrow = {"ffn_dim": 48, "word_embed_proj_dim": 16, "hidden_size": 32, "num_hidden_layers": 1}
    OPTConfig(**narrow, num_attention_heads=2, vocab_size=64, pad_token_id=1).save_pretrained(tmp_path)
    with torch.device("meta"):  # where transformers loads an exported model
        assert tower(tmp_path, 12, pretrained=False)[1] == 16
    made, width = tower(tmp_path, 12, pretrained=False)
    assert width == 16
    assert made.eval()(torch.randint(3, 60, (2, 12))).shape == (2, 16)


@pytest.mark.parametrize(("both_ways", "pooling"), [(True, "mean"), (False, "last")])
def test_a_causal_model_that_looks_both_ways_pools_by_mean(tmp_path, both_ways, pooling):
    import_torchvision()
    from transformers import Gemma3TextConfig

    sizes = {**SMALL, "head_dim": 16, "num_key_value_heads": 1, "vocab_size": 64}
    Gemma3TextConfig(**sizes, use_bidirectional_attention=both_ways).save_pretrained(tmp_path)
    words = TextTower(name=f"transformers/{tmp_path}")
    made, width = build_text_tower(words, vocab_size=64, pad_id=1, end_id=2, context_length=8)
    assert (made.pooling, width) == (pooling, 32)


def test_the_largest_that_fits():
    assert [largest(lambda n, end=end: n <= end, 7) for end in range(9)] == [0, 1, 2, 3, 4, 5, 6, 7, 7]


@pytest.mark.parametrize(
    ("name", "size", "told", "near"),
    [
        ("timm/test_vit", 100, "timm/test_vit does not take images of 100 pixels (Input height", "96 and 112"),
        (
            "timm/test_convnext",
            16,
            "timm/test_convnext does not take images of 16 pixels (Calculated padded input",
            "32",
        ),
        ("torchvision/vit_b_16", 100, "torchvision/vit_b_16 cannot be built for 100 pixels: Input shape", "96 and 112"),
        (
            "timm/vit_tiny_r_s16_p8_224",
            100,
            "timm/vit_tiny_r_s16_p8_224 cannot be built for 100 pixels: AssertionError",
            "96 and 128",
        ),
    ],
)
def test_an_image_size_that_does_not_fit(name, size, told, near):
    with torch.device("meta"), pytest.raises(UserError) as caught:
        build_image_tower(ImageTower(name=name), size)
    assert str(caught.value).startswith(f"data.image_size: {told}")
    assert str(caught.value).endswith(f"; it takes {near}")


def test_pixels_that_a_grid_of_patches_cuts_off():
    tower, width, notes, _ = build_image_tower(ImageTower(name="timm/mixer_s32_224"), 70)
    (note,) = notes
    assert note == (
        "data.image_size: timm/mixer_s32_224 never sees the last 6 of 70 rows and columns, which are no whole patch of "
        "32 pixels; choose a multiple of 32"
    )
    images = torch.randn(1, 3, 70, 70, requires_grad=True)
    out = tower(images)
    out.square().sum().backward()
    assert out.shape == (1, width)
    seen = images.grad.abs().sum((0, 1))
    assert (seen.sum(0) == 0).tolist() == (seen.sum(1) == 0).tolist() == [False] * 64 + [True] * 6
    assert build_image_tower(ImageTower(name="timm/test_vit"), 64)[2] == ()
    for size in (32, 33, 70):  # overlapping windows see all, and a shortcut that takes every second pixel is no patch
        assert build_image_tower(ImageTower(), size)[2] == ()


@pytest.mark.parametrize(
    ("name", "size", "cut", "better"),
    [
        ("tnt_s_patch16_224", 36, 4, "16 pixels; choose a multiple of 16"),  # patches by unfolding
        ("tnt_s_legacy_patch16_224", 36, 4, "19 pixels; choose a multiple of 16"),  # unfolded behind a convolution
        ("pit_ti_224", 100, 4, "16 pixels; choose a multiple of 8"),  # patches that overlap
        ("test_resnet", 31, 0, ""),
        ("test_vit", 32, 0, ""),
    ],
)
def test_pixels_that_other_grids_cut_off(name, size, cut, better):
    tower, _, notes, _ = build_image_tower(
        ImageTower(name=f"timm/{name}", norm="group" if "resnet" in name else "default"), size
    )
    images = torch.randn(1, 3, size, size, requires_grad=True)
    tower(images).square().sum().backward()
    unseen = images.grad.abs().sum((0, 1)) == 0
    assert unseen.all(0).sum() == unseen.all(1).sum() == cut
    told = [note for note in notes if "never sees" in note]
    assert [f"never sees the last {cut} of {size} " in note and note.endswith(better) for note in told] == [
        True
    ] * bool(cut)


class Flat(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) @ torch.ones(3, 5, device=images.device)


def test_a_tower_of_one_s_own_is_tried_too(monkeypatch):
    monkeypatch.setitem(IMAGE_TOWERS, "flat", lambda tower, size: (Flat(), 7))  # its own word for its width is wrong
    assert build_image_tower(ImageTower(name="flat"), 8)[1] == 5
    monkeypatch.setitem(IMAGE_TOWERS, "grid", lambda tower, size: (nn.Conv2d(3, 4, 2), 4))
    with pytest.raises(UserError, match=r"^model\.image\.name: expected one vector per image, .* got \(2, 4, 7, 7\)"):
        build_image_tower(ImageTower(name="grid"), 8)


def test_a_tower_is_tried_once_unless_something_else_than_its_section_decides(monkeypatch):
    tried = []
    monkeypatch.setattr(image_towers, "trial", lambda *given: tried.append(given) or trial(*given))
    monkeypatch.setitem(IMAGE_TOWERS, "flat", lambda tower, size: (Flat(), 5))
    first, again = (build_image_tower(ImageTower(width=11), 24) for _ in range(2))
    assert first[1:] == again[1:]
    assert first[0] is not again[0]
    assert len(tried) == 1
    other = build_image_tower(ImageTower(width=11), 25)
    assert (first[3].count, other[3].count) == (9, 16)
    for _ in range(2):
        build_image_tower(ImageTower(name="flat"), 8)
    assert len(tried) == 4
