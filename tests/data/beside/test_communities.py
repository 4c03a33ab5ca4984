"""Communities are dealt whole: each sample once per epoch, the same batch on any ranks, from any step on."""

import json
import os
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from amclr_scale.commands.communities import main as group
from amclr_scale.config.load import load
from amclr_scale.data.beside.communities import CommunityOrder
from amclr_scale.data.beside.partition import communities_of, graph_of, inside
from amclr_scale.data.indexing import open_index
from amclr_scale.errors import UserError
from tests.data.shards import settings, write_shards
from tests.data.test_loader import take

B = 8
HEADER = b"\x93NUMPY\x01\x00\x79\x00{'descr': '<i8', 'fortran_order': False, %-79s\n"  # of a .npy file


def row(order, steps, batch_size=B):
    return np.concatenate([order.batch(step, batch_size).ids for step in range(steps)])


@pytest.mark.parametrize(
    ("sizes", "batch_size"), [([4] * 10, 8), ([4] * 10 + [3], 8), ([5, 1, 9, 2, 2, 7], 6), ([3], 4)]
)
def test_each_sample_comes_once_per_epoch_and_communities_stay_together(sizes, batch_size):
    communities = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)) * 3, sizes))  # with gaps
    order = CommunityOrder(communities, seed=1)
    N = len(communities)
    assert order.samples_per_epoch == N
    steps = 4 * N // batch_size
    stream = row(order, steps, batch_size)
    passes = np.concatenate([order.batch(step, batch_size).passes for step in range(steps)])
    for epoch in range(3):
        ids = stream[epoch * N : (epoch + 1) * N]
        assert sorted(ids) == list(range(N))
        assert set(passes[epoch * N : (epoch + 1) * N]) == {epoch}
        changes = np.count_nonzero(np.diff(communities[ids]))
        assert changes == len(sizes) - 1
    if N % batch_size == 0:
        assert all(len(set(communities[batch])) == 2 for batch in stream.reshape(-1, batch_size))
    if len(sizes) > 3:
        assert stream[:N].tolist() != stream[N : 2 * N].tolist() != CommunityOrder(communities, seed=2)


def test_ranks_share_a_batch_that_follows_from_its_number_alone():
    communities = np.arange(37) // 4
    order = pickle.loads(pickle.dumps(CommunityOrder(communities, seed=0)))
    for step in (0, 3, 4, 5, 999):
        whole = CommunityOrder(communities, seed=0).batch(step, B)
        for W in (1, 2, 4, 8):
            parts = [order.batch(step, B, rank, W) for rank in range(W)]
            assert np.array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
            assert np.array_equal(np.concatenate([part.passes for part in parts]), whole.passes)


