"""Definitions of objectives that read hard negatives, references, tokens, parts or a teacher, in plain tensors."""

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.types import Embeddings
from tests.objectives.harness import B

EYE = torch.eye(B, dtype=torch.bool)


def softmax_of(e: Embeddings, t: Any) -> Tensor:
    """CLIP's value."""
    x = e.image @ e.text.T / t
    return (x.logsumexp(1) + x.logsumexp(0) - 2 * x.diagonal()).mean() / 2


def negclip(state, e, step, pictures=False):
    keys = torch.cat([e.text, *(x[there] for x, there in zip(e.text_negatives, e.text_negative_mask.T, strict=True))])
    own = (e.image * e.text).sum(1) * e.logit_scale
    of_image = (e.image @ keys.T * e.logit_scale).logsumexp(1) - own
    keys = e.image
    if pictures:
        wrong = zip(e.image_negatives, e.image_negative_mask.T, strict=True)
        keys = torch.cat([keys, *(x[there] for x, there in wrong)])
    value = (of_image + (e.text @ keys.T * e.logit_scale).logsumexp(1) - own).mean() / 2
    return value, value


def negclip_of_both(state, e, step):
    return negclip(state, e, step, pictures=True)


def byolip(state, e, step):
    pairs = ((e.image_predicted, e.text_momentum), (e.text_predicted, e.image_momentum))
    missed = [(F.normalize(p, dim=1) - x).square().sum(1).mean() for p, x in pairs]
    value = 0.7 * softmax_of(e, 0.1) + 0.3 * (missed[0] + missed[1]) / 2
    return value, value


def count(state, e, step):
    margins = torch.cat([(e.image * (wrong - e.text)).sum(1) for wrong in e.text_negatives])
    margins = margins[e.text_negative_mask.T.flatten()]
    value = softmax_of(e, 0.1) + 0.7 * (1 + margins.exp()).log().mean()
    return value, value


def degla(state, e, step):
    value = negclip(state, e, step)[0]
    sides = ((e.image, e.text, e.logit_scale, 0.2), (e.text, e.text_momentum, 1 / 0.25, 0.3))
    for anchors, positives, scale, weight in sides:
        own = (anchors * positives).sum(1, keepdim=True)
        wrong = torch.stack([(anchors * n).sum(1) for n in e.text_negatives], 1)
        x = torch.cat([own * scale, (wrong * scale).masked_fill(~e.text_negative_mask, -torch.inf)], 1)
        value = value + weight * (x.logsumexp(1) - x[:, 0]).mean()
    moved = torch.cat([e.image - e.image_momentum, e.text - e.text_momentum], 1)
    value = value + 0.5 * moved.square().sum(1).mean()
    return value, value


def distill(teacher: str, alpha: Any, own_temperature: float | None):
    def definition(state, e, step):
        share = alpha[step] if isinstance(alpha, tuple) else alpha
        r, o = (getattr(e, f"{side}_{teacher}") for side in ("image", "text"))
        scale = 1 / own_temperature if own_temperature else e.logit_scale.detach()
        s, true = e.image @ e.text.T * e.logit_scale, r @ o.T * scale
        value = 0.0
        for x, y in ((s, true), (s.T, true.T)):
            target = (1 - share) * EYE.double() + share * y.softmax(1)
            value = value - (target * x.log_softmax(1)).sum(1).mean() / 2
        return value, value

    return definition


def mochi(hardest: int, mixed: int, with_anchor: int, epochs: Any):
    def definition(state, e, step):
        value = 0.0
        for which, (z, keys) in enumerate(((e.image, e.text), (e.text, e.image))):
            seed = hashlib.sha256(f"7 {epochs[step]!r} {which}".encode()).digest()[:8]
            g = torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)
            two, one = (torch.rand(B, *shape, generator=g).double() for shape in ((mixed, 3), (with_anchor, 2)))
            x = (z @ keys.T).detach().masked_fill(EYE, -torch.inf)
            near = keys.detach()[x.argsort(1, descending=True)[:, :hardest]]  # (B, N, D)
            rows = torch.arange(B)[:, None]
            p, q, r = (near[rows, (x * hardest).long()] for x in (two[..., 0], two[..., 1], one[..., 0]))
            a, b = two[..., 2:], one[..., 1:] / 2
            made = [a * p + (1 - a) * q, b * z.detach()[:, None] + (1 - b) * r]
            there = torch.cat([keys.expand(B, B, -1), F.normalize(torch.cat(made, 1), dim=2)], 1)  # (B, B + S, D)
            x = (there * z[:, None]).sum(2) * e.logit_scale
            value = value + (x.logsumexp(1) - x[:, :B].diagonal()).mean() / 2
        return value, value

    return definition


