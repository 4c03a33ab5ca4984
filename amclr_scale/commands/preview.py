"""`amclr-scale train --dry-run`: read one sample of everything, and say what a run will do, need and take.

The other ranks are pretended, and no process group is started, so that `--ranks 64 --device h100` is answered on a
laptop; without the data `--num-samples` stands in for its index.
"""

import argparse
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.fetch import source_of
from amclr_scale.checkpoint.remote import RemoteError
from amclr_scale.checkpoint.resume import find
from amclr_scale.commands.job import check_best, predict_memory, with_shards_since
from amclr_scale.config.schema import Config
from amclr_scale.data.beside.features import Features
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.tokenizers import Tokenizer, load_tokenizer
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.distributed.process_group import device_type, seed_everything
from amclr_scale.engine.batch_plan import Plan, make_plan
from amclr_scale.engine.build import model_of
from amclr_scale.engine.features import rest_towers
from amclr_scale.engine.schedules import peak_learning_rate
from amclr_scale.errors import AbsentDataError, UserError
from amclr_scale.evaluation.run import Evaluator
from amclr_scale.evaluation.suites.of_runs import RunSuites
from amclr_scale.memory.account import account
from amclr_scale.memory.units import in_two_digits, in_words
from amclr_scale.metrics.devices import DeviceProfile, find_profile
from amclr_scale.metrics.run_folder import name_run
from amclr_scale.planner.step_time import between

PER_NODE = 8  # GPUs


def preview(config: Config, rank_info: RankInfo, options: argparse.Namespace) -> Iterator[str]:
    """What there is to say, line by line, as it is found.

    Raises:
        UserError: something that the run would read cannot be used.
    """
    profile = None
    if options.device:
        try:
            profile = find_profile(options.device)
        except UserError as error:
            raise UserError(f"--{error}") from error
    world_size = options.ranks or rank_info.world_size
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.context_length)
    fingerprint, features = None, dict[str, Features]()
    if options.num_samples:
        num_samples = per_epoch = options.num_samples
        yield f"data.train: not looked at; {num_samples:,} samples (--num-samples)"
    else:
        loader, said = _read_data(config)
        num_samples, per_epoch, fingerprint = loader.num_samples, loader.samples_per_epoch, loader.fingerprint
        features = loader.features
        yield said
    plan = make_plan(config, per_epoch, world_size)
    yield from _read_splits(config)
    yield _model(config, tokenizer, features)
    yield str(plan)
    yield from _resumed(config, plan, fingerprint, tokenizer)
    yield _learning_rate(config)
    yield from _needs(config, plan, num_samples, profile, rank_info, options)


def _read_data(config: Config) -> tuple[TrainLoader, str]:
    """One batch of every lane's next sample through all views, as training reads it; the loader is closed then."""
    lanes = config.data.lanes
    try:
        data = config.data.model_copy(update={"resident": "none"})  # a few samples need not be decoded with the rest
        loader = with_shards_since(
            config, lambda begun: TrainLoader(data, seed=config.seed, global_batch_size=lanes, begun=begun)
        )
    except AbsentDataError as error:
        raise UserError(f"{error}\n--num-samples: with it, the data need not be here") from error
    batch = next(loader)
    loader.close()
    views = f"{len(batch.images)} images and {len(batch.texts)} texts each"
    bad = f", {sum(loader.counts.values())} of them bad" if loader.counts else ""
    return loader, (
        f"data.train: {loader.num_samples:,} samples; read {len(batch.ids)}{bad}: {views}, "
        f"{'x'.join(map(str, batch.images[0].shape[1:]))}"
    )


def _read_splits(config: Config) -> Iterator[str]:
    """The first sample of everything that is measured on."""
    evaluator = with_shards_since(config, lambda begun: Evaluator(config, begun=begun))
    check_best(config, evaluator if evaluator.tasks or evaluator.probes else None)
    suites = RunSuites(config)
    pairs = [(f"evaluation.splits: {task.name}", task) for task in evaluator.tasks]
    pairs += [(f"evaluation.probes: {task.name}", task) for _, *both in evaluator.probes for task in both]
    for said, task in pairs:
        next(task.split.batches(1))
        kinds = ["retrieval"] * task.retrieval + [f"{len(task.class_names):,} classes"] * bool(task.class_names)
        yield f"{said}: {task.split.num_samples:,} images, {' and '.join(kinds)}; read the first"
    yield from (f"evaluation.suites: {words}" for words in suites.words)


