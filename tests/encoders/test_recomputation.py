"""Recomputing activations changes memory, and nothing else: not gradients, names, statistics or dropout."""

import pytest
import torch

from amclr_scale.config.schema import ImageTower, TextTower
from tests.encoders.test_dual_encoder import gradients, images, model, tokens

TOWERS = {
    "dropout": {"text": TextTower(width=16, layers=3, dropout=0.3), "image": ImageTower(width=8, dropout=0.2)},
    "batch norm": {"image": ImageTower(width=8, norm="batch")},
    "libraries": {
        "image": ImageTower(name="timm/vit_tiny_patch16_224"),
        "text": TextTower(name="transformers/distilbert"),
    },
}


def step(encoder, seed=3):
    torch.manual_seed(seed)
    out = encoder((images()[:3],), (tokens()[:3],))
    (out["image"] * torch.arange(16) + out["text"].square().cumsum(0)).sum().backward()
    return gradients(encoder), {name: b.clone() for name, b in encoder.named_buffers()}, torch.get_rng_state()


@pytest.mark.parametrize("towers", ["dropout", "batch norm", pytest.param("libraries", marks=pytest.mark.slow)])
def test_gradients_statistics_and_random_state_are_the_same_to_the_bit(towers, small_transformers):
    results = []
    for image, text in (("none", "none"), ("full", "full"), (2, 1)):
        encoder = model(**TOWERS[towers])
        encoder.set_recomputation(image=image, text=text)
        results.append(step(encoder))
    for got, buffers, rng in results[1:]:
        assert got.keys() == results[0][0].keys()
        for name, want in results[0][0].items():
            torch.testing.assert_close(got[name], want, rtol=0, atol=0, msg=name)
        for name, want in results[0][1].items():
            torch.testing.assert_close(buffers[name], want, rtol=0, atol=0, msg=name)
        assert torch.equal(rng, results[0][2])


def held(encoder) -> int:
    """Bytes that autograd keeps between forward and backward, parameters aside."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in encoder.parameters()}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = encoder((images(),), (tokens(),))
    del out
    return sum(kept.values())


def test_blocks_keep_their_input_only():
    plain = model(image=ImageTower(width=8, depth=18))
    want = held(plain)
    sizes = []
    for k in (2, "full"):
        plain.set_recomputation(image=k)
        sizes.append(held(plain))
    assert sizes[1] < sizes[0] < want
    assert sizes[1] < 0.5 * want
    plain.set_recomputation()
    assert held(plain) == want


def test_names_and_classes_survive():
    encoder = model()
    names, kind = list(encoder.state_dict()), type(encoder.image_tower.stages[0])
    encoder.set_recomputation(image="full", text="full")
    assert list(encoder.state_dict()) == names
    assert isinstance(encoder.image_tower.stages[0], kind)
    encoder.set_recomputation()
    assert type(encoder.image_tower.stages[0]) is kind


def test_the_number_of_blocks_is_checked():
    encoder = model()
    assert {tower: len(found) for tower, found in encoder.blocks().items()} == {"image": 4, "text": 1}
    for wrong in (5, 0, -1, "some"):
        with pytest.raises(ValueError, match=r"recomputation: expected none, full or a number of blocks up to 4"):
            encoder.set_recomputation(image=wrong)
