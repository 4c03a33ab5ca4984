"""Runs an objective for a few steps on any number of ranks, and its definition on one, in float64.

A definition is `definition(state, batch, step) -> (value, objective)` in plain tensors over the whole global batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.objectives.base import Objective
from amclr_scale.similarity import rank, using, world_size
from amclr_scale.types import Embeddings, flatten

NUM_SAMPLES, B, D, STEPS = 20, 8, 6, 5

Definition = Callable[[dict[str, Tensor], Embeddings, int], tuple[Tensor, Tensor]]


def global_batch(step: int, **what: Any) -> Embeddings:
    """The whole batch of a step, as `drawn`, with fresh leaves."""
    found = drawn(step, **what)
    return Embeddings(**{name: fresh(getattr(found, name)) for name in found.__dataclass_fields__})


def fresh(x: Any) -> Any:
    """A copy of a tensor, as a leaf, or of all of several."""
    if isinstance(x, Tensor):
        return x.detach().clone().requires_grad_(x.requires_grad)
    if isinstance(x, tuple):
        return tuple(map(fresh, x))
    return {name: fresh(value) for name, value in x.items()} if isinstance(x, Mapping) else x


@cache
def drawn(
    step: int,
    *,
    views: int = 0,
    scale: float = 12.0,
    duplicate: bool = False,
    copies: bool = False,
    negatives: int = 0,
    heads: bool = False,
    tokens: bool = False,
    layers: int = 0,
) -> Embeddings:
    """The whole batch of a step. Texts resemble their images; ids come back from step to step.

    With `duplicate`, one id of step 3 occurs twice, on different ranks; with `copies`, most ids do, in every step. With
    `heads` there is what parts of an objective make, with `tokens` those of images and texts, of which some do not
    count, with `layers` features of so many inner layers, of other widths. Labels, and what captions are known by, come
    several times in any case. References have a width of their own.
    """
    g = torch.Generator().manual_seed(100 + step)

    def near(x: Tensor, noise: float, seed: int | None = None) -> Tensor:
        own = g if seed is None else torch.Generator().manual_seed(seed)
        y = x + noise * torch.randn(B, D, generator=own, dtype=torch.float64)
        return F.normalize(y, dim=-1).requires_grad_()

    image = F.normalize(torch.randn(B, D, generator=g, dtype=torch.float64), dim=-1).requires_grad_()
    text = near(image.detach(), 0.5)
    ids = torch.randperm(NUM_SAMPLES, generator=g)[:B]
    if duplicate and step == 3:
        ids[-1] = ids[1]
    if copies:
        ids = torch.randint(5, (B,), generator=torch.Generator().manual_seed(step))
    made: dict[str, Any] = {}
    if heads:
        h = torch.Generator().manual_seed(200 + step)
        sides = [f"{side}_{what}" for side in ("image", "text") for what in ("predicted", "projected")]
        made = {name: torch.randn(B, D, generator=h, dtype=torch.float64).requires_grad_() for name in sides}
        made["shared"] = {"prototypes": torch.randn(5, D, generator=h, dtype=torch.float64).requires_grad_()}
    if tokens:
        h = torch.Generator().manual_seed(300 + step)
        for side, n in (("image", 4), ("text", 5)):
            rows = torch.randn(B, n, D, generator=h, dtype=torch.float64)
            made[f"{side}_tokens"] = F.normalize(rows, dim=2).requires_grad_()
            made[f"{side}_token_mask"] = torch.arange(n) <= torch.randint(n, (B, 1), generator=h)
    for number in range(layers):
        h = torch.Generator().manual_seed(300 + 10 * number + step)
        for side in ("image", "text"):
            x = F.normalize(torch.randn(B, D - 1 - number, generator=h, dtype=torch.float64), dim=1)
            y = F.normalize(x + 0.3 * torch.randn(x.shape, generator=h, dtype=torch.float64), dim=1)
            made[f"{side}_layers"] = (*made.get(f"{side}_layers", ()), x.requires_grad_())
            made[f"{side}_momentum_layers"] = (*made.get(f"{side}_momentum_layers", ()), y)
    return Embeddings(
        **made,
        image=image,
        text=text,
        ids=ids,
        logit_scale=torch.tensor([scale], dtype=torch.float64, requires_grad=True),
        logit_bias=torch.tensor([-4.0], dtype=torch.float64, requires_grad=True),
        image_views=tuple(near(image.detach(), 0.3) for _ in range(views)),
        text_views=tuple(near(text.detach(), 0.3) for _ in range(views)),
        image_temperature=(0.02 + 0.1 * torch.rand(B, generator=g, dtype=torch.float64)).requires_grad_(),
        text_temperature=(0.02 + 0.1 * torch.rand(B, generator=g, dtype=torch.float64)).requires_grad_(),
        text_content=torch.randint(5, (B,), generator=g),
        labels=torch.randint(4, (B,), generator=g),
        image_reference=F.normalize(torch.randn(B, 4, generator=g, dtype=torch.float64), dim=1),
        text_reference=F.normalize(torch.randn(B, 4, generator=g, dtype=torch.float64), dim=1),
        text_negatives=tuple(near(text.detach(), 0.8) for _ in range(negatives)),
        image_negatives=tuple(near(image.detach(), 0.8, 400 + step + k) for k in range(negatives)),
        image_negative_mask=torch.rand(B, max(1, negatives), generator=torch.Generator().manual_seed(50 + step)) < 0.7,
        text_negative_mask=torch.rand(B, max(1, negatives), generator=torch.Generator().manual_seed(step)) < 0.7,
        image_momentum=near(image.detach(), 0.2).detach(),
        text_momentum=near(text.detach(), 0.2).detach(),
    )


@dataclass
class Step:
    """What one step left behind, of the global batch."""

    value: float
    objective: float
    rows: dict[str, Tensor] = field(default_factory=dict)  # gradients of per-sample outputs, (B, ...)
    shared: dict[str, Tensor] = field(default_factory=dict)  # gradients of the scale and the bias


def _leaves(embeddings: Embeddings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    rows = {"image": embeddings.image, "text": embeddings.text}
    rows |= {f"image_views[{i}]": view for i, view in enumerate(embeddings.image_views)}
    rows |= {f"text_views[{i}]": view for i, view in enumerate(embeddings.text_views)}
    rows |= {name: x for name, x in flatten(embeddings.given).items() if x.requires_grad}
    shared: dict[str, Tensor] = dict(embeddings.shared)
    for name in ("logit_scale", "logit_bias"):
        shared[name] = getattr(embeddings, name)
    return rows, shared


def _gradients(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}


def my_rows(embeddings: Embeddings) -> Embeddings:
    """This rank's share, as fresh leaves."""
    size = len(embeddings.image) // world_size()
    mine = slice(rank() * size, (rank() + 1) * size)

    def leaf(x: Tensor) -> Tensor:
        return x.detach()[mine].clone().requires_grad_(x.requires_grad)

    return replace(
        embeddings,
        image=leaf(embeddings.image),
        text=leaf(embeddings.text),
        ids=embeddings.ids[mine],
        text_ids=None if embeddings.text_ids is None else embeddings.text_ids[mine],
        logit_scale=embeddings.logit_scale.detach().clone().requires_grad_(),
        logit_bias=embeddings.logit_bias.detach().clone().requires_grad_(),
        image_views=tuple(leaf(view) for view in embeddings.image_views),
        text_views=tuple(leaf(view) for view in embeddings.text_views),
        shared={name: x.detach().clone().requires_grad_() for name, x in embeddings.shared.items()},
        given={name: tuple(map(leaf, x)) if isinstance(x, tuple) else leaf(x) for name, x in embeddings.given.items()},
    )


