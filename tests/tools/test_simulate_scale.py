"""A job past what fits here, simulated at a small size: every row is there, and its counts are those of the package."""

from pathlib import Path

import pytest

from tools.scale import simulate as tool
from tools.scale.data import SMALL
from tools.scale.simulate import MARKS, PAGE, SMALL_WORDS, simulate, table


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(tool, "in_own_process", lambda function, *arguments: function(*arguments))
    found = simulate(SMALL, SMALL_WORDS, Path(tmp_path_factory.mktemp("scale")), mib=1)
    patch.undo()
    return found


def test_counts(rows):
    found = {row.what: (row.few, row.many) for row in rows}
    assert found["shards that a rank's first batch opens"] == ("16", "4")  # its lanes' windows
    assert found["shards that a later batch opens"] == ("0", "0")
    mean = [f"{SMALL.batch // ranks}, " for ranks in SMALL.ranks]
    held = found["rows of a real batch that one rank holds: mean, most"]
    assert [words.startswith(m) for words, m in zip(held, mean, strict=True)] == [True, True]
    state = 2 * 4 * SMALL.num_samples  # SogCLR's two columns
    assert found["per-sample state of a rank (SogCLR)"] == tuple(f"{state // n // 1000} kB" for n in SMALL.ranks)
    inside, outside = zip(*(found["a step's bytes, gradients: a rank's NVLink, its network card"][k].split(", ")
                            for k in (0, 1)), strict=True)  # fmt: skip
    assert outside[0] == "0 B" != outside[1]  # four ranks are one node
    assert "0 B" not in inside


def test_each_row_says_how_it_is_known(rows):
    assert {row.how.partition(":")[0].split()[0].rstrip(",") for row in rows} == {"run", "simulated", "computed"}


def test_the_page_has_these_rows(rows):
    text = PAGE.read_text("utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0].strip().splitlines()
    assert [line.split(" | ")[0] for line in text[2:]] == [row.line().split(" | ")[0] for row in rows]
    assert len(table(SMALL, rows).splitlines()) == len(text)
