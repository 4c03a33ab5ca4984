"""At real sizes, against dense float64: the Triton backend on a GPU (`pytest -m cuda`), the torch backend on a CPU.

A CPU has fewer rows. It rounds operands as a GPU does and adds their products up in float32.
"""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.similarity import contrast, pairwise, using
from amclr_scale.similarity.backends import chosen
from amclr_scale.similarity.settings import Settings

# Tensor cores cut sums of 16-bit products off, which costs up to 3.3e-6 here (tools/precision/tensor_cores.py).
OUTPUTS = {torch.float32: 2e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6}
SPLIT = 4e-6
GRADIENTS = {torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 4e-3}
PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "auto"}


@dataclass(frozen=True)
class Place:
    device: str
    backend: str
    B: int


CPU, GPU = Place("cpu", "torch", 1030), Place("cuda", "triton", 4100)
ON_A_GPU = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.fixture(params=[pytest.param(CPU, id="cpu"), pytest.param(GPU, id="cuda", marks=ON_A_GPU)])
def place(request: pytest.FixtureRequest) -> Place:
    return request.param


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.detach().double() - y.detach().double()).norm() / y.detach().double().norm())


def draw(place: Place, D: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(place.device).manual_seed(0)
    image, noise = torch.randn(2, place.B, D, generator=generator, device=place.device)
    return tuple(F.normalize(x, dim=1).to(dtype).requires_grad_() for x in (image, image + 4 * noise))


def dense(image, text, t_image, t_text, extra, *, exclude_positive, centred):
    """Log-sums of both directions in float64."""
    s = image @ text.T
    out = []
    left_out = torch.eye(len(s), dtype=torch.bool, device=s.device) & exclude_positive
    centre = s.diagonal()[:, None] if centred else 0
    for counted, t, keys, anchors in ((s, t_image, extra, image), (s.T, t_text, None, text)):
        more = [] if keys is None else [anchors @ keys.T]
        all_of_them = torch.cat([counted.masked_fill(left_out, -math.inf), *more], dim=1)
        out.append(((all_of_them - centre) / t[:, None]).logsumexp(1))
    return out


def errors(
    place, D, dtype, *, per_anchor=False, extra=0, exclude_positive=False, centred=True, rounded=False, **settings
):
    """Largest relative errors of log-sums, and of gradients; `rounded`: against those of the rows in bfloat16."""
    image, text = draw(place, D, dtype)
    t = [torch.full((1,), 0.03, device=place.device) for _ in range(2)]
    if per_anchor:
        t = [0.03 * (1 + torch.rand(place.B, device=place.device)) for _ in range(2)]
    t = [x.requires_grad_() for x in t]
    queue = F.normalize(torch.randn(extra, D, device=place.device), dim=1).to(dtype) if extra else None
    options = {"exclude_positive": exclude_positive, "centred": centred}
    with using(backend=place.backend, **{"precision": PRECISIONS[dtype]} | settings):
        c = contrast(image, text, temperature=(t[0], t[1]), extra_text_keys=queue, **options)
    got = [c.image.log_sum, c.text.log_sum]
    gradients = torch.autograd.grad(sum(x.mean() for x in got), (image, text, *t))
    rows = [x.bfloat16() if rounded else x for x in (image, text)]
    exact = [x.detach().double().requires_grad_() for x in (*rows, *t)]
    full = [x.expand(place.B) for x in exact[2:]]
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


@pytest.mark.parametrize("place", [pytest.param(GPU, marks=ON_A_GPU)])
def test_auto_takes_it(place):
    assert chosen(Settings(), torch.device(place.device)) == place.backend


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("D", [512, 768, 77])
def test_it_is_the_definition(place, D, dtype):
    check(dtype, errors(place, D, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exclude_positive", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_every_loss(place, exclude_positive, centred, dtype):
    check(dtype, errors(place, 512, dtype, exclude_positive=exclude_positive, centred=centred))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_temperatures_per_anchor_extra_keys_and_spans(place, dtype):
    check(dtype, errors(place, 512, dtype, per_anchor=True, extra=1000, chunk=place.B * 3 // 8))


def test_split_operands_are_nearly_as_good_as_float32(place):
    outputs, gradients = errors(place, 512, torch.float32, precision="split")
    assert outputs < SPLIT
    assert gradients < 4e-5


def test_rounded_rows_are_exact_for_the_rows_that_they_are_rounded_to(place):
    check(torch.bfloat16, errors(place, 512, torch.float32, precision="bf16", rounded=True))


def test_rounded_rows_cost_what_their_rounding_costs(place):
    outputs, gradients = errors(place, 512, torch.float32, precision="bf16")
    assert 3e-4 < outputs < 3e-3
    assert 3e-4 < gradients < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sigmoid_losses(place, dtype):
    image, text = draw(place, 512, dtype)
    numbers = [torch.tensor([x], device=place.device, requires_grad=True) for x in (10.0, -10.0)]
    with using(backend=place.backend, precision=PRECISIONS[dtype]):
        value = pairwise(image, text, *numbers)
    got = torch.autograd.grad(value, (image, text, *numbers))
    exact = [x.detach().double().requires_grad_() for x in (image, text, *numbers)]
    r = exact[2] * exact[0] @ exact[1].T + exact[3]
    y = 2 * torch.eye(place.B, dtype=torch.float64, device=place.device) - 1
    want = -F.logsigmoid(y * r).sum(1).mean()
    wanted = torch.autograd.grad(want, exact)
    assert relative(value, want) < 4e-6
    assert max(relative(x, y) for x, y in zip(got, wanted, strict=True)) < GRADIENTS[dtype]


def test_a_tower_that_diverged_gives_nan_and_does_not_hang(place):
    image, text = draw(place, 512, torch.bfloat16)
    with using(backend=place.backend):
        c = contrast(image * math.nan, text, temperature=0.03)
    assert c.image.log_sum.isnan().all()
