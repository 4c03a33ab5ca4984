"""Combinations of keys that would fail later, or train wrongly in silence: refused before any process starts."""

import math
from typing import Any

from amclr_scale.config.changed_keys import changed_keys
from amclr_scale.config.data_checks import augmentation, batches, features, text_negatives, unread_places
from amclr_scale.config.objective_options import declared
from amclr_scale.config.optimizers import RULES
from amclr_scale.config.schema import Config, ImageAugmentation, Optimizer
from amclr_scale.declarations import KINDS, queue_of, unread_keys
from amclr_scale.errors import one_of

_MOST = 2**48  # of what is counted


def check(config: Config, world_size: int, *, objective: bool = True) -> list[str]:
    """One line per mistake, the key to change first; empty when all is well.

    Args:
        objective: ask the objective too, which runs what it declares.
    """
    return [
        *_finite(config.model_dump(), ""),
        *augmentation(config),
        *batches(config),
        *_resident(config),
        *_frozen(config),
        *text_negatives(config),
        *_momentum(config),
        *_length(config),
        *_shares(config, world_size),
        *(_objective(config, world_size) if objective else ()),
        *(features(config) if objective else ()),
        *(changed_keys(config) if objective else ()),
        *_same_images(config),
        *_probe(config),
        *_execution(config, world_size),
        *_deepspeed(config),
    ]


def _finite(tree: dict[str, Any], prefix: str) -> list[str]:
    """Numbers that YAML can write and no key means; seeds may be any."""
    lines = []
    for key, value in tree.items():
        if isinstance(value, dict):
            lines += _finite(value, f"{prefix}{key}.")
        elif any(
            isinstance(n, float) and not math.isfinite(n) for n in (value if isinstance(value, tuple) else [value])
        ):
            lines.append(f"{prefix}{key}: expected finite numbers, got {value}")
        elif isinstance(value, int) and abs(value) > _MOST and not key.endswith("seed"):
            lines.append(f"{prefix}{key}: expected at most 2^48, got {value}")
    return lines


def _resident(config: Config) -> list[str]:
    data, lines = config.data, []
    if data.image_view_from == "group" and data.image_group is None:
        lines.append("data.image_group: image_view_from group reads it, expected such as json.concept, got none")
    if data.image_view_from == "group" and data.resident == "none":
        held = "host or device" if data.features.image is None else "host"
        lines.append(f"data.resident: image_view_from group needs all samples at hand, expected {held}, got none")
    if data.image_group is not None and data.image_view_from != "group":
        lines.append(
            f"data.image_group: image_view_from group reads it, got {data.image_group} with {data.image_view_from}; "
            "set data.image_view_from=group"
        )
    if data.resident != "none" and data.stream:
        lines.append(
            f"data.resident: expected none with data.stream, which holds a window of shards, got {data.resident}"
        )
    return lines


def _frozen(config: Config) -> list[str]:
    lines, still = [], []
    for side, section in (("image", config.model.image), ("text", config.model.text)):
        if section.taps and config.execution.compile:
            lines.append(f"execution.compile: expected false beside model.{side}.taps, whose hooks it does not see")
        for key in ("unfrozen_blocks", "unfrozen_norms"):
            if getattr(section, key) and not section.frozen:
                lines.append(
                    f"model.{side}.{key}: model.{side}.frozen reads it, got {getattr(section, key)} of a tower that is "
                    f"trained as a whole; set model.{side}.frozen=true"
                )
        still.append(section.frozen and section.frozen_head and not section.unfrozen_blocks + section.unfrozen_norms)
    if all(still):
        lines.append(
            "model.image.frozen: expected a tower or a head that is trained, got frozen and frozen_head on both sides: "
            "no embedding would change; set model.image.frozen_head=false, say"
        )
    return lines


def _momentum(config: Config) -> list[str]:
    momentum, execution, lines = config.model.momentum, config.execution, []
    if momentum is None:
        there = "model.momentum: evaluation.momentum measures it, got null; such as model.momentum={decay: 0.995}"
        return [there] if config.evaluation.momentum else []
    cosine = momentum.decay_schedule == "cosine"
    if cosine and (momentum.start_decay is None or momentum.start_decay > momentum.decay):
        lines.append(
            f"model.momentum.start_decay: decay_schedule cosine begins there, expected at most decay = "
            f"{momentum.decay}, got {momentum.start_decay}"
        )
    if not cosine and momentum.start_decay is not None:
        lines.append(
            f"model.momentum.start_decay: decay_schedule cosine reads it, got {momentum.start_decay} with "
            f"{momentum.decay_schedule}; set model.momentum.decay_schedule=cosine"
        )
    if not cosine and momentum.decay == 1:
        lines.append("model.momentum.decay: expected less than 1, where the average never moves, got 1.0")
    if momentum.precision == "fp32" and execution.halves_weights and execution.zero_stage == 3:
        lines.append(
            "model.momentum.precision: at execution.zero_stage=3 the average computes in the shares of the weights, "
            f"expected run, got fp32 beside execution.precision={execution.precision}"
        )
    return lines


