"""Keywords of timm: what they draw is repeated by the gradient cache, and what they leave out is not counted."""

from typing import Any

import pytest
import torch
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.config.load import build
from amclr_scale.config.schema import ImageTower, Model, TextTower
from amclr_scale.encoders.build import build_model
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.engine.gradient_cache import cached_backward
from amclr_scale.memory.towers import trace
from amclr_scale.metrics.flops import count
from amclr_scale.types import Batch

CPU, ONES = torch.device("cpu"), (1.0, 1.0, 1.0)


def model(**options: Any) -> DualEncoder:
    torch.manual_seed(0)
    image = ImageTower(name="timm/test_vit", options=options)
    sections = Model(image=image, text=TextTower(width=16, heads=2), embedding_width=8)
    return build_model(
        sections, vocab_size=30, pad_id=0, context_length=5, image_size=64, image_mean=ONES, image_std=ONES
    )


def batch() -> Batch:
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (6, 3, 64, 64), generator=g, dtype=torch.uint8)
    return Batch(torch.arange(6), (images,), (torch.randint(1, 30, (6, 5), generator=g),))


@pytest.mark.parametrize("options", [{"patch_drop_rate": 0.5}, {"drop_path_rate": 0.4}], ids=str)
def test_what_is_drawn_is_repeated_in_the_second_pass(options):
    def gradients(kept: int, **keys: Any) -> dict[str, Tensor]:
        made = model(**keys)
        torch.manual_seed(5)
        cached_backward(made, objectives.create("clip"), batch(), micro_batch_sizes=(2, 2), device=CPU, kept=kept)
        return {name: p.grad for name, p in made.named_parameters() if p.grad is not None}

    graphs, again, plain = gradients(3, **options), gradients(0, **options), gradients(0)
    for name, gradient in graphs.items():
        assert torch.equal(gradient, again[name]), name
    assert any(not torch.equal(gradient, plain[name]) for name, gradient in graphs.items())


def test_patches_that_are_left_out_are_no_operations():
    images, texts = (batch().images[0][:2],), (batch().texts[0][:2],)
    whole, half = (count(model(**keys).train(), images, texts) for keys in ({}, {"patch_drop_rate": 0.5}))
    torch.manual_seed(3)
    generator = torch.random.get_rng_state()
    made = model(patch_drop_rate=0.5)
    torch.random.set_rng_state(generator)
    count(made, images, texts)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert made.training
    assert 0.4 * whole.image < half.image < 0.7 * whole.image
    assert half.text == whole.text


def test_patches_that_are_left_out_take_no_memory():
    whole, half = (
        trace(
            build({
                "model": {"image": {"name": "timm/test_vit", "options": options}},
                "data": {"image_size": 160}, "train": {"epochs": 1, "global_batch_size": 64},
            }), "image", "cpu",
        )
        for options in ({}, {"patch_drop_rate": 0.5})
    )  # fmt: skip
    assert 0.4 * whole.with_graph.kept(8) < half.with_graph.kept(8) < 0.7 * whole.with_graph.kept(8)
    assert 0.4 * whole.flops < half.flops < 0.7 * whole.flops
