"""The Triton kernel of sigmoid losses, in `blocks.py`'s notation: a tile of weights, and its sums."""

import triton
import triton.language as tl

from amclr_scale.similarity.triton_kernels import _place, _similarities, _store


@triton.jit
def _log_1_plus(z):
    """log(1 + z) for z from 0 to 1 to float32's last digits, however small z is: 2 artanh(z / (2 + z)) as a series."""
    y = z / (2.0 + z)
    q = y * y
    series = 1.0 / 19.0
    series = q * series + 1.0 / 17.0
    series = q * series + 1.0 / 15.0
    series = q * series + 1.0 / 13.0
    series = q * series + 1.0 / 11.0
    series = q * series + 1.0 / 9.0
    series = q * series + 1.0 / 7.0
    series = q * series + 1.0 / 5.0
    series = q * series + 1.0 / 3.0
    series = q * series + 1.0
    return 2.0 * y * series


@triton.jit(do_not_specialize=["diagonal"])
def sigmoid_kernel(
    A, K, W, W_LOW, SCALE, BIAS, SUMS, b, n, stride_a, stride_k, stride_w, diagonal,
    WIDTH: tl.constexpr, GIVEN: tl.constexpr, DIAGONAL: tl.constexpr, STORE: tl.constexpr, LOW: tl.constexpr,
    DOUBLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """Q (b, n) if STORE, and in SUMS (3, programs) this tile's sums of losses, of Q s and of Q."""
    pm, pn = _place(b, n, BM, BN, GROUP)
    om, on = pm * BM + tl.arange(0, BM), pn * BN + tl.arange(0, BN)
    s = _similarities(A, K, om, on, b, n, stride_a, stride_k, WIDTH, GIVEN, BM, BN, BK, STAGES, PRECISION,
                      EVEN, FAR)  # fmt: skip
    logits = s * tl.load(SCALE) + tl.load(BIAS)  # -y r, once the positives' sign is turned
    if DIAGONAL:
        logits = tl.where(on[None, :] == om[:, None] + diagonal, -logits, logits)
    z = tl.exp(-tl.abs(logits))
    if DOUBLE:
        u = 1.0 + z
        tail = tl.where(u == 1.0, z, tl.log(u) * (z / tl.where(u == 1.0, 1.0, u - 1.0)))
    else:
        tail = _log_1_plus(z)
    loss = tl.maximum(logits, 0.0) + tail
    q = tl.where(logits >= 0.0, 1.0, z) / (1.0 + z)
    if DIAGONAL:
        q = tl.where(on[None, :] == om[:, None] + diagonal, -q, q)
    if not EVEN:
        inside = (om < b)[:, None] & (on < n)[None, :]
        loss = tl.where(inside, loss, 0.0)
        q = tl.where(inside, q, 0.0)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(SUMS + program, tl.sum(tl.sum(loss, 1), 0))
    tl.store(SUMS + programs + program, tl.sum(tl.sum(q * s, 1), 0))
    tl.store(SUMS + 2 * programs + program, tl.sum(tl.sum(q, 1), 0))
    if STORE:
        _store(W, W_LOW, q, om, on, b, n, stride_w, LOW, EVEN, FAR)