@pytest.mark.parametrize("look_back", [1, 20, 65_536])
def test_last_visits_are_those_of_the_steps_before(look_back, monkeypatch):
    monkeypatch.setattr("amclr_scale.data.beside.communities._LOOK_BACK", look_back)
    order, asked = CommunityOrder(np.arange(21) // 5, seed=3), np.array([20, 3, 7, 0])
    for step in (0, 1, 2, 9):
        wanted = [max((n for n in range(step) if i in order.batch(n, 4).ids), default=-1) for i in asked]
        assert order.last_visits(asked, step, 4).tolist() == wanted


def test_batches_of_a_run_are_those_of_any_ranks_workers_and_interruptions(tmp_path):
    write_shards(tmp_path, [5, 1, 26])
    communities = np.random.default_rng(0).permutation(32) // 4
    np.save(tmp_path / "c.npy", communities)
    data = settings(str(tmp_path), batches="similar", communities=str(tmp_path / "c.npy"))
    whole = take(data, 8)
    assert Counter(torch.cat([batch.ids for batch in whole]).tolist()) == Counter(list(range(32)) * 2)
    assert all(len(set(communities[batch.ids])) == 2 for batch in whole)
    again = take(data, 5, start_step=3, workers=1)
    halves = zip(take(data, 8, rank=0, world_size=2), take(data, 8, rank=1, world_size=2), strict=True)
    for batch, parts in zip(whole, halves, strict=True):
        assert torch.equal(batch.ids, torch.cat([part.ids for part in parts]))
        assert torch.equal(batch.images[0], torch.cat([part.images[0] for part in parts]))
    for batch, same in zip(whole[3:], again, strict=True):
        assert torch.equal(batch.ids, same.ids)
        assert torch.equal(batch.images[0], same.images[0])


def planted(clusters=6, size=5, width=16):
    """Features of samples in clusters that lie apart, mixed: (N, R), and the cluster of each."""
    generator = np.random.default_rng(0)
    label = generator.permutation(np.repeat(np.arange(clusters), size))
    centres = np.linalg.qr(generator.normal(size=(width, width)))[0][:clusters]
    return (centres[label] + 0.05 * generator.normal(size=(len(label), width))).astype(np.float32), label


def test_clusters_of_that_size_are_found():
    features, label = planted()
    ranked = np.argsort(-features @ features.T, axis=1, kind="stable")
    graph = graph_of(ranked[:, :5])
    found = communities_of(graph, 5, seed=0)
    assert len({(a, b) for a, b in zip(found.tolist(), label.tolist(), strict=True)}) == 6
    assert inside(graph, found) == 1
    assert inside(graph, np.arange(30)) == 0


@pytest.mark.parametrize("size", [2, 7, 23, 40])
def test_each_sample_that_joins_has_the_most_edges_into_its_community(size, monkeypatch):
    neighbours = np.random.default_rng(1).random((40, 40)).argsort(axis=1)[:, :4]
    graph = graph_of(neighbours)
    dense = np.zeros((40, 40), dtype=int)
    for i, pointed in enumerate(neighbours):
        for j in set(pointed.tolist()) - {i}:  # itself does not count
            dense[i, j] += 1
            dense[j, i] += 1
    for i in range(40):
        here = slice(graph.first[i], graph.first[i + 1])
        assert dict(zip(graph.others[here].tolist(), graph.weights[here].tolist(), strict=True)) == {
            j: w for j, w in enumerate(dense[i].tolist()) if w
        }
    joined = list[int]()

    class Noted(np.ndarray):
        def __setitem__(self, key, value):
            joined.append(int(key))
            super().__setitem__(key, value)

    real = np.full
    monkeypatch.setattr("amclr_scale.data.beside.partition.np.full", lambda *a: real(*a).view(Noted))
    found = np.asarray(communities_of(graph, size, seed=0))
    assert sorted(Counter(found.tolist()).values(), reverse=True)[: 40 // size] == [size] * (40 // size)
    left = set(range(40))
    for place, sample in enumerate(joined):
        before = [i for i in joined[:place] if found[i] == found[sample]]
        gain = {i: int(dense[i, before].sum()) for i in left}
        if before:
            assert gain[sample] == max(gain.values())
        left.remove(sample)
    assert not left


def test_the_command_groups_what_a_frozen_model_finds_similar(tmp_path, capsys):
    write_shards(tmp_path, [12, 18])
    features, label = planted()
    np.save(tmp_path / "f.npy", features)
    both = ["--image", str(tmp_path / "f.npy"), "--text", str(tmp_path / "f.npy")]
    out = tmp_path / "c.npy"
    line = [str(tmp_path), *both, "--out", str(out), "--size", "5", "--skip", "1", "--neighbours", "4"]
    assert group(line) == 0
    assert (
        "6 communities of 5 of 30 samples; 100.0% of edges are inside one, 13.8% by chance" in capsys.readouterr().out
    )
    found = np.load(out)
    assert len({(a, b) for a, b in zip(found.tolist(), label.tolist(), strict=True)}) == 6
    about = json.loads((tmp_path / "c.npy.json").read_text())
    assert about["samples"] == open_index(settings(str(tmp_path))).fingerprint
    for words, told in (
        (["--size", "1"], "--size: expected 2 to 30 in a data set of 30 samples, got 1"),
        (["--skip", "29"], "--skip: expected 0 to 28 in a data set of 30 samples, got 29"),
        (["--neighbours", "29"], "--neighbours: expected 1 to 28 in a data set of 30 samples, got 29"),
        (["--out", f"{tmp_path}/no/c.npy"], "--out: expected a name in a folder that is there, got "),
        (["--out", "c.txt"], "--out: expected a name that ends in .npy, got c.txt"),
    ):
        assert group([*line, *words]) == 2
        assert told in capsys.readouterr().err


def test_mistakes_are_told(tmp_path):
    write_shards(tmp_path / "a", [16])
    write_shards(tmp_path / "b", [16, 1])
    fingerprint = open_index(settings(str(tmp_path / "b"))).fingerprint
    for name, rows, told in (
        ("none", None, "expected a .npy file of communities, got: "),
        ("empty", b"", "expected a .npy file of communities, got: "),
        ("vast", HEADER % b"'shape': (1125899906842624,)}", "got: mmap length is greater than file size"),
        ("forged", HEADER % b"'shape': ((((", "expected a .npy file of communities, got: "),
        ("pipe", os.mkfifo, "got: a folder, a named pipe or a device; "),
        ("zip", b"PK\3\4", "expected a .npy file of communities, got: "),
        ("floats", np.ones(16), r"expected integers of at least 0, one for each sample, got float64 of shape \(16,\)"),
        ("flat", np.ones((16, 1), int), r"got int64 of shape \(16, 1\)"),
        ("below", np.arange(16) - 1, r"got int64 of shape \(16,\) with -1 among them"),
        ("few", np.arange(15), "expected the communities of the 16 samples in data.train, got 15; "),
        ("other", np.arange(16), rf"got 16 of another data set \(fingerprint {fingerprint}\)"),
    ):
        file = tmp_path / f"{name}.npy"
        if rows is os.mkfifo:
            rows(file)
        elif isinstance(rows, bytes):
            file.write_bytes(rows)
        elif rows is not None:
            np.save(file, rows)
        if name == "other":
            (tmp_path / "other.npy.json").write_text(json.dumps({"samples": fingerprint}))
        with pytest.raises(UserError, match=f"data.communities: .*{name}.npy: .*{told}"):
            take(settings(str(tmp_path / "a"), batches="similar", communities=str(file)), 1)
    for words, told in (
        (["data.batches=similar"], "data.communities: expected the .npy that amclr-scale shards communities wrote"),
        (["data.communities=c.npy"], "data.communities: has no meaning with data.batches=random"),
        (
            ["data.batches=similar", "data.communities=c.npy", "data.weights=[2]"],
            "data.weights: expected none with data.batches=similar",
        ),
    ):
        with pytest.raises(UserError, match=told):
            load(None, words)


class Far(list):
    remote = np.array([True])


def test_other_communities_are_another_order_of_the_data(tmp_path):
    from amclr_scale.data.beside.communities import order_of_communities

    write_shards(tmp_path, [16])
    index, digests = open_index(settings(str(tmp_path))), set()
    for number, rows in enumerate((np.arange(16) // 4, np.arange(16) // 2)):
        np.save(tmp_path / f"{number}.npy", rows)
        data = settings(str(tmp_path), batches="similar", communities=str(tmp_path / f"{number}.npy"))
        digests.add(order_of_communities(data, index, 0)[1])
    assert len(digests) == 2
    far = SimpleNamespace(shards=Far([SimpleNamespace(url="https://host/0.tar")]))
    with pytest.raises(
        UserError, match=r"data\.batches: similar reads samples from all over the data set, expected shards on"
    ):
        order_of_communities(data, far, 0)
