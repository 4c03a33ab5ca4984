"""What narrower operands of similarities cost: gradients of CLIP's loss against float64, on a trained model's rows.

    amclr-scale embed RUN --shards emoji/train --side image --out image.npy
    amclr-scale embed RUN --shards emoji/train --side text --out text.npy
    python tools/precision/similarities.py image.npy text.npy --temperatures 0.07 0.01

Relative errors |g - e| / |e| of the gradients g of image rows, text rows and scale, on the torch backend; e is autograd
of the dense loss in float64, on the same float32 rows. Two rows more than `execution.similarity.precision` has:

    split, bf16 gradients   similarities of `split`, and one bf16 product for each gradient (computed densely)
    bf16 rows               the towers' rows rounded first, and the loss of the rounded rows differentiated exactly
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from amclr_scale.similarity import contrast, using

Gradients = tuple[Tensor, ...]  # of image rows, text rows, scale


def exact(image: Tensor, text: Tensor, scale: float) -> Gradients:
    """Of the dense loss, in float64."""
    leaves = [x.double().requires_grad_() for x in (image, text, torch.tensor([scale]))]
    logits = leaves[2] * leaves[0] @ leaves[1].T
    loss = (logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()).mean() / 2
    return torch.autograd.grad(loss, leaves)


def ours(image: Tensor, text: Tensor, scale: float, precision: str) -> Gradients:
    """Of `contrast`, as an objective uses it."""
    leaves = [x.clone().requires_grad_() for x in (image, text, torch.tensor([scale]))]
    with using(precision=precision, backend="torch"):
        c = contrast(leaves[0], leaves[1], temperature=1 / leaves[2], centred=True)
        return torch.autograd.grad((c.image.log_sum.mean() + c.text.log_sum.mean()) / 2, leaves)


def mixed(image: Tensor, text: Tensor, scale: float) -> Gradients:
    """`split` similarities; weights and features of the gradients' products rounded to bf16."""
    (a, a_low), (k, k_low) = (
        (x.bfloat16().double(), (x - x.bfloat16().float()).bfloat16().double()) for x in (image, text)
    )
    s = (a @ k.T + a_low @ k.T + a @ k_low.T).requires_grad_()
    t = torch.tensor([scale], dtype=torch.float64, requires_grad=True)
    logits = t * s
    loss = (logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()).mean() / 2
    w, d_scale = torch.autograd.grad(loss, (s, t))
    w = w.bfloat16().double()
    return w @ k, w.T @ a, d_scale


def error(got: Gradients, want: Gradients) -> list[float]:
    return [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="rows of --side image")
    parser.add_argument("text", type=Path, help="rows of --side text")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.07, 0.01])
    parser.add_argument("--batch", type=int, default=2048, help="B: this many rows, drawn at random")
    args = parser.parse_args()
    image, text = (torch.from_numpy(np.load(file, allow_pickle=False)) for file in (args.image, args.text))
    chosen = torch.randperm(len(image), generator=torch.Generator().manual_seed(0))[: args.batch]
    image, text = image[chosen], text[chosen]
    print(f"B = {len(image):,}, D = {image.shape[1]}, mean similarity of pairs {(image * text).sum(1).mean():.2f}, "
          f"of all {(image.mean(0) * text.mean(0)).sum():.2f}\n")  # fmt: skip
    print("| temperature | operands | d image | d text | d scale |\n|---|---|---|---|---|")
    for temperature in args.temperatures:
        scale = 1 / temperature
        want = exact(image, text, scale)
        rows = {name: error(ours(image, text, scale, name), want) for name in ("fp32", "split", "bf16")}
        rows["split, bf16 gradients"] = error(mixed(image, text, scale), want)
        rounded = image.bfloat16().float(), text.bfloat16().float()
        rows["bf16 rows"] = error(exact(*rounded, scale), want)
        for name, errors in rows.items():
            print(f"| {temperature:.4f} | {name} | {' | '.join(f'{e:.1e}' for e in errors)} |", flush=True)


if __name__ == "__main__":
    main()
