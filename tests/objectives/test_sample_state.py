"""Per-sample state: the same numbers replicated or sharded, saved once and loaded on any number of ranks."""

from dataclasses import replace

import pytest
import torch

from amclr_scale import objectives
from amclr_scale.objectives import sample_state
from amclr_scale.objectives.sample_state import SampleState
from amclr_scale.similarity import rank, world_size
from tests.objectives.harness import NUM_SAMPLES, close, global_batch, joined, make, my_rows, run

COLUMNS = {"level": -torch.inf, "count": 0.5}


def wander(layout, width=0, num_samples=11):
    """Four visits of 8 ids, some twice in a batch; every read, and the state at the end."""
    state = SampleState(num_samples, COLUMNS, width=width, layout=layout)
    reads = []
    for step in range(4):
        g = torch.Generator().manual_seed(step)
        ids = torch.randint(0, num_samples, (8,), generator=g)
        new = torch.randn(8, *([width] if width else []), generator=g)
        size = 8 // world_size()
        mine = slice(rank() * size, (rank() + 1) * size)
        visit = state.visit(ids[mine])
        old = visit.read()
        reads.append(torch.stack([old["level"], old["count"]]))
        visit.write(level=new[mine], count=old["count"] + 1)
    rows = len(state.level)
    return torch.stack(reads), dict(state.state_dict()), rows


