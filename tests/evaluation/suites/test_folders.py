"""Folders of CLIP_benchmark: DataComp's numbers against plain definitions in float64, and what cannot be measured."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

from amclr_scale.data.evaluation_split import EvaluationSplit
from amclr_scale.errors import UserError
from amclr_scale.evaluation.suites.catalogue import SUITES
from amclr_scale.evaluation.suites.files import locate
from amclr_scale.evaluation.suites.folders import (
    best_rivals,
    check_folder,
    f1_macro,
    group_shares,
    open_classes,
    open_retrieval,
)
from amclr_scale.evaluation.zero_shot import class_ranks
from tests.evaluation.suites.made import NAMES, TEMPLATES, Directions, classes_folder, pictures, place, retrieval_folder

LABELS = [0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 1, 0, 3, 4, 2, 1, 0, 5, 3, 4, 1, 2, 0, 5]  # no 6: a class without pictures
REGIONS = [[(7 * i) % 3 + (i > 20), 2000 + i] for i in range(len(LABELS))]


def scored(folder, suite, name):
    """Scores (N, K) float64 as a reader of the folder computes them with its own hands."""
    split, model = EvaluationSplit(str(folder / "test"), place(suite, name, folder, folder).data.model_copy(
        update={"caption": "cls"}), classes="cls"), Directions()  # fmt: skip
    images = torch.cat([batch.images[0] for batch in split.batches(5)])
    image = model(images=(images,))["image"].numpy()
    rows = []
    for one in NAMES:
        each = model(texts=(split.reading.tokenizer([t.replace("{c}", one) for t in TEMPLATES]),))["text"].numpy()
        rows.append(each.mean(0) / np.linalg.norm(each.mean(0)))
    return image @ np.array(rows).T, np.array(split.labels)


def test_numbers_of_classes_and_groups_are_the_definitions(tmp_path):
    folder = classes_folder(tmp_path / "wds_wilds-fmow_test", LABELS, metadata=REGIONS)
    opened = open_classes(place("datacomp38", "wilds/fmow", folder, tmp_path))
    numbers, plain = opened.measure(Directions())
    scores, labels = scored(folder, "datacomp38", "wilds/fmow")
    predicted, groups = scores.argmax(1), np.array(REGIONS)[:, 0]
    best5 = (-scores).argsort(1)[:, :5]
    hits = {1: predicted == labels, 5: (best5 == labels[:, None]).any(1)}
    assert opened.items == len(LABELS)
    assert 0 < hits[1].sum() < len(LABELS)
    assert numbers["zero_shot_top1"].value == pytest.approx(accuracy_score(labels, predicted), abs=1e-12)
    assert numbers["zero_shot_top5"].value == pytest.approx(hits[5].mean(), abs=1e-12)
    mean = np.mean([hits[1][labels == one].mean() for one in np.unique(labels)])
    assert numbers["zero_shot_mean_per_class"].value == pytest.approx(mean, abs=1e-12)
    f1 = f1_score(labels, predicted, average="macro", labels=np.unique(labels))
    assert plain["f1_macro"] == pytest.approx(f1, abs=1e-12)
    for k in (1, 5):
        by_group = {int(g): hits[k][groups == g].mean() for g in np.unique(groups)}
        assert plain[f"worst_group_top{k}"] == pytest.approx(min(by_group.values()), abs=1e-12)
        assert {g: plain[f"group_{g}_top{k}"] for g in by_group} == pytest.approx(by_group, abs=1e-12)
    assert "7 classes (1 without images), each in 2 prompts: a photo of a cat." in opened.words
    assert set(opened.files) == {
        "classnames.txt", "zeroshot_classification_templates.txt", "test/0.tar", "test/1.tar",
    }  # fmt: skip


def test_a_tie_is_lost_in_every_number():
    image = torch.eye(3, dtype=torch.float64)[[0, 0, 1]]
    classes = torch.eye(3, dtype=torch.float64)[[0, 0, 1]]  # classes 0 and 1 are one
    labels = torch.tensor([0, 1, 2])
    ranks, rivals = class_ranks(image, classes, labels), best_rivals(image, classes, labels)
    assert ranks.tolist() == [2, 2, 1]
    predicted = torch.where(ranks == 1, labels, rivals)
    assert predicted.tolist() == [1, 0, 2]
    assert f1_macro(predicted, labels) == pytest.approx(1 / 3)
    for largest in (3, 2**52):  # a group's number takes no memory
        assert group_shares(ranks == 1, torch.tensor([largest, 0, largest])) == {0: 0.0, largest: 0.5}


def test_retrieval_counts_with_the_mean_of_both_directions(tmp_path):
    folder = retrieval_folder(tmp_path / "wds_flickr30k")
    numbers, _ = open_retrieval(place("retrieval", "flickr30k", folder, tmp_path)).measure(Directions())
    both = [numbers[f"{way}_R@1"].value for way in ("image_to_text", "text_to_image")]
    assert numbers["mean_R@1"].value == pytest.approx(sum(both) / 2, abs=1e-12)
    listed = [{"image": f"{i}.png", "caption": [f"thing {i}", f"thing {i} again"]} for i in range(4)]
    (pictures(tmp_path / "coco", [f"{i}.png" for i in range(4)]) / "coco_test.json").write_text(json.dumps(listed))
    opened = open_retrieval(place("retrieval", "mscoco_captions", tmp_path / "coco" / "coco_test.json", tmp_path))
    assert {path.name for path in opened.files.values()} == {"coco_test.json", *(f"{i}.png" for i in range(4))}
    assert opened.measure(Directions())[1]["texts"] == 8


def test_a_data_set_is_the_first_of_its_places_that_fits(tmp_path):
    """A folder of that name may hold the same pictures in another layout: then it is not the one that is meant."""
    pictures(tmp_path / "flickr30k", ["a.jpg"])
    (tmp_path / "cars").mkdir()
    with pytest.raises(
        UserError, match=r"^--data: .*: expected at least one data set of retrieval, found none; looked"
    ):
        locate(SUITES["retrieval"], tmp_path)
    (tmp_path / "flickr30k" / "dataset_flickr30k.json").write_text("{}")
    assert locate(SUITES["retrieval"], tmp_path) == {"flickr30k": "flickr30k/dataset_flickr30k.json"}
    (tmp_path / "flickr30k" / "test").mkdir()
    assert locate(SUITES["datacomp38"], tmp_path) == {"flickr30k": "flickr30k"}
    (tmp_path / "wds_cars").mkdir()  # meant, though nothing is in it: check_folder says so
    assert locate(SUITES["datacomp38"], tmp_path) == {"flickr30k": "flickr30k", "cars": "wds_cars"}


def test_what_cannot_be_measured_is_told(tmp_path):
    good = classes_folder(tmp_path / "good", LABELS[:8])
    check_folder("mnist", good, classes=True)
    (good / "test" / "nshards.txt").write_text("3")
    with pytest.raises(UserError, match=r"^--data: mnist: expected 3 shards in .*/good/test, as .*, got 2; download"):
        check_folder("mnist", good, classes=True)
    (good / "test" / "nshards.txt").unlink()
    (good / "classnames.txt").write_text("cat\n\ndog\n")  # the number of dog would be 1 or 2
    for _ in range(2):
        with pytest.raises(UserError, match=r"^--data: mnist: expected .*/good/classnames.txt with a line for each"):
            check_folder("mnist", good, classes=True)
        (good / "classnames.txt").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"^--data: flickr30k: expected .*/dataset_type.txt with the line `retrieval`"):
        check_folder("flickr30k", good, classes=False)
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match=r"^--data: mnist: expected shards in .*/void/test, found none"):
        check_folder("mnist", tmp_path / "void", classes=True)
    bare = classes_folder(tmp_path / "bare", LABELS[:8], metadata=[[1, 2]] * 7)
    with pytest.raises(UserError, match=r"bare/test: sample 1.tar/000003: expected an array of numpy at .npy, got: it"):
        open_classes(place("datacomp38", "geode", bare, tmp_path))
    strange = classes_folder(tmp_path / "strange", LABELS[:8], metadata=[[1, 2]] * 7 + [[-1, 2]])
    with pytest.raises(UserError, match=r"^--data: geode: sample 1.tar/000003: expected a whole number at place 0"):
        open_classes(place("datacomp38", "geode", strange, tmp_path))


def test_suites_are_the_papers():
    """Counts that the papers state; every column names numbers of its own suite's data sets."""
    sizes = {name: len(suite.sets) for name, suite in SUITES.items()}
    assert sizes == {
        "datacomp38": 38, "clip_benchmark_vtab": 19, "retrieval": 3, "sugarcrepe": 7, "winoground": 1, "aro": 4,
    }  # fmt: skip
    for suite in SUITES.values():
        names = {one.name for one in suite.sets}
        assert len(names) == len(suite.sets) == len({one.title for one in suite.sets})
        assert {name for column in suite.columns for name, _ in column.over} == names
    over = {column.title: len(column.over) for column in SUITES["datacomp38"].columns}
    assert over == {"ImageNet": 1, "ImageNet shifts": 6, "VTAB": 13, "Retrieval": 3, "Average over 38": 38}
    counts = {one.words: 0 for one in SUITES["datacomp38"].sets}
    for one in SUITES["datacomp38"].sets:
        counts[one.words] += 1
    assert counts["mean per class"] == 4
    assert counts["top 1"] == 27
