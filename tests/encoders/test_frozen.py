"""Frozen towers: the gradient is plain PyTorch's with requires_grad=False, and a tower is run once for each sample."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale import objectives
from amclr_scale.checkpoint.pieces import flats
from amclr_scale.config.load import build
from amclr_scale.config.schema import ImageTower, Model, Momentum, TextTower
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.encoders.build import build_model
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.gradient_cache import cached_backward
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.teacher import Teacher
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.errors import UserError
from amclr_scale.memory.towers import trace
from amclr_scale.metrics.phases import Phases
from amclr_scale.types import Batch, Embeddings
from tests.engine.towers import CPU, config

SIZE, STEPS, LR, DECAY = 16, 3, 0.05, 0.7
WHOLE = {"frozen": True}
# By name: the sections' keys, and beginnings of names of what is trained, of a side's tower and head.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "image": (WHOLE, {}, ("image_head", "text_")),
    "both": (WHOLE, WHOLE, ("image_head", "text_head")),
    "image with its head": ({"frozen": True, "frozen_head": True}, {}, ("text_",)),
    "all but the last blocks": (
        {"frozen": True, "unfrozen_blocks": 1},
        {"frozen": True, "unfrozen_blocks": 1, "unfrozen_norms": True, "frozen_head": True},
        ("image_head", "image_tower.stages.3", "text_tower.tokens.layers.1", "text_tower.tokens.norm",
         "text_tower.tokens.layers.0.norm"),
    ),
}  # fmt: skip


def model(image: dict[str, Any], text: dict[str, Any], dropout: float = 0.0, length: int = 5) -> DualEncoder:
    """With BatchNorm, whose statistics are neither 0 and 1 nor those of a batch."""
    torch.manual_seed(0)
    sections = Model(
        image=ImageTower(width=8, norm="batch", dropout=dropout, **image),
        text=TextTower(width=16, layers=2, heads=2, dropout=dropout, **text), embedding_width=8,
    )  # fmt: skip
    mean = (0.5, 0.5, 0.5)
    made = build_model(
        sections, vocab_size=30, pad_id=0, context_length=length, image_size=16, image_mean=mean, image_std=mean
    )
    g = torch.Generator().manual_seed(1)
    for module in made.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = torch.randn(module.num_features, generator=g) / 10
            module.running_var = 1 + torch.rand(module.num_features, generator=g)
    return made


def batch(step: int, mine: slice = slice(None), views: int = 1) -> Batch:
    g = torch.Generator().manual_seed(step)
    images = [torch.randint(0, 256, (SIZE, 3, 16, 16), generator=g, dtype=torch.uint8)[mine] for _ in range(views)]
    texts = torch.randint(1, 30, (SIZE, 5), generator=g)[mine]
    return Batch(torch.arange(SIZE)[mine], tuple(images), (texts,))


def by_hand(name: str) -> DualEncoder:
    """A model that knows nothing of freezing, frozen as a user of PyTorch does it."""
    image, _, trained = CASES[name]
    plain = model({}, {})
    for key, parameter in plain.named_parameters():
        parameter.requires_grad_(key.startswith((*trained, "logit_")))
    plain.image_tower.eval()
    if image.get("unfrozen_blocks"):
        plain.image_tower.get_submodule("stages.3").train()
    return plain


def plain_run(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after some steps, and their moving average."""
    plain = by_hand(name)
    average = {key: p.detach().clone() for key, p in plain.named_parameters()}
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=LR)
    for step in range(STEPS):
        whole = batch(step)
        rows = [
            plain((image,), (text,))
            for image, text in zip(whole.images[0].split(2), whole.texts[0].split(2), strict=True)
        ]
        image, text = (torch.cat([part[side] for part in rows]) for side in ("image", "text"))
        logits = rows[0]["logit_scale"] * image @ text.T
        labels = torch.arange(SIZE)
        optimizer.zero_grad()
        ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2).backward()
        optimizer.step()
        plain.clamp_logit_scale()
        for key, p in plain.named_parameters():
            average[key] = DECAY * average[key] + (1 - DECAY) * p.detach()
    return {key: p.detach().clone() for key, p in plain.named_parameters()}, average


