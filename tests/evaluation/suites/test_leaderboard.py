"""`amclr-scale leaderboard RUNS`: one row for each model, sorted, and what does not compare is said."""

import csv
import json
from pathlib import Path

import pytest
import yaml

from amclr_scale.commands.leaderboard import main
from amclr_scale.evaluation.suites.catalogue import suite
from amclr_scale.evaluation.suites.leaderboard import leaderboard, read_rows
from amclr_scale.evaluation.suites.summary import summary


def sets(scores: dict[str, float], *, data: str = "d") -> dict[str, dict[str, object]]:
    """Results of data sets as they are kept, each with one number."""
    retrieval, found = suite("retrieval"), {}
    for name, value in scores.items():
        both = {f"{way}_R@{k}": value for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
        digest = f"{data} {name}"
        found[name] = {"value": value, "numbers": both | {"mean_R@1": value}, "items": 9, "data_sha256": digest}
        assert retrieval.find(name)
    return found


def write_results(folder: Path, name: str, results: dict[str, dict[str, object]], **about: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = {"model": folder.name, "precision": "fp32", "resize": "crop", "clean_captions": False} | about
    (folder / f"{name}.json").write_text(json.dumps(summary(suite(name), results, about)))


def run(root: Path, name: str, arm: str, batch: int, samples: int, own: float) -> Path:
    """A run's folder: what trained it, how far it came, and what it measured by itself."""
    folder = root / name
    folder.mkdir()
    config = {"objective": {"name": arm}, "train": {"global_batch_size": batch}, "evaluation": {"resize": "crop"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records = [{"step": step, "samples": step * samples // 4} for step in range(1, 5)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"step": 5, "sam')
    (folder / "evaluation.json").write_text(
        json.dumps({"photos/R@mean": own, "photos/images": 100, "photos/texts": 200})
    )
    return folder


@pytest.fixture
def runs(tmp_path) -> list[str]:
    a, b, c = (
        run(tmp_path, "a", "clip", 64, 4000, 0.3), run(tmp_path, "b", "sogclr", 128, 8000, 0.4),
        run(tmp_path, "c", "isogclr", 256, 2000, 0.2),
    )  # fmt: skip
    write_results(a / "evaluation", "retrieval", sets({"flickr30k": 0.5, "mscoco_captions": 0.3, "flickr8k": 0.1}))
    write_results(b / "evaluation", "retrieval", sets({"flickr30k": 0.7, "mscoco_captions": 0.2}))
    write_results(b / "evaluation" / "step_00000002", "retrieval", sets({"flickr30k": 0.6}))
    return [str(one) for one in (a, b, c)]


def told(capsys, *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_rows_say_what_trained_them_and_how_far(runs):
    rows = {row.name: row for row in read_rows(runs)}
    assert {name: (row.arm, row.batch, row.samples) for name, row in rows.items()} == {
        "a": ("clip", 64, 4000), "b": ("sogclr", 128, 8000), "b/step_00000002": ("sogclr", 128, 4000),
        "c": ("isogclr", 256, 2000),
    }  # fmt: skip
    assert rows["a"].entries["photos: R@mean"].value == 0.3
    assert rows["b/step_00000002"].entries["retrieval: Flickr IR R@5"].value == 0.6
    assert "retrieval: Flickr8k TR R@1" not in rows["b"].entries


def test_a_table_sorted_by_a_column(runs, capsys, tmp_path):
    board = leaderboard(read_rows(runs), "flickr ir r@10")
    assert board.sorted_by == "retrieval: Flickr IR R@10"
    assert [row.name for row in board.rows] == ["b", "b/step_00000002", "a", "c"]
    assert [row.name for row in leaderboard(read_rows(runs), "samples").rows] == ["c", "a", "b/step_00000002", "b"]
    said = told(capsys, *runs, "--sort", "Flickr TR R@1")
    lines = [line.split() for line in said.splitlines()]  # sixteen columns do not fit: they are rows
    assert ["b", "b/step_00000002", "a", "c"] in lines
    assert ["arm", "sogclr", "sogclr", "clip", "isogclr"] in lines
    assert ["samples", "8,000", "4,000", "4,000", "2,000"] in lines
    assert ["retrieval:", "Flickr", "TR", "R@1", "70.0", "60.0", "50.0", "-"] in lines
    assert "sorted by retrieval: Flickr TR R@1; in percent" in said
    assert "not comparable" not in said
    written = told(capsys, *runs, "--format", "csv", "--output", str(tmp_path / "runs.csv"), "--sort", "R@mean")
    assert written == f"{tmp_path / 'runs.csv'}: csv\n"
    table = list(csv.DictReader((tmp_path / "runs.csv").read_text().splitlines()))
    assert [(row["name"], row["photos: R@mean"]) for row in table][:3] == [("b", "0.4"), ("a", "0.3"), ("c", "0.2")]
    assert table[3]["photos: R@mean"] == ""


def test_what_does_not_compare_is_said(runs, capsys):
    c = Path(runs[2])
    write_results(c / "evaluation", "retrieval", sets({"flickr30k": 0.9}, data="other"), resize="squash")
    (c / "evaluation.json").write_text(json.dumps({"photos/R@mean": 0.9, "photos/images": 50, "photos/texts": 200}))
    found = json.loads(told(capsys, *runs, "--format", "json"))
    assert found["not_comparable"]["photos: R@mean"] == "the number of images (c against a)"
    assert found["not_comparable"]["retrieval: Flickr TR R@1"] == (
        "the data of flickr30k (c against a), resize (c against a)"
    )
    assert "retrieval: MSCOCO TR R@1" not in found["not_comparable"]
    assert found["rows"][-1]["numbers"]["photos: R@mean"] == {"value": 0.9, "over": "all"}
    markdown = told(capsys, *runs, "--format", "markdown", "--suite", "retrieval")
    assert "| retrieval: Flickr TR R@1\\* | " in markdown
    assert "photos" not in markdown
    assert (
        "- not comparable\\* retrieval: Flickr TR R@1: the rows differ in the data of flickr30k (c against a)"
        in markdown
    )


def test_means_over_a_part_say_so_and_do_not_compare(tmp_path, capsys):
    for name, there in {"one": {"swap_obj": 0.5, "swap_att": 0.7}, "two": {"swap_obj": 0.6}}.items():
        results = {
            key: {"value": v, "numbers": {"right": v}, "items": 4, "data_sha256": key} for key, v in there.items()
        }
        write_results(tmp_path / name, "sugarcrepe", results)
    said = told(capsys, str(tmp_path / "one"), str(tmp_path / "two"))
    assert [line.split()[0] for line in said.splitlines() if line.startswith(("  one", "  two"))] == ["one", "two"]
    assert " 60.0 (2 of 7)" in said
    assert " 60.0 (1 of 7)" in said
    expected = "sugarcrepe: Mean over 7: the rows differ in the data sets it is taken over (two against one)"
    assert f"not comparable* {expected}" in said
    assert "sugarcrepe: Swap object:" not in said
    table = list(
        csv.DictReader(told(capsys, str(tmp_path / "one"), str(tmp_path / "two"), "--format", "csv").splitlines())
    )
    assert [row["sugarcrepe: Mean over 7: over"] for row in table] == ["2 of 7", "1 of 7"]


def test_mistakes_are_told(runs, tmp_path, capsys):
    def said(*words: str) -> str:
        assert main(list(words)) == 2
        return capsys.readouterr().err

    (tmp_path / "void").mkdir()
    assert "RUNS: expected folders with results, got " in said(str(tmp_path / "void"))
    assert "RUNS: expected folders with results of aro, got " in said(*runs, "--suite", "aro")
    assert "amclr-scale evaluate" in said(str(tmp_path / "void"))
    assert said(str(gone := tmp_path / "gone")).strip().endswith(f"got {gone}, which does not exist")
    assert "--sort: expected one of arm; batch; samples; photos: R@mean; " in said(*runs, "--sort", "height")
    assert "which several end in: retrieval: Flickr TR R@1; " in said(*runs, "--sort", "TR R@1")
    assert "RUNS: expected every run once, with a name of its own, got a twice" in said(*runs, runs[0])
    assert "--output: expected a file in a folder that exists" in said(*runs, "--output", str(tmp_path / "no" / "x"))
    (Path(runs[0]) / "evaluation" / "retrieval.json").write_text("{cut")
    assert "retrieval.json: expected JSON, got " in said(*runs)


def edited(file: Path, change) -> str:
    """A file of results after somebody's hands were in it; its name."""
    read, write = (yaml.safe_load, yaml.safe_dump) if file.suffix == ".yaml" else (json.loads, json.dumps)
    content = read(file.read_text())
    change(content)
    file.write_text(write(content))
    return str(file)


FORGED = {
    "no columns": lambda found: found.pop("columns"),
    "no sets": lambda found: found.pop("sets"),
    "a column is a number": lambda found: found["columns"].update({"Flickr TR R@1": 0.5}),
    "columns are a list": lambda found: found.update(columns=[1]),
    "no value": lambda found: found["columns"]["Flickr TR R@1"].pop("value"),
    "text for a number": lambda found: found["columns"]["Flickr TR R@1"].update(value="0.5"),
    "a list for a number": lambda found: found["columns"]["Flickr TR R@1"].update(value=[0.5]),
    "not a number": lambda found: found["columns"]["Flickr TR R@1"].update(value=float("nan")),
    "no over": lambda found: found["columns"]["Flickr TR R@1"].pop("over"),
    "missing is a word": lambda found: found["columns"]["Flickr TR R@1"].update(missing="some"),
    "over holds what cannot be sorted": lambda found: found["columns"]["Flickr TR R@1"].update(over=[["x"]]),
    "a set of another name": lambda found: found["sets"].pop("flickr30k"),
    "a set without its data": lambda found: found["sets"]["flickr30k"].pop("data_sha256"),
}


@pytest.mark.parametrize("how", FORGED)
def test_forged_results_of_a_suite_are_told_with_their_file(runs, capsys, how):
    file = edited(Path(runs[0]) / "evaluation" / "retrieval.json", FORGED[how])
    assert main([*runs, "--sort", "samples"]) == 2
    expected = f"RUNS: {file}: expected what `amclr-scale evaluate --suite retrieval` writes, got "
    assert expected in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("name", "change", "got"),
    [
        ("evaluation.json", lambda found: found.update({"photos/R@mean": "0.3"}), "photos/R@mean: '0.3'"),
        ("evaluation.json", lambda found: found.update({"photos/R@mean": {}}), "photos/R@mean: {}"),
        ("config.yaml", lambda found: found["train"].update(global_batch_size="64"), "train.global_batch_size: '64'"),
        ("config.yaml", lambda found: found["objective"].update(name=["clip"]), "objective.name: ['clip']"),
    ],
)
def test_forged_files_of_a_run_are_told_with_their_name(runs, capsys, name, change, got):
    file = edited(Path(runs[0]) / name, change)
    assert main([*runs, "--sort", "samples"]) == 2
    assert f"RUNS: {file}: expected what a run writes, got {got}; measure again" in capsys.readouterr().err


def test_records_without_numbers_and_names_that_look_like_markup(runs, tmp_path, capsys):
    (Path(runs[0]) / "metrics.jsonl").write_bytes(b'{"step": 1, "samples": "many"}\n')
    assert main(runs) == 2
    assert "metrics.jsonl: expected what a run writes, got samples: 'many'" in capsys.readouterr().err
    (Path(runs[0]) / "metrics.jsonl").write_bytes(b'\xff\n{"step": 1, "samples": 7}\n')
    renamed = Path(runs[0]).rename(tmp_path / "a:cat:")
    edited(renamed / "config.yaml", lambda found: found.update(evaluation=["x"], objective={"name": "[/b]"}))
    edited(renamed / "evaluation.json", lambda found: found.update({"[/b]/R@mean": 0.5}))
    said = told(capsys, str(renamed), *runs[1:])
    for word in ("a:cat:", " [/b] ", "[/b]: R@mean"):
        assert word in said
    (Path(runs[1]) / "config.yaml").write_bytes(b"\xff")
    assert main(runs[1:]) == 2
    assert "config.yaml: expected YAML, got " in capsys.readouterr().err
