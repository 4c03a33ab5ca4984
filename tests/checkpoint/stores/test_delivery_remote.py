"""run.shared=false and run.remote together: the store has the pieces of all nodes, and any nodes go on from there.

Nodes are folders, as in test_delivery.
"""

import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from amclr_scale.checkpoint import delivery, files, marks, state
from amclr_scale.checkpoint.checkpointer import Checkpointer
from amclr_scale.checkpoint.delivery import arrange
from amclr_scale.checkpoint.remote_copy import RemoteCopy
from amclr_scale.checkpoint.signals import Signals
from amclr_scale.checkpoint.start import agree_on_start, lock_new
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.engine.batch_plan import make_plan
from amclr_scale.metrics.log import RunLog
from tests.checkpoint.test_delivery import HOW, equal, hashes, listed, names, node_of
from tests.checkpoint.trainer import CPU, SAMPLES, SIZE, Trainer

STEPS = 5


class PowerCutError(Exception):
    """Nothing is finished."""


def trained(home: Path, store: Path | None, cut: bool = False, **keys):
    """Go on from what is there, save after every second step; where it began, and what the model is.

    Args:
        store: None: one folder, that all ranks share.
        cut: all end in the midst of a save, of step 4.
    """
    rank, node, before = dist.get_rank(), node_of(home).parent if store else home, os.getcwd()
    node.mkdir(parents=True, exist_ok=True)
    os.chdir(node)  # a run has the same path on all nodes
    run = Path("run")
    trainer = Trainer(**HOW, **keys)
    tree = trainer.config.model_dump()
    settings = tree["run"] | {"name": "run", "folder": ".", "shared": store is None}
    settings |= {"remote": f"file://{store}"} if store else {}
    often = tree["checkpoint"] | {"every_minutes": None, "every_samples": 2 * SIZE, "keep": 9}
    train = tree["train"] | {"samples": STEPS * SIZE}
    config = type(trainer.config).model_validate(
        tree | {"run": settings, "checkpoint": often, "train": train, "resume": "auto"}
    )
    plan, tokenizer = make_plan(config, SAMPLES, dist.get_world_size()), load_tokenizer("emoji", 8)
    found, folder, lock = agree_on_start(config, run, "f", tokenizer, rank)
    lock = lock or lock_new(folder, rank, config.run.shared)
    if rank == 0 and not found:
        (folder / "environment.json").write_text('{"time": "now", "host": "here"}')
    carrying = None if store is None else arrange(folder, lock, rank)
    begin = found.step(config) if found else 0
    if found:
        here = carrying.fetch(found) if carrying else found
        state.restore(here.checkpoint, trainer.engine, trainer.objective, CPU, teacher=trainer.teacher)
        if carrying:
            carrying.forget()
    elsewhere = marks.step_elsewhere(run)[1]
    with lock, RunLog(folder, config, speaks=rank == 0, total_steps=STEPS) as log, Signals() as signals:
        log.say = lambda words: None
        saver = Checkpointer(
            folder, config, plan, engine=trainer.engine, objective=trainer.objective, fingerprint="f",
            tokenizer=tokenizer, log=log, signals=signals, device=CPU, teacher=trainer.teacher, delivery=carrying,
            found=found,
        )  # fmt: skip
        hooks = [saver, *([RemoteCopy(folder, config, saver)] if store else [])]
        try:
            with hooks[0], hooks[-1]:
                for done in range(begin + 1, STEPS + 1):
                    trainer.train(done - 1, done)
                    for hook in hooks:
                        hook.after_step(plan.position(done))
                    while store and rank == 0 and hooks[-1].mirror.busy:
                        time.sleep(0.01)
                    if cut and done == 4:
                        raise PowerCutError
        except PowerCutError:
            pass
    everything = trainer.everything()
    dist.barrier()
    trainer.close()
    os.chdir(before)
    return begin, elsewhere, everything


@pytest.mark.slow
def test_the_store_has_the_pieces_of_all_nodes_and_other_nodes_go_on_from_there(ranks, tmp_path):
    """Bit for bit what a run in one folder comes to; then at another ZeRO stage, and with rank 0 on the other node."""
    whole = ranks(2, trained, tmp_path / "whole", None, zero_stage=2)
    store = tmp_path / "store"
    ranks(2, trained, tmp_path / "first", store, cut=True, zero_stage=2)
    there = store / "run" / "checkpoints"
    assert files.steps(there) == [2]
    pieces = {f"rank_{rank:05}.safetensors" for rank in range(2)}
    assert pieces < hashes(there / files.name_of(2)).keys()
    assert all((there / files.name_of(2) / file["name"]).stat().st_size == file["size"] for file in
               listed(there / files.name_of(2)))  # fmt: skip

    told = ranks(2, trained, tmp_path / "second", store, zero_stage=2)
    assert [begin for begin, *_ in told] == [2] * 2
    assert [elsewhere for _, elsewhere, _ in told] == [0, 2]
    equal(whole, told)
    last = files.name_of(STEPS)
    assert hashes(there / last) == hashes(tmp_path / "whole" / "run" / "checkpoints" / last)
    assert names(tmp_path / "second" / "b") == [f"run/{marks.ELSEWHERE}"]

    files.remove(there / last)  # it was not uploaded
    (tmp_path / "third").mkdir()
    (tmp_path / "second" / "b").rename(tmp_path / "third" / "a")  # which knows that the other node has more
    (tmp_path / "second" / "a").rename(tmp_path / "third" / "b")
    told = ranks(2, trained, tmp_path / "third", store, zero_stage=1)
    assert [(begin, elsewhere) for begin, elsewhere, _ in told] == [(4, 0), (4, 4)]
    assert files.steps(there) == [5, 4, 2]
    assert {file["name"] for file in listed(there / last)} >= pieces
    assert delivery.RECEIVED not in {path.name for path in (tmp_path / "third").rglob("*")}
