"""Linear probe and nearest neighbours against scikit-learn, on one, two and three ranks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from amclr_scale.config.schema import Config
from amclr_scale.errors import UserError
from amclr_scale.evaluation.frozen_features import linear, neighbours
from amclr_scale.evaluation.frozen_features.measure import held_out
from amclr_scale.evaluation.frozen_features.places import places
from amclr_scale.evaluation.run import Evaluator
from amclr_scale.evaluation.shares import gather_rows, share
from tests.data.shards import write_shards

N, D, K = 203, 6, 4
PENALTIES = (1e-3, 1e-1)
KS, TEMPERATURES = (1, 5, 100, 500), (0.02, 0.1)  # 100: more than are chosen on, fewer than vote


def problem():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(K, (N,), generator=g)
    centres = torch.randn(K, D, generator=g, dtype=torch.float64)
    x = F.normalize(centres[y] + 1.5 * torch.randn(N, D, generator=g, dtype=torch.float64), dim=-1)
    queries = F.normalize(torch.randn(31, D, generator=g, dtype=torch.float64), dim=-1)
    return x, y, torch.arange(N) % 5 == 0, queries


def on_ranks():
    x, y, validation, queries = problem()
    rows, asked = (slice(s.start, s.stop) for s in (share(N), share(31)))
    x, y, validation = x[rows], y[rows], validation[rows]
    fitted = linear.fit(x, y, K, 1e-3)
    swept, scores = linear.sweep(x, y, validation, K, PENALTIES)
    pair, pairs = neighbours.sweep(x, y, validation, K, ks=KS, temperatures=TEMPERATURES)
    similarities, classes = neighbours.nearest(queries[asked], x, y, 20)
    votes = gather_rows(neighbours.vote(similarities, classes, K, 0.1))
    return fitted.weight, fitted.bias, swept.weight, swept.l2, scores, pair, pairs, votes


@pytest.fixture(scope="module")
def here():
    return on_ranks()


def logistic(x, y, l2):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=10_000).fit(x.numpy(), y.numpy())


def test_the_linear_probe_is_logistic_regression(here):
    x, y, validation, _ = problem()
    want = logistic(x, y, 1e-3)
    torch.testing.assert_close(here[0], torch.from_numpy(want.coef_), rtol=1e-4, atol=1e-4)
    shift = here[1] - torch.from_numpy(want.intercept_)  # a constant added to all biases changes nothing
    torch.testing.assert_close(shift, shift.mean().expand(K), rtol=0, atol=1e-4)
    for l2, accuracy in here[4].items():
        fitted = logistic(x[~validation], y[~validation], l2)
        assert accuracy == pytest.approx(fitted.score(x[validation].numpy(), y[validation].numpy()), abs=1e-12)
    assert here[4][here[3]] == max(here[4].values())
    torch.testing.assert_close(here[2], torch.from_numpy(logistic(x, y, here[3]).coef_), rtol=1e-3, atol=1e-3)


def test_nearest_neighbours_are_scikit_learns(here):
    from sklearn.neighbors import KNeighborsClassifier

    x, y, validation, queries = problem()

    def classifier(k, t, rows):
        model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / t))
        return model.fit(x[rows].numpy(), y[rows].numpy())

    votes = here[7] / here[7].sum(1, keepdim=True)
    everything = torch.ones(N, dtype=torch.bool)
    torch.testing.assert_close(votes, torch.from_numpy(classifier(20, 0.1, everything).predict_proba(queries.numpy())))
    assert set(here[6]) == {(k, t) for k in KS[:3] for t in TEMPERATURES}  # 500 is more than there are
    for (k, t), accuracy in here[6].items():
        want = classifier(k, t, ~validation).score(x[validation].numpy(), y[validation].numpy())
        assert accuracy == pytest.approx(want, abs=1e-12)
    assert here[6][here[5]] == max(here[6].values())


def test_of_equally_good_settings_the_largest_penalty_and_the_first_vote_are_taken():
    x = F.normalize(torch.tensor([[3.0, 1.0], [-3.0, 1.0]], dtype=torch.float64), dim=1).repeat(6, 1)
    y, validation = torch.arange(12) % 2, torch.arange(12) < 4
    classifier, scores = linear.sweep(x, y, validation, 2, (1e-3, 1e-1, 1e-2))
    assert set(scores.values()) == {1.0}
    assert classifier.l2 == 1e-1
    pair, scores = neighbours.sweep(x, y, validation, 2, ks=(3, 1), temperatures=(0.1, 0.02))
    assert set(scores.values()) == {1.0}
    assert pair == (3, 0.1)


def test_settings_are_chosen_as_they_are_measured_ties_count_against():
    """Pictures that are there twice, in two classes, and a model that maps everything to one point."""
    x = F.normalize(torch.tensor([[3.0, 1.0], [-3.0, 1.0]], dtype=torch.float64), dim=1).repeat(3, 1)
    y, validation = torch.tensor([0, 0, 1, 2, 0, 1]), torch.arange(6) > 3  # twins of classes 0 and 1, and of 0 and 2
    votes = neighbours.vote(*neighbours.nearest(x[validation], x[~validation], y[~validation], 2), 3, 0.1)
    assert places(votes, y[validation]).tolist() == [2, 3]
    for names in (torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0])):  # whichever class has the smallest number
        _, scores = neighbours.sweep(x, names[y], validation, 3, ks=(2,), temperatures=(0.1,))
        assert scores == {(2, 0.1): 0.0}
    _, scores = linear.sweep(torch.ones_like(x), torch.arange(6) % 2, validation, 2, (1e-2,))
    assert scores == {1e-2: 0.0}
    assert places(torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]), torch.tensor([0, 0])).tolist() == [2, 2]


def test_any_number_of_ranks_gives_the_same(ranks, here):
    for W in (2, 3):
        for there in ranks(W, on_ranks):
            for index in (0, 1, 2):
                torch.testing.assert_close(there[index], here[index], rtol=1e-4, atol=1e-5)
            assert there[3:7] == here[3:7]
            torch.testing.assert_close(there[7], here[7])


def test_no_temperature_is_too_small():
    votes = neighbours.vote(torch.tensor([[0.9, 0.8, -1.0]]), torch.tensor([[1, 0, 0]]), 3, 1e-6)
    assert votes.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("n", "share", "chosen"), [(2, 0.1, 1), (2, 0.9, 1), (3, 0.9, 2), (40, 0.1, 4), (1000, 0.25, 250)]
)
def test_some_are_chosen_on_and_some_are_left_to_learn_from(n, share, chosen):
    rows = held_out(n, share)
    assert (len(rows), int(rows.sum())) == (n, chosen)
    assert torch.equal(rows, held_out(n, share))  # on every rank
    if n == 1000:
        assert 95 < int(rows[500:].sum()) < 155  # not the first ones: classes come one after another


@pytest.mark.parametrize("classes", [{}, {"classes": "json.nowhere"}])
def test_a_class_that_is_not_there_is_told_by_the_probes_key(tmp_path, classes):
    """evaluation.classes is that of the splits, and changing it would change nothing where the probe has its own."""
    write_shards(tmp_path, [4])
    probe = {"train": str(tmp_path), "test": str(tmp_path), **classes}
    with pytest.raises(UserError, match=r"^evaluation.probes.classes: .* got None; say where classes are$"):
        Evaluator(Config.model_validate({"evaluation": {"classes": "json.concept", "probes": [probe]}}))
