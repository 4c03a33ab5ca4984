"""What the numbers of an evaluation are: their words, unit and direction. Imports no torch.

A number is called `emoji/val_style/image_to_text_R@1`: a split, a row, a column. Groups of numbers share their rows;
what a column means stands once, here, and tables, curves, studies and model cards ask. A new number of a ranking is an
entry in `scores` of its group that says what it makes of ranks; a new evaluator brings a group of its own
(evaluation/evaluators.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

Unit = Literal["points", "ranks", ""]  # points: a share of one, written in percent, its differences in points


@dataclass(frozen=True)
class Score:
    """One column.

    Attributes:
        label: its heading.
        unit: of the number.
        lower_is_better: a smaller number is the better one.
        within: the share of ranks that are at most so high; None: something else.
        of: ranks (n,) int64, 1 = first -> one value per item, of which the mean is taken; None: measured elsewhere.
        drawn: in the learning curve of a run.
    """

    label: str
    unit: Unit = "points"
    lower_is_better: bool = False
    within: int | None = None
    of: Callable[[Any], Any] | None = None
    drawn: bool = False

    def values(self, ranks: Any) -> Any:
        """One value per item, (n,) float64."""
        return ranks <= self.within if self.of is None else self.of(ranks)

    @property
    def ranked(self) -> bool:
        """Whether it is a mean over ranks."""
        return self.within is not None or self.of is not None


@dataclass(frozen=True)
class Group:
    """Numbers that are shown together.

    Attributes:
        heading: above their table.
        rows: what a number's name begins with -> words; "": the column alone is the name.
        scores: the rest of a number's name, or a pattern such as * -> what it is.
        table: show them as one; False: in a line.
        row_first: in words, such as zero-shot top 1; else R@1 image to text.
    """

    heading: str
    rows: Mapping[str, str]
    scores: dict[str, Score] = field(default_factory=dict)
    table: bool = True
    row_first: bool = False

    def find(self, name: str) -> tuple[str, Score] | None:
        """The row and the score of a number's name; None: it is none of these."""
        for row in sorted(self.rows, key=len, reverse=True):
            column = name.removeprefix(f"{row}_") if row else name
            if row and column == name:
                continue
            for pattern, score in self.scores.items():
                if fnmatchcase(column, pattern):
                    return row, score
        return None


RETRIEVAL = Group(
    "retrieval",
    {
        "image_to_text": "image to text",
        "text_to_image": "text to image",
        "text_to_image_filtered": "text to image, filtered",
        "": "",
    },
    {
        "R@1": Score("R@1", within=1, drawn=True),
        "R@5": Score("R@5", within=5),
        "R@10": Score("R@10", within=10),
        "R@mean": Score("mean"),
        "median_rank": Score("median rank", "ranks", lower_is_better=True),
    },
)
TOKENS = Group(
    "retrieval by tokens",
    {
        f"token_{row}" if row else "token": f"{words}, by tokens" if words else ""
        for row, words in RETRIEVAL.rows.items()
    },
    RETRIEVAL.scores,
)
CLASSIFICATION = Group(
    "classification",
    {
        "zero_shot": "zero-shot",
        "probe": "linear",
        "knn": "kNN",
        "probe_tower": "linear, before head",
        "knn_tower": "kNN, before head",
    },
    {
        "top1": Score("top 1", within=1, drawn=True),
        "top3": Score("top 3", within=3),
        "top5": Score("top 5", within=5),
        "top10": Score("top 10", within=10),
        "mean_per_class": Score("mean per class"),
    },
    row_first=True,
)
COMPOSITION = Group("composition", {"composition": "composition"}, {"*": Score("right")}, table=False)
GEOMETRY = Group(
    "geometry",
    {"": ""},
    {
        "alignment": Score("alignment", "", lower_is_better=True),
        "*_uniformity": Score("uniformity", "", lower_is_better=True),
        "modality_gap": Score("modality gap", ""),
        "*_diversity": Score("diversity", ""),
        "*_effective_rank": Score("effective rank", ""),
        "image_tolerance": Score("tolerance", ""),
    },
    table=False,
)
SUITES = Group("suites of papers", {"suite": ""}, {"*": Score("mean of data sets")}, table=False)
GROUPS = [RETRIEVAL, TOKENS, CLASSIFICATION, COMPOSITION, GEOMETRY, SUITES]


def describe(key: str) -> tuple[Group, str, Score] | None:
    """The group, row and score of a number, with or without its split before it; None: nothing is known of it."""
    name = key.rpartition("/")[2]
    found = ((group, *where) for group in GROUPS if (where := group.find(name)))
    return next(found, None)


def score_of(key: str) -> Score | None:
    """What a number is; None: nothing is known of it."""
    found = describe(key)
    return found[2] if found else None


def is_share(key: str, results: Mapping[str, Any] | None = None) -> bool:
    """Whether a number is written in percent: as it is described, or else where it has a standard error.

    Args:
        results: that it is among; None: it has a standard error.
    """
    score = score_of(key)
    return score.unit == "points" if score else results is None or f"{key}/stderr" in results


def lower_is_better(key: str) -> bool:
    """Whether a smaller number is the better one."""
    score = score_of(key)
    return score is not None and score.lower_is_better


def words_of(key: str) -> str:
    """A number in words, such as `R@1 image to text`; its name where it is not described, or its row has no words."""
    name = key.rpartition("/")[2]
    found = describe(name)
    if found is None or not found[0].rows[found[1]]:
        return name.replace("_", " ")
    group, row, score = found
    words = (group.rows[row], score.label) if group.row_first else (score.label, group.rows[row])
    return " ".join(words)
