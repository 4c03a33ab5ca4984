"""What it costs that tensor cores cut sums off: similarities as an H100 or H200 adds them up, emulated in float64.

    python tools/precision/tensor_cores.py

A tensor core adds BLOCK products at once to what it has so far: every summand is cut off EXTRA bits below the last bit
that float32 gives the largest of them, and their sum at float32's last bit. Nothing is rounded, so errors do not
cancel: a sum falls short in proportion to its size and to the number of blocks. Khattak and Mikaitis, "Accurate Models
of NVIDIA Tensor Cores", 2025, arXiv:2512.07004, say how such models are found.

Printed are relative errors |x - e| / |e| of the log-sums x of image anchors, against the float64 similarities of the
same rows: with products of these operands added up exactly, and cut off. Rows are drawn as those of
tests/similarity/test_at_size.py: pairs with a similarity of 0.24, temperature 0.03, centred.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from amclr_scale.similarity.precision import Form, operand

BLOCK, EXTRA = 16, 2  # of Hopper, for operands of 16 bits
BITS = 24  # of float32's significand
AT_ONCE = 4  # rows whose products with all keys stay in a cache
NONE = -900  # the exponent of 0: below all others, and its unit is still a number
TEMPERATURE = 0.03
OPERANDS: tuple[tuple[str, Form, torch.dtype, bool], ...] = (  # words, form, type of rows, large products first
    ("bf16", "bf16", torch.bfloat16, False),
    ("fp16", "fp16", torch.float16, False),
    ("split, small products first", "split", torch.float32, False),
    ("split, large products first", "split", torch.float32, True),
    ("float32 rounded to bf16", "bf16", torch.float32, False),
)


def cut_off_product(left: Tensor, right: Tensor, *, block: int = BLOCK, extra: int = EXTRA) -> Tensor:
    """`left @ right.T` (m, n) in float64, with the numbers that tensor cores have in float32.

    Args:
        left: (m, K) bfloat16 or float16.
        right: (n, K), the same.
        block: products that are added at once.
        extra: bits that a summand keeps below the last one of the largest.
    """
    if len(left) > AT_ONCE:
        return torch.cat([cut_off_product(rows, right, block=block, extra=extra) for rows in left.split(AT_ONCE)])
    a, k = left.double(), right.double()
    a_exponents, k_exponents = _exponents(a) - 1, _exponents(k)  # of products, before they are brought to 1 <= x < 2
    total = a.new_zeros(len(a), len(k))
    for first in range(0, a.shape[1], block):
        part = slice(first, first + block)
        products = a[:, None, part] * k[None, :, part]
        exponents = (a_exponents[:, None, part] + k_exponents[None, :, part]).amax(2)
        unit = torch.maximum(exponents, _exponents(total)).clamp_min(NONE) - BITS - extra
        total = _cut(torch.cat((products, total[:, :, None]), dim=2), unit[:, :, None]).sum(2)
        total = _cut(total, _exponents(total) - BITS)
    return total


def _exponents(x: Tensor) -> Tensor:
    """Integers n with |x| = f 2^n and 1/2 <= f < 1."""
    return torch.where(x == 0, NONE, torch.frexp(x).exponent)


def _cut(x: Tensor, unit: Tensor) -> Tensor:
    """Towards zero, to multiples of 2^unit."""
    scale = torch.ldexp(torch.ones_like(unit, dtype=x.dtype), -unit)
    return (x * scale).trunc_().div_(scale)


def draw(B: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows (B, D) of both sides."""
    image, noise = torch.randn(2, B, D, generator=torch.Generator().manual_seed(0))
    return F.normalize(image, dim=1).to(dtype), F.normalize(image + 4 * noise, dim=1).to(dtype)


def large_first(product: Tensor) -> Tensor:
    """The operand of `split` with its three parts the other way round."""
    return torch.cat(product.chunk(3, dim=1)[::-1], dim=1)


def log_sums(similarities: Tensor, *, exclude_positive: bool = False) -> Tensor:
    """(m,) centred, of the first m anchors among n keys; the positive of anchor i is key i."""
    positive = similarities.diagonal()
    x = (similarities - positive[:, None]) / TEMPERATURE
    if exclude_positive:
        x.diagonal().fill_(-math.inf)
    return x.logsumexp(1)


def errors(
    D: int, form: Form, dtype: torch.dtype, *, B: int = 4100, anchors: int = 32, exclude_positive: bool = False,
    reverse: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """Relative errors of log-sums: of these operands with exact sums, and with sums that are cut off.

    Args:
        D: width of rows.
        form: of operands, as in `similarity.precision`.
        dtype: of the rows that operands are made of, and that errors are against.
        B: keys.
        anchors: how many of them are looked at.
        exclude_positive: whether the positive is no key.
        reverse: large products first, not last; `split` alone has two kinds.
    """
    image, text = draw(B, D, dtype)
    left, right = operand(image[:anchors], form, left=True).product, operand(text, form, left=False).product
    if reverse:
        left, right = large_first(left), large_first(right)
    want = log_sums(image[:anchors].double() @ text.double().T, exclude_positive=exclude_positive)
    found = (left.double() @ right.double().T, cut_off_product(left, right))
    exact, cut = (float((log_sums(s, exclude_positive=exclude_positive) - want).norm() / want.norm()) for s in found)
    return exact, cut


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 768])
    parser.add_argument("--anchors", type=int, default=256)
    args = parser.parse_args()
    print("| D | operands | positive | sums exact | sums cut off |\n|---|---|---|---|---|")
    for D in args.widths:
        for name, form, dtype, reverse in OPERANDS:
            for excluded in (False, True):
                exact, cut = errors(D, form, dtype, anchors=args.anchors, exclude_positive=excluded, reverse=reverse)
                print(f"| {D} | {name} | {'excluded' if excluded else 'a key'} | {exact:.1e} | {cut:.1e} |", flush=True)


if __name__ == "__main__":
    main()
