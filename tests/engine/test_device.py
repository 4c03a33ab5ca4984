"""What runs on CUDA under NCCL: no tensor of the host meets one of the device, and none goes to a collective.

Checked on a pretended accelerator (tests/pretended_device.py), two ranks, against the same on the CPU: bit for bit.
"""

import json
from dataclasses import fields, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.config.schema import Config
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.encoders.norms import keep_statistics
from amclr_scale.encoders.recomputation import set_recomputation
from amclr_scale.engine.gradient_cache import cached_backward
from amclr_scale.engine.zero.flat_shards import Piece, Shard
from amclr_scale.engine.zero.layerwise import LAMB, AdamP
from amclr_scale.evaluation.frozen_features import linear
from amclr_scale.evaluation.run import Evaluator
from amclr_scale.objectives import diagnostics
from amclr_scale.objectives.whole_set import compare_with_whole_set
from amclr_scale.similarity import rank, using, world_size
from amclr_scale.types import Batch, Embeddings
from tests.evaluation.shards import write_split
from tests.evaluation.test_run import model as build
from tests.objectives.harness import NUM_SAMPLES, B, global_batch, my_rows
from tests.pretended_device import CPU, DEVICE, MisplacedError, accelerator

# Every option that leads through other lines than the defaults do.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("clip", {"temperature": 0.05, "omega": 1, "label_smoothing": 0.1}),
    ("clip", {"group_size": 4}),
    ("cyclip", {"inmodal": True}),
    ("fastclip", {"version": "v1", "temperature": 0.05}),
    ("fastclip", {"version": "v2", "rho": 8.0, "gamma_schedule": "constant"}),
    ("fastclip", {"version": "v3"}),
    ("isogclr", {"surrogate": "squared_hinge", "eta_schedule": "cosine", "eta_epochs": 4.0}),
    ("isogclr_net", {"diversity": 0.1}),
    ("sogclr", {"surrogate": "squared_hinge", "num_texts": 2 * NUM_SAMPLES}),
    ("xamclr", {"state": "shared_sequential", "reduce": "mean"}),
    ("xamclr_dro", {"state": "shared_sequential"}),
]
COVERED = {  # made of what the others are made of
    "slip", "one_to_k", "siglip_plus", "debiased", "m2_mixup", "cacr", "siamlip", "negclip", "cwcl", "rankclip",
    "vrns", "drrho",
}  # fmt: skip
VARIANTS += [(name, {}) for name in objectives.available() if name not in {*dict(VARIANTS), *COVERED}]


def on(device: torch.device, embeddings: Embeddings) -> Embeddings:
    """float32 leaves on the device."""

    def move(_: str, x: Tensor) -> Tensor:
        moved = x.detach().float() if x.is_floating_point() else x
        return moved.to(device).requires_grad_(x.is_floating_point())

    return embeddings.map(move)


def train(name: str, options: dict[str, Any], device: torch.device) -> dict[str, Tensor | dict[str, float]]:
    """Everything that a step in each layout leaves behind, on the CPU."""
    left: dict[str, Tensor | dict[str, float]] = {}
    layouts = [("all", "reduce_scatter", "replicated"), ("all", "column_sums", "sharded"), ("ring", "auto", "sharded")]
    for step, (gather, distribution, layout) in enumerate(layouts):
        objective = objectives.create(name, num_samples=NUM_SAMPLES, sample_state=layout, **options).to(device)
        with using(gather=gather, distribution=distribution, chunk=4):
            views, negatives = (objective.inputs.count(name) for name in ("image_views", "text_negatives"))
            read = {"views": views, "negatives": negatives, "heads": True, "tokens": True}
            embeddings = on(device, my_rows(global_batch(step, **read)))
            if "num_texts" in options:
                embeddings = replace(embeddings, text_ids=embeddings.ids + NUM_SAMPLES)
            objective.set_epoch(step)
            loss = objective(embeddings)
            loss.value.backward()
            key = f"{gather} {layout}"
            left[key] = loss.value.detach().cpu()
            for field in fields(embeddings):
                leaf = getattr(embeddings, field.name)
                for index, x in enumerate(leaf if isinstance(leaf, tuple) else (leaf,)):
                    if isinstance(x, Tensor) and x.grad is not None:
                        left[f"{key} {field.name} {index}"] = x.grad.cpu()
            left[f"{key} metrics"] = dict(loss.metrics)
            left[f"{key} diagnostics"] = diagnostics.of_step(
                objective, embeddings, torch.arange(2 * len(embeddings.image)).view(-1, 2)
            )
            for column, values in objective.state_dict().items():
                left[f"{gather} {layout} {column}"] = values.cpu()
    return left