def engine_run(name: str, stage: int, kept: int) -> dict[str, Any]:
    image, text, _ = CASES[name]
    settings = config(
        SIZE, execution__zero_stage=stage, optimizer__name="sgd", optimizer__momentum=0.0,
        optimizer__weight_decay=0.0, optimizer__max_grad_norm=0.0,
    )  # fmt: skip
    made = model(image, text)
    engine, _ = build_engine(settings, made, no_decay=made.no_weight_decay(), device=CPU, world_size=world_size())
    teacher = Teacher(Momentum(decay=DECAY), engine, precision="fp32", total_steps=STEPS, lends=("image",), device=CPU)
    runs = {"image": 0, "text": 0}

    def count(side: str) -> Any:
        return lambda *_: runs.update({side: runs[side] + made.training})

    for side in runs:
        getattr(made, f"{side}_tower").register_forward_pre_hook(count(side))
    step = TrainStep(
        engine, objectives.create("clip"), micro_batch_sizes=(2, 2), device=CPU, phases=Phases(CPU), kept=kept,
        teacher=teacher,
    )  # fmt: skip
    share = SIZE // world_size()
    for number in range(STEPS):
        step(batch(number, slice(rank() * share, (rank() + 1) * share)), LR)
    found = {
        "weights": {key: full_fp32(p).cpu() for key, p in made.named_parameters()},
        "average": teacher.saved(), "runs": runs,
        "stepped": {part.name for flat in flats(engine) for part in flat.parts},
        "gradients": {key for key, p in made.named_parameters() if p.grad is not None},
    }  # fmt: skip
    engine.destroy()
    return found


def all_cases(stage: int) -> dict[str, dict[str, Any]]:
    names = CASES if stage in (0, 3) else ("image", "all but the last blocks")
    return {name: engine_run(name, stage, kept=1) for name in names}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_are_plain_pytorch_with_constants(ranks, stage):
    found = ranks(2, all_cases, stage)
    for name in found[0]:
        image, text, trained = CASES[name]
        weights, average = plain_run(name)
        for one in found:
            for key, want in weights.items():
                assert (one[name]["weights"][key] - want).norm() <= 5e-6 * want.norm() + 1e-9, (name, key)
                if not key.startswith("logit_"):
                    assert (one[name]["average"][key] - average[key]).norm() <= 5e-6 * want.norm() + 1e-9, (name, key)
            assert all(key.startswith((*trained, "logit_")) for key in one[name]["stepped"] | one[name]["gradients"])
            for side, section in (("image", image), ("text", text)):
                whole = section.get("frozen") and "unfrozen_blocks" not in section
                calls = 4 if whole else 7  # of 4 micro-batches, one's graph is kept
                assert one[name]["runs"][side] == STEPS * calls, (name, side)


@pytest.mark.parametrize("name", CASES)
def test_gradients_in_float64(name):
    """Of two image views, whose features are kept and given back together."""
    image, text, _ = CASES[name]
    made, plain, whole = model(image, text).double(), by_hand(name).double(), batch(0, views=2)
    clip = objectives.create("clip")
    cached_backward(made, clip, whole, micro_batch_sizes=(3, 3), device=CPU, kept=1)
    parts = [plain(tuple(v[i : i + 3] for v in whole.images), (whole.texts[0][i : i + 3],)) for i in range(0, SIZE, 3)]
    joined = {side: torch.cat([part[side] for part in parts]) for side in ("image", "text")}
    clip(Embeddings(**joined, logit_scale=parts[0]["logit_scale"], ids=whole.ids)).value.backward()
    got, want = ({key: p.grad for key, p in m.named_parameters() if p.grad is not None} for m in (made, plain))
    assert got.keys() == want.keys() - {"logit_bias"}
    for key, gradient in got.items():
        torch.testing.assert_close(gradient, want[key], rtol=1e-11, atol=1e-15, msg=key)


