"""Small temperatures and wide gaps: finite, and right to 1e-4 of float64. And no B x B matrix between passes."""

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.objectives import rankclip as rankclip_module
from amclr_scale.objectives.rankclip import WIDEST, ascending
from amclr_scale.types import Embeddings
from tests.objectives.harness import NUM_SAMPLES, assert_same, defined, global_batch, make, run
from tests.objectives.test_family import EPOCHS, rankclip

T = 0.005
STATEFUL = [
    ("clip", {"temperature": T}),
    ("dcl", {"temperature": T}),
    ("sogclr", {"temperature": T}),
    ("scent", {"temperature": T}),
    ("isogclr", {"temperature": T, "eta": 1e-4}),
    ("isogclr_net", {}),
    ("fastclip", {"version": "v1", "temperature": T, "eps": 1e-30}),
    ("fastclip", {"version": "v3", "eps": 1e-30}),
    ("amclr", {"temperature": T}),
    ("xamclr", {"temperature": T, "state": "shared_sequential"}),
    ("amclr_dro", {"temperature": T, "eta": 1e-4}),
    ("onlineclr", {"temperature": T}),
]


def extreme(step: int, dtype: torch.dtype) -> Embeddings:
    """Half of the anchors lie near their positive and opposite to the rest; the others the other way round.

    So s_ij - s_ii runs from -1.9 to 1.9, and the same ids swap sides from step to step.
    """
    g = torch.Generator().manual_seed(step)
    pole = F.normalize(torch.ones(16, dtype=torch.float64), dim=0)
    side = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1], dtype=torch.float64)
    agree = torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1], dtype=torch.float64).roll(step)

    def rows(sign):
        noise = 0.03 * torch.randn(8, 16, generator=g, dtype=torch.float64)
        return F.normalize(sign[:, None] * pole + noise, dim=1).to(dtype).requires_grad_()

    image, text = rows(side), rows(side * agree)
    views = (rows(side),), (rows(side * agree),)
    t = torch.full((8,), T, dtype=dtype)
    scale = torch.tensor([1 / T], dtype=dtype, requires_grad=True)
    return Embeddings(
        image, text, torch.arange(8), None, scale, None, *views, image_temperature=t, text_temperature=t.clone()
    )


def final_gradients(name, options, dtype):
    objective = make(name, **options)
    for step in range(3):
        e = extreme(step, dtype)
        loss = objective(e)
        loss.value.backward()
    scale = torch.zeros(1, dtype=dtype) if e.logit_scale.grad is None else e.logit_scale.grad
    return {
        "value": loss.value.detach(),
        "objective": torch.tensor(loss.metrics["objective"]),
        "image": e.image.grad,
        "text": e.text.grad,
        "scale": scale,
    }


def test_the_gaps_are_as_wide_as_they_get():
    e = extreme(0, torch.float64)
    gaps = e.image @ e.text.T - (e.image * e.text).sum(1)[:, None]
    assert gaps.max() > 1.9
    assert gaps.min() < -1.9


@pytest.mark.parametrize(("name", "options"), STATEFUL, ids=[f"{n}-{o.get('version', '')}" for n, o in STATEFUL])
def test_float32_is_right_to_1e_4_of_float64(name, options):
    # the same numbers in both precisions: float64 sees the float32 rows
    single = final_gradients(name, options, torch.float32)
    double = final_gradients_of_float32_rows(name, options)
    for what, want in double.items():
        got = single[what].double()
        assert got.isfinite().all(), what
        error = (got - want.double()).norm() / want.double().norm().clamp(min=1e-30)
        assert error < 1e-4 or (got - want.double()).abs().max() < 1e-9, f"{what}: {error:.1e}"


def final_gradients_of_float32_rows(name, options):
    objective = make(name, **options)
    for step in range(3):
        e = extreme(step, torch.float32).map(
            lambda name, x: x.detach().double().requires_grad_() if x.is_floating_point() else x
        )
        loss = objective(e)
        loss.value.backward()
    scale = torch.zeros(1) if e.logit_scale.grad is None else e.logit_scale.grad
    return {
        "value": loss.value.detach(),
        "objective": torch.tensor(loss.metrics["objective"], dtype=torch.float64),
        "image": e.image.grad,
        "text": e.text.grad,
        "scale": scale,
    }


def test_half_precision_rows_stay_finite():
    for name, options in STATEFUL:
        e = extreme(0, torch.bfloat16)
        make(name, **options)(e).value.backward()
        assert e.image.grad.isfinite().all(), name