def compare(name: str, options: dict[str, Any]) -> set[str]:
    want = train(name, options, CPU)
    with accelerator() as sent:
        got = train(name, options, DEVICE)
    assert got.keys() == want.keys()
    for key, value in want.items():
        same = torch.equal(got[key], value) if isinstance(value, Tensor) else got[key] == value
        assert same, f"{key}: {got[key]} on the device, {value} on the host"
    return sent


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=[f"{n}-{'-'.join(o)}" for n, o in VARIANTS])
def test_objectives_keep_to_the_device(ranks, name, options):
    for sent in ranks(2, compare, name, options):
        assert sent


def whole_set(name: str, device: torch.device) -> dict[str, float]:
    """What run.probe measures, after a step of training."""
    objective = objectives.create(name, num_samples=NUM_SAMPLES, sample_state="sharded").to(device)
    whole = objectives.create(name, num_samples=B, **objective.whole_set_options).to(device)
    batch = global_batch(0, views=objective.inputs.count("image_views"))
    objective(on(device, my_rows(batch)))
    with torch.no_grad():
        return compare_with_whole_set(objective, whole, on(device, batch), global_batch_size=B // 2)


def compare_whole_sets(name: str) -> None:
    want = whole_set(name, CPU)
    with accelerator() as sent:
        assert whole_set(name, DEVICE) == pytest.approx(want, rel=1e-5)
    assert "_all_gather_single" in sent


@pytest.mark.parametrize("name", ["clip", "isogclr"])
def test_the_whole_set_keeps_to_the_device(ranks, name):
    ranks(2, compare_whole_sets, name)


TOWERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "group": ({"width": 8}, {}, "full"),
    "batch": ({"width": 8, "norm": "batch", "projection": "mlp"}, {"projection": "mlp", "pooling": "last"}, "none"),
    "sync": ({"width": 8, "norm": "sync"}, {"pooling": "first"}, "none"),
    "library": ({"name": "timm/test_vit"}, {"name": "transformers/{folder}"}, "none"),
}
BERT = {"model_type": "distilbert", "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 300}


def recipe(image: dict[str, Any], text: dict[str, Any], split: str = "") -> Config:
    probes = [{"train": split, "test": split, "classes": "json.concept", "l2": [1.0]}]
    tree = {
        "data": {"image_size": 32, "context_length": 12},
        "model": {"embedding_width": 8, "image": image, "text": {"width": 16, **text}},
        "evaluation": {
            "splits": [split],
            "classes": "json.concept",
            "batch_size": 8,
            "resamples": 20,
            "geometry": True,
            "probes": probes,
        },
    }
    return Config.model_validate(tree)


def gradients(towers: DualEncoder, norm: str, recomputation: str, device: torch.device) -> dict[str, Tensor]:
    """Of the towers, by the gradient cache, from a batch that waits on the host."""
    towers = towers.to(device)
    set_recomputation(towers.image_tower, recomputation)
    set_recomputation(towers.text_tower, recomputation)
    g = torch.Generator().manual_seed(rank())
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=g, dtype=torch.uint8)
    batch = Batch(torch.arange(6), (images,), (torch.randint(4, 200, (6, 12), generator=g),))
    sizes = (6, 6) if norm == "sync" else (4, 3)
    clip, again = objectives.create("clip"), partial(keep_statistics, towers)
    done = cached_backward(towers, clip, batch, micro_batch_sizes=sizes, device=device, again=again)
    found = {name: p.grad.cpu() for name, p in towers.named_parameters() if p.grad is not None}
    return {**found, "loss": done.loss.value.detach().cpu()}


