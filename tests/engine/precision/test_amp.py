"""execution.precision amp_bf16 and tf32: plain PyTorch's gradients, at every ZeRO stage, cached and recomputed."""

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale import objectives
from amclr_scale.checkpoint import files, state
from amclr_scale.config.schema import Config, Execution, ImageTower, Model, Momentum, TextTower
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.encoders.build import build_model
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.engine.deepspeed_setup import build_engine, prepare_towers
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.teacher import Teacher
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.errors import UserError
from amclr_scale.metrics.phases import Phases
from amclr_scale.precision import products_of
from amclr_scale.types import Batch
from tests.engine.towers import config

SIZE, CPU = 8, torch.device("cpu")
STAGES = [0, 1, 2, 3]
ONES = (1.0, 1.0, 1.0)


def encoder(dropout: float = 0.0) -> DualEncoder:
    """A ResNet and a transformer: convolutions, norms, attention, an embedding."""
    torch.manual_seed(0)
    text = TextTower(width=16, layers=2, heads=2, dropout=dropout)
    sections = Model(image=ImageTower(width=8, dropout=dropout), text=text, embedding_width=8)
    return build_model(
        sections, vocab_size=30, pad_id=0, context_length=5, image_size=16, image_mean=ONES, image_std=ONES
    )


def batch(step: int = 0, share: slice = slice(None)) -> Batch:
    g = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (SIZE, 3, 16, 16), generator=g, dtype=torch.uint8)
    texts = torch.randint(1, 30, (SIZE, 5), generator=g)
    return Batch(torch.arange(SIZE)[share], (images[share],), (texts[share],))


def settings(stage: int, recompute: str = "none", precision: str = "amp_bf16") -> Config:
    found = config(
        SIZE, execution__zero_stage=stage, execution__precision=precision, execution__recompute_image=recompute,
        execution__recompute_text=recompute, optimizer__name="sgd", optimizer__max_grad_norm=0.0,
    )  # fmt: skip
    return found


def prepared(how: Config, dropout: float = 0.0) -> tuple[DualEncoder, Any]:
    model = encoder(dropout)
    prepare_towers(model, how.execution)
    return model, build_engine(how, model, no_decay=model.no_weight_decay(), device=CPU, world_size=world_size())[0]


def step_of(engine: Any, micro: int, kept: int, **how: Any) -> TrainStep:
    sizes = (micro, micro)
    return TrainStep(
        engine, objectives.create("clip"), micro_batch_sizes=sizes, device=CPU, phases=Phases(CPU), kept=kept, **how
    )


