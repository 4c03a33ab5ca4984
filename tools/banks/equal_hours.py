"""More negatives for the same time: a larger batch, a momentum encoder with a queue, SogCLR, and CLIP as it is (C13).

    python tools/banks/equal_hours.py                        # the table of docs/measurements.md, 4 minutes of one core
    python tools/banks/equal_hours.py --seconds 5 --seeds 1

Every arm trains for the same CPU seconds of one thread, whatever else the machine does; reading and evaluating are not
counted. The quickstart's towers at half the width on 16 pixels, AdamW, a rate of 1e-3 sqrt(B / 128) with a warm-up over
the first twentieth of the time and a cosine behind it, temperature 0.07, no augmentation. `clip` at 1,024 takes its
exact gradient in micro-batches of 128, in the memory of one of them. The queue has 896 keys, as many as that batch
adds.
Recall at 10 on emoji/val_style, 1,724 drawings of an artist who was not trained on, mean of both directions, percent;
mean, least and most over seeds.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from amclr_scale import objectives
from amclr_scale.config.load import load
from amclr_scale.config.schema import Config
from amclr_scale.data.evaluation_split import EvaluationSplit
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.encoders.build import build_model
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.engine.own_loop import GradientCache
from amclr_scale.types import Embeddings

MICRO, T, DECAY = 128, 0.07, 0.99
WORDS = [
    "data.image_size=16", "data.context_length=16", "model.embedding_width=64", "model.image.width=8", 
    "model.text.width=32",
]  # fmt: skip


class Arm(NamedTuple):
    """An objective at a batch size; `teacher`: it reads a moving average of the towers."""

    words: str
    batch: int
    name: str
    options: dict[str, Any]
    teacher: bool = False


QUEUE = {"size": 896, "alpha": 0.0}
ARMS = [
    Arm("`clip`, B = 128", 128, "clip", {}),
    Arm("`clip`, B = 1,024", 1024, "clip", {}),
    Arm("`momentum_queue`, B = 128, M = 896, alpha 0", 128, "momentum_queue", QUEUE, True),
    Arm("the same, alpha 0.4", 128, "momentum_queue", QUEUE | {"alpha": 0.4}, True),
    Arm("`sogclr`, B = 128", 128, "sogclr", {}),
]


class Pairs(NamedTuple):
    """Pictures (N, 3, H, W), uint8, and token ids (N, L)."""

    images: Tensor
    texts: Tensor


def read(config: Config, split: str) -> Pairs:
    """A split of the embedded corpus, as it is evaluated."""
    whole = next(EvaluationSplit(split, config.data).batches(10_000))
    return Pairs(whole.images[0], whole.texts[0])


def batches(N: int, B: int, seed: int) -> Iterator[Tensor]:
    """Ids, (B,), in another order in every epoch, without end."""
    g = torch.Generator().manual_seed(100 + seed)
    while True:
        for ids in torch.randperm(N, generator=g).split(B):
            if len(ids) == B:
                yield ids


def rate(share: float, B: int) -> float:
    """The learning rate after a share of the time."""
    return 1e-3 * math.sqrt(B / 128) * min(share / 0.05, 0.5 + 0.5 * math.cos(math.pi * min(share, 1.0)))


class Trained(NamedTuple):
    """What an arm came to: recall in percent, steps, and CPU seconds of one."""

    recall: float
    steps: int
    per_step: float


def train(config: Config, arm: Arm, data: Pairs, held_out: Pairs, seed: int, seconds: float) -> Trained:
    """One arm for so many CPU seconds."""
    torch.manual_seed(seed)
    words, look = load_tokenizer(config.data.tokenizer, config.data.context_length), config.data
    model = build_model(
        config.model, vocab_size=words.vocab_size, pad_id=words.pad_id, context_length=look.context_length,
        image_size=look.image_size, image_mean=look.image_mean, image_std=look.image_std,
    )  # fmt: skip
    average = copy.deepcopy(model) if arm.teacher else None
    objective = objectives.create(arm.name, num_samples=len(data.images), temperature=T, **arm.options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.1)

    def encode(images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        out = model(images=(images,), texts=(texts,))
        return {side: out[side] for side in ("image", "text")}

    cache = GradientCache(encode, micro_batch_size=MICRO, models=(model,))
    steps, start = 0, time.process_time()
    for ids in batches(len(data.images), arm.batch, seed):
        share = (time.process_time() - start) / seconds
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate(share, arm.batch)
        images, texts, lent = data.images[ids], data.texts[ids], dict[str, Tensor]()
        if average is not None:
            with torch.no_grad():
                made = average(images=(images,), texts=(texts,))
            lent = {side: made[side] for side in ("image", "text")}

        def loss(out: dict[str, Tensor], ids: Tensor = ids, lent: dict[str, Tensor] = lent) -> Tensor:
            of = Embeddings(
                out["image"],
                out["text"],
                ids=ids,
                image_momentum=lent.get("image", ()),
                text_momentum=lent.get("text", ()),
            )
            value: Tensor = objective(of).value
            return value

        optimizer.zero_grad()
        cache(loss, images, texts)
        optimizer.step()
        if average is not None:
            with torch.no_grad():
                for old, new in zip(average.parameters(), model.parameters(), strict=True):
                    old.lerp_(new, 1 - DECAY)
        steps += 1
    used = time.process_time() - start
    return Trained(recall(model, held_out), steps, used / max(steps, 1))


@torch.no_grad()
def recall(model: DualEncoder, held_out: Pairs) -> float:
    """At 10, mean of both directions, in percent."""
    out = model.eval()(images=(held_out.images,), texts=(held_out.texts,))
    products, own = out["image"] @ out["text"].T, torch.arange(len(held_out.images))[:, None]
    found = [float((of.topk(10, 1).indices == own).any(1).double().mean()) for of in (products, products.T)]
    return 100 * sum(found) / 2


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="CPU seconds of every arm and seed")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    config = load("quickstart", WORDS)
    data, held_out = (read(config, split) for split in ("emoji/train", "emoji/val_style"))
    print("| arm | R@10 | CPU ms per step | epochs |\n|---|---|---|---|")
    for arm in ARMS:
        found = [train(config, arm, data, held_out, seed, options.seconds) for seed in range(options.seeds)]
        scores, mean = [one.recall for one in found], 1 / len(found)
        steps, cost = sum(one.steps for one in found) * mean, 1e3 * sum(one.per_step for one in found) * mean
        print(
            f"| {arm.words} | {sum(scores) * mean:.1f} ({min(scores):.1f} to {max(scores):.1f}) | {cost:.0f} | "
            f"{steps * arm.batch / len(data.images):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
