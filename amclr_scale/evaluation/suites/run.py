"""A suite measured: each data set in its turn, each finished one kept, so that a second call goes on.

    FOLDER/SUITE/DATA_SET.json    what one data set gave, and the digests of model and data that it holds for
    FOLDER/SUITE.json, SUITE.md   all of them, the columns, and what is missing

A data set is not measured again while the model, the settings and the data set's files are the same.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from amclr_scale.config.schema import Config
from amclr_scale.data.reading import Reading
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.distributed.process_group import broadcast_object
from amclr_scale.errors import UserError
from amclr_scale.evaluation.progress import EvaluationProgress
from amclr_scale.evaluation.run import flatten
from amclr_scale.evaluation.suites.catalogue import DataSet, Suite
from amclr_scale.evaluation.suites.choices import (
    open_aro_attribution,
    open_aro_order,
    open_aro_relation,
    open_sugarcrepe,
)
from amclr_scale.evaluation.suites.files import content, locate, of_model, stamp
from amclr_scale.evaluation.suites.folders import check_folder, open_classes, open_retrieval
from amclr_scale.evaluation.suites.opened import Opened, Place, reading_for
from amclr_scale.evaluation.suites.summary import markdown, summary
from amclr_scale.evaluation.suites.winogavil import open_winogavil
from amclr_scale.evaluation.suites.winoground import open_winoground

# Goes up when a suite's numbers of the same model and data change, or their errors and intervals: with 2 those of means
# per class and of ARO's macro accuracies did.
MEASURE = 2
KINDS: dict[str, Callable[[Place], Opened]] = {
    "classes": open_classes,
    "retrieval": open_retrieval,
    "sugarcrepe": open_sugarcrepe,
    "aro_relation": open_aro_relation,
    "aro_attribution": open_aro_attribution,
    "aro_order": open_aro_order,
    "winoground": open_winoground,
    "winogavil": open_winogavil,
}
# What a suite says itself: its numbers would not be the papers' with other values.
FIXED = ("splits", "classes", "class_names", "templates", "caption", "probes", "evaluators", "geometry", "momentum")


@dataclass(frozen=True)
class Measured:
    """One model on its way through the suites.

    Attributes:
        name: of the model, in tables.
        reading: how it reads pictures and captions, where it is not as `config` says.
        digest: of the model and the settings.
        precision: what it computes in.
        folder: where results are kept.
    """

    name: str
    model: nn.Module
    config: Config
    reading: Reading | None
    digest: str
    precision: str
    folder: Path
    speaks: bool = True


def prepared(
    name: str, model: nn.Module, config: Config, reading: Reading | None, precision: str, folder: Path
) -> Measured:
    """A model ready for suites. All ranks call it together.

    Args:
        name, model, config, reading, precision, folder: see `Measured`.
    """
    options = config.evaluation
    how = reading_for(config.data, options, reading)
    digest = of_model(model, how, [MEASURE, precision, options.resize, options.clean_captions, options.resamples])
    return Measured(name, model, config, reading, digest, precision, folder, rank() == 0)


def check(suite: Suite, data: Path) -> dict[str, str]:
    """Data set -> its place below a folder, of those that are there; mistakes are found before anything is measured.

    Raises:
        UserError: there are none, or a folder is not whole.
    """
    found = locate(suite, data)
    for name, place in found.items():
        one = suite.find(name)
        if one.kind in ("classes", "retrieval") and (data / place).is_dir():
            check_folder(one.name, data / place, classes=one.kind == "classes")
        elif one.kind == "classes":
            raise UserError(f"--data: {one.name}: expected a folder of CLIP_benchmark, got the file {data / place}")
    return found


def measure_suite(suite: Suite, data: Path, on: Measured) -> dict[str, Any]:
    """Every data set of a suite that a folder has. All ranks call it together.

    Args:
        data: the folder that holds the data sets.

    Returns:
        Data set -> what its file holds.

    Raises:
        UserError: a data set cannot be used; those before it are kept.
    """
    found = check(suite, data)
    results = {}
    for name, place in found.items():
        results[name] = _measure(suite.find(name), suite.name, data, place, on)
    return results


def measured_table(suite: Suite, data: Path, on: Measured) -> dict[str, Any]:
    """What `SUITE.json` holds, measured and written. All ranks call it together.

    Args:
        data: the folder that holds the data sets.

    Raises:
        UserError: as `measure_suite`.
    """
    results = measure_suite(suite, data, on)
    about = {
        "model": on.name, "precision": on.precision, "resize": on.config.evaluation.resize,
        "clean_captions": on.config.evaluation.clean_captions, "model_sha256": on.digest,
        "data_sha256": digest_of(results),
    }  # fmt: skip
    found = summary(suite, results, about)
    if on.speaks:
        write_whole(on.folder / f"{suite.name}.json", json.dumps(found, indent=1) + "\n")
        write_whole(on.folder / f"{suite.name}.md", markdown({on.name: found}))
    return found


def file_of(folder: Path, suite: str, name: str) -> Path:
    """Where a finished data set is kept."""
    return folder / suite / f"{name.replace('/', '-')}.json"


def _measure(one: DataSet, suite: str, data: Path, place: str, on: Measured) -> dict[str, Any]:
    file = file_of(on.folder, suite, one.name)
    options = on.config.evaluation
    opened = KINDS[one.kind](Place(one, data / place, data, on.config.data, options, on.reading, rank(), world_size()))
    kept = broadcast_object(_read(file) if on.speaks else None) or {}
    touched = broadcast_object(stamp(opened.files) if on.speaks else None)
    digest = kept["data_sha256"] if kept.get("stamp") == touched else content(opened.files)
    if kept.get("model_sha256") == on.digest and kept.get("data_sha256") == digest:
        kept["stamp"] = touched
        if on.speaks:
            write_whole(file, json.dumps(kept, indent=1) + "\n")
            print(f"{on.name}: {one.title}: measured before, {_words(kept)}", flush=True)
        return kept
    begin = time.perf_counter()
    with EvaluationProgress(f"{on.name} {one.name}", opened.encoded, speaks=on.speaks) as progress:
        numbers, plain = opened.measure(progress.watch(on.model))
    flat = flatten(one.name, numbers, plain, options.resamples)
    flat = {key.removeprefix(f"{one.name}/"): value for key, value in flat.items()}
    if one.number not in flat:
        raise UserError(
            f"--data: {one.name}: expected what gives {one.words}, which this data set counts with, got only "
            f"{', '.join(name for name in flat if '/' not in name)}"
        )
    result = {
        "suite": suite, "set": one.name, "title": one.title, "number": one.number, "words": one.words,
        "value": flat[one.number], "items": opened.items, "place": place, "numbers": flat, "prompts": opened.words,
        "model_sha256": on.digest, "data_sha256": digest, "stamp": touched,
    }  # fmt: skip
    if on.speaks:
        write_whole(file, json.dumps(result, indent=1) + "\n")
        print(f"{on.name}: {one.title}: {_words(result)}, {time.perf_counter() - begin:.1f} s", flush=True)
    return result


def _words(result: Mapping[str, Any]) -> str:
    return f"{100 * result['value']:.1f} % {result['words']}"


def _read(file: Path) -> dict[str, Any] | None:
    """What a file holds; None where there is none, or one of something else."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"model_sha256", "data_sha256", "numbers"} <= set(found) else None


def write_whole(file: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all, whenever the process is killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(text, "utf-8")
    beside.replace(file)


def digest_of(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest of all data that a suite was measured on."""
    found = sorted((name, one["data_sha256"]) for name, one in results.items())
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
