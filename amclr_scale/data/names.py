"""What data sets are called in results, cards and plots: as a recipe names them, or as their folders are called."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from amclr_scale.config.schema import Evaluation, Probe
from amclr_scale.data.formats.shards import shard_suffixes
from amclr_scale.data.sources import INDEX_NAMES, Given, embedded_splits, paths_of
from amclr_scale.errors import UserError


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Path -> the last part that tells it from the others: its folder's name, a file's without its ending.

    /data/flickr30k -> flickr30k; /data/coco/{000..331}.tar -> coco; dataset_coco.json#val -> dataset_coco#val; of
    /data/imagenet/val and /data/places/val the parents belong to the names, of shards of one folder the files:
    cc3m/000..100, cc3m/101..331. No name is a whole path, or holds a key to the data that an address may have.
    """
    parts = {path: _parts(path) for path in dict.fromkeys(paths)}
    taken = dict.fromkeys(parts, 1)
    folders = Counter(map(tuple, parts.values()))
    for path, words in parts.items():
        if folders[tuple(words)] > 1 and (file := _file(path)) != words[-1]:
            parts[path], taken[path] = [*words, file], 2

    def name(path: str) -> str:
        return "/".join(parts[path][-taken[path] :])

    while True:
        counts = Counter(map(name, parts))
        same = [path for path in parts if counts[name(path)] > 1 and taken[path] < len(parts[path])]
        if not same:
            break
        for path in same:
            taken[path] += 1
    found, seen = dict[str, str](), Counter[str]()
    for path in parts:
        seen[name(path)] += 1
        found[path] = name(path) if counts[name(path)] == 1 else f"{name(path)} ({seen[name(path)]})"
    return found


def _file(path: str) -> str:
    """The last part of a path, without the ending of shards or the braces of a pattern."""
    last = re.split(r"[/\\]+", path.partition("?")[0].rstrip("/\\"))[-1]
    ending = next((one for one in shard_suffixes() if last.endswith(one)), "")
    return re.sub(r"[{}]", "", last.removesuffix(ending))


def _parts(path: str) -> list[str]:
    """The parts of a path that may be a name."""
    if path in embedded_splits():
        return [path]
    place, mark, part = path.partition("#")
    words = re.split(r"[/\\]+", re.sub(r"^(pipe:|[a-z0-9]+:/+([^/]*@)?)", "", place.partition("?")[0]).rstrip("/\\"))
    last = words[-1]
    if len(words) > 1 and (last.endswith(shard_suffixes()) or last in INDEX_NAMES):
        words.pop()
    words = [word for word in words if word not in ("", ".", "..", "~")] or [path]
    words[-1] = words[-1].removesuffix(".jsonl").removesuffix(".json") + mark + part
    return words


def known_as(given: Given) -> dict[str, str | None]:
    """Name -> path of what a recipe gives with names or without; None: the path is not known here."""
    if isinstance(given, Mapping):
        return dict(given)
    return {name: path for path, name in short_names([given] if isinstance(given, str) else given).items()}


def split_names(evaluation: Evaluation) -> dict[str, str]:
    """Name -> path of every split to evaluate.

    Raises:
        UserError: a split is listed twice, or of some only the names are known.
    """
    key, splits = "evaluation.splits", evaluation.splits
    paths = paths_of(splits, key)
    if isinstance(splits, Mapping):
        return dict(zip(splits, paths, strict=True))
    twice = next((path for path, count in Counter(splits).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{key}: expected every split once, got {twice} twice")
    return {name: path for path, name in short_names(splits).items()}


def probe_splits(probe: Probe, evaluation: Evaluation) -> list[tuple[str, str | None]]:
    """Name and path of a probe's `train` and `test`: names of their own, those of evaluation.splits, or short ones."""
    called = {path: name for name, path in known_as(evaluation.splits).items() if path is not None}
    every = [one for each in evaluation.probes for one in (each.test, each.train) if isinstance(one, str)]
    called = short_names([path for path in every if path not in called]) | called
    return [
        next(iter(one.items())) if isinstance(one, Mapping) else (called[one], one) for one in (probe.train, probe.test)
    ]


def probe_name(probe: Probe, evaluation: Evaluation) -> str:
    """What a probe's numbers are called: `val_style from train, json.group`."""
    (train, _), (test, _) = probe_splits(probe, evaluation)
    where = f", {probe.classes}" if probe.classes else ""
    return f"{test} from {train}{where}"
