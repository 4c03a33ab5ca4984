"""Sheets at the end of a run: each split has a file of its own, and a run without any says so."""

from types import SimpleNamespace

import pytest
from PIL import Image

from amclr_scale.commands.train import conclude
from amclr_scale.evaluation import items
from amclr_scale.evaluation.sheet import NOTHING, file_names
from amclr_scale.metrics import curve
from amclr_scale.trained import weights


def test_names_of_splits_that_are_nearly_alike_have_files_of_their_own():
    assert file_names(["a/b", "a_b", "c", "a/b_2", "a_b_2"]) == {
        "a/b": "sheet_a_b.png", "a_b": "sheet_a_b_2.png", "c": "sheet_c.png", "a/b_2": "sheet_a_b_2_2.png",
        "a_b_2": "sheet_a_b_2_3.png",
    }  # fmt: skip


@pytest.mark.parametrize(("rows", "names"), [(2, ["a/b", "a_b"]), (2, []), (0, [])])
def test_a_run_draws_every_sheet_or_says_that_there_is_none(tmp_path, monkeypatch, rows, names):
    monkeypatch.setattr(weights, "save_weights", lambda *_, **__: None)
    monkeypatch.setattr(items, "save_items", lambda *_: None)
    monkeypatch.setattr(curve, "draw_if_possible", lambda _: (None, "no curve"))
    said, shown = [], []
    evaluator = SimpleNamespace(
        sheets=lambda _, rows: {name: Image.new("RGB", (8 + k, 8)) for k, name in enumerate(names)},
        numbers={}, table=lambda _: "table",
    )  # fmt: skip
    job = SimpleNamespace(
        folder=tmp_path, evaluator=evaluator, speaks=True, suites=SimpleNamespace(suites={}),
        log=SimpleNamespace(say=said.append, picture=lambda name, path: shown.append((name, path.name))),
        trainer=SimpleNamespace(model=None, objective=None, engine=None, teacher=None),
        config=SimpleNamespace(
            evaluation=SimpleNamespace(sheet=rows), execution=SimpleNamespace(precision="fp32")
        ),
    )  # fmt: skip
    conclude(job, {})
    assert shown == [(f"sheet/{name}", file) for name, file in file_names(names).items()]
    assert [Image.open(tmp_path / file).size[0] for _, file in shown] == list(range(8, 8 + len(names)))
    found = [f"captions found and missed on {name} {tmp_path / file}" for name, file in file_names(names).items()]
    assert [words for words in said if "missed" in words] == found
    assert (NOTHING in said) is (rows > 0 and not names)
