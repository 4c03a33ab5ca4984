"""From a configuration to what trains: first the data, then model, objective and engine.

In two parts, since mistakes in the data are found before any process waits for another, and the second part needs the
process group.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from amclr_scale import objectives
from amclr_scale.config.schema import Config, Execution
from amclr_scale.config.teacher import lent_sides
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.tokenizers import Tokenizer, load_tokenizer
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.distributed.process_group import broadcast_object, seed_everything
from amclr_scale.encoders.build import build_model
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.encoders.tokens import check_tokens
from amclr_scale.engine.batch_plan import Plan, make_plan
from amclr_scale.engine.deepspeed_setup import adapt_to_objective, build_engine, prepare_towers, sample_views
from amclr_scale.engine.features import rest_towers
from amclr_scale.engine.optimizers import freeze
from amclr_scale.engine.start_of_parts import start_parts
from amclr_scale.engine.teacher import Teacher, build_teacher
from amclr_scale.engine.zero.stage3_init import shape_only
from amclr_scale.errors import UserError
from amclr_scale.metrics.flops import ModelFlops, count
from amclr_scale.metrics.stopwatch import Stopwatch
from amclr_scale.objectives.base import Objective
from amclr_scale.similarity import configure, describe, rank


@dataclass(frozen=True)
class Inputs:
    """This rank's batches, how captions become tokens, and the arithmetic of the run."""

    loader: TrainLoader
    tokenizer: Tokenizer
    plan: Plan


def open_data(config: Config, rank_info: RankInfo, *, begun: bool = False) -> Inputs:
    """Open the training data; no process group yet.

    Args:
        begun: the run goes on from a checkpoint (`open_index`).

    Raises:
        UserError: shards, captions or the tokenizer are not usable.
    """
    loader = TrainLoader(
        config.data, seed=config.seed, global_batch_size=config.train.global_batch_size,
        rank=rank_info.rank, world_size=rank_info.world_size, workers=config.execution.workers, begun=begun,
    )  # fmt: skip
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.context_length)
    return Inputs(loader, tokenizer, make_plan(config, loader.samples_per_epoch, rank_info.world_size))


@dataclass(frozen=True)
class Trainer:
    """What trains: the model inside DeepSpeed's engine, and the objective beside it."""

    model: DualEncoder
    objective: Objective
    engine: Any
    optimizer: str  # its name, and who provides it
    similarities: str  # backend and precision, in words
    flops: ModelFlops  # of one sample
    teacher: Teacher | None = None  # a moving average of the model

    @property
    def parameters(self) -> int:
        """Numbers in the model, over all ranks."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())

    @property
    def frozen(self) -> int:
        """How many of them are not trained."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters() if not p.requires_grad)


def model_of(config: Config, tokenizer: Tokenizer, *, weights: bool = True) -> DualEncoder:
    """The recipe's towers and heads; seed torch before.

    Args:
        weights: load those that the configuration names.

    Raises:
        UserError: a key of model is not usable here.
    """
    data = config.data
    model = build_model(
        config.model, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id, end_id=tokenizer.end_id,
        context_length=data.context_length, image_size=data.image_size, image_mean=data.image_mean,
        image_std=data.image_std, weights=weights, with_depths=config.optimizer.layer_decay < 1,
    )  # fmt: skip
    model.further_views = {"image": data.image_views, "text": data.text_views}
    return model


def build_trainer(
    config: Config, inputs: Inputs, *, device: torch.device, world_size: int, folder: Path, stopwatch: Stopwatch,
    fresh: bool = True,
) -> Trainer:  # fmt: skip
    """Build the model from the recipe's seed, the objective, and the engine around the model. All ranks call it.

    Args:
        folder: the run's, for profiles.
        fresh: whether the run begins; otherwise a checkpoint has all weights, and what parts of the objective began
            with.

    Raises:
        UserError: a key of model, objective, optimizer or execution is not usable here.
    """
    seed_everything(config.seed)
    stage, first, features = config.execution.zero_stage, rank() == 0, inputs.loader.features
    with nullcontext() if features else shape_only(stage, rank()):  # a tower that rests is whole on every rank
        needed = fresh and (first or stage < 3)
        model = model_of(config, inputs.tokenizer, weights=needed or bool(features))  # features are of weights
    rest_towers(model, config, features)
    objective = objectives.from_section(
        config.objective, config.execution.sample_state, num_samples=inputs.loader.num_samples
    ).to(device)
    adapt_to_objective(model, objective, config.model.embedding_width)
    if "token_retrieval" in config.evaluation.evaluators:  # not first when the model is measured
        check_tokens(("image",), model.image_tokens)
    if fresh:
        start_parts(model, inputs.loader, device)
    prepare_towers(model, config.execution)
    freeze(model.named_parameters(), config.optimizer, model.learning_rate_factors())  # and what is frozen counts less
    flops = broadcast_object(
        count(model, *sample_views(config, inputs.tokenizer.pad_id, model.widths)) if first else None
    )
    views = {"image": config.data.images_each, "text": config.data.texts_each}
    flops = replace(flops, lent=sum(getattr(flops, side) // views[side] for side in lent_sides(config)))
    stopwatch.lap("model")

    similarities = configure_similarity(config.execution, device)
    engine, optimizer = build_engine(
        config, model, no_decay=model.no_weight_decay(), factors=model.learning_rate_factors(), device=device,
        world_size=world_size, folder=folder,
    )  # fmt: skip
    teacher = build_teacher(config, engine, total_steps=inputs.plan.total_steps, device=device)
    stopwatch.lap("engine")
    return Trainer(model, objective, engine, optimizer, similarities, flops, teacher)


def configure_similarity(execution: Execution, device: torch.device) -> str:
    """Set this process's similarity engine as the recipe says; returns in words what that is on this device.

    Raises:
        UserError: the backend asked for does not work here.
    """
    similarity = execution.similarity
    settings = configure(
        chunk=similarity.chunk, gather=similarity.gather, backend=similarity.backend, precision=similarity.precision,
        run_precision=execution.precision, distribution=similarity.distribution,
        cache_bytes=similarity.cache_mib * 2**20,
    )  # fmt: skip
    try:
        return describe(settings, device)
    except ValueError as error:
        raise UserError(f"execution.similarity.{error}; or set it to auto") from error
