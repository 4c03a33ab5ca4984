"""DeepSpeed's configuration from ours, and an engine around the model."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from amclr_scale.config.load import merge
from amclr_scale.config.schema import Config, Execution
from amclr_scale.distributed.process_group import leave_messages_to_gloo
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.encoders.recomputation import recomputed_share, set_recomputation
from amclr_scale.encoders.resting import RestingTower
from amclr_scale.encoders.tokens import check_tokens, token_sides
from amclr_scale.engine.batch_plan import Plan
from amclr_scale.engine.optimizers import build_optimizer, freeze, parameter_groups
from amclr_scale.engine.profiling import SKIPPED
from amclr_scale.engine.zero.alignment import report_misaligned
from amclr_scale.engine.zero.gradient_norm import fuse_norm
from amclr_scale.engine.zero.layerwise import attach
from amclr_scale.engine.zero.module_order import note_orders
from amclr_scale.engine.zero.stage3_init import partition, undo_linear
from amclr_scale.errors import UserError
from amclr_scale.metrics.devices import device_peak
from amclr_scale.metrics.flops import ModelFlops
from amclr_scale.metrics.throughput import Throughput
from amclr_scale.objectives.base import Objective
from amclr_scale.precision import DTYPES, has_tf32

REDUCE_BUCKET = 500_000_000  # DeepSpeed's default, in elements


def deepspeed_config(config: Config, world_size: int, folder: Path = Path()) -> dict[str, Any]:
    """What DeepSpeed needs to know. The gradient cache drives the micro-batches, so for DeepSpeed a step is one batch.

    Keys of `config.deepspeed` are laid over it; those that would contradict it were refused when it was loaded.
    """
    batch, execution = config.train.global_batch_size, config.execution
    zero: dict[str, Any] = {"stage": execution.zero_stage}
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if execution.offload != "none":
        zero["offload_optimizer"] = host
    if execution.offload == "parameters":
        zero["offload_param"] = host
    generated: dict[str, Any] = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch // world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.max_grad_norm,  # DeepSpeed's default is 1.0, so zero must be said
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # other rules than Adam step on the host too, only slower
        "bf16": {"enabled": execution.precision == "bf16"},
        "fp16": {"enabled": execution.precision == "fp16"},
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device before every forward, to time a step
    }
    if execution.profile:
        generated["comms_logger"] = {"enabled": True, "verbose": False}
        flops = str(folder / "profile" / "flops.txt")
        generated["flops_profiler"] = {"enabled": True, "profile_step": SKIPPED, "output_file": flops}
    if execution.halves_weights:
        generated["communication_data_type"] = "fp32"  # the mean over ranks is taken in fp32, whatever is sent
    return merge(generated, config.deepspeed)


def quieten() -> None:
    """Warnings and errors of DeepSpeed only, but for one: optimizers that are untested there are tested here."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    if not logger.filters:
        logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())


def adapt_to_objective(model: DualEncoder, objective: Objective, embedding_width: int) -> None:
    """Let the model give what the objective reads: outputs of its parts, tokens, embeddings of their own length.

    Raises:
        UserError: the objective reads tokens of a tower that has none.
    """
    model.tokens = token_sides(objective.inputs)
    check_tokens(model.tokens, model.image_tokens)
    model.unit_rows = objective.needs_unit_rows
    model.take_parts(objective.model_parts(objective.config, embedding_width))


def prepare_towers(model: DualEncoder, execution: Execution) -> None:
    """Say what products are made in, and switch on activation recomputation and compilation.

    In this order: what is compiled recomputes too.

    Raises:
        UserError: a tower has fewer blocks than execution.recompute_... counts, or what it has inside is to be read.
    """
    model.computes_in = execution.precision
    for tower, recomputation in (("image", execution.recompute_image), ("text", execution.recompute_text)):
        if isinstance(getattr(model, f"{tower}_tower"), RestingTower):
            continue
        try:
            set_recomputation(getattr(model, f"{tower}_tower"), recomputation)
        except ValueError as error:
            raise UserError(f"execution.recompute_{tower}: {str(error).removeprefix('recomputation: ')}") from error
    if execution.compile and "image" in model.tokens:
        raise UserError(
            "execution.compile: expected false where the objective reads image_tokens, which are noted inside the "
            "tower, got true"
        )
    if execution.compile:  # in place, so that parameters keep their names
        model.image_tower.compile()
        model.text_tower.compile()


