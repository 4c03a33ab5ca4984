"""`token_contrast` is its definition, for any tile, on any ranks, with any tokens left out; and holds one tile."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.memory.tracker import Tracker
from amclr_scale.similarity import contrast, token_contrast, using

B, N1, N2, D = 8, 3, 4, 6
Inputs = tuple[Tensor, ...]


def inputs(dtype: torch.dtype = torch.float64) -> Inputs:
    """Tokens of images (B, N1, D) and texts (B, N2, D), which of them count, and temperatures (B,)."""
    g = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(B, n, D, generator=g, dtype=torch.float64), dim=2) for n in (N1, N2))
    masks = [torch.rand(B, n, generator=g) < 0.6 for n in (N1, N2)]
    masks[0][2] = False  # none of this sample's: then all
    masks[1][:, 0] = True
    t = 0.02 + 0.1 * torch.rand(B, generator=g, dtype=torch.float64)
    return image.to(dtype), text.to(dtype), *masks, t.to(dtype)


def definition(image: Tensor, text: Tensor, image_mask: Tensor, text_mask: Tensor, t: Tensor) -> list[Tensor]:
    """Log-sums and positives of images and of texts."""
    image_mask, text_mask = (m | ~m.any(1, keepdim=True) for m in (image_mask, text_mask))
    products = torch.einsum("ikd,jrd->ikjr", image, text)
    products = products.masked_fill(~text_mask, -9.0).masked_fill(~image_mask[:, :, None, None], -9.0)
    of_image, of_text = (m.double() / m.sum(1, keepdim=True) for m in (image_mask, text_mask))
    s1 = torch.einsum("ikj,ik->ij", products.max(3).values, of_image.to(products))
    s2 = torch.einsum("ijr,jr->ij", products.max(1).values, of_text.to(products))
    found = []
    for s in (s1, s2.T):
        own = s.diagonal()
        found += [((s - own[:, None]) / t[:, None]).logsumexp(1), own]
    return [found[0], found[2], found[1], found[3]]


WEIGHTS = torch.rand(4, B, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def differentiated(values: list[Tensor], leaves: list[Tensor], mine: slice, which: list[int]) -> list[Tensor]:
    """Gradients of a sum with any upstream gradients, of some of the four values."""
    total = sum((values[k] * WEIGHTS[k][mine].to(values[k])).sum() for k in which)
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def run(chunk: int | str, gather: str = "all", which: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[list[Tensor], ...]:
    """This rank's values, gradients and expectations."""
    size = B // world_size()
    mine = slice(rank() * size, (rank() + 1) * size)
    image, text, image_mask, text_mask, t = (x[mine].clone() for x in inputs())
    leaves = [x.requires_grad_() for x in (image, text, t)]
    with using(chunk=chunk, gather=gather):
        both = token_contrast(image, text, image_mask, text_mask, temperature=t)
    values = [both.image.log_sum, both.text.log_sum, both.image.positive, both.text.positive]
    gradients = differentiated(values, leaves, mine, list(which))
    return [x.detach() for x in values], gradients, [both.image.expected, both.text.expected]


def wanted(which: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[list[Tensor], list[Tensor]]:
    image, text, image_mask, text_mask, t = inputs()
    leaves = [x.requires_grad_() for x in (image, text, t)]
    values = definition(image, text, image_mask, text_mask, t)
    return [x.detach() for x in values], differentiated(values, leaves, slice(None), list(which))


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for number, (x, y) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11, msg=lambda m, k=number: f"{k}: {m}")


@pytest.mark.parametrize("chunk", [1, 5, 8, 13, "auto"])
def test_matches_its_definition(chunk):
    values, gradients, _ = run(chunk)
    same(values, wanted()[0])
    same(gradients, wanted()[1])


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (1, 2)])
def test_gradients_of_some_of_what_it_gives(which):
    same(run(5, which=which)[1], wanted(which)[1])


@pytest.mark.parametrize(("W", "gather"), [(2, "all"), (2, "ring"), (4, "ring")])
def test_ranks_are_one_batch(ranks, W, gather):
    answers = ranks(W, run, 5, gather)
    for part, want in enumerate(wanted()):
        same([torch.cat(pieces) for pieces in zip(*(answer[part] for answer in answers), strict=True)], want)
    same([torch.cat(x) for x in zip(*(answer[2] for answer in answers), strict=True)], run(5)[2])


