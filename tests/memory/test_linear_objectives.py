"""What an objective holds grows with the batch, never with its square: all of them, found in the registry.

Doubling B twice tells linear growth from any other. Of bytes f(B) = p + q B + r B^2 the second difference f(4B) - f(2B)
- 2 (f(2B) - f(B)) is 6 r B^2, whatever p (tiles, banks, parts of the model) and q (features, rows of a block) are. Held
bytes are those that wait between forward and backward. The peak is that of both, beside tiles, whose number and size do
not change: with them it is at another moment in a small batch than in a large one.
"""

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from amclr_scale import objectives
from amclr_scale.memory.objective_memory import create
from amclr_scale.memory.random_embeddings import random_embeddings, tensors_of
from amclr_scale.memory.tracker import Tracker
from amclr_scale.objectives.base import Objective, numbers
from amclr_scale.objectives.staging import forgotten
from amclr_scale.similarity import groups, using
from amclr_scale.types import Embeddings, Loss

pytestmark = pytest.mark.slow

FIRST = CHUNK = 61  # a prime: a tile of similarities is known by its size
TILE, WIDTH, SAMPLES = 4 * CHUNK**2, 8, 512
MATRIX = 6 * FIRST**2  # the second difference of one matrix of B x B bytes

# What is of another size by default than is worth running; none of it grows with B.
SMALLER: dict[str, dict[str, Any]] = {
    "barlip": {"coordinates": 16, "hidden": 16},
    "swav": {"prototypes": 16},
    "neuclip": {"prototypes": 16, "inner_steps": 1},
    "degla": {"negatives": 1},
    "fifo_bank": {"size": 64},
    "momentum_queue": {"size": 64},
    "full_bank": {"negatives": 64},
}

# Options that make another path through an objective.
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("clip", {"label_smoothing": 0.1, "omega": 1}),
    ("clip", {"mask_duplicates": "both", "false_negative_margin": 0.1, "queue": {"size": 64}}),
    ("sogclr", {"surrogate": "squared_hinge"}),
    ("supcon", {"log": "in"}),
    ("supcon", {"log": "in", "between": "image"}),
    ("decoupled", {"positives": "label"}),
    ("siglip_plus", {"positives": "label"}),
    ("one_to_k", {"siblings": "mask"}),
    ("debiased", {"hardness": 0.5}),
    ("gram", {"third": "image"}),
    ("cacr", {"omega": 1}),
    ("cyclip", {"inmodal": True}),
    ("cwcl", {"reference": "both"}),
    ("negclip", {"image_negatives": 1}),
    ("filip", {"mask_duplicates": "both", "false_negative_margin": 0.1}),
]


def bytes_of(objective: Objective, rows: int) -> tuple[int, int]:
    """Held between forward and backward, and the most at once beside tiles, beyond the embeddings and what is kept."""
    objective.rehearse(WIDTH, rows)
    embeddings, tracker = random_embeddings(objective, rows, WIDTH, 1), Tracker()
    tracker.add([*objective.buffers(), *tensors_of(embeddings)], "before")
    before, rest, peak = tracker.total, 0, 0

    def note(size: int, _: int) -> None:
        nonlocal rest, peak
        rest += size if abs(size) != TILE else 0
        peak = max(peak, rest)

    tracker.on_change = note
    with tracker, forgotten() if objective.stores_features else nullcontext(), using(chunk=CHUNK):
        loss = objective(embeddings)
        held = tracker.total - before
        loss.value.backward()
    return held, peak


def beyond_linear(make: Any) -> tuple[int, int]:
    """The second differences of both, of the objectives that `make` makes."""
    found = [bytes_of(make(), rows) for rows in (FIRST, 2 * FIRST, 4 * FIRST)]
    (one, two, four) = (torch.tensor(x) for x in found)
    held, peak = (four - two - 2 * (two - one)).tolist()
    return held, peak


CASES = [*((name, {}) for name in sorted(objectives.available())), *OPTIONS]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[" ".join((n, *o)) for n, o in CASES])
def test_no_objective_holds_what_grows_with_the_square_of_the_batch(name, options, monkeypatch):
    monkeypatch.setattr(groups, "PAIR_NUMBERS", 3000 * WIDTH)  # more than one block of pairs that share a label
    section = {"name": name, **SMALLER.get(name, {}), **options}
    held, peak = beyond_linear(lambda: create(json.dumps(section), SAMPLES, "replicated", None))
    assert abs(held) < MATRIX // 8
    assert peak < MATRIX


class Dense(Objective):
    """CLIP as it is mostly written; not in the registry."""

    Config = object

    def forward(self, embeddings: Embeddings) -> Loss:
        s = embeddings.image @ embeddings.text.T * embeddings.logit_scale
        loss = (s.logsumexp(0) + s.logsumexp(1) - 2 * s.diagonal()).mean() / 2
        return Loss(loss, numbers(objective=loss))


class KeepsBits(Objective):
    """A matrix of one byte for each pair, from forward to backward."""

    Config = object

    def forward(self, embeddings: Embeddings) -> Loss:
        self.same = embeddings.ids[:, None] == embeddings.ids
        loss = (embeddings.image * embeddings.text).sum(1).mean()
        return Loss(loss, numbers(objective=loss))


class ForAMoment(Objective):
    """A matrix of B x B that is gone when forward returns."""

    Config = object

    def forward(self, embeddings: Embeddings) -> Loss:
        with torch.no_grad():
            weight = (embeddings.image @ embeddings.text.T).softmax(1).sum(0)
        loss = (weight * (embeddings.image * embeddings.text).sum(1)).mean()
        return Loss(loss, numbers(objective=loss))


@pytest.mark.parametrize("kind", [Dense, KeepsBits, ForAMoment])
def test_one_that_forms_a_matrix_of_the_batch_would_be_found(kind):
    held, peak = beyond_linear(lambda: kind(None))
    assert peak >= MATRIX
    assert (held >= MATRIX) == (kind is not ForAMoment)
