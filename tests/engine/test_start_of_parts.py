"""Parts of an objective begin with the first samples' embeddings, alike on any number of ranks and at every stage."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from amclr_scale.config.load import build
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.distributed.process_group import seed_everything
from amclr_scale.engine.build import build_trainer, model_of, open_data
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.errors import UserError
from amclr_scale.metrics.phases import Phases
from amclr_scale.metrics.stopwatch import Stopwatch

CPU, M, B, STEPS = torch.device("cpu"), 24, 16, 2


def opened(world_size: int = 1, rank: int = 0, prototypes: int = M, **execution):
    tree = {
        "data": {"image_size": 32, "context_length": 12, "lanes": 2},
        "train": {"global_batch_size": B, "samples": B * STEPS},
        "optimizer": {"name": "sgd", "lr": 0.1, "max_grad_norm": 0.0},
        "model": {"embedding_width": 16, "image": {"width": 8}, "text": {"width": 16}},
        "objective": {"name": "isogclr_net", "num_prototypes": prototypes},
        "execution": {"threads": 1, **execution},
    }
    config = build(tree, world_size)
    return config, open_data(config, RankInfo(rank, rank, world_size, world_size))


def trained(fresh: bool = True, **execution):
    """On each rank: the prototypes that a run begins with, and losses and prototypes of its first steps."""
    world_size = dist.get_world_size()
    config, inputs = opened(world_size, dist.get_rank(), **execution)
    trainer = build_trainer(
        config, inputs, device=CPU, world_size=world_size, folder=Path(), stopwatch=Stopwatch(), fresh=fresh
    )
    step = TrainStep(
        trainer.engine, trainer.objective, micro_batch_sizes=inputs.plan.micro_batch_sizes, kept=inputs.plan.kept,
        device=CPU, phases=Phases(CPU),
    )  # fmt: skip
    parts = trainer.model.parts
    parts.image.dropout = parts.text.dropout = 0.0  # else micro-batches of other sizes drop other units
    prototypes = [torch.stack([full_fp32(side.prototypes) for side in (parts.image, parts.text)])]
    losses = []
    for _, batch in zip(range(STEPS), inputs.loader, strict=False):
        loss = step(batch, 0.1).loss.value.detach().reshape(1)
        dist.all_reduce(loss)
        losses.append(float(loss / world_size))
        prototypes.append(torch.stack([full_fp32(side.prototypes) for side in (parts.image, parts.text)]))
    trainer.engine.destroy()
    return torch.tensor(losses), prototypes


def test_prototypes_are_embeddings_of_the_other_modality(ranks):
    config, inputs = opened()
    seed_everything(config.seed)
    model = model_of(config, inputs.tokenizer).eval()
    first, second = next(inputs.loader), next(inputs.loader)
    with torch.no_grad():
        raw = model.image_tower(model.normalise(torch.cat([first.images[0], second.images[0]]), torch.float32))
        images = model.image_head(raw)[:M]
        texts = model.text_head(model.text_tower(torch.cat([first.texts[0], second.texts[0]])))[:M]
    ((losses, (start, *_)),) = ranks(1, trained)
    torch.testing.assert_close(start, torch.stack([texts, images]), rtol=1e-4, atol=1e-5)

    # On other ranks, at other stages, and with micro-batches of their own for texts, it is the same run.
    different = {"zero_stage": 3, "micro_batch_size": 4, "text_micro_batch_size": 2}
    for execution in ({"zero_stage": 1, **{k: v for k, v in different.items() if k != "zero_stage"}}, different):
        for there, (again, *moved) in ranks(2, trained, **execution):
            assert torch.equal(again, start)
            torch.testing.assert_close(there, losses, rtol=1e-5, atol=0)
            assert not torch.equal(moved[-1], start)


def test_a_run_that_goes_on_reads_nothing(ranks):
    ((_, (start, *_)),) = ranks(1, trained, fresh=False)
    assert start.std() == pytest.approx(1, abs=0.1)  # random: the checkpoint's come after


def test_more_prototypes_than_samples():
    config, inputs = opened(prototypes=100_000)
    with pytest.raises(
        UserError, match=r"^objective: expected at least 100000 samples in data.train, .* got 4938; ask"
    ):
        build_trainer(config, inputs, device=CPU, world_size=1, folder=Path(), stopwatch=Stopwatch())


def test_peeking_leaves_the_loader_where_it_is():
    _, inputs = opened()
    peeked = list(inputs.loader.peek(B + 1))
    assert len(peeked) == 2
    for batch in peeked:
        read = next(inputs.loader)
        assert torch.equal(batch.ids, read.ids)
        assert torch.equal(batch.images[0], read.images[0])
        assert torch.equal(batch.texts[0], read.texts[0])
