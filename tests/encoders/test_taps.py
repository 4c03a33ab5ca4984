"""Features of inner layers are what forward hooks on the plain tower see, and stay so whatever is done to the tower."""

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.config.schema import ImageTower, Model, Momentum, TextTower
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.encoders.build import build_model
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.encoders.image_towers import build_image_tower
from amclr_scale.encoders.taps import build_taps
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.gradient_cache import cached_backward
from amclr_scale.engine.optimizers import parameter_groups
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.teacher import Teacher
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.errors import UserError
from amclr_scale.metrics.phases import Phases
from amclr_scale.types import Batch, Embeddings, flatten
from tests.engine.towers import CPU, config

SIZE, LENGTH, WORDS = 16, 5, 30
IMAGE = [{"module": "stages.2.conv2", "head": "none"}, "stages.3"]
TEXT = [{"module": "layers.0.down", "of": "input", "head": "none"}, {"module": "layers.1", "pooling": "first"}]


def model(image: dict[str, Any] | None = None, text: dict[str, Any] | None = None, size: int = 16) -> DualEncoder:
    """Hidden features of 32 of both, at their own width, and of later blocks, with heads."""
    torch.manual_seed(0)
    sections = Model(
        image=ImageTower(**{"width": 8, "taps": IMAGE, **(image or {})}),
        text=TextTower(**{"width": 8, "layers": 2, "heads": 2, "taps": TEXT, **(text or {})}),
        embedding_width=8,
    )
    mean = (0.5, 0.5, 0.5)
    return build_model(
        sections, vocab_size=WORDS, pad_id=0, context_length=LENGTH, image_size=size, image_mean=mean, image_std=mean
    )


def batch(step: int = 0, mine: slice = slice(None), views: int = 1, size: int = 16) -> Batch:
    """Captions of several lengths: what is padding does not count."""
    g = torch.Generator().manual_seed(step)
    images = [torch.randint(0, 256, (SIZE, 3, size, size), generator=g, dtype=torch.uint8)[mine] for _ in range(views)]
    texts = torch.randint(1, WORDS, (SIZE, LENGTH), generator=g)
    texts[::3, 3:] = 0
    return Batch(torch.arange(SIZE)[mine], tuple(images), (texts[mine],))


