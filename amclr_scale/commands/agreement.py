"""What the ranks of a training run compare before they train together."""

import hashlib
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from amclr_scale.commands.job import Prepared
from amclr_scale.config.load import keys_of
from amclr_scale.config.schema import Config
from amclr_scale.data.beside.fingerprint import SHARDS, parts
from amclr_scale.distributed.agreement import check_agreement
from amclr_scale.evaluation.run import Evaluator
from amclr_scale.metrics.run_folder import installed_packages

PACKAGE = Path(__file__).parents[1]
# Keys that a node may have its own way: where it keeps copies, how it shares its cores out, what is said elsewhere.
OWN = (
    "data.cache", "data.cache_gib", "data.max_shard_gib", "execution.threads", "execution.workers", "objective.module",
    "run.wandb", "run.wandb_group", "run.wandb_project", "run.tensorboard", "run.trackio",
)  # fmt: skip


def check_ranks_agree(config: Config, prepared: Prepared) -> None:
    """Compare configuration, code, data and tokenizer. All ranks call it together, in the process group.

    Raises:
        AgreedError: on every rank, naming key and node of each difference.
    """
    check_agreement(facts(config, prepared))


def facts(config: Config, prepared: Prepared) -> dict[str, Any]:
    """What has to be the same on all ranks, by the key or package to change."""
    found = {key: value for key, value in keys_of(config.model_dump(mode="json")) if key not in OWN}
    found |= {f"package {name}": version for name, version in installed_packages().items()}
    found["package python"] = ".".join(platform.python_version_tuple()[:2])
    found["amclr_scale's source files"] = digest_of_source()
    loader, tokenizer = prepared.inputs.loader, prepared.inputs.tokenizer
    found["data.train: samples"] = loader.num_samples
    found["data.train: content of the shards"] = loader.index.shards.content()
    for key, content in parts(loader.fingerprint).items():
        found[f"data.{key}: content{' and order of the shards' * (key == SHARDS)}"] = content
    if synonyms := config.data.text_augmentation.synonyms:
        found["data.text_augmentation.synonyms: content"] = digest_of(Path(synonyms).expanduser().read_text("utf-8"))
    found["data.tokenizer: what it does"] = tokenizer.fingerprint()
    for name, content in _evaluated(prepared.evaluator):
        found[f"evaluation.splits: {name}"] = content
    return found


def digest_of(content: Any) -> str:
    """12 hex digits of anything that has the same `repr` on every machine."""
    return hashlib.sha256(repr(content).encode("utf-8", "surrogateescape")).hexdigest()[:12]


@cache
def digest_of_source() -> str:
    """Of every file of this package that is run or read, whatever its version says; 12 hex digits."""
    found = hashlib.sha256()
    for path in sorted((*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.yaml"))):
        found.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def _evaluated(evaluator: Evaluator | None) -> Iterator[tuple[str, str]]:
    """Of each split that is measured or that a probe learns on, a digest of its captions and classes; 12 hex digits."""
    if evaluator is None:
        return
    learned = [(f"{side} of probe {one.train}", task) for one, *pair in evaluator.probes
               for side, task in zip(("train", "test"), pair, strict=True)]  # fmt: skip
    for name, task in [*((task.name, task) for task in evaluator.tasks), *learned]:
        split = task.split
        yield (
            name,
            digest_of([split.num_samples, split.caption_lists, task.labels.tolist(), task.class_names, task.templates]),
        )
