"""The gradient cache itself, without DeepSpeed: exact in float64, for BatchNorm, views, generated temperatures."""

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale import objectives
from amclr_scale.encoders.norms import keep_statistics
from amclr_scale.engine.gradient_cache import cached_backward
from amclr_scale.types import Batch, Embeddings, Loss
from tests.engine.towers import global_batch, towers

CPU = torch.device("cpu")


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize(("sizes", "kept"), [((16, 16), 1), ((4, 4), 0), ((5, 5), 2), ((2, 16), 0), ((16, 3), 3)])
def test_exact_in_float64(name, sizes, kept):
    batch, model, plain = global_batch(0, 16), towers().double(), towers().double()
    objective = objectives.create(name)
    done = cached_backward(model, objective, batch, micro_batch_sizes=sizes, device=CPU, kept=kept)
    loss = objective(Embeddings(**plain(batch.images, batch.texts), ids=batch.ids))
    loss.value.backward()
    assert done.loss.value.item() == pytest.approx(loss.value.item(), rel=1e-14)
    want = gradients(plain)
    assert gradients(model).keys() == want.keys()
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, want[key], rtol=1e-12, atol=1e-15, msg=key)


class Views(nn.Module):
    """Everything a model may return: views, shared scalars, generated temperatures."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 4), nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.temperature = nn.Linear(4, 1)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(10)))
        self.double()

    def forward(self, images: tuple[Tensor, ...], texts: tuple[Tensor, ...]) -> dict[str, object]:
        first, *others = (F.normalize(self.norm(self.image(x)), dim=1) for x in images)
        one, *rest = (F.normalize(self.text(x), dim=1) for x in texts)
        generated = self.temperature(one.detach()).sigmoid()[:, 0] + 0.1
        scale = self.logit_scale.exp()
        views = {"image_views": tuple(others), "text_views": tuple(rest)}
        return {"image": first, "text": one, "logit_scale": scale, "text_temperature": generated, **views}


def everything(e: Embeddings) -> Loss:
    """Uses all fields, each pair of rows, and the scale more than linearly."""
    assert e.logit_scale is not None
    assert e.text_temperature is not None
    rows = torch.cat([e.image, e.text, *e.image_views, *e.text_views])
    similarities = e.logit_scale * rows @ rows.T / torch.cat([e.text_temperature] * 5)
    return Loss(similarities.logsumexp(1).mean() + e.logit_scale.square().sum() / 100, {})


def views_batch() -> Batch:
    g = torch.Generator().manual_seed(3)
    images = tuple(torch.randn(8, 6, generator=g, dtype=torch.float64) for _ in range(3))
    texts = tuple(torch.randn(8, 5, generator=g, dtype=torch.float64) for _ in range(2))
    return Batch(torch.arange(8), images, texts)


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_all_outputs_and_batch_norm_of_each_micro_batch(kept):
    torch.manual_seed(0)
    model, plain = Views(), Views()
    plain.load_state_dict(model.state_dict())
    batch = views_batch()
    cached_backward(
        model, everything, batch, micro_batch_sizes=(2, 2), device=CPU, kept=kept, again=lambda: keep_statistics(model)
    )

    def cut(views: tuple[Tensor, ...], start: int) -> tuple[Tensor, ...]:
        return tuple(v[start : start + 2] for v in views)

    parts = [plain(cut(batch.images, start), cut(batch.texts, start)) for start in range(0, 8, 2)]
    joined = {key: torch.cat([p[key] for p in parts]) for key in ("image", "text", "text_temperature")}
    views = {k: tuple(map(torch.cat, zip(*(p[k] for p in parts), strict=True))) for k in ("image_views", "text_views")}
    everything(Embeddings(**joined, **views, logit_scale=parts[0]["logit_scale"])).value.backward()
    want = gradients(plain)
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, want[key], rtol=1e-12, atol=1e-15, msg=key)
    for (key, buffer), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-14, atol=0, msg=key)  # statistics once, not twice


def test_what_is_held_does_not_grow_with_the_number_of_micro_batches():
    def held(size: int) -> int:
        model, bytes_held = towers(), 0

        def pack(t: Tensor) -> Tensor:
            nonlocal bytes_held
            if not any(t.untyped_storage().data_ptr() == p.untyped_storage().data_ptr() for p in model.parameters()):
                bytes_held += t.nbytes  # not its storage: a micro-batch is a slice of the waiting inputs
            return t

        def encode(images: tuple[Tensor, ...], texts: tuple[Tensor, ...]) -> dict[str, Tensor]:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                return model(images, texts)

        def objective(e: Embeddings) -> Loss:
            assert e.image.grad_fn is None  # a leaf: no encoder graph hangs on it
            held_in_pass_1.append(bytes_held)
            return objectives.create("clip")(e)

        held_in_pass_1: list[int] = []
        cached_backward(encode, objective, global_batch(0, size), micro_batch_sizes=(4, 4), device=CPU, kept=1)
        return held_in_pass_1[0]

    assert held(64) == held(8) > 0


@pytest.mark.parametrize("first", [True, False])
def test_what_a_teacher_lends_is_asked_for_once_and_when_it_is_wanted(first):
    """Before any graph is alive, or after all samples have been encoded; the objective sees it in each case."""
    batch, model, calls = global_batch(0, 16), towers().double(), [0]
    asked, seen = [], []

    def encode(*views):
        calls[0] += 1
        return model(*views)

    def lend():
        asked.append(calls[0])
        return {"image_momentum": torch.full((16, 2), len(asked), dtype=torch.float64)}

    def objective(e):
        seen.append(e.image_momentum)
        return objectives.create("clip")(e)

    cached_backward(
        encode, objective, batch, micro_batch_sizes=(4, 4), device=CPU, kept=1, lend=lend, lend_first=first
    )  # fmt: skip
    assert asked == [0 if first else 4]
    assert seen[0].eq(1).all()


def test_what_a_step_leaves_stays_as_the_objective_saw_it():
    """Also where a parameter is an output, which the optimizer changes in place."""
    model = towers().double()
    scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    done = cached_backward(
        lambda *views: {**model(*views), "logit_scale": scale},
        objectives.create("clip"), global_batch(0, 16), micro_batch_sizes=(4, 4), device=CPU,
    )  # fmt: skip
    scale.data += 1
    assert done.leaves["logit_scale"].item() == done.embeddings.logit_scale.item() == 2.0


def test_all_backward_passes_are_inside_of_one_reduction():
    """Which is over before the step is."""
    events = []

    @contextmanager
    def reduction():
        events.append("begin")
        yield
        events.append("end")

    def backward(surrogate):
        events.append("backward")
        surrogate.backward()

    cached_backward(
        towers().double(), objectives.create("clip"), global_batch(0, 16), micro_batch_sizes=(4, 8), device=CPU,
        kept=2, backward=backward, one_reduction=reduction(),
    )  # fmt: skip
    assert events == ["begin", *["backward"] * (len(events) - 2), "end"]
    assert len(events) > 4
