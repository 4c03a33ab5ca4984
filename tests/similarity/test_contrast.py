"""`contrast` is its definition, in one process: values and gradients, for any tile, precision and temperature."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from amclr_scale.similarity import Contrast, contrast, current, torch_backend, using
from tests.similarity.definition import (
    Inputs,
    both_sides,
    chunk_of,
    draw,
    for_all,
    gradient_width,
    relative_error,
    without_constants,
)

OPTIONS = [
    pytest.param({"exclude_positive": exclude, "centred": centred}, id=f"exclude={exclude}-centred={centred}")
    for exclude in (False, True)
    for centred in (False, True)
]


def ours(inputs: Inputs, **options) -> tuple[Contrast, list[torch.Tensor], list[torch.Tensor]]:
    """The contrast, its five outputs, and the gradients of a random linear function of the three differentiable."""
    c = contrast(
        inputs.image,
        inputs.text,
        temperature=(inputs.image_temperature, inputs.text_temperature),
        extra_text_keys=inputs.extra_text,
        extra_image_keys=inputs.extra_image,
        **options,
    )
    outputs = [c.image.log_sum, c.text.log_sum, c.image.positive, c.image.expected, c.text.expected]
    value = sum((x * w).sum() for x, w in zip(outputs[:3], inputs.upstream, strict=True))
    return c, outputs, list(torch.autograd.grad(value, inputs.leaves))


def worst_error(inputs: Inputs, *, gradient_width: int | None = None, **options) -> float:
    """Of outputs and gradients, against the definition in float64."""
    mine = inputs.part(slice(None))
    _, outputs, gradients = ours(mine, gradient_width=gradient_width, **options)
    exact = mine.double()
    wanted = both_sides(exact, **options, group=len(exact.image))
    value = sum((x * w).sum() for x, w in zip(wanted[:3], exact.upstream, strict=True))
    wanted += without_constants(torch.autograd.grad(value, exact.leaves), gradient_width)
    return max(relative_error(x, y) for x, y in zip(outputs + gradients, wanted, strict=True))


cases = st.fixed_dictionaries(
    {
        "D": st.integers(1, 20),
        "chunk": st.sampled_from([1, 2, 3, 7, 13, 64, "auto"]),
        "seed": st.integers(0, 10**6),
        "per_anchor": st.booleans(),
        "extra": st.sampled_from([0, 0, 1, 6]),
        "exclude_positive": st.booleans(),
        "centred": st.booleans(),
        "cache_bytes": st.sampled_from([0, 0, 500, 10**6]),
        "constants": st.sampled_from([0, 0, 1, 5]),
    }
)


@pytest.mark.slow
@for_all(60, B=st.integers(1, 40), case=cases)
def test_float64_is_exact_to_1e_12(B, case):
    inputs = draw(B, case["D"], case["seed"], per_anchor=case["per_anchor"], extra=case["extra"])
    with using(chunk=chunk_of(case["chunk"]), cache_bytes=case["cache_bytes"]):
        exclude, width = case["exclude_positive"] and B > 1, gradient_width(case["D"], case["constants"])
        error = worst_error(inputs, exclude_positive=exclude, centred=case["centred"], gradient_width=width)
        assert error < 1e-12


@pytest.mark.slow
@for_all(40, B=st.integers(8, 50), case=cases)
def test_float32_is_exact_to_2e_6(B, case):
    inputs = draw(
        B, 8 + case["D"], case["seed"], dtype=torch.float32, per_anchor=case["per_anchor"], extra=case["extra"]
    )
    inputs.upstream.abs_()  # terms of both signs would cancel in the gradient of a common temperature
    options = {"exclude_positive": case["exclude_positive"], "centred": case["centred"]}
    with using(chunk=chunk_of(case["chunk"]), cache_bytes=case["cache_bytes"]):
        assert worst_error(inputs, gradient_width=gradient_width(8 + case["D"], case["constants"]), **options) < 2e-6


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lowest_temperature", [0.1, 0.03, 0.008])  # at the last, sums take two exponentials
def test_one_temperature_for_all_is_exact_to_2e_6(lowest_temperature, options, monkeypatch):
    """With one exponential for both directions, and with two."""
    found = []
    monkeypatch.setattr(torch_backend, "COMMON_SIZE", 0)
    for common_range in (torch_backend.COMMON_RANGE, -1.0):
        monkeypatch.setattr(torch_backend, "COMMON_RANGE", common_range)
        for seed in range(5):
            inputs = draw(
                30 + 7 * seed, 24, seed, dtype=torch.float32, of_all=True, extra=seed, aligned=seed / 4,
                lowest_temperature=lowest_temperature,
            )  # fmt: skip
            mine = inputs.part(slice(None))
            exact = mine.double()
            with using(chunk=chunk_of(32), cache_bytes=10**6 * (seed % 2)):
                _, outputs, gradients = ours(mine, **options)
            wanted = both_sides(exact, **options, group=len(exact.image))
            value = sum((x * w).sum() for x, w in zip(wanted[:3], exact.upstream, strict=True))
            wanted += torch.autograd.grad(value, exact.leaves)[:2]  # those of temperatures: sums of `expected`
            assert max(relative_error(x, y) for x, y in zip(outputs + gradients[:2], wanted, strict=True)) < 2e-6
        found.append(gradients[0])
    assert current().backend == "triton" or not torch.equal(*found)


@pytest.mark.parametrize("temperature", [0.01, 0.002])
def test_float32_is_as_good_as_plain_autograd_at_small_temperatures(temperature):
    errors, plain = [], []
    for seed in range(5):
        inputs = draw(200, 32, seed, dtype=torch.float32, lowest_temperature=temperature)
        errors.append(worst_error(inputs, exclude_positive=False, centred=False))
        mine = inputs.part(slice(None))
        exact = mine.double()
        gradients = []
        for x in (mine, exact):
            outputs = both_sides(x, exclude_positive=False, centred=False, group=200)
            value = sum((o * w).sum() for o, w in zip(outputs[:3], x.upstream, strict=True))
            gradients.append(torch.autograd.grad(value, x.leaves))
        plain.append(max(relative_error(x, y) for x, y in zip(*gradients, strict=True)))
    assert sum(errors) < 1.5 * sum(plain)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cache_bytes", [0, 10**6])
@pytest.mark.slow
def test_gradcheck(options, cache_bytes):
    inputs = draw(5, 3, 0, lowest_temperature=0.3).part(slice(None))
    extra = draw(4, 3, 1).image

    def function(image, text, image_temperature, text_temperature):
        with using(chunk=2, cache_bytes=cache_bytes):
            temperature = (image_temperature, text_temperature)
            c = contrast(image, text, temperature=temperature, extra_text_keys=extra, **options)
        return c.image.log_sum, c.text.log_sum, c.image.positive, c.text.positive

    assert torch.autograd.gradcheck(function, inputs.leaves, nondet_tol=1e-12)


def test_an_expression_on_top_is_differentiated_through():
    """SogCLR's form: temperature times a ratio with a constant."""
    mine = draw(12, 5, 3, per_anchor=False).part(slice(None))
    exact = mine.double()
    log_u = torch.randn(12, dtype=torch.float64)
    t = mine.image_temperature
    c = contrast(mine.image, mine.text, temperature=t, exclude_positive=True, centred=True)
    assert c.num_keys == 11
    got = torch.autograd.grad((t * (c.image.log_sum - log_u).exp()).mean(), (mine.image, mine.text, t))
    wanted_log_sum = both_sides(exact, exclude_positive=True, centred=True, group=12)[0]
    t = exact.image_temperature
    want = torch.autograd.grad((t * (wanted_log_sum - log_u).exp()).mean(), (exact.image, exact.text, t))
    torch.testing.assert_close(c.image.log_sum, wanted_log_sum, rtol=1e-12, atol=1e-12)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_one_tensor_as_both_sides():
    x = draw(9, 4, 0).image.requires_grad_()
    c = contrast(x, x, temperature=0.2, exclude_positive=True)
    (got,) = torch.autograd.grad(c.image.log_sum.sum() + (c.text.log_sum**2).sum(), x)
    s = (x @ x.T / 0.2).masked_fill(torch.eye(9, dtype=torch.bool), -torch.inf).logsumexp(1)
    (want,) = torch.autograd.grad(s.sum() + (s**2).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(c.image.positive, torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize("which", ["image", "text", "image_temperature", "text_temperature"])
@pytest.mark.parametrize("output", [0, 1, 2])
def test_one_input_and_one_output_alone(which, output):
    """Keys without gradient (a momentum encoder), or a loss of one direction."""
    inputs = draw(11, 6, 4).part(slice(None))
    for name in ("image", "text", "image_temperature", "text_temperature"):
        getattr(inputs, name).requires_grad_(name == which)
    options = {"exclude_positive": False, "centred": True}
    t = (inputs.image_temperature, inputs.text_temperature)
    with using(chunk=4):
        c = contrast(inputs.image, inputs.text, temperature=t, **options)
    outputs = [c.image.log_sum, c.text.log_sum, c.text.positive]
    leaf = getattr(inputs, which)
    want_outputs = both_sides(inputs, **options, group=11)
    weights = inputs.upstream[output]
    (got,) = torch.autograd.grad((outputs[output] * weights).sum(), leaf, materialize_grads=True, allow_unused=True)
    value = (want_outputs[output] * weights).sum() + 0 * leaf.sum()
    (want,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_features_of_16_bits(dtype, options):
    """Statistics in float32 of exactly these features; gradients in the features' precision."""
    exact = draw(50, 16, 0, dtype=torch.float32)
    inputs = dataclasses.replace(exact, image=exact.image.to(dtype), text=exact.text.to(dtype)).part(slice(None))
    _, outputs, gradients = ours(inputs, **options)
    double = inputs.double()
    wanted = both_sides(double, **options, group=50)
    value = sum((x * w).sum() for x, w in zip(wanted[:3], double.upstream, strict=True))
    want = torch.autograd.grad(value, double.leaves)
    assert all(x.dtype == torch.float32 for x in outputs)
    assert max(relative_error(x, y) for x, y in zip(outputs, wanted, strict=True)) < 2e-6
    assert [x.dtype for x in gradients] == [dtype, dtype, torch.float32, torch.float32]
    for x, y in zip(gradients, want, strict=True):
        assert relative_error(x, y) < torch.finfo(x.dtype).eps * 20


def test_autocast_changes_nothing():
    inputs = draw(30, 8, 0, dtype=torch.float32).part(slice(None))
    _, outputs, gradients = ours(inputs, exclude_positive=False, centred=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, others, other_gradients = ours(inputs, exclude_positive=False, centred=False)
    for x, y in zip(outputs + gradients, others + other_gradients, strict=True):
        assert torch.equal(x, y)


def adversary(kind: str, B: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    image = F.normalize(torch.randn(B, D, generator=torch.Generator().manual_seed(0)), dim=1)
    return {
        "identical": (image[:1].expand(B, D).clone(), image[:1].expand(B, D).clone()),
        "orthogonal": (torch.eye(B, D), torch.eye(B, D)),
        "positives worst": (image, -image),
        "aligned": (image, image.clone()),
    }[kind]


@pytest.mark.parametrize("kind", ["identical", "orthogonal", "positives worst", "aligned"])
@pytest.mark.parametrize("B", [1, 2, 37])
@pytest.mark.parametrize("temperature", [0.002, 0.01])
def test_adversarial_features_stay_finite_and_right(kind, B, temperature):
    for options in (o.values[0] for o in OPTIONS):
        if options["exclude_positive"] and B == 1:
            continue
        image, text = (x.requires_grad_() for x in adversary(kind, B, 40))
        t = torch.tensor([temperature], requires_grad=True)
        with using(chunk=8):
            c = contrast(image, text, temperature=t, **options)
        got = torch.autograd.grad((c.image.log_sum + 2 * c.text.log_sum).mean(), (image, text, t))
        exact = [x.detach().double().requires_grad_() for x in (image, text, t)]
        wanted = both_sides(Inputs(*exact[:2], exact[2], exact[2], None, None, torch.zeros(0)), **options, group=B)
        want = torch.autograd.grad((wanted[0] + 2 * wanted[1]).mean(), exact)
        torch.testing.assert_close(c.image.log_sum.double(), wanted[0], rtol=2e-6, atol=1e-4)
        torch.testing.assert_close(c.image.expected.double(), wanted[3], rtol=2e-6, atol=2e-3)
        for x, y in zip(got, want, strict=True):
            assert x.isfinite().all()
            assert float((x.double() - y).abs().max()) <= 2e-4 * max(float(y.abs().max()), 1 / temperature)


def test_aligned_pairs_give_no_negative_loss():
    """Centred log-sums over all keys contain e^0, so they cannot fall below 0."""
    image, text = adversary("aligned", 300, 40)
    c = contrast(image, text, temperature=0.01, centred=True)
    assert (c.image.log_sum >= 0).all()
    assert (c.text.log_sum >= 0).all()


def test_without_gradients_nothing_is_kept_and_extra_outputs_are_detached():
    inputs = draw(20, 4, 0).part(slice(None))
    t = (inputs.image_temperature, inputs.text_temperature)
    kept = []
    with torch.no_grad(), using(cache_bytes=10**6), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        c = contrast(inputs.image, inputs.text, temperature=t)
    assert not c.image.log_sum.requires_grad
    assert kept == []
    c = contrast(inputs.image, inputs.text, temperature=t)
    assert c.image.log_sum.requires_grad
    assert c.text.positive.requires_grad
    assert not c.image.expected.requires_grad


def test_backward_may_be_called_twice():
    inputs = draw(20, 4, 0).part(slice(None))
    with using(chunk=8, cache_bytes=800):
        c = contrast(inputs.image, inputs.text, temperature=0.1)
    first = torch.autograd.grad(c.image.log_sum.sum(), inputs.image, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(c.image.log_sum.sum(), inputs.image)[0])


def test_second_order_gradients_are_refused():
    inputs = draw(6, 4, 0).part(slice(None))
    c = contrast(inputs.image, inputs.text, temperature=0.1)
    (first,) = torch.autograd.grad(c.image.log_sum.sum(), inputs.image, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order gradients"):
        (first**2).sum().backward()


def test_backward_uses_the_settings_of_its_forward():
    inputs = draw(30, 4, 0, dtype=torch.float32).part(slice(None))

    def gradient(outside):
        with using(chunk=7, cache_bytes=500):
            c = contrast(inputs.image, inputs.text, temperature=0.1)
        with using(**outside):
            return torch.autograd.grad(c.image.log_sum.sum(), inputs.image)[0]

    assert torch.equal(gradient({}), gradient({"chunk": 30}))  # other tiles would pair the cache with other entries


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": torch.ones(3)}, "image: expected"),
        ({"image": torch.ones(0, 4)}, "image: expected"),
        ({"text": torch.ones(4, 4)}, "text: expected"),
        ({"image": torch.ones(3, 4, dtype=torch.int64)}, r"image: expected floating-point features, got torch\.int64"),
        ({"text": torch.ones(3, 4, dtype=torch.complex64)}, "text: expected floating-point features"),
        ({"text": torch.ones(3, 4, device="meta")}, "text: expected features on cpu, the device of image, got meta"),
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
        ({"temperature": torch.tensor([-1.0])}, "temperature: expected numbers above 0"),
        ({"temperature": torch.ones(4)}, r"temperature: expected shape \(\), \(1,\), or \(3,\)"),
        ({"extra_text_keys": torch.ones(2, 5)}, r"extra_text_keys: expected \(M, 4\)"),
        ({"extra_image_keys": torch.ones(2, 4, requires_grad=True)}, "extra_image_keys: extra keys get no gradient"),
        ({"negatives": 0}, "negatives: expected"),
        ({"gradient_width": 5}, "gradient_width: expected 1 to 4 columns, got 5"),
        ({"negatives": 2}, "negatives: groups of 2 ranks do not divide 1"),
        ({"image": torch.ones(1, 4), "text": torch.ones(1, 4), "exclude_positive": True}, "exclude_positive: a global"),
    ],
)
def test_mistakes_are_named(arguments, message):
    right = {"image": torch.ones(3, 4), "text": torch.ones(3, 4), "temperature": 0.1}
    with pytest.raises(ValueError, match=message):
        contrast(**(right | arguments))


def test_unequal_numbers_of_keys_are_asked_of_a_side():
    x = torch.ones(3, 4)
    c = contrast(x, x, temperature=0.1, extra_text_keys=torch.ones(2, 4))
    assert (c.image.num_keys, c.text.num_keys) == (5, 3)
    with pytest.raises(ValueError, match=r"ask \.image\.num_keys"):
        _ = c.num_keys
