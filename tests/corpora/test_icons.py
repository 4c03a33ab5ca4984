"""The corpus of icons on a small archive: what is kept and why, disjoint splits, the same bytes however it is made."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amclr_scale.commands import corpus
from amclr_scale.config import schema
from amclr_scale.corpora import icons
from amclr_scale.corpora.icon_splits import Sizes
from amclr_scale.data.evaluation_split import EvaluationSplit
from amclr_scale.data.loader import TrainLoader
from amclr_scale.errors import UserError
from tests.corpora.archive import CONCEPTS, drawing, sets, write_archive

resvg_py = pytest.importorskip("resvg_py")

SMALL = Sizes(
    val_sets=1, val_items=40, tune_sets=1, tune_items=40, smallest=10, largest=200, val_concepts=0.1, tune_concepts=0.1,
    val_pairs=0.1, tune_pairs=0.1, common=3, categories=2, per_category=20,
)  # fmt: skip
SETTINGS = icons.Settings(size=24, per_shard=50, splits=SMALL)
SAMPLES = ("train", "val_concept", "tune_concept", "val_style", "tune_style", "val_pairs", "tune_pairs")


@pytest.fixture(scope="module")
def pinned(tmp_path_factory):
    """An archive, and the package that it is."""
    path = tmp_path_factory.mktemp("archive") / "small-json-1.0.0.tgz"
    return path, write_archive(path, sets())


@pytest.fixture(autouse=True)
def _package(pinned, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(icons, "PACKAGE", pinned[1])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def made(pinned, tmp_path_factory):
    """The corpus, made in this process, and its report."""
    out = tmp_path_factory.mktemp("corpora") / "icons"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(icons, "PACKAGE", pinned[1])
        return out, icons.make(out, SETTINGS, pinned[0])


def read(folder: Path) -> list[tuple[dict, str, bytes]]:
    """(json, txt, picture) of every sample of a split."""
    found = []
    for path in sorted(folder.glob("*.tar.gz")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for key in dict.fromkeys(name.split(".")[0] for name in members):
            found.append((json.loads(members[f"{key}.json"]), members[f"{key}.txt"].decode(), members[f"{key}.webp"]))
    return found


def content(out: Path) -> dict[str, bytes]:
    """All files but the member tables, which hold when a shard was written."""
    files = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".npz"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_everything_that_was_read_is_kept_or_rejected_for_a_reason(made):
    out, report = made
    assert report["rejected"] == {
        "blank": 1,
        "broken": 1,
        "copy, another concept": 1,
        "copy, same concept": 1,
        "licence: GPL, which would bind whatever is made with the pictures": len(CONCEPTS),
        "licence: no commercial use": len(CONCEPTS),
        "withdrawn by the artist": 1,
    }
    assert report["read"] == 8 * len(CONCEPTS) + 11 == report["kept"] + sum(report["rejected"].values())
    written = sum(report["splits"][split]["samples"] for split in SAMPLES)
    assert written == report["kept"] - report["in_no_split"] == sum(len(read(out / split)) for split in SAMPLES)
    assert report["licences"] == {"MIT": report["kept"]}
    assert report["kinds"] == {"ui": report["kept"]}
    assert not (out / ".work").exists()


def test_splits_are_disjoint_in_what_they_hold_out(made):
    out, _ = made
    splits = {split: [content for content, _, _ in read(out / split)] for split in SAMPLES}
    assert all(splits.values())
    pictures = Counter(one["picture"] for found in splits.values() for one in found)
    assert set(pictures.values()) == {1}
    concepts = {split: {one["concept"] for one in found} for split, found in splits.items()}
    artists = {split: {one["set"] for one in found} for split, found in splits.items()}
    for use, other in (("val", "tune"), ("tune", "val")):
        seen = set().union(*(concepts[split] for split in SAMPLES if split != f"{use}_concept"))
        assert not concepts[f"{use}_concept"] & seen
        drew = set().union(*(artists[split] for split in SAMPLES if split != f"{use}_style"))
        assert not artists[f"{use}_style"] & drew
        assert concepts[f"{use}_style"] <= concepts["train"]
        assert concepts[f"{other}_style"] <= concepts["train"]


def test_further_splits_are_parts_of_these(made):
    out, _ = made
    by_split = {
        split: {one["picture"]: one for one, _, _ in read(out / split)}
        for split in (*SAMPLES, "val_common", "probe_train", "probe_test")
    }
    trained = Counter(one["concept"] for one in by_split["train"].values())
    common = {key for key, one in by_split["val_style"].items() if trained[one["concept"]] >= SMALL.common}
    assert set(by_split["val_common"]) == common
    assert set(by_split["probe_train"]) <= set(by_split["train"])
    assert set(by_split["probe_test"]) <= set(by_split["val_style"]) | set(by_split["val_pairs"])
    labels = Counter(one["category"] for one in by_split["probe_train"].values())
    assert set(labels) >= {"first half"}
    assert max(labels.values()) <= SMALL.per_category


def test_a_sample_says_what_it_shows_and_whose_it_is(made):
    out, _ = made
    found = next(sample for split in SAMPLES for sample in read(out / split) if sample[0]["name"] == "wide")
    drawn_by = found[0]["set"]
    assert found[0] | {"key": "", "picture": ""} == {
        "key": "", "caption": "wide", "captions": ["wide", f"wide, drawn by {drawn_by.title()}"], "name": "wide",
        "words": "wide", "concept": "wide", "style": "", "category": "", "set": drawn_by, "kind": "ui",
        "license": "MIT", "picture": "",
    }  # fmt: skip
    assert found[1] == "wide"
    pixels = np.asarray(Image.open(io.BytesIO(found[2])).convert("RGB"))
    assert pixels.shape == (24, 24, 3)  # 48 x 24, its proportions kept: white above and below
    assert (pixels[:5] == 255).all()
    assert (pixels[8:16, 3:] == 0).all()
    named = next(one for one, _, _ in read(out / "train") if one["style"])
    first = named["concept"]
    assert named["captions"][0] == f"{first} outline" == named["words"]
    assert f"{first}, drawn by {named['set'].title()}" in named["captions"]
    assert {f"outline {first}", f"{first} (outline)", first} <= set(named["captions"])


@pytest.mark.slow
def test_any_number_of_processes_and_a_stop_in_the_middle_give_the_same_bytes(made, pinned, tmp_path, monkeypatch):
    out, report = made
    again, calls = tmp_path / "again", []

    def interrupted(job, render=icons.render):
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return render(job)

    monkeypatch.setattr(icons, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        icons.make(again, SETTINGS, pinned[0])
    monkeypatch.undo()
    monkeypatch.setattr(icons, "PACKAGE", pinned[1])
    done = sorted((again / ".work" / "drawn").glob("*.table.json"))
    assert len(done) == 2
    done[0].write_text(done[0].read_text() + " ")  # a set that were drawn again would have its table without the blank
    seen = list[str]()

    def noted(job, drawn=icons.RenderJob.drawn):
        seen.append(job.table.read_text())
        return drawn(job)

    monkeypatch.setattr(icons.RenderJob, "drawn", noted)
    assert icons.make(again, SETTINGS, pinned[0], workers=2) == report
    assert sum(text.endswith(" ") for text in seen) == 1
    assert content(again) == content(out)
    assert icons.make(again, SETTINGS, tmp_path / "no archive is needed any more") == report
    with pytest.raises(UserError, match=r"--out: .* was begun with another settings"):
        icons.make(again, icons.Settings(size=32, per_shard=50, splits=SMALL), pinned[0])


def test_training_and_evaluation_read_it(made):
    out, report = made
    data = schema.Data(
        train=str(out / "train"), image_size=24, context_length=8, lanes=4, caption=["txt", "json.captions"]
    )
    batch = next(TrainLoader(data, seed=0, global_batch_size=16))
    assert batch.images[0].shape == (16, 3, 24, 24)
    split = EvaluationSplit(str(out / "val_style"), data, classes="json.concept")
    assert split.num_samples == report["splits"]["val_style"]["samples"]
    assert set(split.labels) <= {"wide", *(name.replace("-", " ") for name in CONCEPTS)}


def test_credits_name_every_set_and_why_others_are_not_there(made):
    out, report = made
    lines = (out / "CREDITS.md").read_text()
    held = report["held_out"]["val"][0]
    assert f"| {held} | {held.title()} | {held} artist | MIT | ui | 65 | val_style |" in lines
    assert "| free | CC-BY-NC-4.0 | no commercial use | 64 |" in lines
    assert {path.stem for path in (out / "credits").iterdir()} == {f"set{i}" for i in range(6)}
    rows = (out / "concepts.csv").read_text().splitlines()
    assert rows[0] == "concept,pictures,sets,train"
    assert {"thing ab,6,6", "wide,6,6"} < {row.rpartition(",")[0] for row in rows}


def test_what_cannot_be_used_is_told(pinned, tmp_path, monkeypatch, capsys):
    archive, _ = pinned
    other = tmp_path / "other.tgz"
    other.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"--archive: .*: expected @small/json 1.0.0 with sha512-"):
        icons.make(tmp_path / "a", SETTINGS, other)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"npm pack .* failed"):
        icons.make(tmp_path / "b", SETTINGS)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine").touch()
    with pytest.raises(UserError, match=r"--out: expected an empty folder"):
        icons.make(tmp_path / "c", SETTINGS, archive)
    with pytest.raises(UserError, match=r"families of icon sets to hold out .* for val_style, found"):
        icons.make(tmp_path / "d", icons.Settings(size=24), archive)
    assert corpus.main(["icons", "--out", str(tmp_path / "e"), "--size", "2"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("--size: expected 8 or more, got 2")
    assert corpus.main(["icon"]) == 2
    assert "did you mean 'icons'?" in capsys.readouterr().err


def test_drawings_that_differ_in_the_archive_differ_in_the_corpus():
    bodies = {drawing(i, shape) for i in range(len(CONCEPTS)) for shape in range(10)}
    assert len(bodies) == 10 * len(CONCEPTS)
