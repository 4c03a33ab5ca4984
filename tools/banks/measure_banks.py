"""What the notes "Increasing negative examples for ITC" say about banks, asked of small towers on the embedded corpus.

    python tools/banks/measure_banks.py                  # the tables of docs/measurements.md, minutes on one core
    python tools/banks/measure_banks.py --steps 40 --seeds 1

Batches of 128, banks of M rows per modality; recall at 10 from 500 drawings of an artist who was not trained on, in
percent, where chance is 2; mean, least and most over seeds.

stale by k   the keys that a FIFO bank of M would hold, all of them encoded anew with the weights of k steps ago: k = 0
             has the negatives of a bank and nothing stale in them
gradients    with respect to all weights, where 640 pairs are cut into five batches, each beside the 512 others as keys
             without gradient, averaged over the five; against the gradient of CLIP on all 640 at once
"""

import argparse
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from amclr_scale import objectives
from amclr_scale.config.schema import Data
from amclr_scale.data.evaluation_split import EvaluationSplit
from amclr_scale.objectives.clip import softmax_loss
from amclr_scale.similarity import ExtraKeys, contrast
from amclr_scale.types import Embeddings

B, T, DECAY, CUTS = 128, 0.07, 0.98, 5
AGES = (1, 4, 16, 64)  # steps
Weights = dict[str, Tensor]


