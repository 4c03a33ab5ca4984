"""`pairwise` is SigLIP's loss, in one pass and on any number of ranks."""

import pytest
import torch
from hypothesis import strategies as st

from amclr_scale.similarity import pairwise, rank, using, world_size
from tests.similarity.definition import draw, for_all, relative_error

DISTRIBUTIONS = ["reduce_scatter", "column_sums", "two_blocks"]


def definition(image, text, scale, bias, group):
    """Per image, the sum over the texts of its group."""
    parts = []
    for first in range(0, len(image), group):
        logits = scale * image[first : first + group] @ text[first : first + group].T + bias
        y = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
        parts.append(-torch.nn.functional.logsigmoid(y * logits).sum(1))
    return torch.cat(parts)


def worst_error(b, D, seed, how, *, negatives="all", dtype="float64"):
    W = world_size()
    everything = draw(b * W, D, seed, dtype=getattr(torch, dtype))
    numbers = [torch.tensor([x], dtype=everything.image.dtype) for x in (12.0, -8.0)]
    rows = slice(rank() * b, (rank() + 1) * b)
    image, text, scale, bias = leaves = [
        x.clone().requires_grad_() for x in (everything.image[rows], everything.text[rows], *numbers)
    ]
    with using(**how):
        value = pairwise(image, text, scale, bias, negatives=negatives)
    got = [value, *torch.autograd.grad(value * 3, leaves)]

    exact = [x.detach().double().requires_grad_() for x in (everything.image, everything.text, *numbers)]
    losses = definition(*exact, group=b * {"all": W, "local": 1}.get(negatives, negatives)).view(W, b)
    total = losses.mean(1).sum() * 3
    features = torch.autograd.grad(total, exact[:2], retain_graph=True)
    own = torch.autograd.grad(losses[rank()].mean() * 3, exact[2:])
    want = [losses[rank()].mean(), *(x[rows] for x in features), *own]
    return max(relative_error(x, y) for x, y in zip(got, want, strict=True))


@for_all(
    30,
    b=st.integers(1, 40),
    D=st.integers(1, 20),
    seed=st.integers(0, 10**6),
    chunk=st.sampled_from([1, 3, 7, 100, "auto"]),
)
def test_it_is_the_definition(b, D, seed, chunk):
    assert worst_error(b, D, seed, {"chunk": chunk}) < 1e-12
    assert worst_error(b, D, seed, {"chunk": chunk}, dtype="float32") < 4e-6


@pytest.mark.parametrize("W", [2, 3, 4])
@pytest.mark.parametrize("gather", ["all", "ring"])
def test_ranks_are_one_big_batch(ranks, W, gather):
    for distribution in DISTRIBUTIONS:
        how = {"gather": gather, "distribution": distribution, "chunk": 4}
        assert max(ranks(W, worst_error, 6, 5, W, how)) < 1e-12
        assert max(ranks(W, worst_error, 6, 5, W, how, negatives="local")) < 1e-12


def test_extreme_logits_stay_finite_and_right():
    image = torch.eye(6, 8).requires_grad_()
    for scale, bias in ((500.0, 0.0), (500.0, 300.0), (-500.0, 10.0)):
        value = pairwise(image, image.detach(), torch.tensor([scale]), torch.tensor([bias]))
        want = definition(image.double(), image.double(), scale, bias, 6).mean()
        torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-6)
        assert torch.autograd.grad(value, image)[0].isfinite().all()


def test_backward_twice_is_refused_in_words():
    image, text = torch.randn(2, 5, 3).requires_grad_()
    value = pairwise(image, text, torch.tensor(2.0), torch.tensor(-1.0))
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="pairwise: backward was called twice"):
        value.backward()


def differently_scaled():
    image, text = torch.randn(2, 5, 3).requires_grad_()
    value = pairwise(image, text, torch.tensor(2.0), torch.tensor(-1.0))
    with pytest.raises(RuntimeError, match=r"pairwise: the losses of ranks were scaled differently, by 1\.0, 2\.0"):
        (value * (1 + rank())).backward()


def test_ranks_that_scale_their_losses_differently_are_refused(ranks):
    ranks(2, differently_scaled)


def test_without_gradients_no_gradient_is_made(monkeypatch):
    image, text = torch.randn(2, 5, 3).requires_grad_()
    monkeypatch.setattr(torch.Tensor, "addmm_", None)  # what adds products to gradients
    with torch.no_grad():
        value = pairwise(image, text, torch.tensor(2.0), torch.tensor(-1.0))
    assert not value.requires_grad


def test_autocast_and_16_bits():
    image, text = (x.bfloat16().requires_grad_() for x in torch.randn(2, 9, 4))
    scale, bias = torch.tensor([2.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = pairwise(image, text, scale, bias)
    want = definition(image.double(), text.double(), scale.double(), bias.double(), 9).mean()
    torch.testing.assert_close(value.double(), want, rtol=2e-6, atol=0)
    got, wanted = (torch.autograd.grad(x, (image, text, scale, bias)) for x in (value, want))
    assert [x.dtype for x in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for x, y in zip(got, wanted, strict=True):
        assert relative_error(x, y) < (1e-2 if x.dtype == torch.bfloat16 else 4e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": torch.ones(4, 4)}, "text: expected"),
        ({"text": torch.ones(3, 4, dtype=torch.int64)}, r"text: expected floating-point features, got torch\.int64"),
        ({"image": torch.ones(0, 4), "text": torch.ones(0, 4)}, "image: expected .* at least one row"),
        ({"logit_scale": torch.ones(3)}, "logit_scale: expected one number"),
        ({"logit_bias": torch.ones(2)}, "logit_bias: expected one number"),
    ],
)
def test_mistakes_are_named(arguments, message):
    right = {
        "image": torch.ones(3, 4),
        "text": torch.ones(3, 4),
        "logit_scale": torch.ones(1),
        "logit_bias": torch.ones(1),
    }
    with pytest.raises(ValueError, match=message):
        pairwise(**(right | arguments))
