"""Operations are those of the matrix products that a sample needs, whichever kernel computes them."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from amclr_scale.config.load import build
from amclr_scale.memory.towers import trace
from amclr_scale.metrics.devices import find_profile
from amclr_scale.metrics.flops import ModelFlops, count, flop_counter
from amclr_scale.planner.step_time import Rates, estimate

b, HEADS, LENGTH, WIDTH = 2, 4, 16, 8
WHOLE = HEADS * WIDTH
PRODUCTS = 2 * 2 * HEADS * LENGTH * LENGTH * WIDTH  # of one sample
LAYERS = {"attention": 2 * LENGTH * 4 * WHOLE**2, "layer": 2 * LENGTH * (4 * WHOLE**2 + 2 * WHOLE * 64)}
LINEAR = {"attention": nn.MultiheadAttention(WHOLE, HEADS, batch_first=True),
          "layer": nn.TransformerEncoderLayer(WHOLE, HEADS, 64, batch_first=True)}  # fmt: skip


class Sides(nn.Module):
    """Pictures and captions through one module."""

    def __init__(self, encode):
        super().__init__()
        self.image_tower = self.image_head = self.text_tower = self.text_head = nn.Linear(1, 1)
        self.encode = encode

    def forward(self, images, texts):
        return self.encode((images or texts)[0])


def split(x):
    return x.view(len(x), LENGTH, HEADS, WIDTH).transpose(1, 2)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {}, "causal": {"is_causal": True}, "dropout": {"dropout_p": 0.1}, "grouped": {"enable_gqa": True},
    "mask": {"attn_mask": torch.ones(LENGTH, LENGTH).bool()}, "bias": {"attn_mask": torch.zeros(LENGTH, LENGTH)},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_attention_in_every_form(form, dtype):
    def attend(x):
        q = split(x).to(dtype)
        k = q[:, : HEADS // 2] if form == "grouped" else q
        options = {
            name: v.to(dtype) if name == "attn_mask" and form == "bias" else v for name, v in FORMS[form].items()
        }
        return F.scaled_dot_product_attention(q, k, k, **options)

    x = torch.randn(b, LENGTH, WHOLE)
    assert count(Sides(attend), (x,), (x,)) == ModelFlops(PRODUCTS, PRODUCTS)


@pytest.mark.parametrize("kind", LINEAR)
def test_torchs_own_attention(kind):
    x = torch.randn(b, LENGTH, WHOLE)
    module = LINEAR[kind]
    model = Sides(lambda x: module(x, x, x, need_weights=False) if kind == "attention" else module(x))
    model.inside = module  # evaluated with it
    assert torch.backends.mha.get_fastpath_enabled()
    assert count(model, (x,), (x,)).image == PRODUCTS + LAYERS[kind]
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_vision_transformer_by_hand():
    config = recipe(model={"image": {"name": "timm/vit_tiny_patch16_224"}}, data={"image_size": 224})
    n, d = 197, 192
    layers = 12 * (n * 12 * d * d + 2 * n * n * d)
    assert trace(config, "image").flops == 2 * (196 * 768 * d + layers + d * 16)


def recipe(model=None, data=None, **factors):
    tree = {
        "data": {"image_size": 32, "context_length": 12, **(data or {})},
        "model": {"embedding_width": 16, "image": {"width": 16}, "text": {"width": 32}, **(model or {})},
        "train": {"global_batch_size": 64, "epochs": 1},
        "execution": {"micro_batch_size": 8, "kept_micro_batches": 0},
        "optimizer": {"lr_factors": factors},
    }
    return build(tree, 1)


FROZEN: dict[str, dict[str, float]] = {
    "nothing": {}, "one tower": {"image_tower": 0.0}, "both": {"image_tower": 0.0, "text_tower": 0.0},
    "one side": {"text_tower": 0.0, "heads": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("frozen", FROZEN)
def test_what_is_frozen_has_no_backward(frozen):
    """Against a backward that is counted as it runs; 3 % for the gradients of pictures, which nobody asks for."""
    from amclr_scale.memory.towers import skeleton

    config = recipe(**FROZEN[frozen])
    model = skeleton(config)
    images = (torch.empty(b, 3, 32, 32, dtype=torch.uint8, device="meta"),)
    texts = (torch.empty(b, 12, dtype=torch.int64, device="meta"),)
    counter = flop_counter()
    with counter:
        out = model(images, texts)
        (out["image"].sum() + out["text"].sum()).backward()
    want = counter.get_total_flops() / b
    for p in model.parameters():
        p.grad = None
    traced = [trace(config, side) for side in ("image", "text")]
    image, text = traced
    found = ModelFlops(
        round(image.flops), round(text.flops), round(image.frozen_flops), round(text.frozen_flops),
        round(image.once_flops), round(text.once_flops),
    )  # fmt: skip
    assert found.useful() == pytest.approx(want, rel=0.03)
    assert count(model, images, texts) == found

    times = Rates(utilisation=0.5, launch=0.0, message=0.0)
    cost = estimate(config, find_profile("h100"), world_size=1, num_samples=1000, rates=times)
    assert cost.flops == found.useful()
    peak = 0.5 * find_profile("h100").peak("fp32")
    twice = found.image - found.once_image + found.text - found.once_text  # a frozen tower is run once
    assert cost.bound == pytest.approx(64 * (found.useful() + twice) / peak)
    twice = found.hardware(second_forwards=1.0, recomputed_image=1.0, recomputed_text=1.0)
    trained = found.image + found.text - found.frozen_image - found.frozen_text
    once = found.once_image + found.once_text
    assert twice == found.useful() + found.image + found.text - once + trained


def test_more_is_frozen_less_is_done():
    useful = []
    for factors in FROZEN.values():
        traced = [trace(recipe(**factors), side) for side in ("image", "text")]
        useful.append(sum(3 * t.flops - 2 * t.frozen_flops for t in traced))
    assert all(more > less for more, less in pairwise(useful[:3]))
