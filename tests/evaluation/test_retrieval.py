"""Retrieval is its definition, written out with loops, whatever the tiles and however many ranks."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.evaluation.retrieval import Ranks, retrieval
from amclr_scale.torchvision_ops import import_torchvision

N, D = 11, 4


def gallery(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (N, D), texts (M, D), the image of each text, and which texts are the same caption."""
    g = torch.Generator().manual_seed(len(kind))
    image = F.normalize(torch.randn(N, D, generator=g, dtype=torch.float64), dim=-1)
    if kind == "pairs":
        owners = torch.randperm(N, generator=g)
    else:
        owners = torch.cat([torch.arange(N), torch.randint(N, (17,), generator=g)])[torch.randperm(N + 17, generator=g)]
    text = F.normalize(image[owners] + 0.8 * torch.randn(len(owners), D, generator=g, dtype=torch.float64), dim=-1)
    groups = torch.arange(len(owners))
    if kind == "copies":
        for copy, original in ((3, 7), (4, 7), (9, 12), (20, 21), (0, 21)):
            groups[copy], text[copy] = groups[original], text[original]
    return image, text, owners, groups


def definition(image, text, owners, groups) -> dict[str, list[int]]:
    """The module's docstring, one comparison at a time."""
    M, tie = len(text), 1e-12
    score = [[float(image[i] @ text[j]) for j in range(M)] for i in range(N)]
    out: dict[str, list[int]] = {"image_to_text": [], "text_to_image": [], "text_to_image_filtered": []}
    for i in range(N):
        own = [j for j in range(M) if owners[j] == i]
        best = max(score[i][j] for j in own)
        right = {j for j in range(M) if any(groups[j] == groups[k] for k in own)}
        out["image_to_text"].append(1 + sum(score[i][j] >= best - tie for j in range(M) if j not in right))
    for j in range(M):
        own = score[owners[j]][j]
        same = {int(owners[k]) for k in range(M) if groups[k] == groups[j]}
        ahead = [i for i in range(N) if i != owners[j] and score[i][j] >= own - tie]
        out["text_to_image"].append(1 + len(ahead))
        out["text_to_image_filtered"].append(1 + sum(i not in same for i in ahead))
    return out


def measured(kind: str, tile: tuple[int, int] | None) -> Ranks:
    """Unequal shares: the last rank has the fewest images and the most texts."""
    image, text, owners, groups = gallery(kind)
    W, r = world_size(), rank()
    cut_i = [0, 7, 10, N] if W == 3 else [0, 8, N] if W == 2 else [0, N]
    cut_t = [0, 0, 3, len(text)] if W == 3 else [0, 2, len(text)] if W == 2 else [0, len(text)]
    mine = slice(cut_t[r], cut_t[r + 1])
    return retrieval(
        image[cut_i[r] : cut_i[r + 1]], text[mine], image_of_text=owners[mine], caption_groups=groups[mine], tile=tile
    )


@pytest.mark.parametrize(
    ("kind", "tile"), itertools.product(("pairs", "several", "copies"), (None, (1, 1), (4, 5), (11, 3)))
)
def test_ranks_are_the_definition(kind, tile):
    got, want = measured(kind, tile), definition(*gallery(kind))
    for name in want:
        assert getattr(got, name).tolist() == want[name], name
    if kind != "copies":
        assert torch.equal(got.text_to_image, got.text_to_image_filtered)
        assert not got.copies.any()


def test_any_number_of_ranks_gives_the_same(ranks):
    for kind, W in (("copies", 2), ("several", 3), ("copies", 3)):
        want = measured(kind, None)
        for got in ranks(W, measured, kind, (3, 4)):
            for field in vars(want):
                assert torch.equal(getattr(got, field), getattr(want, field)), field


