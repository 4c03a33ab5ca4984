"""The model is its towers, whatever goes through them together, and its outputs are what objectives expect."""

import math

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.config.schema import ImageTower, Model, TextTower
from amclr_scale.encoders.build import build_model
from amclr_scale.encoders.dual_encoder import DualEncoder

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
B, D, L, SIZE = 6, 16, 12, 32


def model(seed: int = 0, **options) -> DualEncoder:
    torch.manual_seed(seed)
    options = {"embedding_width": D, "image": ImageTower(width=8), "text": TextTower(width=16)} | options
    return build_model(
        Model(**options), vocab_size=50, pad_id=0, context_length=L, image_size=SIZE, image_mean=MEAN, image_std=STD
    )


def images(seed: int = 0, size: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (B, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, 50, (B, L), generator=generator)
    lengths = torch.randint(3, L + 1, (B, 1), generator=generator)
    return rows.where(torch.arange(L) < lengths, 0)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_outputs_have_the_shapes_and_types_that_types_py_says():
    out = model()((images(), images(1)), (tokens(),))
    assert out["image"].shape == out["text"].shape == (B, D)
    assert [view.shape for view in out["image_views"]] == [(B, D)]
    assert out["text_views"] == ()
    assert out["logit_scale"].shape == out["logit_bias"].shape == (1,)
    assert "image_temperature" not in out
    for rows in (out["image"], out["text"], out["image_views"][0]):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(B))
    assert out["logit_scale"].item() == pytest.approx(1 / 0.07)
    assert out["logit_bias"].item() == -10


def test_one_modality_leaves_the_other_tower_alone():
    encoder = model()
    assert set(encoder(images=(images(),))) == {"image", "image_views", "logit_scale", "logit_bias"}
    encoder(texts=(tokens(),))["text"].sum().backward()
    assert all(p.grad is None for p in encoder.image_tower.parameters())
    assert all(p.grad is not None for p in encoder.text_tower.parameters())


def test_views_and_micro_batches_do_not_know_each_other():
    """float64: one pass over everything equals many small ones, in features and in every parameter's gradient."""
    encoder = model(image=ImageTower(width=8, projection="mlp")).double()
    weights = torch.randn(4, B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    pictures, captions = (images(0), images(1)), (tokens(0), tokens(1))
    out = encoder(pictures, captions)
    together = [out["image"], *out["image_views"], out["text"], *out["text_views"]]
    sum((w * x).sum() for w, x in zip(weights, together, strict=True)).backward()
    want, got = gradients(encoder), {}
    encoder.zero_grad()
    for start in range(0, B, 2):
        rows = slice(start, start + 2)
        for index, picture in enumerate(pictures):
            part = encoder(images=(picture[rows],))["image"]
            torch.testing.assert_close(part, together[index][rows], rtol=1e-12, atol=1e-12)
            (weights[index, rows] * part).sum().backward()
        for index, caption in enumerate(captions):
            part = encoder(texts=(caption[rows],))["text"]
            torch.testing.assert_close(part, together[2 + index][rows], rtol=1e-12, atol=1e-12)
            (weights[2 + index, rows] * part).sum().backward()
    got = gradients(encoder)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-9, atol=1e-11, msg=name)


def test_every_parameter_gets_a_gradient():
    encoder = model(text=TextTower(width=16, projection="mlp"))
    out = encoder((images(),), (tokens(),))
    sum(out[name].sum() for name in ("image", "text", "logit_scale", "logit_bias")).backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None]
    assert without == []