def run(
    name: str,
    options: dict[str, Any],
    *,
    chunk: int | str = "auto",
    batch: dict[str, Any] | None = None,
    epochs: tuple[float, ...] = (0.0,) * STEPS,
    sample_state: str = "auto",
    state: dict[str, Tensor] | None = None,
    first: int = 0,
) -> tuple[list[Step], dict[str, Tensor]]:
    """This rank's part of `len(epochs)` steps, and the state after them.

    Gradients are divided by the number of ranks, as the engine's average does.

    Args:
        state: what to go on from, and with which step.
    """
    objective = objectives.create(name, sample_state=sample_state, num_samples=NUM_SAMPLES, **options)
    if state is not None:
        objective.load_state_dict(state)
    steps = []
    for step, epoch in enumerate(epochs, first):
        embeddings = my_rows(global_batch(step, **(batch or {})))
        objective.set_epoch(epoch)
        with using(chunk=chunk):
            loss = objective(embeddings)
        loss.value.backward()
        rows, shared = _leaves(embeddings)
        steps.append(
            Step(
                loss.value.item(),
                loss.metrics["objective"],
                {k: g / world_size() for k, g in _gradients(rows).items()},
                {k: g / world_size() for k, g in _gradients(shared).items()},
            )
        )
    return steps, dict(objective.state_dict())


