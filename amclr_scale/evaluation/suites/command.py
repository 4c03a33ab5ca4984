"""`amclr-scale evaluate MODEL... --suite NAME --data FOLDER`: models one after the other, then the tables."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from amclr_scale.config.load import build, from_words, merge
from amclr_scale.config.schema import Config
from amclr_scale.distributed.collectives import rank
from amclr_scale.errors import UserError
from amclr_scale.evaluation.models import Loaded, check_reading, compute_in, name_beside, use_statistics
from amclr_scale.evaluation.report import made
from amclr_scale.evaluation.suites.catalogue import Suite
from amclr_scale.evaluation.suites.run import FIXED, check, measured_table, prepared
from amclr_scale.evaluation.suites.summary import in_terminal


def configured(config: Config, words: Sequence[str]) -> Config:
    """A model's configuration as suites measure by it: everything that is theirs to say at its default.

    Args:
        words: KEY=VALUE of the command line.

    Raises:
        UserError: a word says what a suite says itself.
    """
    given = _changes(words)
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree["data"]["allow_pipe"] = False
    tree["evaluation"] = {key: tree["evaluation"][key] for key in ("batch_size", "resamples")}
    return build(merge(tree, given), trusted=False)


def _changes(words: Sequence[str]) -> dict[str, Any]:
    given = from_words(list(words))
    for key in FIXED:
        if key in given.get("evaluation", {}):
            raise UserError(f"--set evaluation.{key}: expected no such key beside --data: a suite says it itself")
    return given


def measure(
    checkpoints: Sequence[str],
    suites: Sequence[Suite],
    data: Path,
    *,
    opens: Callable[[str], Loaded],
    device: torch.device,
    words: Sequence[str] = (),
    precision: str = "run",
    output: Path | None = None,
) -> None:
    """Measure, print and write. All ranks call it together.

    Args:
        data: the folder of the data sets.
        opens: the name of a model -> the model.
        words: KEY=VALUE for configurations.
        precision: what models compute in; run: what each was trained in.
        output: where results go; None: evaluation/ in each run's folder.

    Raises:
        UserError: something of it cannot be used.
    """
    _changes(words)
    for suite in suites:
        there = check(suite, data)
        if not rank():
            print(f"{suite.name}: {len(there)} of {len(suite.sets)} data sets in {data}", flush=True)
    tables: dict[str, dict[str, dict[str, Any]]] = {suite.name: {} for suite in suites}
    folders = []
    for checkpoint in checkpoints:
        loaded = opens(checkpoint)
        name = name_beside(loaded, checkpoint, {name for table in tables.values() for name in table})
        config = configured(loaded.config, words)
        check_reading(loaded, config.data)
        use_statistics(loaded, config.data)
        chosen = compute_in(loaded, precision, device)
        folder = _folder(output, loaded, name, several=len(checkpoints) > 1)
        folders.append(folder)
        if not rank():
            made(folder)
        on = prepared(name, loaded.model.to(device), config, loaded.reading, chosen, folder)
        for suite in suites:
            tables[suite.name][name] = measured_table(suite, data, on)
    if not rank():
        _say(tables, folders)


def _folder(output: Path | None, loaded: Loaded, name: str, *, several: bool) -> Path:
    flat = name.replace("/", "-").replace(":", "-")
    if output is not None:
        return output / flat if several else output
    if loaded.folder is None:
        return Path("runs") / "evaluation" / flat
    # A checkpoint is called RUN/step_..., other weights of a run RUN/momentum: they have folders of their own.
    return loaded.folder / "evaluation" / loaded.name.partition("/")[2]


def _say(tables: Mapping[str, Mapping[str, Mapping[str, Any]]], folders: Sequence[Path]) -> None:
    for table in tables.values():
        print(f"\n{in_terminal(table)}")
    files = " and ".join(f"{name}.json" for name in tables)
    print(f"\n{files}, and the same as .md, in {', '.join(map(str, dict.fromkeys(folders)))}")
