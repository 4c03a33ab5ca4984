"""What data sets are called in results, cards and plots: as a recipe names them, or as their folders are called."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from amclr_scale.config.schema import Evaluation, Probe
from amclr_scale.data.formats.shards import shard_suffixes
from amclr_scale.data.sources import embedded_splits
from amclr_scale.errors import UserError


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Path -> the last part that tells it from the others: its folder's name, a file's without its ending.

    /data/flickr30k -> flickr30k; /data/coco/{000..331}.tar -> coco; dataset_coco.json#val -> dataset_coco#val; of
    /data/imagenet/val and /data/places/val the parents belong to the names.
    """
    parts = {path: _parts(path) for path in dict.fromkeys(paths)}
    taken = dict.fromkeys(parts, 1)

    def name(path: str) -> str:
        return "/".join(parts[path][-taken[path] :])

    while True:
        counts = Counter(map(name, parts))
        same = [path for path in parts if counts[name(path)] > 1 and taken[path] < len(parts[path])]
        if not same:
            break
        for path in same:
            taken[path] += 1
    found = {path: name(path) for path in parts}
    return {path: path if counts[one] > 1 else one for path, one in found.items()}  # told apart by their whole paths


def _parts(path: str) -> list[str]:
    """The parts of a path that may be a name."""
    if path in embedded_splits():
        return [path]
    place, mark, part = path.partition("#")
    words = re.split(r"[/\\]+", re.sub(r"^(pipe:|[a-z0-9]+:/+)", "", place.partition("?")[0]).rstrip("/\\"))
    last = words[-1]
    if len(words) > 1 and (last.endswith(shard_suffixes()) or last == "index.json"):
        words.pop()
    words = [word for word in words if word not in ("", ".", "..", "~")] or [path]
    words[-1] = words[-1].removesuffix(".jsonl").removesuffix(".json") + mark + part
    return words


def split_names(evaluation: Evaluation) -> dict[str, str]:
    """Name -> path of every split to evaluate.

    Raises:
        UserError: a split is listed twice.
    """
    splits = evaluation.splits
    if isinstance(splits, Mapping):
        return dict(splits)
    twice = next((path for path, count in Counter(splits).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"evaluation.splits: expected every split once, got {twice} twice")
    return {name: path for path, name in short_names(splits).items()}


def probe_name(probe: Probe, evaluation: Evaluation) -> str:
    """What a probe's numbers are called: `val_style from train, json.group`."""
    paths = {path: name for name, path in split_names(evaluation).items()}
    every = [path for one in evaluation.probes for path in (one.test, one.train)]
    names = short_names([path for path in every if path not in paths]) | paths
    where = f", {probe.classes}" if probe.classes else ""
    return f"{names[probe.test]} from {names[probe.train]}{where}"