def compare_towers(config: Config, recomputation: str) -> None:
    norm = config.model.image.norm
    want, towers = gradients(build(config), norm, recomputation, CPU), build(config)
    with accelerator() as sent:
        got = gradients(towers, norm, recomputation, DEVICE)
    assert "_all_gather_single" in sent
    assert len(want) > 20
    assert got.keys() == want.keys()
    for name, value in want.items():  # to rounding: other kernels may be chosen for what is not quite a CPU tensor
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()) + 1e-7, msg=name)


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_and_their_gradients_keep_to_the_device(ranks, tmp_path, kind):
    image, text, recomputation = TOWERS[kind]
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    text = {key: value.format(folder=tmp_path) for key, value in text.items()}
    ranks(2, compare_towers, recipe(image, text), recomputation)


def compare_evaluations(config: Config) -> None:
    """The same features on either device, so that nothing but the evaluation's own arithmetic differs."""
    towers, evaluator = build(config).eval(), Evaluator(config, rank=rank(), world_size=world_size())

    def encode(device: torch.device, **inputs: Any) -> dict[str, Tensor]:
        return {name: x.to(device) for name, x in towers(**inputs).items() if isinstance(x, Tensor)}

    with mock.patch.object(linear, "MAX_STEPS", 3):  # of the linear probe, whose steps are all alike
        want = evaluator.measure(partial(encode, CPU))
        with accelerator() as sent:
            got = evaluator.measure(partial(encode, DEVICE))
    assert {"_all_gather_single", "all_reduce"} <= sent
    assert len(want) > 20
    assert got == pytest.approx(want, abs=1e-9)


def test_evaluation_keeps_to_the_device(ranks, tmp_path):
    split = str(write_split(tmp_path, 23, captions=2, copies=3, shared_images=2))
    ranks(2, compare_evaluations, recipe({"width": 8}, {}, split))


def layerwise(name: str, device: torch.device, offloaded: bool) -> Tensor:
    """Two steps on this rank's part of a flat tensor; the exchange is on the device wherever the tensor lies."""
    weights = torch.linspace(-1, 1, 24).to(CPU if offloaded else device).requires_grad_()
    group = {"params": [weights], "weight_decay": 0.1}
    optimizer: Any = {"lamb": LAMB, "adamp": AdamP}[name]([group], lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    shapes = (torch.Size((4, 6)), torch.Size((12,)), torch.Size((3, 4)))
    pieces = (Piece(0, 12 * rank(), 0, 12), Piece(1 + rank(), 0, 12, 12))
    optimizer.device, optimizer.shards = device, {id(weights): Shard(shapes, pieces)}
    for step in range(2):
        weights.grad = torch.linspace(-1, 2 + step, 24).to(weights.device)
        optimizer.step()
    return weights.detach().cpu()


def compare_optimizers(name: str) -> None:
    for offloaded in (False, True):
        want = layerwise(name, CPU, offloaded)
        with accelerator() as sent:
            assert torch.equal(layerwise(name, DEVICE, offloaded), want)
        assert sent == {"all_reduce"}


@pytest.mark.parametrize("name", ["lamb", "adamp"])
def test_optimizers_that_sum_over_ranks_keep_to_the_device(ranks, name):
    ranks(2, compare_optimizers, name)


def test_the_pretended_device_refuses_what_cuda_refuses():
    with accelerator():
        x = torch.ones(3, device="cuda")
        index = torch.tensor([0, 2])
        assert (x + torch.tensor(2.0)).cpu().tolist() == [3, 3, 3]
        assert x[index].cpu().tolist() == [1, 1]
        for wrong in (
            lambda: x + torch.ones(3),
            lambda: torch.cat([x, torch.ones(3)]),
            lambda: torch.ones(3)[index.cuda()],
            lambda: x.index_copy(0, index, x[:2]),
            x.numpy,
            lambda: torch.distributed.all_reduce(torch.ones(3)),
        ):
            with pytest.raises(MisplacedError):
                wrong()