def test_images_are_normalised_inside_and_bytes_equal_floats():
    encoder = model()
    pixels = images()
    got = encoder.normalise(pixels, torch.float32)
    want = (pixels.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    out = encoder(images=(pixels,))["image"]
    torch.testing.assert_close(encoder(images=(pixels.float() / 255,))["image"], out, rtol=1e-4, atol=1e-5)


def test_in_bf16_pixels_and_lengths_stay_exact():
    encoder = model().bfloat16()
    assert encoder.normalise.mean.dtype == torch.float32
    torch.testing.assert_close(encoder.normalise.mean.flatten(), torch.tensor(MEAN), rtol=0, atol=0)
    out = encoder((images(),), (tokens(),))
    assert out["image"].dtype == out["text"].dtype == out["logit_scale"].dtype == torch.float32
    torch.testing.assert_close(out["image"].norm(dim=1), torch.ones(B), rtol=1e-6, atol=1e-6)
    exact = model()((images(),), (tokens(),))
    assert F.cosine_similarity(out["image"], exact["image"]).min() > 0.99
    assert F.cosine_similarity(out["text"], exact["text"]).min() > 0.99


def test_features_before_the_head_on_request():
    encoder = model()
    out = encoder((images(), images(1)), (tokens(),), features=True)
    assert out["image_features"].shape == (B, 64)
    assert out["text_features"].shape == (B, 16)
    torch.testing.assert_close(F.normalize(encoder.image_head(out["image_features"]), dim=-1), out["image"])


def test_parts_are_called_with_what_is_there():
    class Parts(torch.nn.Module):
        learning_rate_factor = "temperature"

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, outputs):
            made = {"length": self.weight * outputs["text"].abs().sum(1)} if "text" in outputs else {}
            return {**made, "shared": {"weight": self.weight}}

    encoder = model()
    encoder.take_parts(Parts())
    assert encoder.learning_rate_factors() == {"parts": "temperature"}
    assert "length" not in encoder((images(),))
    out = encoder((images(),), (tokens(),))
    assert out["length"].shape == (B,)
    assert out["shared"]["weight"] is not encoder.parts.weight  # which stage 3 empties after the forward
    assert torch.equal(out["shared"]["weight"], encoder.parts.weight)
    out["length"].sum().backward()
    assert encoder.parts.weight.grad is not None
    assert any(p.grad is not None for p in encoder.text_tower.parameters())  # through the part, into the tower


def test_parts_work_in_the_models_precision_and_give_float32():
    class Parts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(D, 3)

        def forward(self, outputs):
            views = [self.net(view) for view in outputs["image_views"]]
            return {"seen": tuple(views), "sign": views[0] > 0, "shared": {"weight": self.net.weight}}

    encoder = model()
    encoder.take_parts(Parts())
    out = encoder.to(torch.bfloat16)((images(), images()))
    assert out["seen"][0].dtype == out["shared"]["weight"].dtype == out["image"].dtype == torch.float32
    assert out["sign"].dtype == torch.bool


def test_weight_decay_spares_what_it_should():
    encoder = model()
    spared = encoder.no_weight_decay()
    decayed = {name for name, _ in encoder.named_parameters()} - spared
    assert {"logit_scale", "logit_bias", "text_tower.tokens.positions.weight"} <= spared
    assert {"text_tower.tokens.tokens.weight", "image_head.1.weight", "image_tower.stages.0.conv1.weight"} <= decayed
    assert all(p.dim() < 2 for name, p in encoder.named_parameters() if name in spared and "positions" not in name)
    assert all(p.dim() >= 2 for name, p in encoder.named_parameters() if name in decayed)


def test_the_scale_is_kept_between_1_and_100():
    encoder = model()
    for value, want in ((-1.0, 0.0), (9.0, math.log(100)), (2.0, 2.0)):
        encoder.logit_scale.data.fill_(value)
        encoder.clamp_logit_scale()
        assert encoder.logit_scale.item() == pytest.approx(want)


def test_a_seed_fixes_the_weights():
    first, second, third = model(1).state_dict(), model(1).state_dict(), model(2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["image_head.1.weight"], third["image_head.1.weight"])


@pytest.mark.parametrize("size", [32, 64, 224])
def test_larger_pictures_are_shrunk_in_the_stem(size):
    encoder = model()
    small = build_model(
        Model(embedding_width=D, image=ImageTower(width=8, depth=18)), vocab_size=50, pad_id=0, context_length=L,
        image_size=size, image_mean=MEAN, image_std=STD,
    )  # fmt: skip
    assert small(images=(images(0, size)[:2],))["image"].shape == (2, D)
    stem = small.image_tower.stem(torch.zeros(1, 3, size, size))
    assert stem.shape[-1] <= 48
    assert encoder.image_tower.width == small.image_tower.width
