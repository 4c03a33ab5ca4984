"""Diagnostics equal their dense definitions, on one rank and on two."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.objectives import diagnostics
from amclr_scale.similarity import rank, world_size
from tests.objectives.harness import B, global_batch, make, my_rows


def everything():
    e = my_rows(global_batch(0))
    make("clip", temperature=0.1)(e).value.backward()
    return {
        **diagnostics.geometry(e.image, e.text),
        **diagnostics.npc_multiplier(e.image, e.text, 0.1),
        **diagnostics.gradient_norms(image=e.image.grad, text=e.text.grad, other=None),
    }


def dense():
    e = global_batch(0)
    z, t = e.image, e.text

    def spread(x):
        distances = (x[:, None] - x[None]).square().sum(-1)
        return (-2 * distances)[~torch.eye(B, dtype=torch.bool)].exp().mean().log()

    s = z @ t.T / 0.1
    loss = (F.cross_entropy(s, torch.arange(B)) + F.cross_entropy(s.T, torch.arange(B))) / 2
    loss.backward()
    return {
        "alignment": (z - t).square().sum(1).mean(),
        "uniformity_image": spread(z),
        "uniformity_text": spread(t),
        "modality_gap": (z.mean(0) - t.mean(0)).norm(),
        "positive_similarity": (z * t).sum(1).mean(),
        "npc_multiplier": 1 - (s.softmax(1).diagonal() + s.softmax(0).diagonal()).mean() / 2,
        "gradient_norm_image": z.grad.norm(),
        "gradient_norm_text": t.grad.norm(),
    }


def test_batch_diagnostics_are_their_definitions_on_any_number_of_ranks(ranks):
    want = {name: value.item() for name, value in dense().items()}
    for got in (everything(), *ranks(2, everything)):
        assert got == pytest.approx(want, rel=1e-6)


def spread_of(layout):
    objective = make("isogclr", temperature=0.02, eta=0.001, rho=2.0, sample_state=layout)
    assert diagnostics.temperature_spread(objective) == {}
    objective(my_rows(global_batch(0)))
    return diagnostics.temperature_spread(objective), objective.state_dict()


def test_temperature_spread_counts_visited_samples_only(ranks):
    assert diagnostics.temperature_spread(make("clip")) == {}
    for layout in ("replicated", "sharded"):
        for found, state in (spread_of(layout), *ranks(4, spread_of, layout)):
            want = {}
            for side in ("image", "text"):
                t = state[f"{side}_state.temperature"][global_batch(0).ids]
                want |= {
                    f"temperature_{side}_mean": t.mean().item(),
                    f"temperature_{side}_std": t.std(correction=0).item(),
                    f"temperature_{side}_min": t.min().item(),
                    f"temperature_{side}_max": t.max().item(),
                }
            assert found == pytest.approx(want, rel=1e-5)
            assert found["temperature_text_max"] > found["temperature_text_min"]


def test_a_step_answers_what_it_can():
    e = my_rows(global_batch(0))
    objective = make("isogclr", rho=2.0)
    objective(e).value.backward()
    found = diagnostics.of_step(objective, e)
    assert found["gradient_norm_image"] == pytest.approx(e.image.grad.norm().item(), rel=1e-5)
    assert found["npc_multiplier"] == diagnostics.npc_multiplier(e.image, e.text, 1 / 12.0)["npc_multiplier"]
    assert {"alignment", "modality_gap", "temperature_image_std"} <= found.keys()
    free = make("vicreg")
    free(e).value.backward()
    lent = dataclasses.replace(e, given={"text_momentum": -e.text.detach()})
    assert diagnostics.of_step(objective, lent)["teacher_cosine_text"] == pytest.approx(-1)
    assert "teacher_cosine_image" not in diagnostics.of_step(objective, lent)
    cosines = {"teacher_cosine_image", "teacher_cosine_text"}
    assert set(diagnostics.of_step(free, e)) == {"gradient_norm_image", "gradient_norm_text", *cosines}


IDS = torch.tensor([3, 7, 3, 9, 11, 9, 9, 2])
CAPTIONS = torch.tensor([[1, 2, 0], [1, 2, 3], [1, 2, 0], [4, 0, 0], [1, 2, 3], [5, 0, 0], [4, 0, 0], [6, 7, 8]])
TEXT_IDS = torch.tensor([30, 70, 31, 90, 110, 91, 90, 70])


def found_collisions(with_texts):
    ids, captions, text_ids = (x.chunk(world_size())[rank()] for x in (IDS, CAPTIONS, TEXT_IDS))
    return diagnostics.collisions(ids, captions, text_ids if with_texts else None)


@pytest.mark.parametrize("with_texts", [False, True])
def test_collisions_count_pairs_that_agree_in_any_way(ranks, with_texts):
    keys = [IDS, CAPTIONS, TEXT_IDS[:, None]][: 3 if with_texts else 2]
    pairs = [(i, j) for i in range(8) for j in range(8) if i != j]
    same = sum(any(torch.equal(key[i], key[j]) for key in keys) for i, j in pairs)
    assert same == (12 if with_texts else 10)
    want = {"duplicates": 5 / 8, "false_negatives": same / 56}
    for got in (found_collisions(with_texts), *ranks(2, found_collisions, with_texts)):
        assert got == pytest.approx(want, rel=1e-12)


def test_a_batch_without_collisions_has_none():
    assert diagnostics.collisions(torch.arange(4), torch.arange(8).view(4, 2)) == {
        "duplicates": 0.0,
        "false_negatives": 0.0,
    }
    assert diagnostics.collisions(torch.tensor([5]), torch.tensor([[1, 2]]))["false_negatives"] == 0.0