def _goes_on(config: Config) -> bool:
    """Whether a checkpoint has the weights; where `auto` finds none of the run's name, its own are looked at."""
    if config.resume == "auto":
        return bool(config.run.name and files.steps(Path(config.run.folder) / config.run.name / files.CHECKPOINTS))
    return config.resume != "never"


def _model(config: Config, tokenizer: Tokenizer, features: Mapping[str, Features]) -> str:
    """Built with its weights, which are read for it, where no checkpoint has them."""
    seed_everything(config.seed)
    model = model_of(config, tokenizer, weights=bool(features) or not _goes_on(config))
    total, towers = sum(p.numel() for p in model.parameters()), (model.image_tower, model.text_tower)
    image, text = (sum(p.numel() for p in tower.parameters()) for tower in towers)
    rest_towers(model, config, features)
    notes = "".join(f"\nnote: {note}" for note in model.notes)
    return f"{total:,} parameters ({image:,} image tower, {text:,} text tower); {tokenizer.vocab_size:,} tokens{notes}"


def _resumed(config: Config, plan: Plan, fingerprint: str | None, tokenizer: Tokenizer) -> Iterator[str]:
    """Where the run would go on from: the checkpoint is read as a run reads it, but nothing is locked or moved."""
    try:
        newest = cache(files.newest_valid)  # it reads every byte: once is enough
        source = source_of(config, name_run(config, None), newest)
        found, called = source.look() if source else (find(config, newest), "")
    except RemoteError as error:
        raise UserError(f"resume: {error}") from error
    if called:
        yield f"resume: {called} would be fetched into {source.folder if source else ''}"
    if found is None:
        if config.resume != "never":
            yield f"resume: {config.resume} finds nothing to go on from: the run begins anew"
        return
    step = found.check(config, data=fingerprint, tokenizer=tokenizer.fingerprint())
    for note in found.notes():
        yield f"note: {note}"
    left = max(0, plan.total_steps - step)
    yield f"resume: {found.samples:,} samples seen, {left:,} of {plan.total_steps:,} steps left"


def _learning_rate(config: Config) -> str:
    optimizer, batch = config.optimizer, config.train.global_batch_size
    peak = peak_learning_rate(optimizer, batch)
    if optimizer.lr_rule == "none":
        return f"learning rate: {peak:.3g} at its peak"
    reference = f"{optimizer.lr:.3g} for a batch of {optimizer.lr_reference_batch}"
    return f"learning rate: {peak:.3g} at its peak ({reference}, by the {optimizer.lr_rule} rule)"


def _needs(
    config: Config, plan: Plan, num_samples: int, profile: DeviceProfile | None, rank_info: RankInfo,
    options: argparse.Namespace,
) -> Iterator[str]:  # fmt: skip
    """Memory of a rank, and how long it takes on a device that was named."""
    if config.execution.auto or config.execution.kept_micro_batches == "auto":
        yield "execution: auto is settled at the start, from free memory; amclr-scale fit predicts it"
        return
    if options.ranks or profile:
        device = profile or device_type()
        predicted = account(config, world_size=plan.world_size, num_samples=num_samples, device=device)
    else:
        predicted = predict_memory(config, rank_info, num_samples)
    limit = profile.memory_bytes if profile else None
    of = f" of {profile.name} ({in_words(profile.memory_bytes)})" if profile else ""
    yield f"predicted memory of a rank{of}:\n{predicted.table()}\n{predicted.advice(limit)}"
    if profile:
        per_node = min(plan.world_size, PER_NODE)
        costs = between(config, profile, world_size=plan.world_size, num_samples=num_samples, ranks_per_node=per_node)
        least, speed, most = (in_two_digits(cost.samples_per_second) for cost in costs)
        long, usual, short = (in_two_digits(plan.total_samples / cost.samples_per_second / 3600) for cost in costs)
        yield (
            f"predicted speed: {speed} samples/s ({least} to {most}), {in_two_digits(costs[1].seconds)} s per step, "
            f"{usual} hours in all ({short} to {long}), without evaluation"
        )
