"""Tokens are a tower's features through its head, and go through cache, ranks, ZeRO, account and planner as rows do."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from amclr_scale import objectives
from amclr_scale.config.load import load
from amclr_scale.config.schema import Execution, ImageTower, Model, TextTower
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.encoders.build import build_model
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.encoders.image_towers import IMAGE_TOWERS, build_image_tower
from amclr_scale.encoders.tokens import check_tokens
from amclr_scale.engine.build import Inputs, build_trainer
from amclr_scale.engine.deepspeed_setup import adapt_to_objective, build_engine, prepare_towers
from amclr_scale.engine.gradient_cache import cached_backward
from amclr_scale.engine.last_layer import LastLayer
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.errors import UserError
from amclr_scale.memory.account import account
from amclr_scale.memory.objective_memory import objective_memory
from amclr_scale.memory.pretended_group import pretended
from amclr_scale.memory.random_embeddings import random_embeddings, tensors_of
from amclr_scale.memory.towers import token_counts, trace
from amclr_scale.memory.tracker import Tracker
from amclr_scale.metrics.flops import count
from amclr_scale.metrics.phases import Phases
from amclr_scale.planner.objective_traffic import trace_objective
from amclr_scale.similarity import using
from amclr_scale.similarity.blocks import Workspace
from amclr_scale.study.planning.cost import encoder_flops
from amclr_scale.types import Batch, Embeddings, flatten
from tests.engine.towers import CPU, config
from tests.memory.test_measure import WORDS, _train

SECTION = {"name": "compares_tokens", "module": str(Path(__file__).with_name("compares_tokens.py"))}
SIZE, D, L, STEPS, LR = 8, 6, 7, 3, 0.05


def model(**sections) -> DualEncoder:
    torch.manual_seed(0)
    frozen = {side: {"frozen": True} for side, still in sections.items() if still}
    made = build_model(
        Model(
            image=ImageTower(name="timm/test_vit", **frozen.get("image", {})),
            text=TextTower(width=8, heads=2, **frozen.get("text", {})), embedding_width=D,
        ),
        vocab_size=30, pad_id=0, context_length=L, image_size=32, image_mean=(0.5,) * 3, image_std=(0.5,) * 3,
    )  # fmt: skip
    adapt_to_objective(made, objectives.from_section(SECTION), D)
    return made


def batch(step: int = 0, mine: slice = slice(None)) -> Batch:
    g = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (SIZE, 3, 32, 32), dtype=torch.uint8, generator=g)
    texts = torch.randint(1, 30, (SIZE, L), generator=g)
    texts = texts.where(torch.arange(L) < torch.randint(1, L + 1, (SIZE, 1), generator=g), 0)
    return Batch(torch.arange(SIZE)[mine], (images[mine],), (texts[mine],))


def test_tokens_are_the_towers_features_through_its_head():
    encoder, some = model().double().eval(), batch()
    found = encoder((some.images[0], some.images[0]), some.texts)
    assert encoder.image_tokens.count == 5  # four patches and the class token
    patches = encoder.image_tower.forward_features(encoder.normalise(some.images[0], torch.float64))
    torch.testing.assert_close(found["image_tokens"], F.normalize(encoder.image_head(patches), dim=2))
    assert found["image_token_mask"].shape == (SIZE, 5)
    assert found["image_token_mask"].all()
    visible = some.texts[0] != 0
    words = F.normalize(encoder.text_head(encoder.text_tower.tokens(some.texts[0], visible)), dim=2)
    assert torch.equal(found["text_token_mask"], visible)
    torch.testing.assert_close(found["text_tokens"][visible], words[visible])
    plain = encoder(some.images, some.texts, tokens=False)
    assert not {"image_tokens", "text_tokens", "image_token_mask", "text_token_mask"} & plain.keys()
    for name in ("image", "text"):
        torch.testing.assert_close(found[name], plain[name])


@pytest.mark.parametrize(
    ("sizes", "kept", "still"),
    [((8, 8), 1, ""), ((3, 3), 0, ""), ((2, 5), 1, "text"), ((3, 3), 0, "image"), ((3, 8), 1, "image")],
)
def test_the_cache_is_exact(sizes, kept, still):
    """Micro-batches whose longest captions differ, and towers whose second pass begins with their features."""
    whole, mine, plain = batch(), model(**{still: True}).double(), model(**{still: True}).double()
    objective = objectives.from_section(SECTION)
    done = cached_backward(mine, objective, whole, micro_batch_sizes=sizes, device=CPU, kept=kept)
    outputs = flatten(plain(whole.images, whole.texts))
    outputs = {name: x for name, x in outputs.items() if not name.startswith("frozen_features")}
    loss = objective(Embeddings.from_flat({**outputs, **whole.beside()}))
    loss.value.backward()
    assert done.loss.value.item() == pytest.approx(loss.value.item(), rel=1e-13)
    for (name, p), q in zip(mine.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-14, msg=name)


def train(stage: int, sizes: tuple[int, int]) -> dict[str, torch.Tensor]:
    settings = config(
        SIZE, execution__zero_stage=stage, optimizer__name="sgd", optimizer__weight_decay=0.0,
        optimizer__max_grad_norm=0.0,
    )  # fmt: skip
    given_up = {"zero_optimization": {"stage3_param_persistence_threshold": 1}}
    settings = settings.model_copy(update={"deepspeed": given_up if stage == 3 else {}})
    encoder, objective = model(), objectives.from_section(SECTION)
    engine, _ = build_engine(settings, encoder, no_decay=encoder.no_weight_decay(), device=CPU, world_size=world_size())
    step = TrainStep(engine, objective, micro_batch_sizes=sizes, device=CPU, phases=Phases(CPU), kept=1)
    share = SIZE // world_size()
    for number in range(STEPS):
        step(batch(number, slice(rank() * share, (rank() + 1) * share)), LR)
    weights = {name: full_fp32(p).cpu() for name, p in encoder.named_parameters()}
    engine.destroy()
    return weights


@pytest.mark.parametrize(("stage", "sizes"), [(0, (3, 3)), (3, (3, 4))])
def test_two_ranks_are_one_plain_big_batch(ranks, stage, sizes):
    """Also where every parameter is given up between its uses, and only tokens have a gradient."""
    start, objective = {name: p.detach().clone() for name, p in model().named_parameters()}, None
    plain, objective = model(), objectives.from_section(SECTION)
    optimizer = torch.optim.SGD(plain.parameters(), LR, momentum=0.9, nesterov=True)
    for number in range(STEPS):
        whole = batch(number)
        optimizer.zero_grad()
        outputs = flatten(plain(whole.images, whole.texts))
        objective(Embeddings.from_flat({**outputs, **whole.beside()})).value.backward()
        optimizer.step()
    for weights in ranks(2, train, stage, sizes):
        for name, want in plain.named_parameters():
            moved = (want - start[name]).norm()
            assert (weights[name] - want).norm() <= 1e-3 * moved + 1e-6, name
    assert (plain.text_head[-1].weight - start["text_head.1.weight"]).norm() > 1e-3


def test_memory_is_predicted_as_it_is_measured(ranks):
    words = [*WORDS, *(f"objective.{key}={value}" for key, value in SECTION.items()), "train.global_batch_size=64"]
    words += ["execution.micro_batch_size=8", "model.text.frozen=true"]
    predicted = account(load(None, words, 2), world_size=2, num_samples=4096, device="cpu")
    _, peaks, _ = ranks(2, _train, words, 2, True)[0]
    for phase in predicted.phases:
        assert predicted.by_phase[phase] == pytest.approx(peaks[phase][0], rel=0.03), phase


def test_operations_of_heads_are_counted():
    encoder, one = model(), batch(0, slice(1))
    with_tokens, width = count(encoder, one.images, one.texts), encoder.image_head[-1].in_features
    encoder.tokens = ()
    without = count(encoder, one.images, one.texts)
    assert with_tokens.image - without.image == 2 * 5 * width * D
    assert with_tokens.text - without.text == 2 * L * 8 * D
    words = [*WORDS, *(f"objective.{key}={value}" for key, value in SECTION.items())]
    reads, other = load(None, words, 1), load(None, WORDS, 1)
    assert token_counts(reads) == {"image_tokens": 4, "text_tokens": 8}
    assert token_counts(other) == {}
    more = trace(reads, "text", "cpu").flops - trace(other, "text", "cpu").flops
    assert more == 2 * 8 * 64 * 128
    image = 2 * 4 * 64 * 128
    assert encoder_flops(reads) - encoder_flops(other) == pytest.approx(3 * (more + image))


def test_more_tokens_follow_from_few():
    sizes, rows, width = {"image_tokens": 20, "text_tokens": 9}, 48, 32
    ask = {"gather": "all", "distribution": "reduce_scatter", "layout": "replicated", "num_samples": 64}
    memory = objective_memory(SECTION, width=width, world_size=2, sizes=sizes, **ask)
    made = objectives.from_section(SECTION)
    with pretended(2), using(distribution="reduce_scatter"):
        rows_of = random_embeddings(made, rows, width, 2, sizes)
        tracker = Tracker()
        tracker.add(tensors_of(rows_of), "before")
        before = tracker.total
        with tracker:
            made(rows_of).value.backward()
    held = sum(memory.peak(rows, workspace=Workspace(1024, 1024, 12), rows_at_once=1024))
    assert held == pytest.approx(tracker.peak - before, rel=0.02)
    few, more = (
        trace_objective(SECTION, world_size=2, width=width, local_rows=rows, sizes={**sizes, "image_tokens": n}, **ask)
        for n in (3, 20)
    )
    assert few.flops(rows) == more.flops(rows)
    assert 0 < few.bytes(rows) < more.bytes(rows)


def test_the_last_layers_gradient_is_had_from_that_of_tokens():
    encoder, some, layer = model().double(), batch(), LastLayer({"image": 1, "text": 1})
    with layer.noted(encoder):
        outputs = flatten(encoder(some.images, some.texts))
    kinds = {name: x for name, x in outputs.items() if not name.startswith("logit")}
    layer.forget_others({name: x.detach() for name, x in kinds.items()}, slice(None))
    for x in kinds.values():
        if x.requires_grad:
            x.retain_grad()
    e = Embeddings.from_flat({**outputs, **some.beside()})
    (objectives.from_section(SECTION)(e).value + (e.image[0] * e.text[1]).sum()).backward()
    found = layer({name: x.grad for name, x in kinds.items() if x.grad is not None}, slice(None))
    for side in ("image", "text"):
        want = getattr(encoder, f"{side}_head")[-1].weight.grad
        torch.testing.assert_close(found[f"{side}.weight"], want, rtol=1e-9, atol=1e-12)


def test_a_tower_without_tokens_is_named():
    words = ["model.image.name=torchvision/vgg11", f"objective.module={SECTION['module']}", "data.image_size=32"]
    given = load(None, [*words, "objective.name=compares_tokens", "train.epochs=1"], 1)
    with pytest.raises(UserError, match=r"model\.image\.name: .* torchvision/vgg11 has no features of patches"):
        account(given, world_size=1, num_samples=4096, device="cpu")


@pytest.mark.parametrize(
    ("vision", "D", "norm"),
    [({"layers": 1, "width": 64, "patch_size": 16}, 64, "default"), ({"layers": [1] * 4, "width": 8}, 128, "batch")],
)
def test_what_open_clip_projects_after_pooling_are_no_tokens(tmp_path, vision, D, norm):
    """Though inside there is a sequence, or a map of an earlier stage, that is as wide as what it gives."""
    described = {"model_cfg": {"embed_dim": D, "vision_cfg": {"image_size": 32, **vision}, "text_cfg": {}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    *_, place = build_image_tower(ImageTower(name=f"open_clip/{tmp_path}", norm=norm), 32)
    with pytest.raises(UserError, match=r"^model\.image\.name: image_tokens .* has no features of patches"):
        check_tokens(("image",), place)


def test_a_run_that_will_be_measured_by_tokens_is_told_at_once(monkeypatch, tmp_path):
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 8))
    monkeypatch.setitem(IMAGE_TOWERS, "flat", lambda tower, size: (flat, 8))
    words = ["objective.name=clip", "train.epochs=1", "model.image.name=flat", "data.image_size=16"]
    given = load(None, [*words, "evaluation.evaluators=[token_retrieval]"], 1)
    tokenizer = load_tokenizer("emoji", given.data.context_length)
    inputs = Inputs(SimpleNamespace(num_samples=8, features={}), tokenizer, None)
    with pytest.raises(UserError, match=r"^model\.image\.name: .* flat has no features of patches"):
        build_trainer(given, inputs, device=CPU, world_size=1, folder=tmp_path, stopwatch=None)


def test_what_is_inside_a_compiled_tower_cannot_be_noted():
    with pytest.raises(UserError, match=r"execution\.compile: expected false"):
        prepare_towers(model(), Execution(compile=True))


def test_tokens_have_the_embeddings_width():
    made = objectives.from_section(SECTION)
    found = random_embeddings(made, 4, 8, 1).map(lambda name, x: x[..., :5] if name == "image_tokens" else x)
    with pytest.raises(UserError, match=r"embeddings\.image_tokens: expected tokens of the embeddings' width, \(4, n"):
        made(found)