@cache
def plain(micro: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of torch and nothing else: each micro-batch under torch.autocast, with its defaults."""
    model, whole = encoder(), batch()
    rows: dict[str, list[Tensor]] = {"image": [], "text": []}
    for begin in range(0, SIZE, micro):
        with torch.autocast("cpu", torch.bfloat16):
            out = model((whole.images[0][begin : begin + micro],), (whole.texts[0][begin : begin + micro],))
        for side, found in rows.items():
            found.append(out[side])
    image, text = (torch.cat(found) for found in rows.values())
    logits, labels = out["logit_scale"] * image @ text.T, torch.arange(SIZE)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradients(
    stage: int, combinations: list[tuple[int, int, str]]
) -> list[tuple[tuple[int, int, str], float, dict[str, Tensor]]]:
    """What the optimizer gets, for micro-batches, kept ones, recomputation."""
    from deepspeed.utils import safe_get_full_grad

    found = []
    for micro, kept, recompute in combinations:
        model, engine = prepared(settings(stage, recompute))
        at_step: dict[str, Tensor] = {}
        plain_step = engine.step

        def look_and_step(model=model, at_step=at_step, plain_step=plain_step) -> None:
            for name, p in model.named_parameters():
                gradient = p.grad if stage == 0 else safe_get_full_grad(p)
                if gradient is not None:
                    at_step[name] = gradient.clone()
            plain_step()

        engine.step = look_and_step
        share = SIZE // world_size()
        report = step_of(engine, micro, kept)(batch(0, slice(rank() * share, (rank() + 1) * share)), 0.1)
        found.append(((micro, kept, recompute), report.loss.value.item(), at_step))
        engine.destroy()
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_those_of_torch_under_autocast(ranks, stage):
    """Cached, kept and recomputed; nor does it matter which rank a micro-batch was on."""
    combinations = [(8, 1, "none"), (8, 1, "full"), (4, 0, "none"), (2, 2, "full")]
    every = [[one] for one in ranks(1, gradients, stage, combinations)[0]]
    every += [list(both) for both in zip(*ranks(2, gradients, stage, [(4, 1, "none"), (2, 0, "full")]), strict=True)]
    for found in every:
        (micro, *_), _, _ = found[0]
        loss, want = plain(micro)
        assert sum(one for _, one, _ in found) / len(found) == pytest.approx(loss, rel=1e-6)
        for combination, _, got in found:
            assert got.keys() >= want.keys()
            for name, value in want.items():
                assert (got[name] - value).norm() <= 1e-6 * value.norm() + 1e-9, (combination, name)


def test_micro_batches_differ_by_the_rounding_of_bf16():
    for name, value in plain(8)[1].items():
        assert 0 <= (plain(2)[1][name] - value).norm() <= 0.01 * value.norm() + 1e-7, name


def trained(
    stage: int, micro: int, kept: int, recompute: str, steps: int = 3, load: str = "", save: str = "",
    precision: str = "amp_bf16",
) -> list[Tensor]:  # fmt: skip
    """Weights after some steps with dropout."""
    model, engine = prepared(settings(stage, recompute, precision), dropout=0.3)
    step, begin = step_of(engine, micro, kept), 0
    torch.manual_seed(7)
    if load:
        found, _ = files.newest_valid(Path(load))
        assert found
        state.restore(found, engine, step.objective, CPU)
        begin = 2
    for number in range(begin, steps):
        step(batch(number), 0.1)
        if save and number == 1:
            here = files.staging(Path(save), 2)
            here.mkdir(parents=True)
            files.commit(Path(save), 2, state.take(engine, step.objective, {"step": 2, "number": 1}, CPU).write(here))
    weights = [full_fp32(p).clone() for p in model.parameters()]
    engine.destroy()
    return weights


@pytest.mark.parametrize("stage", [0, 3])
def test_the_second_forward_and_what_is_recomputed_are_the_first_one_bit_for_bit(ranks, stage):
    runs = [ranks(1, trained, stage, 4, kept, again)[0] for kept, again in product((0, 2), ("none", "full"))]
    for other in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("stage", [0, 2])
def test_a_resumed_run_is_the_same_bits(ranks, tmp_path, stage):
    (whole,) = ranks(1, trained, stage, 4, 1, "none", 3, "", str(tmp_path))
    (resumed,) = ranks(1, trained, stage, 4, 1, "none", 3, str(tmp_path), "")
    assert all(torch.equal(x, y) for x, y in zip(whole, resumed, strict=True))


def test_a_run_in_bf16_goes_on_in_amp_bf16_from_its_masters(ranks, tmp_path):
    (masters,) = ranks(1, trained, 2, 4, 1, "none", 2, "", str(tmp_path), "bf16")
    (weights,) = ranks(1, trained, 2, 4, 1, "none", 2, str(tmp_path), "")
    assert all(torch.equal(x, y) for x, y in zip(masters, weights, strict=True))


def teachers(stage: int) -> dict[str, dict[str, Tensor]]:
    found = {}
    for precision in ("run", "fp32"):
        model, engine = prepared(settings(stage))
        teacher = Teacher(
            Momentum(precision=precision), engine, precision="amp_bf16", total_steps=2, lends=("image", "text"),
            device=CPU,
        )  # fmt: skip
        found[precision] = teacher.lend(batch(), (4, 4))
        assert model.computes_in == "amp_bf16"
        engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_a_teacher_computes_as_the_run_does_or_in_fp32(ranks, stage):
    found, model = ranks(1, teachers, stage)[0], encoder().eval()
    for precision, how in (("run", "amp_bf16"), ("fp32", "fp32")):
        with torch.no_grad(), products_of(how, CPU):
            want = model(batch().images, batch().texts)
        for side in ("image", "text"):
            torch.testing.assert_close(found[precision][f"{side}_momentum"], want[side], rtol=1e-6, atol=1e-6)
    assert not torch.equal(found["run"]["image_momentum"], found["fp32"]["image_momentum"])


# --- the model by itself ----------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """What an objective trains, which says what its products are made in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, outputs: dict[str, Any]) -> dict[str, Any]:
        made = self.linear(outputs["image"])
        assert made.dtype == torch.float32
        return {"image_projection": made}


def test_products_of_towers_and_heads_are_bf16_and_all_else_is_float32():
    model = encoder()
    prepare_towers(model, Execution(precision="amp_bf16"))
    model.take_parts(Parts())
    seen: dict[str, tuple[torch.dtype, bool]] = {}
    for name in ("image_head", "text_head"):
        head: nn.Module = next(m for m in getattr(model, name).modules() if isinstance(m, nn.Linear))
        head.register_forward_hook(
            lambda _, inputs, out, name=name: seen.update({name: (out.dtype, torch.is_autocast_cache_enabled())})
        )
    out = model(batch().images, batch().texts)
    assert seen == dict.fromkeys(("image_head", "text_head"), (torch.bfloat16, False))
    assert {x.dtype for x in (out["image"], out["text"], out["logit_scale"])} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def rounds() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def tf32_run() -> dict[str, set[tuple[bool, bool]]]:
    """Whether products may round while towers run forward and backward, and in the objective."""
    torch.backends.cudnn.allow_tf32 = False
    model, engine = prepared(settings(0, precision="fp32"))
    model.computes_in = "tf32"  # as prepare_towers says where the device has it
    seen: dict[str, set[tuple[bool, bool]]] = {"forward": set(), "backward": set(), "objective": set()}
    model.text_tower.register_forward_hook(lambda *_: seen["forward"].add(rounds()))
    next(model.text_tower.parameters()).register_hook(lambda _: seen["backward"].add(rounds()))
    step = step_of(engine, 4, 1)
    plain_objective = step.objective
    step.objective = lambda embeddings: (seen["objective"].add(rounds()), plain_objective(embeddings))[1]
    step(batch(), 0.1)
    seen["objective"].add(rounds())
    engine.destroy()
    return seen


def test_tf32_is_for_the_towers_alone(ranks):
    yes, no = (True, True), (False, False)
    assert ranks(1, tf32_run)[0] == {"forward": {yes}, "backward": {yes}, "objective": {no}}


def test_tf32_where_there_is_none():
    model = encoder()
    with pytest.raises(UserError, match=r"^execution.precision: tf32 .* on cpu; choose fp32"):
        build_engine(settings(0, precision="tf32"), model, no_decay=set(), device=CPU, world_size=1)