def hooked(encoder: DualEncoder, whole: Batch, names: dict[str, str]) -> dict[str, Tensor]:
    """What modules give, or get, by torch's own hooks and one call of each plain tower."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, what in names.items():
        module = encoder.get_submodule(name)
        if what == "input":
            handles.append(module.register_forward_pre_hook(lambda _, args, n=name: found.update({n: args[0]})))
        else:
            handles.append(module.register_forward_hook(
                lambda _, args, out, n=name: found.update({n: out if isinstance(out, Tensor) else out[0]})
            ))  # fmt: skip
    encoder.image_tower(encoder.normalise(whole.images[0], encoder.logit_scale.dtype))
    encoder.text_tower(whole.texts[0])
    for handle in handles:
        handle.remove()
    return found


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


def mean_of_words(x: Tensor, texts: Tensor) -> Tensor:
    return torch.stack([row[: int((words != 0).sum())].mean(0) for row, words in zip(x, texts, strict=True)])


def test_our_towers_give_what_hooks_see():
    encoder, whole = model().double(), batch(views=2)
    names = {"image_tower.stages.2.conv2": "output", "image_tower.stages.3": "output"}
    names |= {"text_tower.tokens.layers.0.down": "input", "text_tower.tokens.layers.1": "output"}
    seen = hooked(encoder, whole, names)
    out = encoder(whole.images, whole.texts)
    heads = {side: encoder.taps[side].heads for side in ("image", "text")}
    torch.testing.assert_close(out["image_layers"][0], unit(seen["image_tower.stages.2.conv2"].mean((2, 3))))
    torch.testing.assert_close(
        out["image_layers"][1], unit(heads["image"][1](seen["image_tower.stages.3"].mean((2, 3))))
    )
    hidden = mean_of_words(seen["text_tower.tokens.layers.0.down"], whole.texts[0])
    torch.testing.assert_close(out["text_layers"][0], unit(hidden))
    torch.testing.assert_close(out["text_layers"][1], unit(heads["text"][1](seen["text_tower.tokens.layers.1"][:, 0])))
    assert [len(x) for x in out["image_layers"]] == [SIZE, SIZE]  # of the first view alone
    assert [x.shape[1] for x in (*out["image_layers"], *out["text_layers"])] == [32, 8, 32, 8]
    for tower in (encoder.image_tower, encoder.text_tower):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in tower.modules())


def vit(**section: Any) -> dict[str, Any]:
    options = {"depth": 2, "embed_dim": 24, "num_heads": 2}
    return {"name": "timm/vit_tiny_patch16_224", "options": options, **section}


CLIP_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "image_size": 32, "patch_size": 8,
}  # fmt: skip


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_class_tokens_of_libraries_vision_models_are_known(tmp_path, library):
    """Sixteen patches; where they are made, no token stands in front of them yet."""
    if library == "transformers":
        (tmp_path / "config.json").write_text(json.dumps(CLIP_VISION))
        block, width = "model.encoder.layers.0", 24
    else:
        vision = {"image_size": 32, "layers": 1, "width": 24, "patch_size": 8, "head_width": 8}
        described = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": {}}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
        block, width = "model.transformer.resblocks.0", 8
    taps = [{"module": block, "head": "none"}, {"module": block, "pooling": "first", "head": "none"}]
    section = ImageTower(name=f"{library}/{tmp_path}", taps=taps)
    tower, own, *_ = build_image_tower(section, 32)
    assert own == width
    images = torch.randn(3, 3, 32, 32)
    made = build_taps(tower.eval(), section, side="image", example=images[:2], embedding_width=8)
    seen = []
    handle = tower.get_submodule(block).register_forward_hook(lambda _, args, out: seen.append(out))
    with made.read(images, tower) as reading:
        tower(images)
    handle.remove()
    assert seen[0].shape == (3, 17, 24)
    for got, want in zip(reading.features(), (seen[0][:, 1:].mean(1), seen[0][:, 0]), strict=True):
        torch.testing.assert_close(got, want)


def test_patches_by_themselves_have_no_class_token():
    encoder, whole = model(vit(taps=["patch_embed"]), {"taps": ["layers.1"]}, size=32).eval(), batch(size=32)
    seen = hooked(encoder, whole, {"image_tower.patch_embed": "output"})["image_tower.patch_embed"]
    (got,) = encoder(whole.images)["image_layers"]
    torch.testing.assert_close(got, unit(encoder.taps["image"].heads[0](seen.mean(1))))


SWIN = {"depths": [1, 1], "embed_dim": 24, "num_heads": [2, 2]}
LIBRARIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "ViT and DistilBERT": (
        vit(taps=[{"module": "blocks.1.mlp.fc1", "head": "mlp"}, {"module": "blocks.0", "pooling": "first"}]),
        {
            "name": "transformers/distilbert",
            "taps": [{"module": "transformer.layer.1.ffn.lin1"}, "transformer.layer.0"],
        },
        {
            "image_tower.blocks.1.mlp.fc1": lambda x, _: x[:, 1:].mean(1),
            "image_tower.blocks.0": lambda x, _: x[:, 0],
            "text_tower.tokens.model.transformer.layer.1.ffn.lin1": lambda x, _: x[:, 0],
            "text_tower.tokens.model.transformer.layer.0": lambda x, _: x[:, 0],
        },
    ),
    "Swin, whose maps have channels last": (
        {"name": "timm/swin_tiny_patch4_window7_224", "options": SWIN, "taps": ["layers.1.blocks.0"]},
        {"taps": [{"module": "norm", "pooling": "last"}]},
        {
            "image_tower.layers.1.blocks.0": lambda x, _: x.mean((1, 2)),
            "text_tower.tokens.norm": lambda x, texts: x[torch.arange(SIZE), (texts != 0).sum(1) - 1],
        },
    ),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_towers_give_what_hooks_see(name, small_transformers):
    image, text, pooled = LIBRARIES[name]
    encoder, whole = model(image, text, size=32).eval(), batch(size=32)
    seen = hooked(encoder, whole, dict.fromkeys(pooled, "output"))
    out = encoder(whole.images, whole.texts)
    numbers = {"image": 0, "text": 0}
    for module, pool in pooled.items():
        side = module.partition("_")[0]
        want = unit(encoder.taps[side].heads[numbers[side]](pool(seen[module], whole.texts[0])))
        torch.testing.assert_close(out[f"{side}_layers"][numbers[side]], want)
        numbers[side] += 1


@pytest.mark.parametrize(
    ("image", "text", "said"),
    [
        ({"taps": ["stages.9"]}, {}, "model.image.taps: small_resnet has no module stages.9; did you mean"),
        ({"taps": ["stages.9"]}, {}, "it has stem, stem.0-2, stages, stages.0-3, stages.0-3.conv1"),
        ({}, {"taps": ["layers.2.down"]}, "model.text.taps: small_transformer has no module layers.2.down"),
        ({"taps": [{"module": "stages.3", "pooling": "first"}]}, {}, "pooling: expected mean, for there is no such"),
        ({"taps": [{"module": "stages.3", "pooling": "last"}]}, {}, "pooling: expected mean, for there is no such"),
        ({}, {"taps": ["positions"]}, "expected (2, width), (2, tokens, width) or a square map for two samples, got ("),
        ({}, {"taps": ["layers"]}, "expected a module that the tower calls with tensors, got one that it does not"),
        (
            {"taps": [{"module": "stages.3", "head": "none"}]},
            {"taps": [{"module": "layers.0", "head": "none"}]},
            "model.text.taps.0: expected features as wide as those of model.image.taps.0, 64, got 8; give both a head",
        ),
    ],
)
def test_bad_taps_are_told(image, text, said):
    with pytest.raises(UserError) as error:
        model(image, text)
    assert said in str(error.value)


def loss_of(out: dict[str, Any]) -> Tensor:
    """Of everything, so that no gradient is zero."""
    rows = [out["image"], out["text"], *out["image_layers"], *out["text_layers"]]
    return torch.stack([(x * torch.arange(x.shape[1]) + x.cumsum(0)).sum() for x in rows]).sum()


def test_recomputation_changes_no_bit():
    results = []
    for recomputation in ("none", "full"):
        encoder = model({"dropout": 0.2}, {"dropout": 0.3})
        encoder.set_recomputation(image=recomputation, text=recomputation)
        torch.manual_seed(3)
        loss_of(encoder(batch().images, batch().texts)).backward()
        results.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() >= {"taps.image.heads.1.1.weight", "taps.text.heads.1.1.weight"}
    for name, want in results[0].items():
        assert torch.equal(results[1][name], want), name


FROZEN = {"frozen": True}


@pytest.mark.parametrize(
    "sides", [({}, {}), (FROZEN, FROZEN), (FROZEN, {"frozen": True, "unfrozen_blocks": 1})], ids=str
)
def test_the_cache_is_exact(sides):
    """Beside further views, and of a tower that is run once."""
    encoder, whole = model(*sides).double(), batch(views=2)
    objective = objectives.create("fifo_bank", size=32, layers=[1, 2, 3])
    want = copy.deepcopy(encoder)
    runs = []
    encoder.image_tower.register_forward_hook(lambda _, args, out: runs.append(len(out)))
    for sizes, kept in (((3, 4), 1), ((5, 5), 0)):
        encoder.zero_grad()
        runs.clear()
        cached_backward(encoder, objective.eval(), whole, micro_batch_sizes=sizes, device=CPU, kept=kept)
        want.zero_grad()
        flat = flatten(want(whole.images, whole.texts))
        flat = {name: x for name, x in flat.items() if not name.startswith("frozen_features")}
        objective(Embeddings.from_flat({**flat, **whole.beside()})).value.backward()
        for (name, got), p in zip(encoder.named_parameters(), want.parameters(), strict=True):
            assert (got.grad is None) == (p.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(got.grad, p.grad, rtol=1e-9, atol=1e-12, msg=name)
        assert sum(runs) == 2 * SIZE * (1 if sides[0] else 2)


STEPS, LR, DECAY = 2, 0.002, 0.7
OPTIONS = {"size": 32, "layers": [1.0, 2.0, 0.5], "source": "momentum", "temperature": 0.5}
SETTINGS = {"optimizer__name": "sgd", "optimizer__lr_factors": {"heads": 0.5}, "optimizer__max_grad_norm": 0.0}


def plain(image: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One process, one batch at a time, plain PyTorch: the student's weights, and the objective's state."""
    settings, encoder = config(SIZE, **SETTINGS), model(image)
    teacher, objective = copy.deepcopy(encoder).eval(), objectives.create("fifo_bank", **OPTIONS)
    o = settings.optimizer
    groups = parameter_groups(encoder.named_parameters(), encoder.no_weight_decay(), o)
    decays = [group.pop("weight_decay") for group in groups]
    optimizer = torch.optim.SGD(groups, lr=LR, momentum=o.momentum, nesterov=o.nesterov)
    for group in optimizer.param_groups:
        group["lr"] = LR * group["lr_factor"]
    for step in range(STEPS):
        whole = batch(step)
        with torch.no_grad():
            out = teacher(whole.images, whole.texts)
            lent = flatten({
                **{f"{side}_momentum": out[side] for side in ("image", "text")},
                **{f"{side}_momentum_layers": out[f"{side}_layers"] for side in ("image", "text")},
            })  # fmt: skip
        flat = {k: x for k, x in flatten(encoder(whole.images, whole.texts)).items() if "frozen" not in k}
        optimizer.zero_grad()
        objective(Embeddings.from_flat({**flat, **lent, **whole.beside()})).value.backward()
        with torch.no_grad():
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                for p in group["params"]:
                    p.mul_(1 - group["lr"] * decay)
        optimizer.step()
        encoder.clamp_logit_scale()
        with torch.no_grad():
            for average, p in zip(teacher.parameters(), encoder.parameters(), strict=True):
                average.lerp_(p, 1 - DECAY)
    return {name: p.detach() for name, p in encoder.named_parameters()}, dict(objective.state_dict())


