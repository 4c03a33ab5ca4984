"""Geometry is its formulas, pair by pair."""

import math

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.evaluation.geometry import geometry, temperatures
from amclr_scale.evaluation.shares import share

N, D = 37, 5


def problem():
    g = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(N, D, generator=g, dtype=torch.float64) + s, dim=-1) for s in (0.5, 0.0))
    return x, y, torch.randint(6, (N,), generator=g)


def measured():
    rows = slice(share(N).start, share(N).stop)
    x, y, labels = problem()
    return geometry(x[rows], y[rows], labels[rows])


def test_every_quantity_is_its_formula():
    x, y, labels = problem()
    pairs = [(i, j) for i in range(N) for j in range(N) if i != j]

    def uniformity(a, b):
        return math.log(sum(math.exp(-2 * float((a[i] - b[j]).square().sum())) for i, j in pairs) / len(pairs))

    same = [float(x[i] @ x[j]) for i, j in pairs if labels[i] == labels[j]]
    singular = torch.linalg.svdvals(x)
    p = singular / singular.sum()
    got = measured()
    want = {
        "alignment": float((x - y).square().sum(1).mean()),
        "image_uniformity": uniformity(x, x),
        "text_uniformity": uniformity(y, y),
        "cross_uniformity": uniformity(x, y),
        "modality_gap": float((x.mean(0) - y.mean(0)).norm()),
        "image_diversity": sum(1 - float(x[i] @ x[j]) for i, j in pairs) / len(pairs),
        "text_diversity": sum(1 - float(y[i] @ y[j]) for i, j in pairs) / len(pairs),
        "image_effective_rank": float((-(p * p.log()).sum()).exp()),
        "image_tolerance": sum(same) / len(same),
    }
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=1e-10), name
    assert set(got) - set(want) == {"text_effective_rank"}


def test_any_number_of_ranks_gives_the_same(ranks, monkeypatch):
    want = measured()
    for W in (2, 3):
        for got in ranks(W, measured):
            assert got == pytest.approx(want, abs=1e-11)
    monkeypatch.setattr("amclr_scale.evaluation.geometry.ROWS", 4)
    assert measured() == pytest.approx(want, abs=1e-12)


def test_known_shapes():
    corners = torch.eye(4)
    got = geometry(corners, corners)
    assert got["alignment"] == got["modality_gap"] == 0
    assert got["image_diversity"] == pytest.approx(1)
    assert got["image_effective_rank"] == pytest.approx(4)
    assert got["image_uniformity"] == pytest.approx(-4)
    assert "image_tolerance" not in geometry(corners, corners, torch.arange(4))
    with pytest.raises(ValueError, match=r"^image: expected at least two pairs"):
        geometry(corners[:1], corners[:1])


def test_temperatures():
    values = torch.cat([torch.linspace(0, 1, 101), torch.tensor([math.nan, math.nan])])
    assert temperatures(values) == pytest.approx(
        {"mean": 0.5, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
    )
    with pytest.raises(ValueError, match=r"^values: expected at least one"):
        temperatures(torch.tensor([math.nan]))
