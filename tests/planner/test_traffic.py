"""What is predicted to cross the wire does: the objective's part to the byte, DeepSpeed's within half a percent."""

import json
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from amclr_scale import objectives
from amclr_scale.config.load import build
from amclr_scale.config.schema import Config
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.distributed.collectives import rank
from amclr_scale.distributed.process_group import seed_everything
from amclr_scale.encoders.build import build_model
from amclr_scale.engine.batch_plan import make_plan
from amclr_scale.engine.deepspeed_setup import build_engine, prepare_towers
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.teacher import build_teacher
from amclr_scale.metrics.phases import Phases
from amclr_scale.planner.messages import Message, MessageCounter, Messages
from amclr_scale.planner.objective_traffic import trace_objective
from amclr_scale.planner.traffic import fetches, host_traffic, on_the_wire, parameters_of, zero_messages
from amclr_scale.similarity import settings
from amclr_scale.types import Batch, Embeddings

CPU = torch.device("cpu")
D = 12


def test_wire_bytes_are_those_of_the_best_algorithms():
    for collective, sent in (("all_gather", 750), ("all_reduce", 1500), ("all_to_all", 750), ("send", 1000)):
        assert Message(collective, 4, 1000).wire_bytes == sent
    both = Messages((Message("send", 4, 10), Message("send", 4, 10), Message("send", 4, 20, calls=3)))
    assert both.merged().found == (Message("send", 4, 10, calls=2), Message("send", 4, 20, calls=3))
    assert (both.calls, both.payload_bytes, both.merged().wire_bytes) == (5, 80, 80)


def test_what_nobody_has_thought_of_is_not_counted_as_nothing(ranks):
    assert ranks(2, gather_to_one) == [True] * 2


def gather_to_one() -> bool:
    try:
        with MessageCounter():
            dist.gather(torch.ones(1), [torch.ones(1), torch.ones(1)] if rank() == 0 else None, dst=0)
    except NotImplementedError as error:
        return "c10d::gather" in str(error)
    return False


OBJECTIVES = [
    {"name": "clip"},
    {"name": "clip", "group_size": 5},
    {"name": "dclw"},
    {"name": "siglip"},
    {"name": "cyclip"},
    {"name": "sogclr"},
    {"name": "sogclr", "surrogate": "squared_hinge"},
    {"name": "isogclr"},
    {"name": "amclr_dro"},
    {"name": "full_bank"},
    {"name": "full_bank", "negatives": 70},
]
WAYS = [
    ("all", "column_sums", "sharded"),
    ("ring", "column_sums", "replicated"),
    ("ring", "reduce_scatter", "sharded"),
    ("all", "two_blocks", "replicated"),
]


def all_measured(rows: int) -> list[dict[str, object]]:
    """Every objective in every way, on real ranks: what each sent in a forward and backward."""
    found = []
    for options in OBJECTIVES:
        for gather, distribution, layout in WAYS:
            plain = {key: value for key, value in options.items() if key != "name"}
            made = objectives.create(str(options["name"]), num_samples=100, sample_state=layout, **plain)
            views = [F.normalize(torch.randn(rows, D), dim=1).requires_grad_() for _ in range(4)]
            scale, bias = (torch.full((1,), x).requires_grad_() for x in (10.0, -10.0))
            embeddings = Embeddings(
                views[0], views[1], ids=torch.arange(rows) + rank() * rows, logit_scale=scale, logit_bias=bias,
                image_views=(views[2],), text_views=(views[3],),
            )  # fmt: skip
            with settings.using(gather=gather, distribution=distribution), MessageCounter() as counter:
                made(embeddings).value.backward()
            found.append(_in_numbers(counter.messages))
    return found


def _in_numbers(messages: Messages) -> dict[str, list[tuple[int, int]]]:
    """Collective -> (payload, calls), sorted."""
    return {
        name: sorted(
            (m.payload, m.calls)
            for m in Messages(tuple(Message(m.collective, m.ranks, m.payload) for m in found)).merged()
        )
        for name, found in messages.by_collective().items()
    }


def test_every_objective_sends_what_was_predicted_to_the_byte(ranks):
    rows = 10
    measured = ranks(2, all_measured, rows)
    assert measured[0] == measured[1]
    cases = [(options, way) for options in OBJECTIVES for way in WAYS]
    for (options, (gather, distribution, layout)), found in zip(cases, measured[0], strict=True):
        trace = trace_objective(
            options, world_size=2, width=D, local_rows=rows, distribution=distribution, gather=gather, layout=layout,
            num_samples=1000,
        )  # fmt: skip
        assert _in_numbers(trace.messages(rows)) == found, (options, gather, distribution, layout)


