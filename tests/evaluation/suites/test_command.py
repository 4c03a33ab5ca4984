"""`amclr-scale evaluate RUN --suite NAME --data FOLDER`: what is there is measured, what is missing is named, once."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from amclr_scale.commands.evaluate import _run_suites, arguments, main
from amclr_scale.commands.leaderboard import main as compare
from amclr_scale.evaluation.suites import run as suites_run
from amclr_scale.evaluation.suites.catalogue import SUITES
from tests.evaluation.suites.made import classes_folder, pictures, retrieval_folder
from tests.evaluation.test_models import write_run
from tests.evaluation.test_run import model, recipe

LABELS = [0, 1, 2, 3, 4, 5, 6, 0, 2, 4]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """runs/first, and data/ with four of DataComp's data sets, one of VTAB's, SugarCrepe's swap_obj."""
    root = tmp_path_factory.mktemp("suites")
    (root / "runs").mkdir()
    # A recipe that measures by a way of its own: suites do not.
    config = recipe("emoji/val_style", templates=["an icon of {}"], resize="squash", batch_size=3)
    write_run(root / "runs" / "first", model(config).eval(), config)
    data = root / "data"
    classes_folder(data / "wds_imagenet1k_test", LABELS, seed=1)
    classes_folder(data / "wds_vtab-dtd", LABELS, seed=2)
    classes_folder(data / "wds_geode_test", LABELS, seed=3, metadata=[[i % 2, 5] for i in range(len(LABELS))])
    retrieval_folder(data / "wds_flickr30k")
    pictures(data / "val2017", ["a.jpg", "b.jpg"])
    (data / "sugarcrepe").mkdir()
    told = {str(i): {"filename": f"{'ab'[i % 2]}.jpg", "caption": f"a {i}", "negative_caption": f"{i} b"}
            for i in range(6)}  # fmt: skip
    (data / "sugarcrepe" / "swap_obj.json").write_text(json.dumps(told))
    return root


def evaluate(made: Path, output: Path, *words: str, run: str = "first") -> int:
    return main([str(made / "runs" / run), "--data", str(made / "data"), "--output", str(output), *words])


def test_columns_say_what_they_were_taken_over(made, tmp_path, capsys):
    assert evaluate(made, tmp_path, "--suite", "datacomp38", "--suite", "sugarcrepe") == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "datacomp38.json").read_text())
    there = ["imagenet1k", "vtab/dtd", "flickr30k", "geode"]
    assert sorted(found["sets"]) == sorted(there)
    assert len(found["missing"]) == 34
    assert found["missing"]["mnist"] == ["wds_mnist_test", "wds_mnist", "mnist"]
    numbers = {name: one["numbers"] for name, one in found["sets"].items()}
    values = [
        numbers["imagenet1k"]["zero_shot_top1"], numbers["vtab/dtd"]["zero_shot_top1"],
        (numbers["flickr30k"]["image_to_text_R@1"] + numbers["flickr30k"]["text_to_image_R@1"]) / 2,
        min(numbers["geode"]["group_0_top1"], numbers["geode"]["group_1_top1"]),
    ]  # fmt: skip
    average = found["columns"]["Average over 38"]
    assert average["value"] == pytest.approx(sum(values) / 4, abs=1e-12)
    assert sorted(average["over"]) == sorted(there)
    assert len(average["missing"]) == 34
    assert found["columns"]["ImageNet"] == {"value": values[0], "over": ["imagenet1k"], "missing": []}
    assert found["columns"]["ImageNet shifts"]["value"] is None
    assert found["sets"]["vtab/dtd"]["prompts"].endswith("each in 2 prompts: a photo of a cat. | a photo of a dog. | "
                                                         "a photo of a green bird.")  # fmt: skip
    assert found["resize"] == "crop"  # whatever the run's recipe says
    row = next(line for line in said.splitlines() if line.split()[:1] == ["first"])
    assert row.split()[1:3] == [f"{100 * values[0]:.1f}", "-"]
    assert row.rstrip().endswith(f"{100 * average['value']:.1f} (4 of 38)")
    assert "first: missing 34 of 38 data sets: ImageNet Sketch (wds_imagenet_sketch_test); " in said
    assert f"datacomp38: 4 of 38 data sets in {made / 'data'}\nsugarcrepe: 1 of 7 data sets in " in said
    assert "GeoDE  " in said
    assert "top 1 of the worst region" in said
    table = (tmp_path / "datacomp38.md").read_text()
    assert "| ImageNet | ImageNet shifts | VTAB | Retrieval | Average over 38 |" in table
    assert f"| {100 * average['value']:.1f} (4 of 38) |" in table
    assert "- first: missing 34 of 38 data sets: " in table
    assert str(made) not in (tmp_path / "datacomp38.json").read_text() + table
    crepe = json.loads((tmp_path / "sugarcrepe.json").read_text())["columns"]
    assert crepe["Swap mean"]["value"] == crepe["Swap object"]["value"] == crepe["Mean over 7"]["value"]
    assert (len(crepe["Mean over 7"]["missing"]), crepe["Add mean"]["value"]) == (6, None)
    assert compare([str(tmp_path), "--sort", "ImageNet"]) == 0
    compared = capsys.readouterr().out  # rows or columns, as long as names are
    assert tmp_path.name in compared
    assert f"{100 * average['value']:.1f} (4 of 38)" in compared


