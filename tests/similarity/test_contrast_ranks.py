"""`contrast` on several ranks is `contrast` of one big batch: values, gradients, bytes that travel."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st

from amclr_scale.distributed import collectives
from amclr_scale.similarity import all_sum, contrast, rank, torch_backend, using, world_size
from tests.similarity.definition import both_sides, draw, for_all, gradient_width, relative_error, without_constants

DISTRIBUTIONS = ["reduce_scatter", "column_sums", "two_blocks"]


def worst_error(
    b, D, seed, how, *, negatives="all", extra=0, exclude_positive=False, centred=False, dtype="float64",
    constants=0, temperature=None,
):  # fmt: skip
    """This rank's rows, against the definition of the global batch in float64.

    What is differentiated is a different random linear function on each rank: the gradient must be that of their sum.
    """
    W = world_size()
    everything = draw(b * W, D, seed, extra=extra, dtype=getattr(torch, dtype))
    everything.upstream.abs_()
    if temperature is not None:
        for x in (everything.image_temperature, everything.text_temperature):
            x.fill_(temperature)
    options = {"exclude_positive": exclude_positive, "centred": centred}
    mine = everything.part(slice(rank() * b, (rank() + 1) * b))
    with using(**how):
        c = contrast(
            mine.image,
            mine.text,
            temperature=(mine.image_temperature, mine.text_temperature),
            extra_text_keys=mine.extra_text,
            extra_image_keys=mine.extra_image,
            negatives=negatives,
            gradient_width=gradient_width(D, constants),
            **options,
        )
    got = [c.image.log_sum, c.text.log_sum, c.image.positive, c.image.expected, c.text.expected]
    value = sum((x * w).sum() for x, w in zip(got[:3], mine.upstream, strict=True))
    got += torch.autograd.grad(value, mine.leaves)

    exact = everything.double()
    group = b * {"all": W, "local": 1}.get(negatives, negatives)
    want = both_sides(exact, **options, group=group)
    value = sum((x * w).sum() for x, w in zip(want[:3], exact.upstream, strict=True))
    want += without_constants(torch.autograd.grad(value, exact.leaves), gradient_width(D, constants))
    rows = slice(rank() * b, (rank() + 1) * b)
    assert c.image.num_keys == group - exclude_positive + (0 if mine.extra_text is None else len(mine.extra_text))
    return max(relative_error(x, y[rows]) for x, y in zip(got, want, strict=True))


def with_one_exponential(*args, **options):
    """The error, and whether a common exponential was found for every block of sums and of weights."""
    found = []

    class Watched(torch_backend.Common):
        @classmethod
        def of_sums(cls, *of):
            found.append(super().of_sums(*of))
            return found[-1]

        @classmethod
        def of_weights(cls, *of):
            found.append(super().of_weights(*of))
            return found[-1]

    with mock.patch.object(torch_backend, "COMMON_SIZE", 0), mock.patch.object(torch_backend, "Common", Watched):
        error = worst_error(*args, **options)
    return error, bool(found) and None not in found


@pytest.mark.parametrize("gather", ["all", "ring"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_one_temperature_on_ranks_is_exact_to_1e_12(ranks, distribution, gather):
    how = {"chunk": 5, "gather": gather, "distribution": distribution}
    for exclude in (False, True):
        options = {"extra": 4, "centred": True, "exclude_positive": exclude, "temperature": 0.07}
        for error, common in ranks(3, with_one_exponential, 9, 12, 1, how, **options):
            assert error < 1e-12
            assert common


cases = st.fixed_dictionaries(
    {
        "b": st.integers(1, 9),
        "D": st.integers(1, 12),
        "seed": st.integers(0, 10**6),
        "extra": st.sampled_from([0, 0, 4]),
        "exclude_positive": st.booleans(),
        "centred": st.booleans(),
        "how": st.fixed_dictionaries(
            {
                "chunk": st.sampled_from([1, 2, 5, 7, 64, "auto"]),
                "gather": st.sampled_from(["all", "ring"]),
                "distribution": st.sampled_from(["auto", *DISTRIBUTIONS]),
                "cache_bytes": st.sampled_from([0, 0, 200, 10**6]),
            }
        ),
    }
)


@pytest.mark.parametrize("W", [2, 3, 4])
def test_ranks_are_one_big_batch(ranks, W):
    @for_all(40, case=cases)
    def check(case):
        assert max(ranks(W, worst_error, **case)) < 1e-12

    check()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("gather", ["all", "ring"])
def test_ranks_are_one_big_batch_in_float32(ranks, gather, distribution):
    how = {"gather": gather, "distribution": distribution, "chunk": 16}
    assert max(ranks(2, worst_error, 40, 16, 0, how, dtype="float32", constants=3)) < 2e-6


@pytest.mark.parametrize("negatives", ["local", 2, 4])
@pytest.mark.parametrize("gather", ["all", "ring"])
def test_groups_contrast_among_themselves(ranks, negatives, gather):
    for distribution in DISTRIBUTIONS:
        how = {"gather": gather, "distribution": distribution, "chunk": 3}
        options = {"negatives": negatives, "exclude_positive": True, "constants": 2 * (distribution != "two_blocks")}
        assert max(ranks(4, worst_error, 5, 6, 1, how, **options)) < 1e-12


def trained_gradients(B):
    """Gradients that parameters and temperature receive after the engine's mean over ranks, CLIP's loss on top."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(2, B, 5, generator=generator, dtype=torch.float64)
    w = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    logit_scale = torch.tensor([9.0], dtype=torch.float64, requires_grad=True)
    b = B // world_size()
    mine = slice(rank() * b, (rank() + 1) * b)
    image, text = (torch.nn.functional.normalize(x[mine] @ w[i], dim=1) for i, x in enumerate((inputs, targets)))
    c = contrast(image, text, temperature=1 / logit_scale)
    loss = (c.image.log_sum + c.text.log_sum - 2 * logit_scale * c.image.positive).mean() / 2
    loss.backward()
    return [all_sum(x) / world_size() for x in (loss.detach(), w.grad, logit_scale.grad)]