def test_clip_sends_its_formula():
    """B rows of D float32 twice (texts forward, images backward), and per row: rate, 3 statistics, twice 3 weights."""
    W, b, width = 8, 96, 32
    trace = trace_objective(
        {"name": "clip"}, world_size=W, width=width, local_rows=b,
        distribution="column_sums", gather="all", layout="replicated", num_samples=1000,
    )  # fmt: skip
    features, check = 2 * W * b * width * 4, W * 2 * 8
    assert trace.messages(b).payload_bytes == features + check + W * b * 4 * (1 + 3 + 2 * 3)
    assert trace.messages(b).by_purpose()["features"].payload_bytes == features
    assert trace.flops(b) == pytest.approx(5 * 2 * b * (W * b) * width)


@pytest.mark.parametrize(("negatives", "stored"), [("all", 3_000_000), (500, 500)])
@pytest.mark.parametrize("W", [1, 4])
def test_stored_rows_are_those_of_the_data_set(negatives, stored, W):
    """2 D for each similarity of two directions, again in backward, and 2 D for the anchor's gradient."""
    b, width, N = 96, 32, 3_000_000
    trace = trace_objective(
        {"name": "full_bank", "negatives": negatives}, world_size=W, width=width, local_rows=b,
        distribution="column_sums", gather="all", layout="replicated", num_samples=N,
    )  # fmt: skip
    assert trace.flops(b) == pytest.approx(2 * b * stored * 3 * 2 * width, rel=1e-6)
    assert trace.products == 2


def test_tracing_leaves_this_process_as_it_was():
    state = torch.get_rng_state()
    trace_objective(
        {"name": "dcl"}, world_size=4, width=6, local_rows=9,
        distribution="two_blocks", gather="all", layout="replicated", num_samples=1000,
    )  # fmt: skip
    assert torch.equal(state, torch.get_rng_state())
    assert not dist.is_initialized()


def test_inside_a_process_group_only_what_was_traced_before(ranks):
    assert all("before the process group" in answer for answer in ranks(2, trace_inside))


def trace_inside() -> str:
    try:
        trace_objective(
            {"name": "clip"}, world_size=3, width=5, local_rows=7,
            distribution="two_blocks", gather="all", layout="replicated", num_samples=1000,
        )  # fmt: skip
    except RuntimeError as error:
        return str(error)
    return "traced"


# stage, micro-batch, text micro-batch, kept, precision: regular orders of modules, and irregular ones
STAGES = [
    (0, 8, None, 1, "fp32"),
    (1, 2, None, 0, "fp32"),
    (2, 4, None, 1, "bf16"),
    (3, 8, None, 1, "fp32"),
    (3, 2, None, 0, "fp32"),
    (3, 4, None, 1, "bf16"),
    (3, 2, None, 4, "fp32"),
    (3, 1, None, 6, "fp32"),
    (3, 4, 2, 0, "fp32"),
    (3, 1, 2, 5, "fp32"),
]
TAUGHT = ((2, 4, None, 1, "bf16"), (3, 4, None, 1, "fp32"))  # beside a teacher
LEFT_OUT = 2  # all-gathers of a loss and the like
OF_THE_SCALE = 1  # broadcasts: what it is clamped to


def settings_of(stage: int, micro: int, text: int | None, kept: int, precision: str, *, taught: bool = False) -> Config:
    teacher = {"momentum": {}} if taught else {}
    objective = {"objective": {"name": "momentum_queue", "size": 64, "width": 16}} if taught else {}
    return build(
        {
            **objective,
            "data": {"image_size": 16, "context_length": 8},
            "model": {
                **teacher,
                "embedding_width": 16,
                "image": {"width": 8},
                "text": {"width": 64, "layers": 3, "heads": 2},
            },
            "train": {"global_batch_size": 16, "samples": 1000},
            "execution": {
                "zero_stage": stage,
                "micro_batch_size": micro,
                "text_micro_batch_size": text,
                "kept_micro_batches": kept,
                "precision": precision,
            },
            "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 2000}},
        },
        2,
    )


def model_of(config: Config) -> nn.Module:
    seed_everything(0)
    tokenizer = load_tokenizer(config.data.tokenizer, 8)
    return build_model(
        config.model, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id, context_length=8, image_size=16,
        image_mean=(0.5, 0.5, 0.5), image_std=(0.2, 0.2, 0.2),
    )  # fmt: skip