def _length(config: Config) -> list[str]:
    train = config.train
    if (train.samples is None) == (train.epochs is None):
        given = "neither" if train.samples is None else f"{train.samples} and {train.epochs}"
        return [f"train.samples: expected exactly one of train.samples and train.epochs, got {given}"]
    if train.samples is not None and train.samples < train.global_batch_size:
        return [f"train.samples: expected at least one global batch ({train.global_batch_size}), got {train.samples}"]
    return []


def _shares(config: Config, world_size: int) -> list[str]:
    lanes, batch = config.data.lanes, config.train.global_batch_size
    lines = []
    if lanes % world_size:
        divisors = ", ".join(str(n) for n in range(1, lanes + 1) if lanes % n == 0)
        fits = [n for n in range(world_size, batch + 1, world_size) if batch % n == 0]
        hint = f" (or, as a change of the recipe, data.lanes={fits[0]})" if fits else ""
        lines.append(
            f"data.lanes: expected a multiple of the number of ranks, got {lanes} lanes for {world_size} ranks; "
            f"run on {divisors} ranks{hint}"
        )
    if batch % lanes:
        near = max(lanes, round(batch / lanes) * lanes)
        lines.append(
            f"train.global_batch_size: expected a multiple of data.lanes = {lanes}, got {batch}; the nearest is {near}"
        )
    return lines