@pytest.mark.parametrize("width", [0, 3])
def test_every_layout_gives_what_a_dictionary_gives(ranks, width):
    known = {i: (torch.full((width or 1,), -torch.inf), torch.full((width or 1,), 0.5)) for i in range(11)}
    wanted = []
    for step in range(4):
        g = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 11, (8,), generator=g).tolist()
        new = torch.randn(8, *([width] if width else []), generator=g)
        wanted.append([known[i] for i in ids])
        for position, i in enumerate(ids):  # in order: the last occurrence stays
            known[i] = (new[position].reshape(-1), wanted[-1][position][1] + 1)
    for world in (1, 2, 4):
        for layout in ("replicated", "sharded"):
            answers = [wander(layout, width)] if world == 1 else ranks(world, wander, layout, width)
            reads = torch.cat([a[0] for a in answers], dim=2)  # (steps, columns, B[, width])
            for step, rows in enumerate(wanted):
                for column in (0, 1):
                    want = torch.stack([row[column] for row in rows]).reshape(reads[step, column].shape)
                    torch.testing.assert_close(reads[step, column], want, rtol=0, atol=0)
            for _, saved, held in answers:
                assert held == (-(-11 // world) if layout == "sharded" else 11)
                level = torch.stack([known[i][0] for i in range(11)]).reshape(saved["level"].shape)
                torch.testing.assert_close(saved["level"], level, rtol=0, atol=0)


def test_more_ranks_than_samples(ranks):
    answers = ranks(4, wander, "sharded", 0, 3)
    alone = wander("replicated", 0, 3)
    torch.testing.assert_close(torch.cat([a[0] for a in answers], 2), alone[0], rtol=0, atol=0)
    for name, value in alone[1].items():
        torch.testing.assert_close(answers[2][1][name], value, rtol=0, atol=0)


def complain(bad_rank):
    objective = make("sogclr")
    e = my_rows(global_batch(0))
    if rank() == bad_rank:
        e.ids[1] = NUM_SAMPLES + 3
    with pytest.raises(ValueError, match="ids: expected ids from 0 to 19") as error:
        objective(e)
    return str(error.value)


def test_an_id_outside_the_data_set_is_named_on_every_rank(ranks):
    for message in ranks(2, complain, 1):
        assert "got 23" in message
    state = SampleState(5, COLUMNS)
    with pytest.raises(ValueError, match=r"ids: expected ids from 0 to 4 .*, got -1"):
        state.visit(torch.tensor([0, -1]))
    assert state.level.isneginf().all()


def come_unevenly(name):
    e = my_rows(global_batch(0, views=1))
    if rank() == 1:
        rows = {k: getattr(e, k)[:2] for k in ("image", "text", "ids")}
        views = {k: tuple(v[:2] for v in getattr(e, k)) for k in ("image_views", "text_views")}
        e = replace(e, **rows, **views)
    with pytest.raises(ValueError, match="rank 1 has 2 rows"):
        make(name)(e)


def test_uneven_ranks_are_refused(ranks):
    for name in ("sogclr", "isogclr", "amclr_dro"):
        ranks(2, come_unevenly, name)


def test_ids_must_fit_the_rows():
    e = my_rows(global_batch(0))
    for ids, message in (
        (None, r"embeddings\.ids: sogclr needs them, got None"),
        (e.ids[:3], r"embeddings\.ids: expected \(8,\) torch\.int64, got \(3,\)"),
        (e.ids.int(), r"embeddings\.ids: expected \(8,\) torch\.int64, got \(8,\) torch\.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            make("sogclr")(replace(e, ids=ids))


def test_texts_have_ids_of_their_own():
    """Two captions of one image keep separate text states; the image's is that of the later one."""
    objective = make("sogclr", num_texts=50)
    e = my_rows(global_batch(0))
    ids = torch.arange(8) // 2
    objective(replace(e, ids=ids, text_ids=torch.arange(8) + 40)).value.backward()
    assert objective.text_state.log_u[40:48].isfinite().all()
    assert objective.text_state.log_u[:40].isneginf().all()
    assert objective.image_state.log_u[:4].isfinite().all()
    alone = make("sogclr")
    alone(my_rows(global_batch(0)))
    torch.testing.assert_close(
        objective.image_state.log_u[:4], alone.image_state.log_u[global_batch(0).ids[1::2]], rtol=0, atol=0
    )


def test_mistakes_with_text_ids_name_them():
    e = my_rows(global_batch(0))
    with pytest.raises(
        ValueError, match=r"text_ids: expected ids from 0 to 19 \(num_texts = 20\), got 47; set num_texts"
    ):
        make("sogclr")(replace(e, text_ids=torch.arange(8).flip(0) + 40))
    with pytest.raises(
        ValueError, match=r"embeddings\.text_ids: expected ids of the texts, .* 50 for 20 images, got None"
    ):
        make("sogclr", num_texts=50)(e)
    make("sogclr", num_texts=NUM_SAMPLES)(e)


CONTINUED = [
    ("sogclr", {}),
    ("isogclr", {"eta": 0.001}),
    ("xamclr", {"temperature": 0.05}),
    ("xamclr_dro", {"temperature": 0.02, "eta": 0.001}),
    ("fastclip", {"version": "v2"}),
    ("onlineclr", {"temperature": 0.05}),
]


def resume(name, options, saved, layout):
    """Three more steps from a saved state."""
    objective = make(name, sample_state=layout, **options)
    objective.load_state_dict(saved)
    gradients = []
    for step in range(3, 6):
        e = my_rows(global_batch(step, views=1))
        objective(e).value.backward()
        gradients.append(e.image.grad / world_size())
    return torch.stack(gradients), dict(objective.state_dict())


@pytest.mark.parametrize(("name", "options"), CONTINUED, ids=[name for name, _ in CONTINUED])
def test_state_survives_a_checkpoint_on_other_numbers_of_ranks(ranks, name, options):
    views = {"views": 1}
    saved = joined(ranks(2, run, name, options, epochs=(0.0,) * 3, batch=views, sample_state="sharded"))[1]
    uninterrupted, end = run(name, options, epochs=(0.0,) * 6, batch=views)
    for world in (1, 2, 4):
        for layout in ("sharded", "replicated"):
            answers = (
                [resume(name, options, saved, layout)]
                if world == 1
                else ranks(world, resume, name, options, saved, layout)
            )
            gradients = torch.cat([a[0] for a in answers], dim=1)
            for number, step in enumerate(uninterrupted[3:]):
                close(gradients[number], step.rows["image"], 1e-10, f"{world} ranks, {layout}")
            for key, value in end.items():
                close(answers[-1][1][key], value, 1e-10, key)


def test_a_state_of_another_data_set_is_refused():
    with pytest.raises(RuntimeError, match=r"image_state\.log_u: expected \(21,\) numbers .* got \(20,\)"):
        objectives.create("sogclr", num_samples=21).load_state_dict(make("sogclr").state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        make("isogclr").load_state_dict(make("sogclr").state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        make("sogclr").load_state_dict(make("isogclr").state_dict())


def shards_of(layout):
    objective = make("sogclr", sample_state=layout)
    return objective.image_state.shards


def test_large_states_are_sharded_by_themselves(ranks, monkeypatch):
    assert ranks(2, shards_of, "auto") == [(1, 0), (1, 0)]
    assert ranks(2, shards_of, "sharded") == [(2, 0), (2, 1)]
    large = sample_state.REPLICATED_BYTES // 4 + 1
    with torch.device("meta"):
        assert SampleState(large, {"log_u": 0.0}).shards == (1, 0)  # one rank: the only shard
    monkeypatch.setattr(sample_state.collectives, "world_size", lambda: 8)
    monkeypatch.setattr(sample_state.collectives, "rank", lambda: 5)
    with torch.device("meta"):
        state = SampleState(large, {"log_u": 0.0})
        assert (state.shards, len(state.log_u)) == ((8, 5), -(-large // 8))
        assert SampleState(large - 1, {"log_u": 0.0}).shards == (1, 0)


def test_half_precision_models_keep_a_full_precision_state():
    objective = make("isogclr").bfloat16()
    assert objective.image_state.temperature.dtype == torch.float32
    assert objective.double().image_state.log_u.dtype == torch.float64


@pytest.mark.parametrize("name", [name for name, _ in CONTINUED])
def test_looking_does_not_change_the_state(name):
    """In evaluation mode, and without gradients, a forward reads but does not write."""
    objective = make(name)
    objective(my_rows(global_batch(0, views=1)))
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    other = my_rows(global_batch(1, views=1))
    with torch.no_grad():
        in_training_mode = objective(other).value
    objective.eval()
    with torch.no_grad():
        assert torch.equal(objective(other).value, in_training_mode)
    objective(other).value.backward()
    for key, value in objective.state_dict().items():
        assert torch.equal(value, before[key]), key
    objective.train()
    objective(other)
    assert any(not torch.equal(value, before[key]) for key, value in objective.state_dict().items())


@pytest.mark.parametrize(("name", "options"), [*CONTINUED, ("amclr", {"state": "shared_mean"})])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_that_overflows_leaves_no_trace(name, options, bad):
    """One text that is not finite reaches the sum of every image; a loss scaler skips such a step and goes on."""
    objective = make(name, **options)
    objective(my_rows(global_batch(0, views=1)))
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    overflowed = my_rows(global_batch(1, views=1))
    overflowed.text.detach()[2] = bad
    assert not objective(overflowed).value.isfinite()
    for key, value in objective.state_dict().items():
        old = before[key]
        texts = overflowed.ids[[0, 1, 3, 4, 5, 6, 7]] if key.startswith("text_state") else []  # they met finite images
        value[texts] = old[texts]
        assert torch.equal(value, old), key


def overflow_beside():
    """The state after a visit in which sample 1 of rank 1 has a number that is not finite."""
    state = SampleState(8, COLUMNS, layout="sharded")
    visit = state.visit(torch.arange(2) + 2 * rank())
    old = visit.read()
    level = torch.tensor([1.0, torch.nan if rank() == 1 else 2.0])
    visit.write(level=level, count=old["count"] + 1)
    return {name: column.tolist() for name, column in state.state_dict().items()}


def test_only_the_rows_that_overflow_stay(ranks):
    for state in ranks(2, overflow_beside):
        assert state["level"] == [1.0, 2.0, 1.0] + 5 * [-torch.inf]
        assert state["count"] == 3 * [1.5] + 5 * [0.5]
