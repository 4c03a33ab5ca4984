"""The kernels of the Triton backend, in `blocks.py`'s notation. `triton_backend.py` launches them;
`triton_sigmoid.py` has the one of sigmoid losses.

Each makes tiles (BM, BN) of similarities, or reads them where a library product has made them (GIVEN), and works on
them while they are in registers:

    accumulate_kernel    statistics of BM anchors, kept in registers over a run of keys; launched once per direction,
                         with anchors and keys swapped for the columns: sums down a tile's columns would cost as much as
                         its product, because each thread holds parts of rows
    merge_kernel         joins the runs, where there are few anchors and keys are divided among several
    common_kernel        whether one exponential serves both directions, and around which shift
    weights_kernel       a tile of W

Operands have a width that is a multiple of BK (padded with zeros), so that no load along it needs a mask. EVEN says
that tiles divide b and n, so that nothing does: a store masked entry by entry takes as long as the tile's product.
FAR says that some offset in memory needs more than 32 bits.
"""

import triton
import triton.language as tl

from amclr_scale.similarity import blocks

LOWEST = tl.constexpr(blocks.LOWEST)
MASKED = tl.constexpr(blocks.MASKED)
COMMON_BITS = tl.constexpr(64.0)  # how far apart, in powers of two, shifts may be that share one exponential


@triton.jit
def _offset(rows, stride, FAR: tl.constexpr):
    """Where rows begin."""
    if FAR:
        return rows.to(tl.int64) * stride
    else:
        return rows * stride


@triton.jit
def _numbers(X, at, size, other, EVEN: tl.constexpr):
    """Entries `at` of X (size,)."""
    if EVEN:
        return tl.load(X + at)
    else:
        return tl.load(X + at, mask=at < size, other=other)