def train(image: dict[str, Any], stage: int, sizes: tuple[int, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    settings = config(SIZE, **SETTINGS, execution__zero_stage=stage)
    encoder, objective = model(image), objectives.create("fifo_bank", **OPTIONS)
    if stage == 3:
        encoder.set_recomputation(image="full", text="full")
    engine, _ = build_engine(settings, encoder, no_decay=encoder.no_weight_decay(), device=CPU, world_size=world_size())
    teacher = Teacher(
        Momentum(decay=DECAY), engine, precision="fp32", total_steps=STEPS, lends=("image", "text"), layers=True,
        device=CPU,
    )  # fmt: skip
    step = TrainStep(
        engine, objective, micro_batch_sizes=sizes, device=CPU, phases=Phases(CPU), kept=1, teacher=teacher
    )
    share = SIZE // world_size()
    for number in range(STEPS):
        step(batch(number, slice(rank() * share, (rank() + 1) * share)), LR)
    weights = {name: full_fp32(p).cpu() for name, p in encoder.named_parameters()}
    engine.destroy()
    return weights, dict(objective.state_dict())


RUNS: list[Any] = [({}, 2, (3, 4)), ({}, 3, (3, 4)), (FROZEN, 0, (3, 3))]


def every_run() -> list[Any]:
    return [train(*run) for run in RUNS]


def test_two_ranks_at_any_stage_are_one_plain_big_batch(ranks):
    """With a teacher, whose features of the layers are what the banks hold."""
    wanted = {bool(image): plain(image) for image in ({}, FROZEN)}
    start = dict(model().named_parameters())
    for run, *answers in zip(RUNS, *ranks(2, every_run), strict=True):
        weights, state = wanted[bool(run[0])]
        for got, held in answers:
            for name, want in weights.items():
                moved = (want - start[name]).norm()
                assert (got[name] - want).norm() <= 1e-4 * moved + 1e-7, (run, name)
            for name in ("bank.image.features", "layers.0.bank.image.features", "layers.1.bank.text.features"):
                torch.testing.assert_close(held[name], state[name], rtol=1e-4, atol=1e-5, msg=f"{run} {name}")
    assert (wanted[False][0]["taps.image.heads.1.1.weight"] - start["taps.image.heads.1.1.weight"]).norm() > 1e-4
