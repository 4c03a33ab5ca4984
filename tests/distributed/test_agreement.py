"""Ranks that differ are told so, all of them, with every key and who has what."""

from unittest import mock

import torch.distributed as dist

from amclr_scale.distributed import agreement
from amclr_scale.distributed.agreement import check_agreement
from amclr_scale.distributed.launcher import where
from amclr_scale.errors import AgreedError

SAME = {"seed": 0, "data.train": ["a", "b"], "optimizer.lr": 0.001}
OTHERS = [
    SAME,
    {**SAME, "optimizer.lr": 0.002},  # a value
    {**SAME, "data.train": ["b", "a"], "optimizer.lr": 0.002},  # an order, and another value
    {key: value for key, value in SAME.items() if key != "seed"},  # an older version's key is missing
]  # fmt: skip


def told() -> list[str]:
    """What each of `OTHERS` on rank 1 is told on this rank."""
    found = []
    for facts in OTHERS:
        with mock.patch.object(agreement.platform, "node", return_value=f"node{dist.get_rank()}"):
            try:
                check_agreement(facts if dist.get_rank() else SAME)
                found.append("")
            except AgreedError as error:
                found.append(str(error))
    return found


def test_every_difference_is_named_on_every_rank(ranks):
    zero, one = ranks(2, told)
    assert zero == one
    same, value, order, missing = zero
    advice = "start every node with the same command, code and data"
    lr = "optimizer.lr: expected the same on all ranks, got 0.001 on rank 0 (node0), 0.002 on rank 1 (node1)"
    assert same == ""
    assert value == f"{lr}\n{advice}"
    assert 'data.train: expected the same on all ranks, got ["a", "b"] on rank 0 (node0), ["b", "a"] on' in order
    assert lr in order
    assert (
        missing == f"seed: expected the same on all ranks, got 0 on rank 0 (node0), nothing on rank 1 (node1)\n{advice}"
    )


def test_many_differences_are_counted():
    """Of more than a message shows."""
    first = {f"key{k:02d}": "0" for k in range(agreement.SHOWN + 3)}
    everyone = [("a", {}), ("b", dict.fromkeys(first, "1"))]
    *lines, more, advice = agreement._differences(first, everyone)
    assert [line.partition(":")[0] for line in lines] == list(first)[: agreement.SHOWN]
    assert (more, advice) == ("and 3 more", "start every node with the same command, code and data")
    few = dict.fromkeys(list(first)[: agreement.SHOWN], "0")
    assert "more" not in agreement._differences(few, [("a", {}), ("b", dict.fromkeys(few, "1"))])[-2]


def test_ranks_in_words():
    hosts = ["a"] * 4 + ["b"] * 4
    assert where([3], hosts) == "rank 3 (a)"
    assert where([0, 1, 2, 3, 4, 5], hosts) == "ranks 0-3 (a), 4-5 (b)"
    assert where([0, 2, 3, 7], hosts) == "ranks 0 (a), 2-3 (a), 7 (b)"