@pytest.mark.parametrize(
    "name", ["clip", "siglip", "dclw", "sogclr", "isogclr", "xamclr", "cyclip", "fastclip", "uniformity"]
)
def test_no_similarity_matrix_is_kept_for_backward(name):
    """What autograd holds grows with b, not with b x B."""
    n, width = 2048, 8
    held: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    g = torch.Generator().manual_seed(0)

    def rows() -> torch.Tensor:
        return F.normalize(torch.randn(n, width, generator=g), dim=1).requires_grad_()

    scale, bias = torch.tensor([10.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    e = Embeddings(rows(), rows(), torch.arange(n) % NUM_SAMPLES, None, scale, bias, (rows(),), (rows(),))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        make(name)(e)
    assert sum(held.values()) < 0.15 * n * n * 4, f"{sum(held.values()):,} bytes held"


def nearly_learned(dtype: torch.dtype) -> Embeddings:
    """At a scale of 100 every pair wins clearly: the loss is about 1e-5, and s_ii / t about 80."""
    g = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(64, 24, generator=g), dim=1)
    text = F.normalize(image + 0.17 * torch.randn(64, 24, generator=g), dim=1)
    scale = torch.tensor([100.0], dtype=dtype, requires_grad=True)
    rows, views = ((x.clone().to(dtype).requires_grad_() for x in (image, text)) for _ in range(2))
    return Embeddings(*rows, None, None, scale, None, *((view,) for view in views))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip", {}),
        ("cyclip", {"lambda_in": 0.0, "lambda_cross": 0.0}),
        ("uniformity", {"alignment": 0.0, "uniformity": 0.0, "cross_uniformity": 0.0}),
    ],
)
def test_a_small_softmax_loss_keeps_its_digits(name, options):
    values, slopes = [], []
    for dtype in (torch.float32, torch.float64):
        e = nearly_learned(dtype)
        loss = make(name, **options)(e).value
        loss.backward()
        values.append(loss.item())
        slopes.append(e.logit_scale.grad.item())
    assert 1e-6 < values[1] < 1e-4, "the example is as it is described"
    assert values[0] == pytest.approx(values[1], rel=5e-4)
    assert slopes[0] == pytest.approx(slopes[1], rel=2e-4)


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_a_small_loss_by_a_teacher_keeps_its_digits(alpha):
    """A teacher that is nearly the student: what the positives' shares lack of 1 is the loss, and all of its slope."""
    found = []
    for dtype in (torch.float32, torch.float64):
        e, g = nearly_learned(dtype), torch.Generator().manual_seed(1)
        for side in ("image", "text"):
            rows = getattr(e, side).detach().float()
            e.given[f"{side}_momentum"] = F.normalize(rows + 0.005 * torch.randn(64, 24, generator=g), dim=1).to(dtype)
        loss = make("distill", alpha=alpha)(e).value
        loss.backward()
        found.append([x.double() for x in (loss.detach(), e.image.grad, e.text.grad, e.logit_scale.grad)])
    assert 1e-6 < found[1][0] < 1e-3, "the example is as it is described"
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() < 4e-3 * want.norm()


def test_lists_that_span_too_much_for_one_exp():
    """At t = 0.002 tails of some rows are e^-700 of the row's largest, and of others are not."""
    batch = {"scale": 500.0}
    got = run("rankclip", {"ramp_epochs": 5.0}, chunk=1, batch=batch, epochs=EPOCHS)
    s = global_batch(2, **batch).image.detach() @ global_batch(2, **batch).text.detach().T * 500
    assert ((s.amax(1) - s.amin(1)) > WIDEST).any()
    assert ((s.amax(1) - s.amin(1)) < WIDEST).any()
    assert_same(got, defined(rankclip(2.0), batch=batch, epochs=EPOCHS))


def test_lists_of_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(rankclip_module, "PIECE", 20)  # two of eight
    got = run("rankclip", {"ramp_epochs": 5.0}, epochs=EPOCHS)
    assert_same(got, defined(rankclip(2.0), epochs=EPOCHS))


def test_rows_are_ordered_as_a_stable_sort_orders_them():
    """Ties by position, zeros of either sign alike, and numbers of every size."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 300, generator=g) * torch.logspace(-40, 30, 7)[:, None]
    rows[:, ::3] = rows[:, 1::3]
    rows[0] = torch.tensor([0.0, -0.0, 1.0]).repeat(100)
    for dtype in (torch.float32, torch.float64):
        wanted = rows.to(dtype).argsort(stable=True, dim=1, descending=True).flip(1)
        assert torch.equal(ascending(rows.to(dtype)), wanted)
