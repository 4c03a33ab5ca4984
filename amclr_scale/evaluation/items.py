"""What was measured on every item, in a file: two models can then be compared item by item long after they ran.

One safetensors file; number `emoji/val_style/image_to_text_R@1` of p parts has the float64 tensors

    emoji/val_style/image_to_text_R@1/0/sums       (C,)
    emoji/val_style/image_to_text_R@1/0/weights    (C,)     ... and /1/ ... /p-1/

and chance levels are in the file's metadata, beside the format. 16 bytes per item, number and part.

What an item of a number holds can change with a version while the number's name, value and weights do not, and two
models would then be compared by different items. So files say their format, and a number that was made otherwise in an
older one is refused, by name; the rest of that file is as good as ever.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import safe_open

from amclr_scale.disk import save_tensors
from amclr_scale.errors import UserError
from amclr_scale.evaluation.numbers import Number, Part

FILE = "evaluation_items.safetensors"
FORMAT = 2  # goes up when items of a number hold something else than before; CHANGED then says which
# Format -> ends of the names of numbers whose items are others since then.
# 2: means per class have distances from the class's mean, in place of hits (`numbers.mean_of_groups`). Files of
# format 1 say none.
CHANGED = {2: ("_mean_per_class",)}


def save_items(path: Path, numbers: Mapping[str, Mapping[str, Number]]) -> None:
    """Write what an `Evaluator` measured.

    Args:
        path: the file.
        numbers: by split, by name: `Evaluator.numbers`.
    """
    flat = {f"{split}/{name}": one for split, found in numbers.items() for name, one in found.items()}
    tensors = {
        f"{name}/{index}/{kind}": getattr(part, kind).contiguous().clone()
        for name, one in flat.items()
        for index, part in enumerate(one.parts)
        for kind in ("sums", "weights")
    }
    about = {name: [len(one.parts), one.chance] for name, one in flat.items()}
    beside = path.with_name(path.name + ".new")
    save_tensors(tensors, beside, metadata={"format": str(FORMAT), "numbers": json.dumps(about)})
    beside.replace(path)


def load_items(path: Path, names: Collection[str] | None = None) -> dict[str, Number]:
    """Read them back: `split/name` -> number.

    Args:
        path: the file.
        names: only these, as far as they are there; None: all.

    Raises:
        UserError: the file is missing, or not one of these; it is of a newer format, or holds one of the numbers in an
            older form that does not compare with today's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            written = int(metadata.get("format", 1))
            about = json.loads(metadata["numbers"])
            wanted = {name: one for name, one in about.items() if names is None or name in names}
            _check_format(path, written, wanted)
            return {
                name: Number(
                    tuple(
                        Part(file.get_tensor(f"{name}/{i}/sums"), file.get_tensor(f"{name}/{i}/weights"))
                        for i in range(parts)
                    ),
                    chance,
                )
                for name, (parts, chance) in wanted.items()
            }
    except UserError:
        raise
    except Exception as error:  # safetensors raises an error of its own kind
        raise UserError(f"{path}: expected a file of evaluated items ({FILE}), got: {error}") from error


def _check_format(path: Path, written: int, names: Collection[str]) -> None:
    """Raise `UserError` where numbers of a file would be compared with others than they are."""
    if written > FORMAT:
        raise UserError(
            f"{path}: expected items of format {FORMAT} or older, got {written}; read it with the version that wrote it"
        )
    ends = tuple(end for since, changed in CHANGED.items() if since > written for end in changed)
    if old := [name for name in names if name.endswith(ends)]:
        raise UserError(
            f"{path}: expected items of format {FORMAT}, got {written}, in which {', '.join(old)} has another form "
            "that does not compare with today's; evaluate the run again: remove its evaluation.json and start it, or "
            "its study, as before (with resume=auto), and it measures its last checkpoint"
        )
