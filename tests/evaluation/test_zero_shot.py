"""Zero-shot classification against its definition and scikit-learn."""

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.errors import UserError
from amclr_scale.evaluation.numbers import intervals
from amclr_scale.evaluation.shares import share
from amclr_scale.evaluation.zero_shot import accuracies, class_ranks, ensemble, prompts
from amclr_scale.torchvision_ops import import_torchvision

N, K, T, D = 53, 7, 3, 5


def problem():
    g = torch.Generator().manual_seed(0)
    encoded = torch.randn(K * T, D, generator=g, dtype=torch.float64)
    labels = torch.randint(K - 1, (N,), generator=g)  # the last class has no image
    image = F.normalize(torch.randn(N, D, generator=g, dtype=torch.float64), dim=-1)
    return encoded, image, labels


def places():
    encoded, image, labels = problem()
    mine = share(N)
    rows = slice(mine.start, mine.stop)
    return class_ranks(image[rows], ensemble(encoded, T), labels[rows])


def test_prompts_and_their_mean():
    assert prompts(["cat", "dog"], ["a {}.", "{c}!"]) == ["a cat.", "cat!", "a dog.", "dog!"]
    encoded, _, _ = problem()
    unit = encoded / encoded.norm(dim=1, keepdim=True)
    for k in range(K):
        mean = (unit[3 * k] + unit[3 * k + 1] + unit[3 * k + 2]) / 3
        torch.testing.assert_close(ensemble(encoded, T)[k], mean / mean.norm())
    for wrong in ("a photo", "{} {c}"):
        with pytest.raises(UserError, match=r"^evaluation.templates: expected one slot"):
            prompts(["cat"], [wrong])
    with pytest.raises(UserError, match=r"^evaluation.templates: expected at least one"):
        prompts(["cat"], [])


def test_agrees_with_scikit_learn_on_any_number_of_ranks(ranks):
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    encoded, image, labels = problem()
    scores = (image @ ensemble(encoded, T).T).numpy()
    here = places()
    for world_size in (2, 3):
        assert all(torch.equal(there, here) for there in ranks(world_size, places))
    numbers = accuracies(here, labels, K)
    assert set(numbers) == {"zero_shot_top1", "zero_shot_top3", "zero_shot_top5", "zero_shot_mean_per_class"}
    for k in (1, 3, 5):
        want = top_k_accuracy_score(labels.numpy(), scores, k=k, labels=range(K))
        assert numbers[f"zero_shot_top{k}"].value == pytest.approx(want, abs=1e-12)
        assert numbers[f"zero_shot_top{k}"].chance == k / K
    want = balanced_accuracy_score(labels.numpy(), scores.argmax(1))
    assert numbers["zero_shot_mean_per_class"].value == pytest.approx(want, abs=1e-12)


def test_agrees_with_torchmetrics():
    import_torchvision()  # which torchmetrics imports
    from torchmetrics.functional.classification import multiclass_accuracy

    encoded, image, labels = problem()
    scores = image @ ensemble(encoded, T).T
    numbers = accuracies(places(), labels, K)
    for k in (1, 3, 5):
        want = multiclass_accuracy(scores, labels, num_classes=K, average="micro", top_k=k)
        assert numbers[f"zero_shot_top{k}"].value == pytest.approx(float(want), abs=1e-6)
    of_class = multiclass_accuracy(scores, labels, num_classes=K, average="none")
    want = of_class[labels.unique()].mean()  # a class without images has no accuracy
    assert numbers["zero_shot_mean_per_class"].value == pytest.approx(float(want), abs=1e-6)


@pytest.mark.parametrize("spread", [0.0, 0.9])
def test_the_error_of_a_mean_per_class_is_that_of_resampled_images(spread):
    """Classes of very different size and difficulty: how many images of an easy class are drawn is no error."""
    g = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.full((60 * (c + 1),), c) for c in range(5)])
    right = torch.rand(len(labels), generator=g) < 0.05 + spread * (labels + 1) / 5
    found = accuracies(torch.where(right, 1, 2), labels, 6)["zero_shot_mean_per_class"]

    def mean(rows):
        return torch.stack([right[rows][labels[rows] == c].double().mean() for c in range(5)]).mean()

    drawn = torch.stack([mean(torch.randint(len(labels), (len(labels),), generator=g)) for _ in range(2000)])
    assert found.value == pytest.approx(float(mean(torch.arange(len(labels)))), abs=1e-12)
    assert found.standard_error == pytest.approx(float(drawn.std()), rel=0.07)
    want = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    (low, high) = intervals({"mean": found}, resamples=2000)["mean"]
    assert [low, high] == pytest.approx(want.tolist(), abs=0.1 * float(drawn.std()) * 4)


def test_classes_that_are_all_right_or_all_wrong_leave_no_error():
    labels = torch.arange(40) % 4
    found = accuracies(torch.where(labels < 2, 1, 2), labels, 4)["zero_shot_mean_per_class"]
    assert (found.value, found.standard_error) == (0.5, 0.0)


def test_a_class_that_is_listed_twice_ties():
    classes = torch.eye(3)[[0, 0, 1]]
    assert class_ranks(torch.eye(3)[[0, 1]], classes, torch.tensor([0, 2])).tolist() == [2, 1]


def test_scores_that_are_no_numbers_count_against_the_model():
    image = torch.eye(3)
    image[1] = torch.nan
    assert class_ranks(image, torch.eye(3), torch.arange(3)).tolist() == [1, 3, 1]