def check_tf32(execution: Execution, device: torch.device) -> None:
    """Raises:
    UserError: products are to be made in TF32, and the device has none.
    """
    if execution.precision == "tf32" and not has_tf32(device):
        raise UserError(
            "execution.precision: tf32 is how CUDA devices of compute capability 8.0 and later multiply, expected "
            f"another one on {device}; choose fp32"
        )


def build_engine(
    config: Config,
    model: nn.Module,
    *,
    no_decay: set[str],
    factors: Mapping[str, str] | None = None,
    device: torch.device,
    world_size: int,
    folder: Path = Path(),
) -> tuple[Any, str]:
    """`deepspeed.initialize` around the model, and who provides the optimizer.

    Parameters are broadcast from rank 0, and live on `device`. At stage 3 the model was built under `shape_only` or
    whole, and other ranks than 0 get new Parameter objects. `folder` is the run's, for profiles. `no_decay` and
    `factors` are the model's (`parameter_groups`).

    Raises:
        UserError: fp16 or tf32 is not supported here, or nothing is trained.
    """
    freeze(model.named_parameters(), config.optimizer, factors)
    model.train(model.training)  # but for what is frozen
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trained:
        raise UserError(
            "optimizer.lr_factors: expected one above 0 for some part of the model that is not frozen "
            "(model.image.frozen, model.text.frozen), got none: nothing is trained"
        )
    quieten()
    leave_messages_to_gloo()  # for those who come with a process group of their own
    import deepspeed

    if config.execution.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        raise UserError(f"execution.precision: fp16 is not supported on {device}; choose bf16 or fp32")
    check_tf32(config.execution, device)
    generated = deepspeed_config(config, world_size, folder)
    # DeepSpeed sets the whole bucket aside, 2 GB of float32, however small the model is.
    generated["zero_optimization"].setdefault("reduce_bucket_size", min(REDUCE_BUCKET, trained))
    if config.execution.zero_stage < 3:
        undo_linear()
        model.to(device)
    else:
        partition(model, generated, DTYPES[config.execution.precision], device)
    depths = getattr(model, "depths", None)
    groups = parameter_groups(model.named_parameters(), no_decay, config.optimizer, factors, depths)
    offload, stage = config.execution.offload != "none", config.execution.zero_stage
    optimizer, provider = build_optimizer(config.optimizer, groups, device, offload=offload, zero_stage=stage)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=generated, dist_init_required=False)
    attach(optimizer, engine.optimizer, config.execution.zero_stage, device)
    engine.module_orders = note_orders(engine) if stage == 3 else None
    fuse_norm(engine.optimizer, stage, engine.module_orders)
    report_misaligned(model, world_size)
    return engine, provider


def sample_views(
    config: Config, pad_id: int, widths: Mapping[str, int]
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """One sample of the shapes that the recipe trains on, its caption full of words, to count operations with.

    Args:
        widths: of the towers' features, which may come in place of pictures and captions.
    """
    data = config.data
    image = torch.zeros(1, 3, data.image_size, data.image_size, dtype=torch.uint8)
    text = torch.full((1, data.context_length), int(pad_id == 0))
    if data.features.image is not None:
        image = torch.zeros(1, widths["image"])
    if data.features.text is not None:
        text = torch.zeros(1, widths["text"])
    return (image,) * data.images_each, (text,) * data.texts_each


def throughput(config: Config, plan: Plan, model: DualEncoder, flops: ModelFlops, device: torch.device) -> Throughput:
    """How a rate of samples becomes rates of operations on this device."""
    return Throughput(
        world_size=plan.world_size,
        flops=flops,
        second_forwards=(plan.micro_batches - plan.kept) / plan.micro_batches,
        recomputed_image=recomputed_share(model.image_tower, config.execution.recompute_image),
        recomputed_text=recomputed_share(model.text_tower, config.execution.recompute_text),
        peak=device_peak(device, config.execution.precision),
    )