def test_ties_count_against_the_model():
    image = torch.eye(3)[[0, 0, 1, 2]]  # the first two images look the same
    ranks = retrieval(image, torch.eye(3)[[0, 0, 1, 2]], image_of_text=torch.arange(4))
    assert ranks.image_to_text.tolist() == [2, 2, 1, 1]
    assert ranks.text_to_image.tolist() == [2, 2, 1, 1]
    collapsed = retrieval(torch.ones(5, 2) / 2**0.5, torch.ones(5, 2) / 2**0.5, image_of_text=torch.arange(5))
    assert collapsed.image_to_text.tolist() == collapsed.text_to_image.tolist() == [5] * 5


@pytest.mark.parametrize("spoilt", ["everything", "one image", "one text"])
def test_features_that_are_no_numbers_count_against_the_model(spoilt):
    """A comparison with nan is false: counted the other way round, a model that has diverged would be perfect."""
    image, text = torch.eye(6), torch.eye(6)
    if spoilt != "one text":
        image[2 if spoilt == "one image" else slice(None)] = torch.nan
    if spoilt != "one image":
        text[2 if spoilt == "one text" else slice(None)] = torch.nan
    found = retrieval(image, text, image_of_text=torch.arange(6), tile=(4, 4))
    worst = [6] * 6
    last, second = [1, 1, 6, 1, 1, 1], [2, 2, 6, 2, 2, 2]
    expected = {"everything": (worst, worst), "one image": (last, second), "one text": (second, last)}[spoilt]
    assert (found.image_to_text.tolist(), found.text_to_image.tolist()) == expected


@pytest.mark.parametrize("width", [33, 77, 512, 1000])
def test_rounding_does_not_break_a_tie(width):
    """Products of equal vectors may differ in the last bit, by how they were summed."""
    image = F.normalize(torch.randn(1, width, generator=torch.Generator().manual_seed(width)), dim=-1).repeat(67, 1)
    ranks = retrieval(image, image.clone(), image_of_text=torch.arange(67), tile=(5, 13))
    assert ranks.image_to_text.tolist() == ranks.text_to_image.tolist() == [67] * 67


def test_a_copy_of_the_own_caption_is_no_rival_but_an_image_with_it_is():
    image = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # images 0 and 1 have the same caption
    same = retrieval(image, text, image_of_text=torch.arange(3), caption_groups=torch.tensor([5, 5, 2]))
    assert same.image_to_text.tolist() == [1, 1, 1]
    assert same.text_to_image.tolist() == [1, 2, 1]
    assert same.text_to_image_filtered.tolist() == [1, 1, 1]
    assert same.plain()["shared_captions"] == 2
    assert "text_to_image_filtered_R@1" in same.numbers()
    other = retrieval(image, text, image_of_text=torch.arange(3))
    assert other.image_to_text.tolist() == [2, 2, 1]
    assert "text_to_image_filtered_R@1" not in other.numbers()


