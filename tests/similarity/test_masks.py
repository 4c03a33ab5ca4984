"""Groups and margins: what `contrast` leaves out, by a whole matrix with holes, on any tile and number of ranks."""

import pytest
import torch
from torch import Tensor

from amclr_scale.similarity import contrast, rank, using, world_size
from tests.similarity.conftest import INTERPRETED
from tests.similarity.definition import Inputs, draw, relative_error

DISTRIBUTIONS = ("reduce_scatter", "column_sums", "two_blocks")
CASES = [
    {"exclude_positive": True},
    {"exclude_positive": False, "centred": True},
    {"exclude_positive": True, "centred": True, "group_keys": "own"},
    {"exclude_positive": False, "group_keys": "own", "margin": 0.05},
    {"exclude_positive": True, "centred": True, "margin": 0.1},
    {"exclude_positive": False, "centred": True, "margin": 0.0, "groups": 0},
]


def drawn_groups(B: int, extra: int, seed: int, count: int) -> list[list[Tensor]]:
    """Of images, texts, extra images and extra texts: some alone, pairs that differ, and one anchor without a key."""
    g = torch.Generator().manual_seed(seed)
    image = [torch.randint(-1, 6, (B,), generator=g) * 10**12 for _ in range(count)]
    text = [x.clone() for x in image]
    for x in text:
        x[: B // 3] = torch.randint(-1, 6, (B // 3,), generator=g) * 10**12
    more = [[torch.randint(-1, 6, (extra + i,), generator=g) * 10**12 for _ in range(count)] for i in range(2)]
    for k in range(count):  # image 1 meets texts of its own groups alone, by one of them or by the other
        image[k][1] = 7 + k
        for x in (text[k], more[0][k]):
            half = torch.arange(len(x)) % count == k
            x[half] = 7 + k
    for k in range(count):  # the last anchors and keys agree in all of their numbers
        for x in (image[k], text[k], *(x[k] for x in more if extra)):
            x[-3:] = 9 + k
    return [image, text, more[1] if extra else [], more[0] if extra else []]


def side(
    anchors, keys, t, extra, groups, key_groups, *, exclude_positive, centred=False, group_keys="others", margin=None
):
    """log_sum, kept and expected of one direction."""
    s = anchors @ torch.cat([keys, *([] if extra is None else [extra])]).T
    positive = s.diagonal()
    same = torch.zeros(s.shape, dtype=torch.bool)
    for x, y in zip(groups, key_groups, strict=True):
        same |= (x[:, None] == y) & (x[:, None] >= 0)
    drop = same.logical_not() if group_keys == "own" else same
    own = torch.eye(*s.shape, dtype=torch.bool)
    kept = (~drop & ~own).sum(1) + (not exclude_positive)
    if margin is not None:
        drop = drop | (s > positive.detach()[:, None] + margin)
    drop = drop & ~own | own & exclude_positive
    x = (s - (positive[:, None] if centred else 0)) / t.expand(len(s))[:, None]
    empty = drop.all(1)
    x = torch.where(empty[:, None], 0.0, x.masked_fill(drop, -torch.inf))
    log_sum = torch.where(empty, -torch.inf, x.logsumexp(1))
    p = x.softmax(1)
    return log_sum, kept, torch.where(empty, 0.0, (p * x.masked_fill(p == 0, 0.0)).sum(1))


def value(sums: list[Tensor], positive: Tensor, upstream: Tensor) -> Tensor:
    """Of sums that exist."""
    found = [torch.where(x.isfinite(), x * w, 0.0) for x, w in zip(sums, upstream, strict=False)]
    return (found[0] + found[1] + upstream[2] * positive).sum()


def worst_error(b, how, case, *, groups=1, extra=5, seed=0):
    """This rank's part against the whole batch; groups are of all ranks' rows."""
    W = world_size()
    everything = draw(b * W, 6, seed, extra=extra)
    given = drawn_groups(b * W, extra, seed, groups)
    rows = slice(rank() * b, (rank() + 1) * b)
    mine: Inputs = everything.part(rows)

    def packed(parts, rows):
        found = tuple(x[rows] for x in parts)
        return None if not found else found[0] if len(found) == 1 else found

    with using(**how):
        c = contrast(
            mine.image, mine.text, temperature=(mine.image_temperature, mine.text_temperature),
            extra_text_keys=mine.extra_text, extra_image_keys=mine.extra_image,
            image_groups=packed(given[0], rows), text_groups=packed(given[1], rows),
            extra_image_groups=packed(given[2], slice(None)), extra_text_groups=packed(given[3], slice(None)), **case,
        )  # fmt: skip
    got = [c.image.log_sum, c.text.log_sum]
    found = [*got, c.image.expected, c.text.expected]
    found += torch.autograd.grad(value(got, c.image.positive, mine.upstream), mine.leaves)

    e = everything.double()
    image, text, extra_image, extra_text = given
    of_texts = [torch.cat(x) for x in zip(text, extra_text, strict=True)] if extra_text else text
    of_images = [torch.cat(x) for x in zip(image, extra_image, strict=True)] if extra_image else image
    a = side(e.image, e.text, e.image_temperature, e.extra_text, image, of_texts, **case)
    z = side(e.text, e.image, e.text_temperature, e.extra_image, text, of_images, **case)
    want = [a[0], z[0], a[2], z[2]]
    want += torch.autograd.grad(value([a[0], z[0]], (e.image * e.text).sum(1), e.upstream), e.leaves)
    if groups:
        assert torch.equal(c.image.kept, a[1][rows])
        assert torch.equal(c.text.kept, z[1][rows])
    else:
        assert c.image.kept is None
    for x, y in zip(got, (a[0], z[0]), strict=True):
        assert torch.equal(x.isfinite(), y[rows].isfinite())
    empty = (a[0].isinf().sum() + z[0].isinf().sum()).item()
    found, want = ([x.masked_fill(x.isneginf(), 0) for x in several] for several in (found, want))
    errors = [relative_error(x, y[rows]) if x.isfinite().all() else torch.inf for x, y in zip(found, want, strict=True)]
    return max(errors), empty


@pytest.mark.parametrize("case", CASES, ids=str)
def test_groups_and_margins_are_holes_in_the_matrix(case):
    case = dict(case)
    empty = 0
    for number, groups in enumerate({case.pop("groups", 1), 2 * ("groups" not in case)}):
        for chunk, cache_bytes in ((8, 900),) if INTERPRETED else ((3, 0), (8, 900), ("auto", 10**6)):
            how = {"chunk": chunk, "cache_bytes": cache_bytes}
            error, left = worst_error(19, how, case, groups=groups, extra=0 if chunk == 3 else 5, seed=number)
            assert error < 1e-12, (groups, chunk)
            empty += left
    assert empty or not case["exclude_positive"] or case.get("group_keys") != "others"


def on_ranks():
    found = []
    for number, given in enumerate(CASES):
        case = dict(given)
        groups = case.pop("groups", 1 + number % 2)
        for distribution in DISTRIBUTIONS if world_size() == 2 else (DISTRIBUTIONS[number % 3],):
            gather = ("all", "ring")[number % 2]
            how = {"distribution": distribution, "gather": gather, "chunk": 4, "cache_bytes": 100 * (number % 3)}
            found.append(worst_error(5, how, case, groups=groups, seed=number)[0])
    return max(found)


@pytest.mark.parametrize("W", [2, 4])
def test_masks_on_ranks(ranks, W):
    assert max(ranks(W, on_ranks)) < 1e-12


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("exclude_positive", [False, True])
def test_groups_of_one_change_nothing(precision, exclude_positive):
    inputs = draw(45, 40, 0, dtype=torch.float32, extra=7)
    ids, more = torch.randperm(45) * 3, (1000 + torch.arange(8), 2000 + torch.arange(7))
    several = (torch.full((45,), -1), ids)
    options = [
        {},
        {"image_groups": ids, "text_groups": ids},
        {"image_groups": several, "text_groups": (torch.full((45,), -5), ids)},
        {"image_groups": ids, "text_groups": ids, "extra_image_groups": more[0], "extra_text_groups": more[1]},
        {"margin": 4.0},
    ]
    found = []
    for more_options in options:
        mine = inputs.part(slice(None))
        with using(precision=precision, chunk=64 if INTERPRETED else 32):
            c = contrast(
                mine.image, mine.text, temperature=0.07, extra_text_keys=mine.extra_text,
                extra_image_keys=mine.extra_image, exclude_positive=exclude_positive, centred=True, **more_options,
            )  # fmt: skip
        total = (c.image.log_sum + c.text.log_sum + c.image.positive).sum()
        kept = [] if c.image.kept is None else [c.image.kept, c.text.kept]
        assert all((x == n).all() for x, n in zip(kept, (52 - exclude_positive, 53 - exclude_positive), strict=False))
        found.append([c.image.log_sum, c.text.log_sum, c.image.expected, *torch.autograd.grad(total, mine.leaves[:2])])
    common = precision == "bf16"  # a limit takes one exponential per direction, where groups take what they find
    # With a mask, kernels of 16-bit operands take smaller tiles: sums of the same numbers, grouped otherwise.
    bound = 1e-6 if INTERPRETED and precision == "bf16" else 0
    for other in found[1 : 4 if common else 5]:
        assert all(torch.allclose(x, y, rtol=0, atol=bound) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_groups": torch.arange(3)}, "image_groups, text_groups: expected both, or no groups"),
        ({"group_keys": "own"}, "image_groups, text_groups: expected both"),
        ({"group_keys": "mine"}, "group_keys: expected 'others' or 'own'"),
        ({"image_groups": torch.arange(3), "text_groups": torch.arange(2)}, r"text_groups: expected \(3,\)"),
        ({"image_groups": torch.ones(3), "text_groups": torch.arange(3)}, r"image_groups: expected \(3,\) torch.int64"),
        ({"image_groups": (torch.arange(3),) * 2, "text_groups": torch.arange(3)}, "text_groups: expected one"),
        ({"margin": -0.1}, "margin: expected"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        contrast(torch.ones(3, 4), torch.ones(3, 4), temperature=0.1, **options)


def test_what_is_as_similar_as_the_limit_counts():
    rows = torch.eye(32)[[0, 0, 1, 1, 2]].requires_grad_()  # of similarities 0 and 1, without a rounding
    c = contrast(rows, rows, temperature=0.5, margin=0.0)
    want = (rows @ rows.T / 0.5).logsumexp(1)
    torch.testing.assert_close(c.image.log_sum, want, rtol=1e-6, atol=0)
    (got,), (gradient,) = (torch.autograd.grad(x.sum(), rows) for x in (c.image.log_sum, want))
    torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-6)


def test_an_anchor_without_keys_is_a_constant():
    x = torch.eye(4, dtype=torch.float64).requires_grad_()
    groups = torch.zeros(4, dtype=torch.int64)
    c = contrast(x, x, temperature=0.1, exclude_positive=True, centred=True, image_groups=groups, text_groups=groups)
    assert c.image.log_sum.eq(-torch.inf).all()
    assert c.image.kept.eq(0).all()
    assert c.image.log_num_keys.eq(0).all()
    (gradient,) = torch.autograd.grad(c.image.log_sum.sum() + c.text.log_sum.sum(), x)
    assert gradient.eq(0).all()
    with pytest.raises(ValueError, match=r"ask \.image\.kept"):
        _ = c.num_keys