def test_of_equal_matches_the_first_has_the_gradient():
    image = torch.tensor([[[1.0, 0], [1, 0]], [[0, 1], [0, 1]]]).requires_grad_()
    text = torch.tensor([[[1.0, 0], [1, 0]], [[0, 1], [1, 0]]]).requires_grad_()
    token_contrast(image, text, temperature=1.0).image.positive[0].backward()
    assert torch.equal(text.grad[0], torch.tensor([[1.0, 0], [0, 0]]))  # both patches meet the first word
    assert torch.equal(image.grad[0], torch.tensor([[0.5, 0], [0.5, 0]]))
    assert not text.grad[1].any()


def test_one_token_each_is_contrast():
    image, text, *_, t = inputs()
    image, text = (x[:, :1].contiguous().requires_grad_() for x in (image, text))
    token_contrast(image, text, temperature=t).image.log_sum.sum().backward()
    one, other = (x.detach()[:, 0].clone().requires_grad_() for x in (image, text))
    both = contrast(one, other, temperature=t, centred=True)
    both.image.log_sum.sum().backward()
    torch.testing.assert_close(image.grad[:, 0], one.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(text.grad[:, 0], other.grad, rtol=1e-12, atol=1e-13)


def test_what_does_not_count_changes_nothing():
    image, text, image_mask, text_mask, t = inputs()
    before = token_contrast(image, text, image_mask, text_mask, temperature=t)
    text[~text_mask] = 50.0
    after = token_contrast(image, text, image_mask, text_mask, temperature=t)
    for side in ("image", "text"):
        assert torch.equal(getattr(before, side).log_sum, getattr(after, side).log_sum)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "fp32"), (torch.float32, "split"),
                                                  (torch.bfloat16, "auto")])  # fmt: skip
def test_narrower_features(dtype, precision):
    image, text, image_mask, text_mask, t = inputs(dtype)
    leaves = [x.requires_grad_() for x in (image, text)]
    with using(precision=precision, chunk=8):
        both = token_contrast(image, text, image_mask, text_mask, temperature=t.float())
        (both.image.log_sum.sum() + both.text.log_sum.sum()).backward()
    assert both.image.log_sum.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in leaves]
    values = definition(*exact, image_mask, text_mask, t.float().double())
    (values[0].sum() + values[1].sum()).backward()
    tolerance = 1e-4 if precision != "auto" else 2e-2
    torch.testing.assert_close(both.image.log_sum.double(), values[0], rtol=tolerance, atol=tolerance)
    for got, want in zip(leaves, exact, strict=True):
        assert (got.grad.double() - want.grad).norm() <= 2 * tolerance * want.grad.norm()


def test_it_holds_features_and_one_tile():
    """Far less than the products of all tokens, of which there are b n1 B n2."""
    b, n1, n2, width, chunk = 48, 5, 7, 16, 70
    image, text = (torch.randn(b, n, width).requires_grad_() for n in (n1, n2))
    tracker = Tracker()
    tracker.add([image, text], "before")
    before = tracker.total
    with tracker, using(chunk=chunk):
        both = token_contrast(image, text, temperature=0.1)
        (both.image.log_sum.sum() + both.text.log_sum.sum()).backward()
    features = 4 * b * (n1 + n2) * width
    assert tracker.peak - before < 2.2 * features + 6 * 4 * chunk**2 < 4 * b * n1 * b * n2


def test_mistakes_are_named():
    image, text, image_mask, text_mask, _ = inputs()
    for wrong, key in (
        ((image[:, 0], text), "image: expected tokens"),
        ((image, text[:4]), "text: expected"),
        ((image, text[..., :3]), "text: expected"),
        ((image.long(), text), "image: expected floating-point"),
        ((image, text, image_mask.long()), "image_mask: expected"),
        ((image, text, image_mask, text_mask[:, :2]), "text_mask: expected"),
    ):
        with pytest.raises(ValueError, match=f"^{key}"):
            token_contrast(*wrong, temperature=0.1)
    assert math.isfinite(float(token_contrast(image, text, temperature=0.005).image.log_sum.sum()))


def test_tokens_may_lie_in_any_order():
    image, text, image_mask, text_mask, t = inputs()
    found = []
    for lay in (lambda x: x, lambda x: x.mT.contiguous().mT):
        leaves = [lay(x.detach()).requires_grad_() for x in (image, text)]
        both = token_contrast(*leaves, image_mask, text_mask, temperature=t)
        (both.image.log_sum.sum() + both.text.log_sum.sum()).backward()
        found.append([both.image.log_sum, *(x.grad for x in leaves)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
