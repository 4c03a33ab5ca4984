"""Retrieval by tokens is its definition, however many ranks and whatever the tiles; and an evaluator of every split."""

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.errors import UserError
from amclr_scale.evaluation.foreign.model import Foreign
from amclr_scale.evaluation.progress import EvaluationProgress
from amclr_scale.evaluation.retrieval import Ranks, retrieval
from amclr_scale.evaluation.run import Evaluator
from amclr_scale.evaluation.tokens.retrieval import AT_ONCE, token_retrieval
from tests.evaluation.shards import write_split
from tests.evaluation.test_run import called, model, recipe

N, M, N1, N2, D = 7, 12, 3, 4, 5


def gallery() -> tuple[torch.Tensor, ...]:
    """Tokens and masks of images and texts, the image of each text, and which texts are the same caption."""
    g = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(k, n, D, generator=g, dtype=torch.float64), dim=2) for k, n in ((N, N1), (M, N2))
    )
    masks = [torch.arange(n) <= torch.randint(n, (k, 1), generator=g) for k, n in ((N, N1), (M, N2))]
    owners = torch.cat([torch.arange(N), torch.randint(N, (M - N,), generator=g)])
    groups = torch.arange(M)
    groups[8], text[8], masks[1][8] = groups[2], text[2], masks[1][2]
    return image, masks[0], text, masks[1], owners, groups


def measured(at_once: int = AT_ONCE) -> Ranks:
    """With three ranks the last one has no images."""
    image, image_mask, text, text_mask, owners, groups = gallery()
    cut_i, cut_t = ([0, 3, N, N], [0, 5, 5, M]) if world_size() == 3 else ([0, N], [0, M])
    i, t = (slice(cut[rank()], cut[rank() + 1]) for cut in (cut_i, cut_t))
    return token_retrieval(
        (image[i], image_mask[i]), (text[t], text_mask[t]), image_of_text=owners[t], caption_groups=groups[t],
        at_once=at_once,
    )  # fmt: skip


def definition() -> tuple[list[int], list[int]]:
    image, image_mask, text, text_mask, owners, groups = gallery()

    def score(anchors: torch.Tensor, keys: torch.Tensor) -> float:
        return float((anchors @ keys.T).max(1).values.mean())

    tokens = (
        [x[m] for x, m in zip(image, image_mask, strict=True)],
        [x[m] for x, m in zip(text, text_mask, strict=True)],
    )
    by_image = [[score(tokens[0][i], tokens[1][j]) for j in range(M)] for i in range(N)]
    by_text = [[score(tokens[1][j], tokens[0][i]) for j in range(M)] for i in range(N)]
    of_images, of_texts = [], []
    for i in range(N):
        own = [j for j in range(M) if owners[j] == i]
        right = {j for j in range(M) if any(groups[j] == groups[k] for k in own)}
        best = max(by_image[i][j] for j in own)
        of_images.append(1 + sum(by_image[i][j] >= best - 1e-12 for j in range(M) if j not in right))
    for j in range(M):
        own = by_text[owners[j]][j]
        of_texts.append(1 + sum(by_text[i][j] >= own - 1e-12 for i in range(N) if i != owners[j]))
    return of_images, of_texts


@pytest.mark.parametrize("at_once", [1, 40, AT_ONCE])
def test_it_is_its_definition(at_once):
    found = measured(at_once)
    assert (found.image_to_text.tolist(), found.text_to_image.tolist()) == definition()


def test_any_number_of_ranks(ranks):
    for found in ranks(3, measured, 40):
        assert (found.image_to_text.tolist(), found.text_to_image.tolist()) == definition()


def test_one_token_each_is_retrieval():
    image, _, text, _, owners, groups = gallery()
    there = [torch.ones(len(x), 1, dtype=torch.bool) for x in (image, text)]
    found = token_retrieval(
        (image[:, :1], there[0]), (text[:, :1], there[1]), image_of_text=owners, caption_groups=groups
    )
    plain = retrieval(image[:, 0], text[:, 0], image_of_text=owners, caption_groups=groups)
    for name in ("image_to_text", "text_to_image", "text_to_image_filtered", "rivals_of_image"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name


def test_it_is_an_evaluator_that_is_asked_for(tmp_path):
    split = str(write_split(tmp_path / "val", 9))
    config = recipe(split, evaluators=["token_retrieval"])
    results = Evaluator(config)(model(config))
    numbers = {key.rpartition("/")[2] for key in results}
    assert {"token_image_to_text_R@1", "token_text_to_image_R@10", "token_R@mean", "image_to_text_R@1"} <= numbers
    assert 0 <= results[f"{called(split)}/token_image_to_text_R@1"] <= 1
    assert "token_R@mean" not in {key.rpartition("/")[2] for key in Evaluator(recipe(split))(model(config))}
    evaluator, counted = Evaluator(config), model(config).eval()
    with EvaluationProgress("a", evaluator.items(), speaks=False) as progress:  # calls that hide the model behind them
        again = evaluator.measure(progress.watch(counted))
    assert again[f"{called(split)}/token_R@mean"] == results[f"{called(split)}/token_R@mean"]
    counted.image_tokens = None
    with pytest.raises(
        UserError, match=r"^model\.image\.name: image_tokens are asked for \(objective\.name, evaluation"
    ):
        evaluator.measure(counted)
    foreign = Foreign(torch.nn.Linear(2, 2), torch.nn.Flatten(), torch.nn.Flatten(), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(
        UserError, match=r"^evaluation\.evaluators: token_retrieval compares tokens, which are not known"
    ):
        foreign(tokens=True)
