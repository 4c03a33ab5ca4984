"""A format of evaluation data of one's own: a list `PICTURE | CAPTION | CLASS`, beside the pictures."""

from amclr_scale.evaluation.image_files import Item
from amclr_scale.evaluation.splits import SPLIT_FORMATS, Opened


def listed(named):
    if named.path.suffix != ".list":
        return None
    rows = [line.split(" | ") for line in named.path.read_text("utf-8").splitlines()]
    split = named.of_files([Item(named.path.parent / name, [caption], kind) for name, caption, kind in rows])
    return Opened(split, retrieval=True, class_names=sorted({kind for *_, kind in rows}), templates=["a patch of {}"])


SPLIT_FORMATS["list"] = listed