@triton.jit
def _similarities(
    A, K, om, on, b, n, stride_a, stride_k,
    WIDTH: tl.constexpr, GIVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """(BM, BN): rows om of A times rows on of K, or if GIVEN entries of A with two strides; anything beyond b and n."""
    if GIVEN:
        entries = A + _offset(om, stride_a, FAR)[:, None] + _offset(on, stride_k, FAR)[None, :]
        if EVEN:  # noqa: SIM108 - the other line is not compiled
            s = tl.load(entries)
        else:
            s = tl.load(entries, mask=(om < b)[:, None] & (on < n)[None, :], other=0.0)
    else:
        if not EVEN:
            om, on = tl.where(om < b, om, 0), tl.where(on < n, on, 0)
        ok = tl.arange(0, BK)
        left = A + _offset(om, stride_a, FAR)[:, None] + ok[None, :]
        right = K + _offset(on, stride_k, FAR)[None, :] + ok[:, None]
        s = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(0, WIDTH // BK, num_stages=STAGES):
            s = tl.dot(tl.load(left + k * BK), tl.load(right + k * BK), s, input_precision=PRECISION)
    return s


@triton.jit
def _place(b, n, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Rows and columns of this program's tile: GROUP tiles down, then across, so that neighbours share operands."""
    down, across = tl.cdiv(b, BM), tl.cdiv(n, BN)
    program = tl.program_id(0)
    first = (program // (GROUP * across)) * GROUP
    size = tl.minimum(down - first, GROUP)
    pm = first + (program % (GROUP * across)) % size
    pn = (program % (GROUP * across)) // size
    return pm, pn


@triton.jit
def _left_out(
    ROW_GROUP, COLUMN_GROUP, ROW_GROUP_2, COLUMN_GROUP_2, om, on, b, n, diagonal,
    GROUPS: tl.constexpr, ONLY_SAME: tl.constexpr, DIAGONAL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(BM, BN): which entries neither direction counts, by one or two GROUPS; positives are none of them."""
    left_out = _numbers(ROW_GROUP, om, b, 0, EVEN)[:, None] == _numbers(COLUMN_GROUP, on, n, 0, EVEN)[None, :]
    if GROUPS == 2:
        second = _numbers(ROW_GROUP_2, om, b, 0, EVEN)[:, None] == _numbers(COLUMN_GROUP_2, on, n, 0, EVEN)[None, :]
        left_out = left_out | second
    if ONLY_SAME:
        left_out = left_out == 0
    if DIAGONAL:
        left_out = left_out & (on[None, :] != om[:, None] + diagonal)
    return left_out


@triton.jit
def _above(s, limit, om, on, diagonal, DIAGONAL: tl.constexpr):
    """(BM, BN): which entries are above a limit (BM, 1) or (1, BN); positives are none of them."""
    above = s > limit
    if DIAGONAL:
        above = above & (on[None, :] != om[:, None] + diagonal)
    return above


@triton.jit(do_not_specialize=["run", "diagonal"])
def accumulate_kernel(
    A, K, RATE, SHIFT, MASS, MOMENT, POSITIVE, ROW_GROUP, COLUMN_GROUP, ROW_GROUP_2, COLUMN_GROUP_2, ROW_LIMIT,
    b, n, run, stride_a, stride_k, diagonal,
    WIDTH: tl.constexpr, GIVEN: tl.constexpr, DIAGONAL: tl.constexpr, STORE_POSITIVE: tl.constexpr,
    EXCLUDE: tl.constexpr, GROUPS: tl.constexpr, ONLY_SAME: tl.constexpr, LIMITED: tl.constexpr,
    CONTINUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Statistics (runs, b), each over `run` keys. CONTINUE: there is one run, which goes on from what is there."""
    pm, part = tl.program_id(0), tl.program_id(1)
    T: tl.constexpr = RATE.dtype.element_ty
    om = pm * BM + tl.arange(0, BM)
    inside = om < b
    rate = _numbers(RATE, om, b, 1.0, EVEN)
    out = part.to(tl.int64) * b + om
    if CONTINUE:
        shift = tl.load(SHIFT + out, mask=inside, other=LOWEST)
        mass = tl.load(MASS + out, mask=inside, other=0.0)
        moment = tl.load(MOMENT + out, mask=inside, other=0.0)
    else:
        shift = tl.full((BM,), LOWEST, T)
        mass = tl.zeros((BM,), T)
        moment = tl.zeros((BM,), T)
    begin = part * run
    end = tl.minimum(begin + run, n)
    for j in range(0, tl.cdiv(end - begin, BN)):
        first = begin + j * BN
        on = first + tl.arange(0, BN)
        s = _similarities(A, K, om, on, b, n, stride_a, stride_k, WIDTH, GIVEN, BM, BN, BK, STAGES, PRECISION,
                          EVEN, FAR)  # fmt: skip
        if DIAGONAL:
            offset = first - (pm * BM + diagonal)
            if (offset < BM) & (offset > -BN):  # the tile has a part of the diagonal
                here = on[None, :] == om[:, None] + diagonal
                if STORE_POSITIVE:
                    column = om + diagonal
                    held = (column >= first) & (column < first + BN) & (column < end) & inside
                    tl.store(POSITIVE + om, tl.sum(tl.where(here, s, 0.0), 1), mask=held)
                if EXCLUDE:
                    s = tl.where(here, MASKED, s)
        if LIMITED:
            limit = _numbers(ROW_LIMIT, om, b, 0.0, EVEN)
            s = tl.where(_above(s, limit[:, None], om, on, diagonal, DIAGONAL), MASKED, s)
        if GROUPS > 0:
            s = tl.where(_left_out(ROW_GROUP, COLUMN_GROUP, ROW_GROUP_2, COLUMN_GROUP_2, om, on, b, n, diagonal,
                                   GROUPS, ONLY_SAME, DIAGONAL, EVEN), MASKED, s)  # fmt: skip
        if not EVEN:  # noqa: SIM102 - decided when compiled; the rest when run
            if first + BN > end:
                s = tl.where((on < end)[None, :], s, MASKED)
        new = tl.maximum(tl.max(s, 1), shift)
        ours = (shift - new) * rate
        keep = tl.exp2(ours)
        x = (s - new[:, None]) * rate[:, None]
        e = tl.exp2(x)
        moment = keep * (moment + ours * mass) + tl.sum(x * e, 1)
        mass = keep * mass + tl.sum(e, 1)
        shift = new
    tl.store(SHIFT + out, shift, mask=inside)
    tl.store(MASS + out, mass, mask=inside)
    tl.store(MOMENT + out, moment, mask=inside)


@triton.jit(do_not_specialize=["b", "runs"])
def merge_kernel(RATE, PARTS, SHIFT, MASS, MOMENT, b, runs, BM: tl.constexpr):
    """Add PARTS (3, runs, b) to the statistics (b,)."""
    om = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = om < b
    rate = tl.load(RATE + om, mask=inside, other=1.0)
    shift = tl.load(SHIFT + om, mask=inside, other=LOWEST)
    mass = tl.load(MASS + om, mask=inside, other=0.0)
    moment = tl.load(MOMENT + om, mask=inside, other=0.0)
    size = runs.to(tl.int64) * b
    for i in range(0, runs):
        at = PARTS + om + i * b
        more_shift = tl.load(at, mask=inside, other=LOWEST)
        more_mass = tl.load(at + size, mask=inside, other=0.0)
        more_moment = tl.load(at + 2 * size, mask=inside, other=0.0)
        new = tl.maximum(shift, more_shift)
        ours, theirs = (shift - new) * rate, (more_shift - new) * rate
        keep, take = tl.exp2(ours), tl.exp2(theirs)
        moment = keep * (moment + ours * mass) + take * (more_moment + theirs * more_mass)
        mass = keep * mass + take * more_mass
        shift = new
    tl.store(SHIFT + om, shift, mask=inside)
    tl.store(MASS + om, mass, mask=inside)
    tl.store(MOMENT + om, moment, mask=inside)


@triton.jit(do_not_specialize=["b", "n"])
def common_kernel(ROW_RATE, ROW_SHIFT, COLUMN_RATE, COLUMN_SHIFT, OUT, b, n, BLOCK: tl.constexpr):
    """OUT (3,): 1 or 0, the largest shift, the rate. 1: all rates are equal and shifts within COMMON_BITS.

    Then 2^((s - shift_i) rate) = 2^((s - largest) rate) 2^((largest - shift_i) rate): one exponential per pair. Where
    the first factor vanishes, below 2^-126, the weight is less than 2^-62 of its row's largest one.
    """
    offsets = tl.arange(0, BLOCK)
    high = tl.full((BLOCK,), LOWEST, tl.float32)
    low = tl.full((BLOCK,), -LOWEST, tl.float32)
    fast = tl.full((BLOCK,), LOWEST, tl.float32)
    slow = tl.full((BLOCK,), -LOWEST, tl.float32)
    for i in range(0, tl.cdiv(b, BLOCK)):
        at = i * BLOCK + offsets
        inside = at < b
        rate, shift = tl.load(ROW_RATE + at, mask=inside, other=0.0), tl.load(ROW_SHIFT + at, mask=inside, other=0.0)
        high = tl.where(inside, tl.maximum(high, shift), high)
        low = tl.where(inside, tl.minimum(low, shift), low)
        fast = tl.where(inside, tl.maximum(fast, rate), fast)
        slow = tl.where(inside, tl.minimum(slow, rate), slow)
    for i in range(0, tl.cdiv(n, BLOCK)):
        at = i * BLOCK + offsets
        inside = at < n
        rate = tl.load(COLUMN_RATE + at, mask=inside, other=0.0)
        shift = tl.load(COLUMN_SHIFT + at, mask=inside, other=0.0)
        high = tl.where(inside, tl.maximum(high, shift), high)
        low = tl.where(inside, tl.minimum(low, shift), low)
        fast = tl.where(inside, tl.maximum(fast, rate), fast)
        slow = tl.where(inside, tl.minimum(slow, rate), slow)
    largest, smallest = tl.max(high, 0), tl.min(low, 0)
    rate, other = tl.max(fast, 0), tl.min(slow, 0)
    yes = (rate == other) & ((largest - smallest) * rate < COMMON_BITS)
    tl.store(OUT, tl.where(yes, 1.0, 0.0))
    tl.store(OUT + 1, largest)
    tl.store(OUT + 2, rate)


@triton.jit
def _store(W, W_LOW, w, om, on, b, n, stride_w, LOW: tl.constexpr, EVEN: tl.constexpr, FAR: tl.constexpr):
    """Store a tile in W's type; LOW: and in W_LOW what that leaves over."""
    at = _offset(om, stride_w, FAR)[:, None] + on[None, :]
    high = w.to(W.dtype.element_ty)
    if EVEN:
        tl.store(W + at, high)
        if LOW:
            tl.store(W_LOW + at, (w - high.to(tl.float32)).to(W.dtype.element_ty))
    else:
        inside = (om < b)[:, None] & (on < n)[None, :]
        tl.store(W + at, high, mask=inside)
        if LOW:
            tl.store(W_LOW + at, (w - high.to(tl.float32)).to(W.dtype.element_ty), mask=inside)


@triton.jit
def _exponentials(
    s, ROW_RATE, ROW_SHIFT, ROW_FACTOR, COLUMN_RATE, COLUMN_SHIFT, COLUMN_FACTOR, ROW_LIMIT, COLUMN_LIMIT,
    om, on, b, n, diagonal,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LIMITED: tl.constexpr, DIAGONAL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(BM, BN) of W, by the formula."""
    if ROWS:
        rate = _numbers(ROW_RATE, om, b, 0.0, EVEN)
        shift = _numbers(ROW_SHIFT, om, b, 0.0, EVEN)
        factor = _numbers(ROW_FACTOR, om, b, 0.0, EVEN)
        of_rows = factor[:, None] * tl.exp2((s - shift[:, None]) * rate[:, None])
        if LIMITED:
            limit = _numbers(ROW_LIMIT, om, b, 0.0, EVEN)
            of_rows = tl.where(_above(s, limit[:, None], om, on, diagonal, DIAGONAL), 0.0, of_rows)
    if COLUMNS:
        rate = _numbers(COLUMN_RATE, on, n, 0.0, EVEN)
        shift = _numbers(COLUMN_SHIFT, on, n, 0.0, EVEN)
        factor = _numbers(COLUMN_FACTOR, on, n, 0.0, EVEN)
        of_columns = factor[None, :] * tl.exp2((s - shift[None, :]) * rate[None, :])
        if LIMITED:
            limit = _numbers(COLUMN_LIMIT, on, n, 0.0, EVEN)
            of_columns = tl.where(_above(s, limit[None, :], om, on, diagonal, DIAGONAL), 0.0, of_columns)
    if ROWS and COLUMNS:
        w = of_rows + of_columns
    elif ROWS:
        w = of_rows
    elif COLUMNS:
        w = of_columns
    else:
        w = tl.zeros_like(s)
    return w


@triton.jit(do_not_specialize=["diagonal"])
def weights_kernel(
    A, K, W, W_LOW, ROW_RATE, ROW_SHIFT, ROW_FACTOR, COLUMN_RATE, COLUMN_SHIFT, COLUMN_FACTOR, POSITIVE_WEIGHT, ONE,
    ROW_GROUP, COLUMN_GROUP, ROW_GROUP_2, COLUMN_GROUP_2, ROW_LIMIT, COLUMN_LIMIT,
    b, n, stride_a, stride_k, stride_w, diagonal,
    WIDTH: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIAGONAL: tl.constexpr,
    GROUPS: tl.constexpr, ONLY_SAME: tl.constexpr, LIMITED: tl.constexpr,
    COMMON: tl.constexpr, LOW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """W (b, n). COMMON: one exponential per pair if `common_kernel` says in ONE that it may be; not LIMITED then."""
    pm, pn = _place(b, n, BM, BN, GROUP)
    om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    s = _similarities(A, K, om, on, b, n, stride_a, stride_k, WIDTH, GIVEN, BM, BN, BK, STAGES, PRECISION,
                      EVEN, FAR)  # fmt: skip
    if COMMON:
        one, largest, rate = tl.load(ONE), tl.load(ONE + 1), tl.load(ONE + 2)
        if one > 0.5:
            of_row = _numbers(ROW_FACTOR, om, b, 0.0, EVEN)
            of_row *= tl.exp2((largest - _numbers(ROW_SHIFT, om, b, 0.0, EVEN)) * rate)
            of_column = _numbers(COLUMN_FACTOR, on, n, 0.0, EVEN)
            of_column *= tl.exp2((largest - _numbers(COLUMN_SHIFT, on, n, 0.0, EVEN)) * rate)
            # Not (s - largest) * rate: one operation less per entry, and the digits it loses are beyond 16 bits.
            w = tl.exp2(s * rate - largest * rate) * (of_row[:, None] + of_column[None, :])
        else:
            w = _exponentials(s, ROW_RATE, ROW_SHIFT, ROW_FACTOR, COLUMN_RATE, COLUMN_SHIFT, COLUMN_FACTOR, ROW_LIMIT,
                              COLUMN_LIMIT, om, on, b, n, diagonal, ROWS, COLUMNS, LIMITED, DIAGONAL,
                              EVEN)  # fmt: skip
    else:
        w = _exponentials(s, ROW_RATE, ROW_SHIFT, ROW_FACTOR, COLUMN_RATE, COLUMN_SHIFT, COLUMN_FACTOR, ROW_LIMIT,
                          COLUMN_LIMIT, om, on, b, n, diagonal, ROWS, COLUMNS, LIMITED, DIAGONAL, EVEN)  # fmt: skip
    if GROUPS > 0:
        w = tl.where(_left_out(ROW_GROUP, COLUMN_GROUP, ROW_GROUP_2, COLUMN_GROUP_2, om, on, b, n, diagonal,
                               GROUPS, ONLY_SAME, DIAGONAL, EVEN), 0.0, w)  # fmt: skip
    if DIAGONAL:
        offset = pn * BN - (pm * BM + diagonal)
        if (offset < BM) & (offset > -BN):
            positive_weight = _numbers(POSITIVE_WEIGHT, om, b, 0.0, EVEN)
            w = tl.where(on[None, :] == om[:, None] + diagonal, positive_weight[:, None], w)
    _store(W, W_LOW, w, om, on, b, n, stride_w, LOW, EVEN, FAR)
