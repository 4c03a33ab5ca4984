"""What was measured on every item, in a file: two models can then be compared item by item long after they ran.

One safetensors file; number `emoji/val_style/image_to_text_R@1` of p parts has the float64 tensors

    emoji/val_style/image_to_text_R@1/0/sums       (C,)
    emoji/val_style/image_to_text_R@1/0/weights    (C,)     ... and /1/ ... /p-1/

and chance levels are in the file's metadata. 16 bytes per item, number and part.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from amclr_scale.disk import save_tensors
from amclr_scale.errors import UserError
from amclr_scale.evaluation.numbers import Number, Part

FILE = "evaluation_items.safetensors"


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
    save_tensors(tensors, beside, metadata={"numbers": json.dumps(about)})
    beside.replace(path)


def load_items(path: Path) -> dict[str, Number]:
    """Read them back: `split/name` -> number.

    Raises:
        UserError: the file is missing, or not one of these.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["numbers"])
            return {
                name: Number(
                    tuple(
                        Part(file.get_tensor(f"{name}/{i}/sums"), file.get_tensor(f"{name}/{i}/weights"))
                        for i in range(parts)
                    ),
                    chance,
                )
                for name, (parts, chance) in about.items()
            }
    except Exception as error:  # safetensors raises an error of its own kind
        raise UserError(f"{path}: expected a file of evaluated items ({FILE}), got: {error}") from error
