"""A configuration that may leave the machine it was used on: it keeps names, and no paths."""

import re
from pathlib import Path
from typing import Any

from amclr_scale.config.schema import Config, Evaluation
from amclr_scale.data.names import known_as, probe_splits
from amclr_scale.data.sources import Given, embedded_splits, is_remote
from amclr_scale.evaluation.class_names import lines_of

# A file or a folder from the root on, of any system's, also behind the name of a library (transformers//data/bert).
_FROM_ROOT = re.compile(r"(?P<before>[a-z_]+/)?(/|~|[A-Za-z]:[/\\]).*")
_WITH_KEY = re.compile(r"[^:]*://([^/]*@|.*\?)")


def portable(config: Config) -> Config:
    """The configuration with data sets by name alone, where they have no address that holds elsewhere too.

    Splits of the embedded corpus and urls stay; the paths of others become null, prompts from a file the prompts
    themselves, and any other path its last part. What the model computes is the same.
    """
    data, evaluation, model = config.data, config.evaluation, config.model
    kept: dict[str, Any] = {"templates": _prompts(evaluation), "image_root": None, "suites": {}}
    kept |= {"splits": _named(evaluation.splits)} if evaluation.splits else {}
    kept["probes"] = [
        one.model_copy(
            update={
                key: path if path is not None and _holds_elsewhere(path) else {name: None}
                for key, (name, path) in zip(("train", "test"), probe_splits(one, evaluation), strict=True)
            }
        )
        for one in evaluation.probes
    ]
    towers = {side: getattr(model, side) for side in ("image", "text")}
    named = {side: tower.model_copy(update={"name": _tower(tower.name)}) for side, tower in towers.items()}
    config = config.model_copy(
        update={
            "data": data.model_copy(update={"train": _named(data.train), "cache": None}),
            "evaluation": evaluation.model_copy(update=kept),
            "model": model.model_copy(update={**named, "init": None}),
            "run": config.run.model_copy(update={"folder": type(config.run)().folder, "remote": None}),
            "resume": "never",
        }
    )
    return Config.model_validate(_last_parts(config.model_dump(mode="json")))


def _holds_elsewhere(path: str) -> bool:
    """Whether it is an address that says nothing of whose it is: a query or a user in it may be a key to the data."""
    private = path.startswith(("pipe:", "file:")) or _WITH_KEY.match(path) is not None
    return path in embedded_splits() or (is_remote(path) and not private)


def _named(given: Given) -> Any:
    """As it was given where nothing is a path; else by name."""
    named = known_as(given)
    if all(path is not None and _holds_elsewhere(path) for path in named.values()):
        return given
    return {name: path if path is not None and _holds_elsewhere(path) else None for name, path in named.items()}


def _prompts(evaluation: Evaluation) -> list[str] | str | None:
    given = evaluation.templates
    if not isinstance(given, str) or given == "imagenet":
        return given
    return lines_of(Path(given).expanduser()) or given


def _tower(name: str) -> str:
    """A tower's name; of a folder of a library, which an exported one brings with it, its last part."""
    library, slash, rest = name.partition("/")
    return f"{library}{slash}{Path(rest).name}" if library in ("transformers", "open_clip") and "/" in rest else name


def _last_parts(tree: Any) -> Any:
    """Any path from the root on becomes its last part."""
    if isinstance(tree, dict):
        return {key: value if key == "templates" else _last_parts(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_last_parts(value) for value in tree]
    found = _FROM_ROOT.fullmatch(tree) if isinstance(tree, str) else None
    return (found["before"] or "") + re.split(r"[/\\]+", tree.rstrip("/\\"))[-1] if found else tree