def test_several_models_have_a_row_and_a_folder_each(made, tmp_path, capsys):
    run, data = str(made / "runs" / "first"), str(made / "data")
    again = f"{run}/weights.safetensors"  # called first too: the second is called as it was given
    words = ["--suite", "sugarcrepe", "--data", data, "--set", "evaluation.resamples=0"]
    assert main([run, run, run, *words, "--output", str(tmp_path / "three")]) == 0
    assert len([*tmp_path.glob("three/*/sugarcrepe.json")]) == 3
    capsys.readouterr()
    assert main([run, again, *words, "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    kept = sorted(path.parent.name for path in tmp_path.glob("*/sugarcrepe.json"))
    assert kept == sorted(["first", again.replace("/", "-")])
    one, two = (json.loads((tmp_path / name / "sugarcrepe.json").read_text()) for name in kept)
    assert one["model_sha256"] == two["model_sha256"]
    assert one["columns"] == two["columns"]
    # Eleven columns do not fit beside one another: they are rows.
    (heading,) = [line.split() for line in said.splitlines() if line.split()[:1] == ["first"]]
    assert heading == ["first", again]
    (row,) = [line for line in said.splitlines() if line.startswith("  Mean over 7  ")]
    assert row.count("(1 of 7)") == 2


def test_finished_data_sets_are_measured_once(made, tmp_path, capsys, monkeypatch):
    """The same again goes on where it was killed; other weights, other data or another precision begin anew."""
    made, out = shutil.copytree(made, tmp_path / "made"), tmp_path / "out"
    words = ("--suite", "datacomp38", "--set", "evaluation.resamples=0")
    opened = []

    def dies(place):
        opened.append(place.one.name)
        if place.one.name == "flickr30k":
            raise KeyboardInterrupt
        return retrieval(place)

    retrieval = suites_run.KINDS["retrieval"]
    monkeypatch.setitem(suites_run.KINDS, "retrieval", dies)
    assert evaluate(made, out, *words) == 130
    assert opened == ["flickr30k"]
    assert sorted(path.name for path in (out / "datacomp38").iterdir()) == ["imagenet1k.json", "vtab-dtd.json"]
    assert not (out / "datacomp38.json").exists()
    monkeypatch.setitem(suites_run.KINDS, "retrieval", retrieval)

    def again(*more: str) -> list[str]:
        capsys.readouterr()
        assert evaluate(made, out, *words, *more) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line.split(": ")[1] for line in lines if line.startswith("first: ") and "measured before" in line]

    assert again() == ["ImageNet 1k", "Describable Textures"]
    everything = ["ImageNet 1k", "Describable Textures", "Flickr", "GeoDE"]
    assert again() == everything
    (out / "datacomp38" / "geode.json").write_text("{cut off")
    assert again() == everything[:3]
    templates = made / "data" / "wds_vtab-dtd" / "zeroshot_classification_templates.txt"
    templates.touch()  # the same content
    assert again() == everything
    before = json.loads((out / "datacomp38" / "vtab-dtd.json").read_text())
    templates.write_text("no {c}\n")
    assert again() == ["ImageNet 1k", "Flickr", "GeoDE"]
    after = json.loads((out / "datacomp38" / "vtab-dtd.json").read_text())
    assert before["data_sha256"] != after["data_sha256"]
    assert before["model_sha256"] == after["model_sha256"]
    assert again("--precision", "bf16") == []
    assert again("--set", "evaluation.resize=squash") == []
    assert again() == []


def test_what_was_measured_with_other_errors_is_measured_again(made, tmp_path, capsys, monkeypatch):
    """Until measure 2, means per class and ARO's macro accuracies had the error of a plain weighted mean."""
    words = ("--suite", "sugarcrepe", "--set", "evaluation.resamples=0")
    monkeypatch.setattr(suites_run, "MEASURE", 1)
    assert evaluate(made, tmp_path, *words) == 0
    monkeypatch.undo()
    assert evaluate(made, tmp_path, *words) == 0
    assert "measured before" not in capsys.readouterr().out
    assert evaluate(made, tmp_path, *words) == 0
    assert "measured before" in capsys.readouterr().out


def test_other_weights_of_a_run_have_results_of_their_own(made, tmp_path, capsys):
    run = shutil.copytree(made / "runs" / "first", tmp_path / "first")
    shutil.copy(run / "weights.safetensors", run / "momentum.safetensors")
    words = ["--suite", "sugarcrepe", "--data", str(made / "data"), "--set", "evaluation.resamples=0"]
    assert main([str(run), str(run / "momentum.safetensors"), *words]) == 0
    assert "measured before" not in capsys.readouterr().out
    kept = {path.relative_to(run).as_posix() for path in run.rglob("sugarcrepe.json")}
    assert kept == {"evaluation/sugarcrepe.json", "evaluation/momentum/sugarcrepe.json"}
    assert compare([str(run)]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "(1 of 7)" in line]
    assert names == ["first", "first/momentum"]


def test_bad_input_is_told_before_anything_is_measured(made, tmp_path, capsys):
    run, data = str(made / "runs" / "first"), str(made / "data")
    (tmp_path / "void").mkdir()
    bad = tmp_path / "bad" / "wds_mnist_test" / "test"
    bad.mkdir(parents=True)
    cases = {
        "--data: expected the folder that holds the data sets of datacomp38, got none": ["--suite", "datacomp38"],
        "--suite: expected one of datacomp38, clip_benchmark_vtab, ": ["--data", data],
        "--suite: with --data, expected one of datacomp38, ": ["--data", data, "--suite", "datacomp"],
        "--data: expected the folder that holds the data sets of aro, got gone": ["--data", "gone", "--suite", "aro"],
        "none; looked for winoground/data/examples.jsonl": ["--data", data, "--suite", "winoground"],
        "--data: mnist: expected shards in ": ["--data", str(tmp_path / "bad"), "--suite", "datacomp38"],
        "--set evaluation.templates: expected no such key beside --data: a suite says it itself": [
            "--data", data, "--suite", "retrieval", "--set", "evaluation.templates=[x]",
        ],
        "--sheet: expected no sheet beside --data": ["--data", data, "--suite", "retrieval", "--sheet", "2"],
    }  # fmt: skip
    for words, given in cases.items():
        assert main([run, *given, "--output", str(tmp_path / "out")]) == 2, given
        said = capsys.readouterr()
        assert words in said.err
        assert said.out == ""
    assert not (tmp_path / "out").exists()
    assert "did you mean 'datacomp38'?" in _told(run, data, capsys)
    assert set(SUITES) == {"datacomp38", "clip_benchmark_vtab", "retrieval", "sugarcrepe", "winoground", "aro"}


def _told(run, data, capsys):
    main([run, "--data", data, "--suite", "datacomp"])
    return capsys.readouterr().err


def on_a_rank(words: list[str]) -> None:
    """The command, where the process group has been started."""
    _run_suites(arguments(words), torch.device("cpu"))


def test_two_ranks_give_the_numbers_of_one(made, tmp_path, ranks):
    words = ["--suite", "datacomp38", "--suite", "sugarcrepe", "--set", "evaluation.resamples=20"]
    assert evaluate(made, tmp_path / "one", *words) == 0
    command = [str(made / "runs" / "first"), "--data", str(made / "data"), *words, "--output", str(tmp_path / "two")]
    ranks(2, on_a_rank, command)
    for name in ("datacomp38", "sugarcrepe"):
        one, two = (json.loads((tmp_path / way / f"{name}.json").read_text()) for way in ("one", "two"))
        assert one["model_sha256"] == two["model_sha256"]
        assert one["data_sha256"] == two["data_sha256"]
        assert one["columns"] == two["columns"]
        assert {key: each["numbers"] for key, each in one["sets"].items()} == {
            key: each["numbers"] for key, each in two["sets"].items()
        }
    shutil.rmtree(tmp_path / "two" / "sugarcrepe")
    ranks(2, on_a_rank, command)  # every rank finds the same finished data sets, or one would wait for the other
    assert json.loads((tmp_path / "two" / "sugarcrepe.json").read_text())["columns"] == two["columns"]
