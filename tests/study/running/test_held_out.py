"""What a study's cells are measured on: a split that was made anew after the first score is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from amclr_scale.commands.study import main
from amclr_scale.config.load import build
from amclr_scale.study.running.corpora import FILE
from amclr_scale.study.running.held_out import content_of, measured_on
from tests.data.shards import picture, write_shards
from tests.study.synthetic import begin
from tests.study.test_plan import PLAN

WORDS = [
    "num_samples=null", "budget={samples: 128, epochs: null}", "lr={rule: none, base: 1e-3}",
    "words=['evaluation.splits={emoji/val_style: held}', data.train=corpus, 'data.cache=null']",
]  # fmt: skip


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A plan whose first cell is at work, and its run."""
    write_shards(tmp_path / "corpus", [5, 3])
    write_shards(tmp_path / "held", [4], 50)
    file = tmp_path / "tiny.yaml"
    file.write_text(PLAN + f"folder: {tmp_path / 'study'}\n")
    monkeypatch.chdir(tmp_path)
    return file, begin(file, WORDS)


def finish(run: Path) -> None:
    key = "emoji/val_style/image_to_text_R@1"
    (run / "evaluation.json").write_text(json.dumps({key: 0.5, f"{key}/chance": 0.01}))


def make_anew() -> None:
    shutil.rmtree("held")
    write_shards(Path("held"), [4], 90)


def test_a_split_made_anew_after_a_score_is_refused(
    begun: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = begun
    finish(run)
    assert main([str(file), *WORDS, "--dry-run"]) == 0
    make_anew()
    capsys.readouterr()
    assert main([str(file), *WORDS, "--dry-run"]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith(
        f"evaluation.splits: expected what {run.name} in {tmp_path / 'study'} was measured on as held"
    )
    assert told.endswith("put it back as it was, or begin another study with folder=...")
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "two")
    shutil.copytree("../corpus", "corpus")
    shutil.copytree("../held", "held")
    assert main([str(file), *WORDS, "--dry-run"]) == 2
    assert f"now {tmp_path / 'two'}, then {tmp_path}: go on from there" in capsys.readouterr().err
    shutil.rmtree("held")
    write_shards(Path("held"), [4], 50)  # the same samples, elsewhere
    assert main([str(file), *WORDS, "--dry-run"]) == 0


def test_a_split_may_be_mended_before_the_first_score_and_an_older_study_goes_on(
    begun: tuple[Path, Path], tmp_path: Path
) -> None:
    file, run = begun
    make_anew()
    assert main([str(file), *WORDS, "--dry-run"]) == 0
    finish(run)
    kept = json.loads((tmp_path / "study" / FILE).read_text())
    assert main([str(file), *WORDS, "--dry-run"]) == 2
    older = {name: one for name, one in kept.items() if not name.startswith("measured on")}
    (tmp_path / "study" / FILE).write_text(json.dumps(older))
    assert main([str(file), *WORDS, "--dry-run"]) == 0


def pictures(folder: Path) -> list[Callable[[], object]]:
    """A picture with a text, and what changes it."""
    for name in ("a", "b"):
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.png").write_bytes(picture(ord(name)))
        (folder / f"{name}.txt").write_text(f"text {name}")
    return [
        lambda: (folder / "a.txt").write_text("another"),
        lambda: (folder / "a.png").write_bytes(picture(7, (30, 30))),
        lambda: (folder / "b.png").rename(folder / "c.png"),
    ]


def annotated(file: Path) -> list[Callable[[], object]]:
    root = file.parent / "annotated"
    changes = pictures(root)
    entry = {"image": "annotated/a.png", "caption": "text a"}
    file.write_text(json.dumps([entry]))
    return [changes[1], lambda: file.write_text(json.dumps([{**entry, "caption": "another"}]))]


def benchmark(folder: Path) -> list[Callable[[], object]]:
    write_shards(folder / "test", [2])
    (folder / "classnames.txt").write_text("one\ntwo\n")
    return [
        lambda: (folder / "classnames.txt").write_text("one\nthree\n"),
        lambda: (shutil.rmtree(folder / "test"), write_shards(folder / "test", [2], 9)),
    ]


def both(folder: Path) -> list[Callable[[], object]]:
    """Shards also beside `test`: it is measured on that alone, and on the names."""
    write_shards(folder, [3], 70)
    return benchmark(folder)


def prompts(file: Path) -> list[Callable[[], object]]:
    file.write_text("a {}\n")
    return [lambda: file.write_text("the {}\n")]


@pytest.mark.parametrize(
    ("make", "name", "key"),
    [
        (pictures, "p", "splits"), (annotated, "a.json", "splits"), (benchmark, "w", "splits"),
        (both, "v", "splits"),
        (prompts, "own.list", "splits"),  # tests/commands/additions/split_format.py
        (prompts, "t.txt", "templates"), (prompts, "n.txt", "class_names"), (pictures, "q", "probes"),
    ],
)  # fmt: skip
def test_each_format_has_a_fingerprint_that_changes_with_it(
    make: Callable[[Path], list[Callable[[], object]]], name: str, key: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    given = {"splits": [str(path)], "probes": [{"train": str(path), "test": "emoji/val_style"}]}.get(key, str(path))
    config = build({"data": {"train": "emoji/train"}, "evaluation": {key: given}, "train": {"epochs": 1}})
    changes = make(path)
    assert (str(path), f"evaluation.{key}") in list(measured_on(config))
    found = [content_of(str(path), f"evaluation.{key}", config)]
    assert found == [content_of(str(path), f"evaluation.{key}", config)]
    for change in changes:
        change()
        found.append(content_of(str(path), f"evaluation.{key}", config))
    assert len(set(found)) == len(changes) + 1


def test_what_no_evaluation_reads_stops_no_study(tmp_path: Path) -> None:
    config = build({"data": {"train": "emoji/train"}, "train": {"epochs": 1}})

    def content(folder: Path) -> str:
        return content_of(str(folder), "evaluation.splits", config)

    photos, shards = tmp_path / "photos", tmp_path / "shards"
    pictures(photos)
    (photos / "gone.txt").symlink_to("nowhere.txt")
    (photos / "again").symlink_to(photos)
    (photos / "class").mkdir()
    (photos / "class" / "backup.tar").write_bytes(b"no shard")
    assert content(photos) == content(photos)
    benchmark(shards)
    before = content(shards)
    write_shards(shards / "train", [2], 30)
    assert content(shards) == before