def test_numbers_are_shares_of_ranks():
    ranks = measured("several", None)
    numbers = {name: one.value for name, one in ranks.numbers().items()}
    M = len(ranks.text_to_image)
    for k in (1, 5, 10):
        assert numbers[f"image_to_text_R@{k}"] == pytest.approx(sum(r <= k for r in ranks.image_to_text.tolist()) / N)
        assert numbers[f"text_to_image_R@{k}"] == pytest.approx(sum(r <= k for r in ranks.text_to_image.tolist()) / M)
    for way in ("image_to_text", "text_to_image"):
        assert numbers[f"{way}_R@mean"] == pytest.approx(sum(numbers[f"{way}_R@{k}"] for k in (1, 5, 10)) / 3)
    assert numbers["R@mean"] == pytest.approx((numbers["image_to_text_R@mean"] + numbers["text_to_image_R@mean"]) / 2)
    middle = sorted(ranks.image_to_text.tolist())[N // 2]
    assert ranks.plain()["image_to_text_median_rank"] == middle


def test_errors_are_of_images_with_all_their_captions_and_chance_counts_who_can_be_wrong():
    """By hand for R@1: m of w_c captions of image c, a_c of them hits; a copy of a caption is no wrong answer."""
    ranks, (_, _, owners, groups) = measured("copies", None), gallery("copies")
    numbers, M = ranks.numbers(), len(owners)
    images = [[j for j in range(M) if owners[j] == i] for i in range(N)]
    bearers = [{int(owners[k]) for k in range(M) if groups[k] == groups[j]} for j in range(M)]
    for name, others in (
        ("text_to_image", [N - 1] * M), ("text_to_image_filtered", [N - len(same) for same in bearers])
    ):  # fmt: skip
        hits = [float(found <= 1) for found in getattr(ranks, name).tolist()]
        mean = sum(hits) / M
        squares = [(sum(hits[j] for j in own) - mean * len(own)) ** 2 for own in images]
        assert numbers[f"{name}_R@1"].standard_error == pytest.approx(sum(squares) ** 0.5 / M)
        assert numbers[f"{name}_R@1"].chance == pytest.approx(sum(1 / (1 + wrong) for wrong in others) / M)
    chances = []
    for own in images:
        wrong = sum(all(groups[j] != groups[k] for k in own) for j in range(M))
        assert wrong < M - len(own) or not any(len(bearers[k]) > 1 for k in own)
        chances.append(len(own) / (len(own) + wrong))
    assert numbers["image_to_text_R@1"].chance == pytest.approx(sum(chances) / N)
    hits = [float(found <= 1) for found in ranks.image_to_text.tolist()]
    error = numbers["image_to_text_R@1"].standard_error
    assert error == pytest.approx((sum(hits) / N * (1 - sum(hits) / N) / N) ** 0.5)


def test_chance_is_what_random_features_reach():
    g = torch.Generator().manual_seed(0)
    _, _, owners, groups = gallery("copies")
    sums, runs = {}, 100
    for _ in range(runs):
        image, text = (F.normalize(torch.randn(n, 16, generator=g), dim=-1) for n in (N, len(owners)))
        numbers = retrieval(image, text, image_of_text=owners, caption_groups=groups).numbers()
        for name, one in numbers.items():
            if one.chance is not None:
                sums[name] = sums.get(name, 0.0) + one.value
    for name, total in sums.items():
        chance = numbers[name].chance
        assert total / runs == pytest.approx(chance, abs=4 * (chance * (1 - chance) / runs / N) ** 0.5 + 1e-9), name


def test_mistakes():
    image, text, owners, _ = gallery("pairs")
    with pytest.raises(ValueError, match=r"^image_of_text: expected numbers from 0 to 10, got 1 to 11"):
        retrieval(image, text, image_of_text=owners + 1)
    with pytest.raises(ValueError, match=r"^image_of_text: 1 of 11 images have no text, the first is image 3"):
        retrieval(image, text[owners != 3], image_of_text=owners[owners != 3])


def test_agrees_with_scikit_learn():
    """R@k from text to image is top-k accuracy where every image is a class."""
    from sklearn.metrics import top_k_accuracy_score

    image, text, owners, _ = gallery("several")
    numbers = measured("several", None).numbers()
    for k in (1, 5, 10):
        want = top_k_accuracy_score(owners.numpy(), (text @ image.T).numpy(), k=k, labels=range(N))
        assert numbers[f"text_to_image_R@{k}"].value == pytest.approx(want, abs=1e-12)


def test_agrees_with_torchmetrics():
    """R@k is its hit rate: each text asks all images, each image asks all texts, any of its captions will do."""
    import_torchvision()  # which torchmetrics imports
    from torchmetrics.retrieval import RetrievalHitRate

    image, text, owners, _ = gallery("several")
    numbers = measured("several", None).numbers()
    scores, right = image @ text.T, owners[None] == torch.arange(N)[:, None]  # (N, M)
    for k in (1, 5, 10):
        for way, asked, answers in (("image_to_text", scores, right), ("text_to_image", scores.T, right.T)):
            of_query = torch.arange(len(asked))[:, None].expand_as(asked)
            want = RetrievalHitRate(top_k=k)(asked.reshape(-1), answers.reshape(-1), of_query.reshape(-1))
            assert numbers[f"{way}_R@{k}"].value == pytest.approx(float(want), abs=1e-6)
