"""Extra keys: left out by id, of other numbers on every rank, without the batch's negatives, and from the host."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.similarity import ExtraKeys, contrast, log_sums, rank, using, world_size
from amclr_scale.similarity.blocks import Mask
from tests.similarity.definition import Inputs, draw, relative_error

B, D, M = 8, 6, 11


def definition(
    e: Inputs, *, batch_negatives, exclude_positive, centred, anchor_ids, text_ids, image_ids, margin=None, there=None
):
    """Log-sums of both sides, how many keys they are of, and the positives, by whole matrices."""
    found = []
    for a, k, t, extra, ids in (
        (e.image, e.text, e.image_temperature, e.extra_text, text_ids),
        (e.text, e.image, e.text_temperature, e.extra_image, image_ids),
    ):
        own = torch.eye(B, dtype=torch.bool)
        left_out = torch.zeros(B, B, dtype=torch.bool) if batch_negatives else ~own
        if exclude_positive:
            left_out = left_out | own
        absent = torch.zeros(len(ids), dtype=torch.bool) if there is None else ~there[: len(ids)]
        left_out = torch.cat([left_out, (anchor_ids[:, None] == ids) | absent], 1)
        kept, positive, s = (~left_out).sum(1), (a * k).sum(1), torch.cat([a @ k.T, a @ extra.T], 1)
        if margin is not None:
            above = s > positive.detach()[:, None] + margin
            left_out = left_out | above.masked_fill(torch.eye(*s.shape, dtype=torch.bool), False)
        x = s - (positive[:, None] if centred else 0)
        found += [(x / t[:, None]).masked_fill(left_out, -torch.inf).logsumexp(1), kept, positive]
    return found[0], found[3], found[2], found[1], found[4]


def worst_error(sharded, how, there=None, **options):
    """Over values, gradients and counts, of this rank's rows, against the definition of the global batch."""
    everything = draw(B, D, 3, extra=M)
    anchor_ids = torch.arange(B) % 7
    text_ids, image_ids = torch.arange(M) % 5, torch.arange(M + 1) + 3
    b, W = B // world_size(), world_size()
    rows = slice(rank() * b, (rank() + 1) * b)
    mine = everything.part(rows)

    def extra(x, ids):
        held = slice(rank(), None, W) if sharded else slice(None)
        x, ids = (x[:1], ids[:1]) if sharded == "one" and rank() == 0 else (x[held], ids[held])
        if sharded == "one" and rank() > 0:  # all others on the last rank, none on those between
            x, ids = (everything_of[1:], ids_of[1:]) if rank() == W - 1 else (x[:0], ids[:0])
        if there is None:
            return ExtraKeys(x, ids, anchor_ids[rows], bool(sharded))
        gone = ~there[: len(ids_of)]
        same = ((anchor_ids[rows, None] == ids_of) | gone).sum(1)
        mine = there[: len(ids_of)][held] if sharded else ~gone
        return ExtraKeys(x, ids, anchor_ids[rows], bool(sharded), same=same, there=mine)

    everything_of, ids_of = everything.extra_text, text_ids
    extra_texts = extra(everything.extra_text, text_ids)
    everything_of, ids_of = everything.extra_image, image_ids
    extra_images = extra(everything.extra_image, image_ids)
    with using(**how):
        c = contrast(
            mine.image,
            mine.text,
            temperature=(mine.image_temperature, mine.text_temperature),
            extra_text_keys=extra_texts,
            extra_image_keys=extra_images,
            **options,
        )
        got = [c.image.log_sum, c.text.log_sum, c.image.positive]
        value = sum((x * w).sum() for x, w in zip(got, mine.upstream, strict=True))
        got += torch.autograd.grad(value, mine.leaves)
    exact = everything.double()
    for leaf in exact.leaves:
        leaf.requires_grad_()
    ids = {"anchor_ids": anchor_ids, "text_ids": text_ids, "image_ids": image_ids}
    *want, image_count, text_count = definition(exact, **options, **ids, there=there)
    value = sum((x * w).sum() for x, w in zip(want, exact.upstream, strict=True))
    want += torch.autograd.grad(value, exact.leaves)
    assert torch.equal(c.image.kept, image_count[rows])
    assert torch.equal(c.text.kept, text_count[rows])
    return max(relative_error(x, y[rows]) for x, y in zip(got, want, strict=True))


FLAGS = tuple(product((True, False), repeat=3))