@pytest.mark.parametrize("W", [2, 3, 4])
def test_the_effective_gradient_is_the_global_one_for_any_number_of_ranks(ranks, W):
    """Public code gives features 1/W of it (gathered without gradient), or temperatures W times it (summed twice)."""
    want = trained_gradients(12)
    for got in ranks(W, trained_gradients, 12):
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def own_positives(b):
    """Row r b + i of both sides is e_i scaled by the rank and row, so a wrong pairing shows in the number."""
    scale = 1 + rank() * b + torch.arange(b, dtype=torch.float64)
    rows = torch.eye(b, dtype=torch.float64) * scale[:, None]
    c = contrast(rows, rows, temperature=1.0, exclude_positive=True, centred=True)
    return c.image.positive, c.text.positive, scale**2


@pytest.mark.parametrize("W", [2, 3])
def test_positives_are_paired_right_on_every_rank(ranks, W):
    """Public code takes the diagonal of a b x B block, which is right on rank 0 only."""
    for image, text, want in ranks(W, own_positives, 4):
        assert torch.equal(image, want)
        assert torch.equal(text, want)


def bytes_sent(b, D, how):
    """Bytes per kind of collective, forward and backward apart."""
    counts = []
    originals = {}

    def count(name):
        def run(*args, **kwargs):
            tensor = args[1] if name in ("all_to_all_single", "reduce_scatter_single") else args[0]
            counts[-1][name] = counts[-1].get(name, 0) + tensor.nbytes
            return originals[name](*args, **kwargs)

        return run

    names = ("all_to_all_single", "all_reduce", "reduce_scatter_single", "broadcast")
    try:
        for name in names:
            originals[name] = getattr(dist, name)
            setattr(dist, name, count(name))
        image, text = torch.randn(2, b, D).requires_grad_()
        counts.append({})
        with using(**how):
            c = contrast(image, text, temperature=0.5)
        counts.append({})
        (c.image.log_sum + c.text.log_sum).mean().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return counts


@pytest.mark.parametrize("W", [2, 4])
def test_feature_gradients_travel_only_in_reduce_scatter(ranks, W):
    b, D = 16, 24
    B = W * b
    sums = {"all_to_all_single": 3 * B * 4}
    want = {
        "reduce_scatter": [sums, {"all_to_all_single": B * D * 4}],
        "column_sums": [sums, {}],
        "two_blocks": [{}, {}],
    }
    for distribution, counted in want.items():
        assert ranks(W, bytes_sent, b, D, {"distribution": distribution}) == [counted] * W, distribution


def held_bytes(b, D, how):
    """What autograd holds between forward and backward, each storage once."""
    image, text = torch.randn(2, b, D).requires_grad_().unbind()
    held = {}

    def pack(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with using(**how), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        contrast(image, text, temperature=0.5)
    return sum(held.values())


@pytest.mark.parametrize("chunk", [16, 256])
def test_backward_holds_features_and_numbers_per_anchor(ranks, chunk):
    b, D, W = 256, 8, 2
    B = b * W
    features, numbers = 4 * D, 4 * 12
    for gather, rows in (("all", 2 * b + B), ("ring", 2 * b)):
        for held in ranks(W, held_bytes, b, D, {"chunk": chunk, "gather": gather}):
            assert held <= rows * features + b * numbers
            assert held < b * B * 4 / 8  # far from a block of similarities


def largest_gather(b, D, how):
    """Bytes of the largest tensor gathered from all ranks, forward and backward."""
    sizes = [0]
    original = collectives._all_gather_single

    def run(out, x, **kwargs):
        sizes.append(out.nbytes)
        return original(out, x, **kwargs)

    try:
        collectives._all_gather_single = run
        image, text = torch.randn(2, b, D).requires_grad_()
        with using(**how):
            c = contrast(image, text, temperature=0.5)
        (c.image.log_sum + c.text.log_sum).mean().backward()
    finally:
        collectives._all_gather_single = original
    return max(sizes)


def test_a_ring_gathers_numbers_per_sample_only(ranks):
    b, D, W = 16, 24, 4
    for distribution in DISTRIBUTIONS:
        how = {"distribution": distribution}
        assert ranks(W, largest_gather, b, D, how | {"gather": "ring"}) == [3 * 4 * b * W] * W
        assert ranks(W, largest_gather, b, D, how | {"gather": "all"}) == [D * 4 * b * W] * W


def uneven():
    x = torch.ones(3 if rank() == 1 else 4, 2)
    try:
        contrast(x, x, temperature=0.1)
    except ValueError as error:
        return str(error)
    return "no error"


def test_an_uneven_batch_is_refused_everywhere_and_names_the_rank(ranks):
    for message in ranks(3, uneven):
        assert message.startswith("batch: rank 1 has 3 rows of width 2, rank 0 has 4"), message


def groups_that_do_not_divide():
    x = torch.ones(2, 2)
    with pytest.raises(ValueError, match="negatives: groups of 2 ranks do not divide 3 ranks"):
        contrast(x, x, temperature=0.1, negatives=2)


def test_groups_that_do_not_divide_are_refused(ranks):
    ranks(3, groups_that_do_not_divide)
