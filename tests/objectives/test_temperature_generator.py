"""TempGenerator is its formula, stays inside its bounds and sends nothing into the encoders."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.objectives.temperature_generator import TempGenerator, TempGenerators

WIDTH, PROTOTYPES, ROWS = 6, 5, 7


def generator(**options) -> TempGenerator:
    torch.manual_seed(0)
    return TempGenerator(WIDTH, num_prototypes=PROTOTYPES, **options).double()


def rows() -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return F.normalize(torch.randn(ROWS, WIDTH, generator=g, dtype=torch.float64), dim=1)


def test_matches_its_definition_sample_by_sample():
    model = generator().eval()
    with torch.no_grad():
        model.weight.uniform_(-2, 2)
        model.bias.fill_(0.3)
        model.kappa.fill_(math.log(0.2))
    for got, x in zip(model(rows()), rows(), strict=True):
        p = [
            1 / (1 + math.exp(-(a @ x + b).item())) for a, b in zip(model.hidden.weight, model.hidden.bias, strict=True)
        ]
        q = [sum(u * v for u, v in zip((row / row.norm()).tolist(), p, strict=True)) for row in model.prototypes]
        total = sum(math.exp(v / 0.2) for v in q)
        score = 0.3 + sum(
            w1 * (math.exp(v / 0.2) / total - 1 / PROTOTYPES) / (1 + math.exp(-v))
            for w1, v in zip(model.weight.tolist(), q, strict=True)
        )
        assert got.item() == pytest.approx(0.005 + 0.045 / (1 + math.exp(-score)), abs=1e-12)


def test_embeddings_get_no_gradient_and_every_parameter_does():
    model, x = generator(), rows().requires_grad_()
    model(x).sum().backward()
    assert x.grad is None
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("from_data", [False, True])
def test_bf16_weights_and_rows_are_computed_with_in_float32(from_data):
    torch.manual_seed(0)
    half = TempGenerator(128).eval()
    if from_data:
        half.set_prototypes(3 * torch.randn(256, 128) + 1)
    half = half.bfloat16()
    exact = copy.deepcopy(half).double()
    x = F.normalize(torch.randn(512, 128), dim=1).bfloat16()
    got, want = half(x), exact(x.double())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)
    got.sum().backward(), want.sum().backward()
    for name, parameter in exact.named_parameters():
        found = half.get_parameter(name).grad.double()
        assert F.cosine_similarity(found.flatten(), parameter.grad.flatten(), dim=0) > 0.9999, name


def test_dropout_acts_in_training_only():
    model = generator()
    assert not torch.equal(model(rows()), model(rows()))
    model.eval()
    assert torch.equal(model(rows()), model(rows()))


def test_stays_inside_its_bounds():
    model = generator(temperature_min=0.01, temperature_max=0.02).eval()
    for bias, bound in ((-800.0, 0.01), (800.0, 0.02)):
        with torch.no_grad():
            model.bias.fill_(bias)
        torch.testing.assert_close(model(rows()), torch.full((ROWS,), bound, dtype=torch.float64), rtol=0, atol=1e-15)


def test_prototypes_come_from_features():
    model, features = generator(), torch.arange(PROTOTYPES * WIDTH + WIDTH, dtype=torch.float64).view(-1, WIDTH)
    model.set_prototypes(features)
    assert torch.equal(model.prototypes, features[:PROTOTYPES])
    assert model.prototypes.requires_grad
    with pytest.raises(ValueError, match=r"features: expected at least \(5, 6\), got \(4, 6\)"):
        model.set_prototypes(features[:4])


def test_options_are_checked():
    with pytest.raises(ValueError, match="temperature_min: expected 0 < temperature_min"):
        generator(temperature_min=0.05, temperature_max=0.05)
    with pytest.raises(ValueError, match="num_prototypes: expected at least 2"):
        TempGenerator(4, num_prototypes=1)


def test_a_pair_serves_both_modalities():
    torch.manual_seed(0)
    image, text = (TempGenerator(WIDTH, num_prototypes=PROTOTYPES).double().eval() for _ in range(2))
    pair = TempGenerators(image, text)
    got = list(pair({"image": rows(), "text": -rows()}).values())
    assert list(pair({"text": rows()})) == ["text_temperature"]
    assert torch.equal(got[0], image(rows()))
    assert torch.equal(got[1], text(-rows()))
    assert not torch.equal(got[0], got[1])


def test_a_pair_starts_from_the_other_modality():
    torch.manual_seed(0)
    pair = TempGenerators(*(TempGenerator(WIDTH, num_prototypes=PROTOTYPES) for _ in range(2)))
    images, texts = torch.randn(PROTOTYPES + 1, WIDTH), torch.randn(PROTOTYPES, WIDTH)
    pair.start_from(images, texts)
    assert torch.equal(pair.image.prototypes, texts)
    assert torch.equal(pair.text.prototypes, images[:PROTOTYPES])