def _objective(config: Config, world_size: int) -> list[str]:
    """What the objective reads and nobody provides, and what it says itself."""
    batch, name = config.train.global_batch_size, config.objective["name"]
    found, lines = declared(config.objective), []
    for kind, (key, there) in _provided(config).items():
        wanted = found.inputs.count(kind)
        if there == 0 and wanted and not KINDS[kind].several:
            lines.append(f"{key}: objective {name} reads {kind}, which come from there, got nothing")
        elif there != wanted and KINDS[kind].several and (wanted or KINDS[kind].gradient):
            lines.append(f"{key}: objective {name} needs {wanted or 'none'}, got {there}")
    given = {key: getattr(config.data, key) for key in unread_keys(found.inputs)}
    lines += [f"data.{key}: objective {name} reads none, got {value}" for key, value in given.items() if value]
    lines += unread_places(config)
    widths = {"width": getattr(found.options, "width", None), "queue.width": queue_of(found.options).get("width")}
    for key, width in widths.items():
        if width not in (None, config.model.embedding_width):
            lines.append(
                f"objective.{key}: expected model.embedding_width = {config.model.embedding_width}, or null, "
                f"got {width}"
            )
    return lines + [f"objective.{line}" for line in found.mistakes(batch, batch // world_size)]


def _provided(config: Config) -> dict[str, tuple[str, int]]:
    """Kind of input -> the key that provides it, and how many it provides."""

    def value(key: str) -> int:
        section: Any = config
        for part in key.split("."):
            section = getattr(section, part)
        return section if isinstance(section, int) else len(section) if isinstance(section, list) else bool(section)

    return {name: (kind.key, value(kind.key)) for name, kind in KINDS.items() if kind.key}


def _same_images(config: Config) -> list[str]:
    """Further image views that are pixel for pixel another view of their sample."""
    data, base = config.data, config.data.augmentation
    view = data.image_view or base
    if not data.image_views or _draws(view) or data.image_view_from == "group" or data.features.image is not None:
        return []
    fixed = (view.flip, view.grayscale)  # all that is left
    unchanged = fixed == (0, 0) if data.image_view_from == "base" else not _draws(base)
    if data.image_view_from == "image" and fixed != (base.flip, base.grayscale):
        unchanged = False
    if not unchanged and data.image_views == 1:
        return []
    key, others = ("image_view" if data.image_view else "augmentation"), "the base view" if unchanged else "one another"
    return [
        f"data.{key}: expected an augmentation that draws something (crop_scale [0.6, 1], flip 0.5, amclr 0.5, ...) "
        f"for data.image_views={data.image_views}, got one that draws nothing: further views would equal {others}"
    ]


def _draws(recipe: ImageAugmentation) -> bool:
    operations = bool(recipe.color_jitter or recipe.amclr or (recipe.randaugment or (0,))[0])
    return recipe.crop_scale != (1, 1) or operations or any(0 < p < 1 for p in (recipe.flip, recipe.grayscale))


def _probe(config: Config) -> list[str]:
    samples, batch = config.run.probe.samples, config.train.global_batch_size
    if samples % batch == 0:
        return []
    near = max(batch, round(samples / batch) * batch)
    return [
        f"run.probe.samples: expected a multiple of train.global_batch_size = {batch}, or 0, got {samples}; "
        f"the nearest is {near}"
    ]


def _execution(config: Config, world_size: int) -> list[str]:
    execution, lines = config.execution, []
    stage, offload = execution.zero_stage, execution.offload
    chosen_later = execution.auto and "zero_stage" not in execution.model_fields_set
    if execution.halves_weights and stage == 0 and not chosen_later:
        lines.append(
            f"execution.zero_stage: expected 1 or more, where ZeRO keeps fp32 masters of {execution.precision} "
            "weights, got 0"
        )
    if execution.trim_texts and execution.compile:
        lines.append("execution.trim_texts: expected false beside execution.compile, which wants one shape, got true")
    if offload == "optimizer" and stage == 0 and not chosen_later:
        lines.append("execution.offload: optimizer states move to the host at zero_stage 1, 2 or 3, got 0")
    if offload == "parameters" and stage != 3 and not chosen_later:
        lines.append(f"execution.offload: parameters move to the host at zero_stage 3 only, got {stage}")
    rule = config.optimizer.rule
    if offload != "none" and not rule.offloadable:
        able = one_of(name for name, other in RULES.items() if other.offloadable)
        lines.append(f"execution.offload: expected optimizer.name {able} with it, got {config.optimizer.name}")
    if stage not in rule.stages and not chosen_later:
        right = one_of(map(str, rule.stages))
        lines.append(f"execution.zero_stage: expected {right} with optimizer.name={config.optimizer.name}, got {stage}")
    local, image = config.train.global_batch_size // world_size, config.model.image
    still = image.frozen and not image.unfrozen_blocks  # in evaluation mode
    if image.norm == "sync" and not still and (execution.micro_batch_size or local) < local:
        lines.append(
            f"execution.micro_batch_size: model.image.norm=sync takes statistics over what is encoded at once, "
            f"expected this rank's whole share of {local}, got {execution.micro_batch_size}; choose norm group, frozen "
            "or batch"
        )
    if max(config.optimizer.betas) >= 1:
        lines.append(f"optimizer.betas: expected two numbers below 1, got {list(config.optimizer.betas)}")
    if config.optimizer.schedule == "step" and not config.optimizer.step_samples:
        lines.append("optimizer.step_samples: schedule step needs the samples at which the rate falls, got none")
    return lines + _schedule(config)


def _schedule(config: Config) -> list[str]:
    o, lines = config.optimizer, []
    cools = o.schedule in ("constant", "inverse_sqrt")
    if o.cooldown_samples and not cools:
        lines.append(
            f"optimizer.cooldown_samples: schedule constant and inverse_sqrt have a cooldown, got {o.cooldown_samples} "
            f"with {o.schedule}, which falls to min_lr by itself; set optimizer.schedule=constant"
        )
    if config.train.samples is not None:
        lines += too_short(o, config.train.samples, "train.samples")
    if o.schedule == "inverse_sqrt" and not (o.timescale_samples or o.warmup_samples):
        lines.append(
            "optimizer.timescale_samples: schedule inverse_sqrt needs it, or warmup_samples, got null and 0; such as a "
            "tenth of the run"
        )
    if o.timescale_samples and o.schedule != "inverse_sqrt":
        lines.append(
            f"optimizer.timescale_samples: schedule inverse_sqrt reads it, got {o.timescale_samples} with {o.schedule}"
        )
    return lines


def too_short(optimizer: Optimizer, samples: float, length: str) -> list[str]:
    """Words where so many samples, called `length`, have no room for warm-up and cooldown."""
    warmup, cooldown = optimizer.warmup_samples, optimizer.cooldown_samples
    if optimizer.schedule not in ("constant", "inverse_sqrt") or warmup + cooldown <= samples:
        return []
    if warmup > samples:
        return [f"optimizer.warmup_samples: expected at most {length} = {math.floor(samples)}, got {warmup}"]
    most = math.floor(samples - warmup)
    return [
        f"optimizer.cooldown_samples: expected at most {length} - optimizer.warmup_samples = {most}, got {cooldown}"
    ]


# What the schema generates, and the key that says it. Everything else in DeepSpeed's configuration is the user's.
GENERATED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "execution.micro_batch_size",
    "gradient_accumulation_steps": "execution.micro_batch_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer.name",
    "scheduler": "optimizer.schedule",
    "bf16": "execution.precision",
    "fp16": "execution.precision",
    "amp": "execution.precision",
    "torch_autocast": "execution.precision",
    "zero_optimization.stage": "execution.zero_stage",
    "zero_optimization.offload_optimizer": "execution.offload",
    "zero_optimization.offload_param": "execution.offload",
}


def _deepspeed(config: Config) -> list[str]:
    def given(tree: dict[str, Any], prefix: str = "") -> list[str]:
        paths = []
        for key, value in tree.items():
            paths.append(prefix + key)
            if isinstance(value, dict):
                paths += given(value, f"{prefix}{key}.")
        return paths

    return [
        f"deepspeed.{path}: this is generated from {GENERATED[path]}; set that key instead"
        for path in given(config.deepspeed)
        if path in GENERATED
    ]