def cwcl(sides: str):
    def definition(state, e, step):
        s, value = e.image @ e.text.T * e.logit_scale, 0.0
        for name, x in (("image", s), ("text", s.T)):
            p = getattr(e, f"{name}_reference")
            w = (1 + p @ p.T) / 2 if sides in (name, "both") else EYE.double()
            value = value - ((w / w.sum(1, keepdim=True)) * x.log_softmax(1)).sum() / (2 * B)
        return value, value

    return definition


def filip(state, e, step):
    value = 0.0
    for a, b in (("image", "text"), ("text", "image")):
        anchors, keys = getattr(e, f"{a}_tokens"), getattr(e, f"{b}_tokens")
        for i in range(B):
            mine = anchors[i][getattr(e, f"{a}_token_mask")[i]]
            best = [(mine @ keys[j][getattr(e, f"{b}_token_mask")[j]].T).max(1).values.mean() for j in range(B)]
            x = torch.stack(best) * e.logit_scale
            value = value + (x.logsumexp(0) - x[i]) / (2 * B)
    return value, value


def m3col(share: float, soft: float, epochs: Any, temperature: float | None):
    def definition(state, e, step):
        value = 0.0
        if epochs[step] >= soft:
            targets = ((e.text @ e.text.T / 0.3).softmax(1) + (e.image @ e.image.T / 0.3).softmax(1)).detach() / 2
            for s in (e.image @ e.text.T, e.text @ e.image.T):
                value = value - (targets * (s / 0.3).log_softmax(1)).sum(1).mean() / 2
            return value, value
        t = 1 / e.logit_scale if temperature is None else temperature
        for which, (rows, keys) in enumerate(((e.image, e.text), (e.text, e.image))):
            seed = hashlib.sha256(f"7 {epochs[step]!r} {which}".encode()).digest()[:7]
            generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
            chosen = torch.rand(B, generator=generator) < share
            drawn = torch._sample_dirichlet(torch.full((B, 2), 0.15, dtype=torch.float64), generator)[:, 0]
            circle = torch.randperm(B, generator=generator)
            b = torch.tensor(
                [float(x) if yes else 1.0 for x, yes in zip(drawn, chosen, strict=True)], dtype=torch.float64
            )
            r = [int(circle[(circle.tolist().index(i) + 1) % B]) for i in range(B)]
            x = F.normalize(torch.stack([b[i] * rows[i] + (1 - b[i]) * rows[r[i]] for i in range(B)]), dim=1)
            target = torch.diag(b)
            for i in range(B):
                target[i, r[i]] += 1 - b[i]
            x = x @ keys.T / t
            value = value - (target * (x.log_softmax(1) + x.log_softmax(0))).sum() / (4 * B)
        return value, value

    return definition


def swav(clip: float, frozen: bool, weight: float = 0.2, t: float = 0.1, epsilon: float = 0.05, iterations: int = 3):
    def definition(state, e, step):
        c = F.normalize(e.prototypes, dim=1)
        c = c.detach() if frozen else c
        s = [x @ c.T for x in (e.image, e.text)]
        codes = []
        for x in s:
            q = (x.detach() / epsilon).exp()
            for _ in range(iterations):
                q = q / q.sum(0, keepdim=True)
                q = q / q.sum(1, keepdim=True)
            codes.append(q)
        swap = [(q * (x / t).log_softmax(1)).sum(1) for q, x in zip(codes[::-1], s, strict=True)]
        value = -weight / 2 * (swap[0] + swap[1]).mean() + (clip * softmax_of(e, 0.1) if clip else 0)
        return value, value

    return definition


def siamlip(state, e, step):
    pairs = ((e.image_predicted, e.text.detach()), (e.text_predicted, e.image.detach()))
    missed = [(F.normalize(p, dim=1) - x).square().sum(1).mean() for p, x in pairs]
    value = 0.7 * softmax_of(e, 0.1) + 0.3 * (missed[0] + missed[1]) / 2
    return value, value


def barlip(state, e, step):
    columns = []
    for v in (e.image_projected, e.text_projected):
        columns.append((v - v.mean(0)) / (v.var(0, correction=0) + 1e-5).sqrt())
    c = columns[0].T @ columns[1] / B
    target = torch.eye(len(c), dtype=torch.float64)
    weights = torch.where(target == 1, 1.0, 0.02)
    value = 0.04 * (weights * (c - target).square()).sum() + 0 * e.image.sum()
    return value, value
