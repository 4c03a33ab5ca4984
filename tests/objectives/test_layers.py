"""An objective of several layers is the weighted mean of its definition over them, each with a state of its own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.config.load import load
from amclr_scale.config.objective_options import declared
from amclr_scale.errors import UserError
from amclr_scale.objectives.layers import of_layer
from amclr_scale.types import Embeddings
from tests.objectives.banks import test_fifo_bank, test_full_bank, test_momentum_queue
from tests.objectives.harness import (
    NUM_SAMPLES,
    State,
    assert_same,
    defined,
    global_batch,
    goes_on,
    joined,
    make,
    my_rows,
    run,
)
from tests.objectives.taught import softmax_of
from tests.objectives.test_sogclr import definition as sogclr

BATCH = {"duplicate": True, "layers": 2}
WEIGHTS = [1.0, 0.5, 2.0]


def layered(one: Any, weights: list[float]) -> Any:
    """The definition of the embeddings and of each layer, with a state of its own."""

    def loss(state, e: Embeddings, step: int):
        if not hasattr(state, "layers"):
            state.layers = [State() for _ in weights[1:]]
        found = [one(state, e, step)]
        for number, own in enumerate(state.layers):
            found.append(one(own, of_layer(e, number), step))
            state.update({f"layers.{number}.{key}": value for key, value in own.items()})
        return tuple(
            sum(w * values[k] for w, values in zip(weights, found, strict=True)) / sum(weights) for k in (0, 1)
        )

    return loss


def clip(state, e, step):
    value = softmax_of(e, 1 / e.logit_scale).squeeze()
    return value, value


CASES = [
    ("clip", {}, clip),
    ("sogclr", {"temperature": 0.07, "gamma": 0.8}, sogclr()),
    ("fifo_bank", {"size": 13, "proximal": 1.0, "source": "momentum"}, None),
    ("momentum_queue", {"size": 16, "alpha_ramp_samples": 20, "in_batch_keys": "student"}, None),
    ("full_bank", {"negatives": 7}, None),
]


def definition(name: str, options: dict[str, Any], one: Any) -> Any:
    known = {"fifo_bank": test_fifo_bank, "momentum_queue": test_momentum_queue, "full_bank": test_full_bank}
    return layered(one or known[name].definition(**options), WEIGHTS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_matches_its_definition(case):
    name, options, _ = case
    want = defined(definition(*case), batch=BATCH)
    for chunk in (3, 100):
        assert_same(run(name, {**options, "layers": WEIGHTS}, chunk=chunk, batch=BATCH), want)


def every_case(layout: str) -> list[Any]:
    return [
        run(name, {**options, "layers": WEIGHTS}, chunk=3, batch=BATCH, sample_state=layout)
        for name, options, _ in CASES
    ]


def test_two_ranks_are_one_batch(ranks):
    for layout in ("replicated", "sharded"):
        for case, *answers in zip(CASES, *ranks(2, every_case, layout), strict=True):
            assert_same(joined(answers), defined(definition(*case), batch=BATCH))


def test_a_state_goes_on_bit_for_bit_on_other_ranks(ranks):
    goes_on(ranks, "fifo_bank", {"size": 13, "layers": WEIGHTS}, BATCH)


def test_a_queue_beside_an_objective_is_one_for_each_layer():
    e = my_rows(global_batch(0, **BATCH))
    with_queue = make("clip", queue={"size": 16}, layers=[1, 1])
    of_each = [make("clip", queue={"size": 16}) for _ in range(2)]
    for _ in range(2):
        got = with_queue(e)
        want = [one(x).value for one, x in zip(of_each, (e, of_layer(e, 0)), strict=True)]
        torch.testing.assert_close(got.value, sum(want) / 2, rtol=1e-12, atol=0)
    assert got.metrics["bank_filled"] == got.metrics["layer_1_bank_filled"] == 8
    assert got.metrics["objective"] == pytest.approx(got.value.item())
    widths = [bank.features.shape[1] for bank in (with_queue.queue.image, with_queue.layers[0].queue.image)]
    assert widths == [6, 5]
    make("clip", queue={"size": 16, "width": 6}, layers=[1, 1])(e)  # which is that of the embeddings


def test_in_evaluation_mode_no_layer_changes_its_state():
    objective = make("sogclr", layers=[1, 1])
    e = my_rows(global_batch(0, **BATCH))
    objective(e)
    before: dict[str, Tensor] = {name: x.clone() for name, x in objective.state_dict().items()}
    objective.eval()(my_rows(global_batch(1, **BATCH)))
    assert all(torch.equal(before[name], x) for name, x in objective.state_dict().items())
    assert any(name.startswith("layers.0.image_state") for name in before)


def test_what_it_reads_is_declared():
    found = declared({"name": "fifo_bank", "size": 64, "source": "momentum", "layers": (1.0, 1.0, 1.0)}).inputs
    assert {name: found.count(name) for name in found} == {
        "ids": 1, "image_momentum": 1, "text_momentum": 1, "image_layers": 2, "text_layers": 2,
        "image_momentum_layers": 2, "text_momentum_layers": 2,
    }  # fmt: skip
    assert make("clip", layers=[1, 2]).inputs == declared({"name": "clip", "layers": (1.0, 2.0)}).inputs
    assert declared({"name": "clip", "group_size": 8, "layers": (1.0, 1.0)}).equals(8) is None


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("clip", {"layers": [1.0]}, "layers: expected a positive weight of the embeddings and one of each tapped"),
        ("clip", {"layers": [1.0, 0.0]}, "layers: expected a positive weight of the embeddings and one of each tapped"),
        ("clip", {"layers": 2}, "layers: expected a list of float or None, got 2"),
        ("clip", {"layers": [1, "one"]}, "layers: expected float, got 'one'"),
        ("clip", {"layers": [1, 1], "omega": 1}, "layers: expected null, for inner layers have no image_views"),
        ("swav", {"layers": [1, 1]}, "layers: expected null, for swav trains parts that read the embeddings"),
    ],
)
def test_bad_options(name, options, said):
    with pytest.raises(UserError, match=said.replace("[", "\\[")):
        objectives.create(name, num_samples=NUM_SAMPLES, **options)


TAPS = ["model.image.taps=[stages.2]", "model.text.taps=[layers.0]"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (TAPS, "model.image.taps: objective clip needs none, got 1"),
        (["objective.layers=[1, 1]"], "model.image.taps: objective clip needs 1, got 0"),
        ([*TAPS, "objective.layers=[1, 1, 1]"], "model.text.taps: objective clip needs 2, got 1"),
        ([*TAPS, "objective.layers=[1]"], "objective.layers: expected a positive weight of the embeddings and one of"),
        ([*TAPS, "objective.layers=[1, 1]", "execution.compile=true"], "execution.compile: expected false beside"),
        (["objective.layers=[a, b]"], "objective.layers.0: expected a valid number"),
    ],
)
def test_a_configuration_that_does_not_fit_is_told(words, said):
    with pytest.raises(UserError) as error:
        load(None, ["train.epochs=1", "objective.name=clip", *words])
    assert said in str(error.value)


def test_a_configuration_keeps_its_layers():
    config = load(None, ["train.epochs=1", "objective.name=clip", *TAPS, "objective.layers=[1, 0.5]"])
    assert list(config.objective["layers"]) == [1.0, 0.5]
    assert [tap.module for tap in config.model.image.taps] == ["stages.2"]
