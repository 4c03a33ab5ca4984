"""What ranks of a run compare: all that has to be the same, nothing that a node may have its own way."""

import os
import subprocess
import sys
import time

import pytest

from amclr_scale.commands.agreement import facts
from amclr_scale.commands.job import prepare
from amclr_scale.config.load import load
from amclr_scale.distributed.launcher import RankInfo, free_port
from tests.commands.test_train import ROOT, SMALL
from tests.data.shards import pair, write_tar

PATTERN = "{00000..00001}.tar"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder with two shards, and another one with the same shards in the other order."""
    home = tmp_path_factory.mktemp("shards")
    for folder, names in (("a", (0, 1)), ("b", (1, 0))):
        (home / folder).mkdir()
        for name, content in enumerate(names):
            write_tar(home / folder / f"{name:05d}.tar", [m for i in range(20) for m in pair(20 * content + i)])
    return home


def compared(shards, *words, folder="a"):
    words = (f"data.cache={shards}/cache", f"data.train={shards}/{folder}/{PATTERN}", "data.lanes=1", *words)
    config = load(str(ROOT / SMALL[1]), [*SMALL[2:], "evaluation.classes=null", *words])
    prepared = prepare(config, RankInfo())
    prepared.inputs.loader.close()
    return facts(config, prepared)


def changed(before, after):
    return {key for key in {**before, **after} if before.get(key) != after.get(key)}


def test_what_is_compared(shards, tmp_path):
    before = compared(shards)
    assert changed(before, compared(shards)) == set()
    own = (f"data.cache={tmp_path}", "data.cache_gib=1", "execution.threads=2", "execution.workers=3")
    assert changed(before, compared(shards, *own)) == set()
    keys = {"optimizer.lr": 0.5, "seed": 3, "model.embedding_width": 32, "execution.zero_stage": 1,
            "run.diagnostics": True, "execution.similarity.chunk": 16, "objective.name": "dcl"}  # fmt: skip
    after = compared(shards, *(f"{key}={value}" for key, value in keys.items()))
    assert changed(before, after) >= keys.keys()
    assert changed(before, compared(shards, folder="b")) == {
        "data.train",
        "data.train: content and order of the shards",
    }
    more = compared(shards, f"data.train={shards}/a/00000.tar")
    assert changed(before, more) == {
        "data.train", "data.train: samples", "data.train: content of the shards",
        "data.train: content and order of the shards",
    }  # fmt: skip


def test_tokenizer_evaluation_and_versions_are_compared(shards):
    split = f"evaluation.splits={{{{x: '{shards}/{{}}/00000.tar'}}}}"
    before = compared(shards, split.format("a"))
    assert {"package torch", "package python", "amclr_scale's source files"} <= before.keys()
    after = compared(shards, split.format("b"), "data.tokenizer=clip")
    assert changed(before, after) == {
        "evaluation.splits.x", "evaluation.splits: x", "data.tokenizer", "data.tokenizer: what it does",
    }  # fmt: skip


def test_what_probes_learn_on_is_compared(shards, tmp_path):
    """Under one name, on a node whose copy has other labels."""
    shard, found = tmp_path / "shard.tar", []
    for first in (0, 1):
        write_tar(shard, [m for i in range(8) for m in pair(i, kind=f"class {(i + first) % 2}")])
        found.append(compared(shards, f"evaluation.probes=[{{train: {shard}, test: {shard}, classes: json.kind}}]"))
    assert changed(*found) == {f"evaluation.splits: {side} of probe {shard}" for side in ("train", "test")}


@pytest.mark.launch
def test_two_ranks_that_differ_end_with_words(shards, tmp_path):
    """Started by hand, as on two nodes; the shards lie under one name, in another order."""
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2",
        "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    began, ranks = time.monotonic(), []
    for rank, lr in enumerate(("0.001", "0.002")):
        words = [*SMALL, f"data.train='{PATTERN}'", "evaluation.classes=null", f"optimizer.lr={lr}", "data.lanes=2",
                 f"run.folder={tmp_path}/runs", f"data.cache={tmp_path}/cache"]  # fmt: skip
        words[1] = str(ROOT / words[1])
        command = [sys.executable, str(ROOT / "launch" / "train.py"), *words]
        ranks.append(subprocess.Popen(command, cwd=shards / "ab"[rank], env={**environment, "RANK": str(rank)},
                                      stderr=subprocess.PIPE, text=True))  # fmt: skip
    for process in ranks:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2, said
        assert "optimizer.lr: expected the same on all ranks, got 0.001 on rank 0 (" in said
        assert "data.train: content and order of the shards: expected the same on all ranks, got" in said
        assert "data.train: content of the shards" not in said
        assert "Traceback" not in said
    assert time.monotonic() - began < 90
    assert not (tmp_path / "runs").exists()
