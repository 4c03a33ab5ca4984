"""Objectives with banks learn on the embedded corpus; and what a bank needs to."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from amclr_scale import objectives
from amclr_scale.data.evaluation_split import EvaluationSplit
from amclr_scale.types import Embeddings
from tests.data.test_evaluation_split import settings

B, STEPS, TESTED, CHANCE = 128, 120, 500, 10 / 500
DECAY = 0.98  # of the teacher: some hundred steps are a short run


@pytest.fixture(scope="module")
def pairs():
    """Pictures (N, 16 x 16 x 3) and token ids (N, L) of the training split."""
    split = EvaluationSplit("emoji/train", settings("emoji/train", image_size=16))
    whole = next(split.batches(10_000))
    return whole.images[0].float().flatten(1) / 127.5 - 1, whole.texts[0]


class Towers(nn.Module):
    def __init__(self, inputs: int, words: int):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 64))
        self.words = nn.EmbeddingBag(words, 64, padding_idx=0)

    def forward(self, images, texts):
        return F.normalize(self.image(images), dim=1), F.normalize(self.words(texts), dim=1)


def trained(pairs, name, **options):
    """Recall at 10 among TESTED training pairs, and their mean similarity, after STEPS steps."""
    images, texts = pairs
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(Towers(images.shape[1], int(texts.max()) + 1))
    student, teacher = made
    objective = objectives.create(name, num_samples=len(images), temperature=0.07, **options)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    for step in range(STEPS):
        ids = order[(torch.arange(B) + step * B) % len(images)]
        with torch.no_grad():
            of_teacher = dict(zip(("image_momentum", "text_momentum"), teacher(images[ids], texts[ids]), strict=True))
        loss = objective(Embeddings(*student(images[ids], texts[ids]), ids=ids, **of_teacher))
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.lerp_(new, 1 - DECAY)
    with torch.no_grad():
        z, y = student(images[:TESTED], texts[:TESTED])
    s = z @ y.T
    found = (s.topk(10, 1).indices == torch.arange(TESTED)[:, None]).any(1).double().mean().item()
    return found, s.mean().item()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("momentum_queue", {"size": 512}),
        ("full_bank", {"negatives": 512, "proximal": 1.0, "key_gradient": False}),
        ("sogclr", {"queue": {"size": 512, "key_gradient": False}}),
        ("meow", {"clusters": [50, 100]}),
        ("pamc", {"clusters": 128}),
        ("m3col", {"soft_epoch": 2.0}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_it_learns(pairs, name, options):
    recall, _ = trained(pairs, name, **options)
    assert recall > (2.5 if name == "full_bank" else 4) * CHANCE  # whose bank has just been filled


def test_a_bank_without_the_gradient_of_keys_does_not_pull_all_embeddings_together(pairs):
    with_it, without = trained(pairs, "fifo_bank", size=512), trained(pairs, "fifo_bank", size=512, key_gradient=False)
    assert with_it[0] > 2 * CHANCE
    assert without[0] > 1.5 * with_it[0]
    assert without[1] < with_it[1] - 0.3