def trained(
    case: tuple[int, int, int | None, int, str], *, taught: bool = False
) -> tuple[dict[str, tuple[int, int]], float]:
    """Payloads and calls of a training step by collective, and what DeepSpeed's own logger adds up."""
    import deepspeed.comm as ds_comm

    config = settings_of(*case, taught=taught)
    model = model_of(config)
    prepare_towers(model, config.execution)
    engine, _ = build_engine(config, model, no_decay=model.no_weight_decay(), device=CPU, world_size=2)
    sizes = (case[1], case[2] or case[1])
    objective = objectives.from_section(config.objective, "replicated", num_samples=1000)
    step = TrainStep(
        engine, objective, micro_batch_sizes=sizes, device=CPU, phases=Phases(CPU), kept=case[3],
        teacher=build_teacher(config, engine, total_steps=3, device=CPU),
    )  # fmt: skip
    ids = torch.arange(8) + 8 * rank()
    batch = Batch(ids, (torch.randint(0, 255, (8, 3, 16, 16), dtype=torch.uint8),), (torch.randint(1, 200, (8, 8)),))
    for _ in range(2 if config.execution.zero_stage == 3 else 1):  # stage 3 learns the order of modules
        step(batch, 1e-3)
    logger = ds_comm.comm.comms_logger
    ds_comm.configure(enabled=True, prof_all=True, verbose=False)
    logger.comms_dict.clear()
    with MessageCounter() as counter:
        step(batch, 1e-3)
    logged = sum(size * calls[0] for by_size in logger.comms_dict.values() for size, calls in by_size.items())
    ds_comm.configure(enabled=False)
    engine.destroy()
    found = counter.messages.by_collective()
    return {name: (messages.payload_bytes, messages.calls) for name, messages in found.items()}, logged


def all_trained() -> list[tuple[dict[str, tuple[int, int]], float]]:
    return [trained(case) for case in STAGES]


def all_taught() -> list[tuple[dict[str, tuple[int, int]], float]]:
    return [trained(case, taught=True) for case in TAUGHT]


def test_a_teacher_sends_what_was_predicted(ranks):
    measured = ranks(2, all_taught)[0]
    for case, (found, _) in zip(TAUGHT, measured, strict=True):
        config = settings_of(*case, taught=True)
        wire = on_the_wire(config, world_size=2, num_samples=1000, device_type="cpu")
        ratio = sum(size for size, _ in found.values()) / wire.messages.payload_bytes
        print(*case, f"measured over predicted {ratio:.5f}")
        assert ratio == pytest.approx(1, abs=0.01), case


def test_zero_sends_what_was_predicted(ranks):
    measured = ranks(2, all_trained)[0]
    for case, (found, _) in zip(STAGES, measured, strict=True):
        config = settings_of(*case)
        objective = trace_objective(
            {"name": "clip"}, world_size=2, width=16, local_rows=8,
            distribution="column_sums", gather="all", layout="replicated", num_samples=1000,
        )  # fmt: skip
        fetched = fetches(config, make_plan(config, 1000, 2), "cpu")
        predicted = zero_messages(config, 2, fetched) + objective.messages(8)
        for name, messages in predicted.by_collective().items():
            assert found[name][0] == pytest.approx(messages.payload_bytes, rel=0.005), (case, name)
        ratio = sum(size for size, _ in found.values()) / predicted.payload_bytes
        print(*case, f"measured over predicted {ratio:.5f}")  # pytest -s
        assert ratio == pytest.approx(1, abs=0.005), case
        if case[0] == 3:
            assert found["all_gather"][1] - LEFT_OUT == predicted.by_collective()["all_gather"].calls, case
            assert found["broadcast"][1] == OF_THE_SCALE  # none for the order of modules, however many micro-batches


def test_deepspeeds_logger_sees_the_gradients_and_not_the_objective(ranks):
    case = (0, 8, None, 1, "fp32")
    found, logged = ranks(2, trained, case)[0]
    gradients = sum(p.numel() for p in model_of(settings_of(*case)).parameters()) * 4
    assert logged >= gradients
    assert logged < sum(size for size, _ in found.values())


def test_offload_moves_gradients_down_and_parameters_up():
    config = settings_of(3, 4, None, 0, "bf16")
    P, fetched = parameters_of(config), Counter({101: 3, 40: 1})
    assert host_traffic(config, 2, fetched) == (0, 0)
    for offload, up in (("optimizer", -(-P // 2)), ("parameters", 51 * 3 + 20)):
        moved = config.model_copy(update={"execution": config.execution.model_copy(update={"offload": offload})})
        assert host_traffic(moved, 2, fetched) == (-(-P // 2) * 4, up * 2)


def test_one_rank_fetches_from_its_host():
    config = settings_of(3, 4, None, 0, "bf16")
    plan = make_plan(config, 1000, 1)
    assert sum(fetches(config, plan, "cpu").elements()) > 3 * plan.micro_batches * parameters_of(config) * 0.9
    assert not fetches(settings_of(2, 4, None, 0, "bf16"), plan, "cpu")


def test_the_whole_prediction_of_a_configuration_is_a_table():
    words = {"objective": {"name": "sogclr"}, "execution": {"zero_stage": 2}, "train": {"epochs": 1}}
    found = on_the_wire(build(words, 4), world_size=4, num_samples=4938)
    table = found.table()
    for purpose in ("features", "per-sample state", "statistics", "gradients", "parameters"):
        assert purpose in table
    assert json.dumps(found.wire_bytes)
    alone = on_the_wire(build({"train": {"epochs": 1}}, 1), world_size=1, num_samples=4938)
    assert alone.wire_bytes == 0