def test_dropout_of_what_trains_is_replayed_beside_a_tower_that_is_not_run_again():
    def gradients(kept: int) -> dict[str, Tensor]:
        made = model(WHOLE, {}, dropout=0.3)
        torch.manual_seed(5)
        cached_backward(made, objectives.create("clip"), batch(0), micro_batch_sizes=(4, 4), device=CPU, kept=kept)
        return {key: p.grad for key, p in made.named_parameters() if p.grad is not None}

    once, twice = gradients(4), gradients(0)
    for key, gradient in once.items():
        assert torch.equal(gradient, twice[key]), key
    assert once.keys() >= {"image_head.1.weight", "text_head.1.weight"}


def test_what_is_frozen_stays_in_evaluation_mode_and_keeps_its_statistics():
    made = model({"frozen": True, "unfrozen_blocks": 1}, WHOLE, dropout=0.3)
    made.eval()
    made.train()
    before = copy.deepcopy(dict(made.named_buffers()))
    training = {key for key, module in made.named_modules() if module.training}
    assert not any(key.startswith("text_tower") for key in training)
    assert {key.split(".")[1] for key in training if key.startswith("image_tower.")} == {"stages"}
    made(batch(0).images, batch(0).texts)
    moved = {key for key, buffer in made.named_buffers() if not torch.equal(buffer, before[key])}
    assert moved
    assert all(key.startswith("image_tower.stages.3") for key in moved)


def settings(**image: Any) -> Any:
    keys = {"data": {"image_size": 32}, "train": {"global_batch_size": 64, "epochs": 1}}
    return build({**keys, "model": {"image": {"width": 8, **image}, "text": {"width": 16}}}, 1)


def test_bytes_and_operations_of_the_account():
    """A frozen tower keeps no graph, has no second forward, and no backward; of a part of it, the rest has."""
    whole, part, none = (trace(settings(**keys), "image", "cpu") for keys in (
        WHOLE, {"frozen": True, "unfrozen_blocks": 1}, {}
    ))  # fmt: skip
    assert whole.features == 4 * 64
    assert none.features == part.features == 0
    assert whole.with_graph.kept(8) <= 8 * 4 * (64 + 3 * 128) + 2048 < part.with_graph.kept(8) < none.with_graph.kept(8)
    assert whole.again.forward_peak(8).activations < whole.with_graph.forward_peak(8).activations / 20
    assert whole.frozen_flops == whole.once_flops == whole.flops - 2 * 64 * 128
    assert 0 < part.frozen_flops < whole.frozen_flops
    assert none.frozen_flops == none.once_flops == part.once_flops == 0


MISTAKES = {
    "unfrozen_blocks: expected at most 4 for small_resnet": {"frozen": True, "unfrozen_blocks": 5},
    "unfrozen_blocks: model.image.frozen reads it, got 2": {"unfrozen_blocks": 2},
    "unfrozen_norms: model.image.frozen reads it": {"unfrozen_norms": True},
    "freezing: .*frozen": {"freezing": True},
    "frozen: frozen statistics need trained ones|norm: frozen statistics need": {
        "name": "torchvision/resnet18", "frozen": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message):
    with pytest.raises(UserError, match=message):
        trace(settings(**MISTAKES[message]), "image", "cpu")


def test_nothing_left_to_train():
    still = {"frozen": True, "frozen_head": True}
    keys = {"train": {"global_batch_size": 64, "epochs": 1}, "model": {"image": still, "text": still}}
    with pytest.raises(UserError, match=r"model.image.frozen: expected a tower or a head that is trained"):
        build(keys, 1)