def all_ways(layouts, hows, flags=FLAGS):
    names = ("batch_negatives", "exclude_positive", "centred")
    return max(
        worst_error(sharded, how, **dict(zip(names, values, strict=True)))
        for values in flags
        for sharded in layouts
        for how in hows
    )


def test_keys_of_the_anchors_own_id_are_left_out():
    assert all_ways([False, True], [{"chunk": 3}, {"chunk": "auto", "cache_bytes": 10**6}]) < 1e-12


def test_positives_without_the_batch_have_all_their_digits():
    x, y = (
        F.normalize(torch.randn(B, D, generator=torch.Generator().manual_seed(n)), dim=1).bfloat16() for n in (0, 1)
    )
    extra = torch.zeros(1, D)
    c = contrast(x, y, temperature=1.0, batch_negatives=False, extra_text_keys=extra, extra_image_keys=extra)
    assert c.image.positive.dtype == torch.float32
    torch.testing.assert_close(c.image.positive, (x.float() * y.float()).sum(1), rtol=1e-6, atol=1e-7)


THERE = torch.arange(M + 1) % 4 != 1


def with_margin():
    """Beside ids, without them, and where some of the rows are no keys."""
    options = {"batch_negatives": True, "exclude_positive": False, "centred": True, "margin": 0.05}
    several = product((False, True), (None, THERE))
    return max(worst_error(sharded, {"chunk": 3}, there, **options) for sharded, there in several)


def test_a_margin_leaves_out_extra_keys_too(ranks):
    assert with_margin() < 1e-12
    assert max(ranks(2, with_margin)) < 1e-12
    e = draw(B, D, 3, extra=M)
    found = [
        contrast(e.image, e.text, temperature=0.1, extra_text_keys=x, extra_image_keys=y, margin=0.05).image.log_sum
        for x, y in ((e.extra_text, e.extra_image), (ExtraKeys(e.extra_text), ExtraKeys(e.extra_image)))
    ]
    assert torch.equal(*found)
    everything = contrast(
        e.image, e.text, temperature=0.1, extra_text_keys=e.extra_text, extra_image_keys=e.extra_image
    )
    assert not torch.equal(found[0], everything.image.log_sum)


@pytest.mark.parametrize("world_size", [2, 4])
def test_shares_of_the_keys_are_the_keys(ranks, world_size):
    hows = [
        {"chunk": 3, "distribution": "two_blocks"},
        {"chunk": 5, "gather": "ring", "distribution": "reduce_scatter"},
        {"distribution": "column_sums"},
    ]
    flags = [(True, True, True), (False, False, True)]
    assert max(ranks(world_size, all_ways, ["one"], hows, flags)) < 1e-12
    assert max(ranks(world_size, all_ways, [False, True], hows[:1], flags[:1])) < 1e-12


def test_keys_on_the_host_come_piece_by_piece(monkeypatch):
    monkeypatch.setattr(log_sums, "PIECE", 4)
    extra, mask = ExtraKeys(torch.arange(20.0).view(10, 2)), Mask((torch.arange(3),), (torch.arange(10),))
    assert [len(rows) for rows, _ in log_sums._pieces(extra, mask, torch.device("cpu"))] == [10]
    found = list(log_sums._pieces(extra, mask, torch.device("meta")))
    assert [rows.shape for rows, _ in found] == [(4, 2), (4, 2), (2, 2)]
    assert [part.column_groups[0].tolist() for _, part in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_mistakes_are_answered_in_words():
    e = draw(B, D, 0, extra=M)
    for extra, message in (
        (ExtraKeys(e.extra_text, torch.arange(M)), "expected ids of keys and of anchors, or neither"),
        (ExtraKeys(e.extra_text, torch.arange(3), torch.arange(B)), r"extra_text_keys.ids: expected \(11,\)"),
        (ExtraKeys(e.extra_text, torch.arange(M), torch.arange(3)), r"extra_text_keys.anchor_ids: expected \(8,\)"),
        (ExtraKeys(e.extra_text[:, :2]), r"extra_text_keys: expected \(M, 6\)"),
        (ExtraKeys(e.extra_text, there=torch.ones(M, dtype=torch.bool)), "extra_text_keys.there: expected with ids"),
    ):
        with pytest.raises(ValueError, match=message):
            contrast(e.image, e.text, temperature=0.1, extra_text_keys=extra)


def test_keys_that_change_before_backward_are_noticed():
    e = draw(B, D, 0, extra=M).part(slice(None))
    c = contrast(e.image, e.text, temperature=0.1, extra_text_keys=e.extra_text)
    e.extra_text.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        c.image.log_sum.sum().backward()
