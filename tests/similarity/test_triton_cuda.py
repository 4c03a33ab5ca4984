"""The Triton backend on a GPU, at real sizes, against dense float64: `pytest -m cuda`."""

import math

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.similarity import contrast, pairwise, using
from amclr_scale.similarity.backends import chosen
from amclr_scale.similarity.settings import Settings

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
B = 4100
# Tensor cores cut sums of 16-bit products off, which costs up to 3.3e-6 here (tools/precision/tensor_cores.py).
OUTPUTS = {torch.float32: 2e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6}
SPLIT = 4e-6
GRADIENTS = {torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 4e-3}


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm())


def draw(D: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    image, noise = torch.randn(2, B, D, generator=generator, device="cuda")
    return tuple(F.normalize(x, dim=1).to(dtype).requires_grad_() for x in (image, image + 4 * noise))


def dense(image, text, t_image, t_text, extra, *, exclude_positive, centred):
    """Log-sums of both directions in float64."""
    s = image @ text.T
    out = []
    left_out = (
        torch.eye(len(s), dtype=torch.bool, device="cuda") if exclude_positive else torch.tensor(False, device="cuda")
    )
    centre = s.diagonal()[:, None] if centred else 0
    for counted, t, keys, anchors in ((s, t_image, extra, image), (s.T, t_text, None, text)):
        more = [] if keys is None else [anchors @ keys.T]
        all_of_them = torch.cat([counted.masked_fill(left_out, -math.inf), *more], dim=1)
        out.append(((all_of_them - centre) / t[:, None]).logsumexp(1))
    return out


def errors(D, dtype, *, per_anchor=False, extra=0, exclude_positive=False, centred=True, rounded=False, **settings):
    """Largest relative errors of log-sums, and of gradients; `rounded`: against those of the rows in bfloat16."""
    image, text = draw(D, dtype)
    t = [torch.full((1,), 0.03, device="cuda") for _ in range(2)]
    if per_anchor:
        t = [0.03 * (1 + torch.rand(B, device="cuda")) for _ in range(2)]
    t = [x.requires_grad_() for x in t]
    queue = F.normalize(torch.randn(extra, D, device="cuda"), dim=1).to(dtype) if extra else None
    options = {"exclude_positive": exclude_positive, "centred": centred}
    with using(backend="triton", **settings):
        c = contrast(image, text, temperature=(t[0], t[1]), extra_text_keys=queue, **options)
    got = [c.image.log_sum, c.text.log_sum]
    gradients = torch.autograd.grad(sum(x.mean() for x in got), (image, text, *t))
    rows = [x.bfloat16() if rounded else x for x in (image, text)]
    exact = [x.detach().double().requires_grad_() for x in (*rows, *t)]
    full = [x.expand(B) for x in exact[2:]]
    want = dense(*exact[:2], *full, None if queue is None else queue.double(), **options)
    wanted = torch.autograd.grad(sum(x.mean() for x in want), exact)
    return (
        max(relative(x, y) for x, y in zip(got, want, strict=True)),
        max(relative(x, y) for x, y in zip(gradients, wanted, strict=True)),
    )


def check(dtype, found):
    outputs, gradients = found
    assert outputs < OUTPUTS[dtype]
    assert gradients < GRADIENTS[dtype]


def test_auto_takes_it():
    assert chosen(Settings(), torch.device("cuda")) == "triton"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("D", [512, 768, 77])
def test_it_is_the_definition(D, dtype):
    check(dtype, errors(D, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exclude_positive", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_every_loss(exclude_positive, centred, dtype):
    check(dtype, errors(512, dtype, exclude_positive=exclude_positive, centred=centred))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_temperatures_per_anchor_extra_keys_and_spans(dtype):
    check(dtype, errors(512, dtype, per_anchor=True, extra=1000, chunk=1500))


def test_split_operands_are_nearly_as_good_as_float32():
    outputs, gradients = errors(512, torch.float32, run_precision="bf16")
    assert outputs < SPLIT
    assert gradients < 4e-5


def test_rounded_rows_are_exact_for_the_rows_that_they_are_rounded_to():
    check(torch.bfloat16, errors(512, torch.float32, precision="bf16", rounded=True))


def test_rounded_rows_cost_what_their_rounding_costs():
    outputs, gradients = errors(512, torch.float32, precision="bf16")
    assert 3e-4 < outputs < 3e-3
    assert 3e-4 < gradients < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sigmoid_losses(dtype):
    image, text = draw(512, dtype)
    numbers = [torch.tensor([x], device="cuda", requires_grad=True) for x in (10.0, -10.0)]
    with using(backend="triton"):
        value = pairwise(image, text, *numbers)
    got = torch.autograd.grad(value, (image, text, *numbers))
    exact = [x.detach().double().requires_grad_() for x in (image, text, *numbers)]
    r = exact[2] * exact[0] @ exact[1].T + exact[3]
    y = 2 * torch.eye(B, dtype=torch.float64, device="cuda") - 1
    want = -F.logsigmoid(y * r).sum(1).mean()
    wanted = torch.autograd.grad(want, exact)
    assert relative(value, want) < 4e-6
    assert max(relative(x, y) for x, y in zip(got, wanted, strict=True)) < GRADIENTS[dtype]


def test_a_tower_that_diverged_gives_nan_and_does_not_hang():
    image, text = draw(512, torch.bfloat16)
    with using(backend="triton"):
        c = contrast(image * math.nan, text, temperature=0.03)
    assert c.image.log_sum.isnan().all()