def joined(answers: list[tuple[list[Step], dict[str, Tensor]]]) -> tuple[list[Step], dict[str, Tensor]]:
    """The ranks' parts as one batch: rows side by side, values averaged, scalar gradients summed; states must agree."""
    steps = []
    for parts in zip(*(steps for steps, _ in answers), strict=True):
        steps.append(
            Step(
                sum(p.value for p in parts) / len(parts),
                sum(p.objective for p in parts) / len(parts),
                {k: torch.cat([p.rows[k] for p in parts]) for k in parts[0].rows},
                {k: torch.stack([p.shared[k] for p in parts]).sum(0) for k in parts[0].shared},
            )
        )
    first = answers[0][1]
    for _, state in answers[1:]:
        assert state.keys() == first.keys()
        for key, value in state.items():
            torch.testing.assert_close(value, first[key], rtol=0, atol=1e-12, msg=f"ranks disagree on {key}")
    return steps, first


class State(dict[str, Tensor]):
    """What a definition says of the state; what it keeps beside, as attributes, is not compared."""


def defined(
    definition: Definition, *, batch: dict[str, Any] | None = None, epochs: tuple[float, ...] = (0.0,) * STEPS
) -> tuple[list[Step], dict[str, Tensor]]:
    """The same steps by the definition, differentiated by autograd."""
    state: dict[str, Tensor] = State()
    steps = []
    for step, _ in enumerate(epochs):
        embeddings = global_batch(step, **(batch or {}))
        value, objective = definition(state, embeddings, step)
        value.backward()
        rows, shared = _leaves(embeddings)
        steps.append(
            Step(value.item(), float(torch.as_tensor(objective).detach()), _gradients(rows), _gradients(shared))
        )
    return steps, state


def assert_same(
    got: tuple[list[Step], dict[str, Tensor]], want: tuple[list[Step], dict[str, Tensor]], tolerance: float = 1e-10
) -> None:
    """Values, every gradient and the state, to the tolerance; of the state, what the definition names."""
    for number, (ours, theirs) in enumerate(zip(got[0], want[0], strict=True)):
        assert abs(ours.value - theirs.value) <= tolerance * max(1, abs(theirs.value)), f"step {number}: value"
        assert abs(ours.objective - theirs.objective) <= tolerance * max(1, abs(theirs.objective)), (
            f"step {number}: objective {ours.objective}, defined as {theirs.objective}"
        )
        for kind in ("rows", "shared"):
            for name, wanted in getattr(theirs, kind).items():
                close(getattr(ours, kind)[name], wanted, tolerance, f"step {number}: gradient of {name}")
    for name, wanted in want[1].items():
        assert name in got[1], f"state {name} is missing from {sorted(got[1])}"
        close(got[1][name].double(), wanted, tolerance, f"state {name}")


ON_THE_WAY = ((2, "sharded"), (1, "replicated"), (4, "sharded"), (2, "replicated"), (1, "sharded"))


def goes_on(ranks: Any, name: str, options: dict[str, Any], batch: dict[str, Any]) -> None:
    """A step on two ranks, one on one, one on four ...: each from the state before, which ends as that of one rank.

    What is stored as it came is the same bits. Averages of sums over shards are the same up to a rounding.
    """
    whole, state = run(name, options, batch=batch), None
    for first, (size, layout) in enumerate(ON_THE_WAY):
        how = {"batch": batch, "epochs": (0.0,), "state": state, "first": first, "sample_state": layout}
        steps, state = joined(ranks(size, run, name, options, **how))
        for side, gradient in whole[0][first].rows.items():
            close(steps[0].rows[side], gradient, 1e-12, f"step {first}: {side}")
    assert state is not None
    assert state.keys() == whole[1].keys()
    for key, value in state.items():
        if key.endswith("log_u"):
            close(value, whole[1][key], 1e-13, key)
        else:
            assert torch.equal(value, whole[1][key]), key


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}\n{m}")


def off_diagonal(x: Tensor) -> Tensor:
    """A (B, B) matrix with -inf on the diagonal."""
    return x.masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)


def make(name: str, **options: Any) -> Objective:
    return objectives.create(name, num_samples=NUM_SAMPLES, **options)