class Towers(nn.Module):
    """A perceptron for pictures, a bag of words for captions."""

    def __init__(self, inputs: int, words: int):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 64))
        self.words = nn.EmbeddingBag(words, 64, padding_idx=0)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 64) each, of unit length."""
        return F.normalize(self.image(images), dim=1), F.normalize(self.words(texts), dim=1)


@dataclass
class Pairs:
    """Pictures (N, 768) and token ids (N, L)."""

    images: Tensor
    texts: Tensor

    @classmethod
    def read(cls, split: str) -> "Pairs":
        """A split of the embedded corpus, as it is evaluated."""
        data = Data(train="emoji/train", image_size=16, context_length=16)
        whole = next(EvaluationSplit(split, data).batches(10_000))
        return cls(whole.images[0].float().flatten(1) / 127.5 - 1, whole.texts[0])


@dataclass
class Run:
    """Towers in training, their average, and their past."""

    data: Pairs
    seed: int
    student: Towers = field(init=False)
    teacher: Towers = field(init=False)
    past: deque[Weights] = field(default_factory=lambda: deque(maxlen=AGES[-1] + 1))  # the last is the present
    seen: deque[Tensor] = field(default_factory=lambda: deque(maxlen=64))  # ids of the last batches

    def __post_init__(self) -> None:
        for name in ("student", "teacher"):
            torch.manual_seed(self.seed)
            setattr(self, name, Towers(self.data.images.shape[1], 4096))
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=2e-3)

    def batches(self, steps: int) -> Iterator[Tensor]:
        """Ids, (B,), in another order in every epoch."""
        order, g, at = torch.empty(0, dtype=torch.int64), torch.Generator().manual_seed(100 + self.seed), 0
        for _ in range(steps):
            if at + B > len(order):
                order, at = torch.randperm(len(self.data.images), generator=g), 0
            yield order[at : at + B]
            at += B

    def train(self, steps: int, loss: Callable[["Run", Tensor], Tensor]) -> "Run":
        """So many steps."""
        for ids in self.batches(steps):
            self.past.append({name: x.clone() for name, x in self.student.state_dict().items()})
            self.optimizer.zero_grad()
            loss(self, ids).backward()
            self.optimizer.step()
            self.seen.append(ids)
            with torch.no_grad():
                for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                    old.lerp_(new, 1 - DECAY)
        return self

    def features(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The student's."""
        image, text = self.student(self.data.images[ids], self.data.texts[ids])
        return image, text

    @torch.no_grad()
    def earlier(self, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """With the weights of k steps ago, or of the beginning."""
        weights = self.past[max(0, len(self.past) - 1 - k)]
        of = torch.func.functional_call(self.student, weights, (self.data.images[ids], self.data.texts[ids]))
        return of[0], of[1]

    @torch.no_grad()
    def recall(self, held_out: Pairs) -> float:
        """At 10, from pictures to captions of the first 500, in percent."""
        z, y = self.student(held_out.images[:500], held_out.texts[:500])
        found = ((z @ y.T).topk(10, 1).indices == torch.arange(500)[:, None]).any(1)
        return 100 * float(found.double().mean())


def by_name(name: str, seen: dict[str, list[float]], **options: Any) -> Callable[[Run, Tensor], Tensor]:
    """An objective of the package; numbers that it logs go into `seen`."""
    made: list[Any] = []

    def loss(run: Run, ids: Tensor) -> Tensor:
        if not made:
            made.append(objectives.create(name, num_samples=len(run.data.images), temperature=T, **options))
        with torch.no_grad():
            image, text = run.teacher(run.data.images[ids], run.data.texts[ids])
        found = made[0](Embeddings(*run.features(ids), ids=ids, image_momentum=image, text_momentum=text))
        for key, number in found.metrics.items():
            seen.setdefault(key, []).append(number)
        value: Tensor = found.value
        return value

    return loss


def stale_by(k: int, size: int, *, key_gradient: bool) -> Callable[[Run, Tensor], Tensor]:
    """CLIP with the keys of a FIFO bank, encoded with the weights of k steps ago."""

    def loss(run: Run, ids: Tensor) -> Tensor:
        z, y = run.features(ids)
        if not run.seen:
            return softmax_loss(contrast(z, y, temperature=T, centred=True, key_gradient=key_gradient))
        held = torch.cat(list(run.seen))[-size:]
        images, texts = (ExtraKeys(rows, held, ids) for rows in run.earlier(held, k))
        both = contrast(
            z, y, temperature=T, centred=True, extra_image_keys=images, extra_text_keys=texts, key_gradient=key_gradient
        )
        return softmax_loss(both)

    return loss


def gradient(run: Run, value: Tensor) -> Tensor:
    """With respect to all weights, flat."""
    return torch.cat([x.flatten() for x in torch.autograd.grad(value, list(run.student.parameters()))])


def likeness(run: Run) -> list[tuple[str, float, float]]:
    """Words, cosine and ratio of norms: batches beside what they lack, against the whole."""
    ids = torch.randperm(len(run.data.images), generator=torch.Generator().manual_seed(9))[: CUTS * B]
    whole = gradient(run, softmax_loss(contrast(*run.features(ids), temperature=T, centred=True)))

    def cut(k: int | None, key_gradient: bool) -> Tensor:
        total = torch.zeros_like(whole)
        for mine in ids.split(B):
            others = ids[~torch.isin(ids, mine)]
            extra = {}
            if k is not None:
                images, texts = run.earlier(others, k)
                extra = {"extra_image_keys": images, "extra_text_keys": texts}
            both = contrast(*run.features(mine), temperature=T, centred=True, key_gradient=key_gradient, **extra)  # type: ignore[arg-type]
            total += gradient(run, softmax_loss(both)) / CUTS
        return total

    kinds: list[tuple[str, int | None, bool]] = [("no bank", None, True), ("bank of the present", 0, True)]
    kinds += [(f"bank {k} steps old", k, True) for k in AGES] + [
        ("bank of the present, keys without gradient", 0, False)
    ]
    found = []
    for words, k, key_gradient in kinds:
        g = cut(k, key_gradient)
        found.append((words, F.cosine_similarity(g, whole, dim=0).item(), (g.norm() / whole.norm()).item()))
    return found


def drift(run: Run) -> list[float]:
    """Mean of 1 - cosine between features now and `AGES` steps ago."""
    ids, now = torch.arange(500), run.earlier(torch.arange(500), 0)

    def apart(k: int) -> float:
        pairs = zip(now, run.earlier(ids, k), strict=True)
        return sum((1 - F.cosine_similarity(a, b, dim=1)).mean().item() for a, b in pairs) / 2

    return [apart(k) for k in AGES]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    train, held_out = Pairs.read("emoji/train"), Pairs.read("emoji/val_style")
    arms: list[tuple[str, Callable[[dict[str, list[float]]], Callable[[Run, Tensor], Tensor]]]] = [
        ("clip", lambda seen: by_name("clip", seen)),
    ]
    for on in (True, False):
        words = "" if on else ", keys without gradient"
        arms.append((
            f"fifo_bank, M = 512{words}", lambda seen, on=on: by_name("fifo_bank", seen, size=512, key_gradient=on),  # type: ignore[misc]
        ))  # fmt: skip
        arms += [
            (f"stale by {k}, M = 512{words}", lambda _, k=k, on=on: stale_by(k, 512, key_gradient=on))  # type: ignore[misc]
            for k in (0, 4, 16, 64)
        ]
    for init in ("empty", "batch", "randn", "rand", "zeros"):
        arms.append((
            f"fifo_bank, M = 4,096, keys without gradient, init {init}",
            lambda seen, init=init: by_name("fifo_bank", seen, size=4096, key_gradient=False, init=init),  # type: ignore[misc]
        ))  # fmt: skip
    arms += [
        ("momentum_queue, M = 512", lambda seen: by_name("momentum_queue", seen, size=512)),
        ("momentum_queue, M = 512, alpha 0", lambda seen: by_name("momentum_queue", seen, size=512, alpha=0.0)),
        ("full_bank, K = 512, proximal 1, keys without gradient", lambda seen: by_name(
            "full_bank", seen, negatives=512, proximal=1.0, key_gradient=False
        )),
        ("sogclr", lambda seen: by_name("sogclr", seen)),
        ("sogclr, queue of 512, keys without gradient", lambda seen: by_name(
            "sogclr", seen, queue={"size": 512, "key_gradient": False}
        )),
    ]  # fmt: skip
    print("| arm | R@10 | least | most | own rows met | their drift |\n|---|---|---|---|---|---|")
    for words, make in arms:
        scores, seen = [], dict[str, list[float]]()
        for seed in range(options.seeds):
            scores.append(Run(train, seed).train(options.steps, make(seen)).recall(held_out))
        met = [sum(seen[key]) / len(seen[key]) if key in seen else None for key in ("bank_same_id", "bank_drift")]
        columns = ["-" if one is None else f"{one:.3f}" for one in met]
        mean = sum(scores) / len(scores)
        print(f"| {words} | {mean:.1f} | {min(scores):.1f} | {max(scores):.1f} | {' | '.join(columns)} |", flush=True)
    print("\n| step | gradient | cosine | norm |\n|---|---|---|---|")
    for steps in (max(AGES) + 1, options.steps):
        run = Run(train, 0).train(steps, by_name("clip", {}))
        for words, cosine, ratio in likeness(run):
            print(f"| {steps} | {words} | {cosine:.3f} | {ratio:.2f} |")
        print(f"drift after {', '.join(map(str, AGES))} steps, at step {steps}:", *(f"{x:.4f}" for x in drift(run)))


if __name__ == "__main__":
    main()
