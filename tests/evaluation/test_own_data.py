"""People's own folders and files as evaluation splits: each measured as it should be, under a name of its own."""

import json

import pytest

from amclr_scale.config.load import build
from amclr_scale.config.schema import Evaluation
from amclr_scale.data.names import known_as, probe_name, short_names, split_names
from amclr_scale.data.sources import resolve_all
from amclr_scale.errors import UserError
from amclr_scale.evaluation.run import Evaluator
from tests.evaluation.shards import picture, write_split
from tests.evaluation.test_run import model, recipe


def recipe_of(*splits, **options):
    """A recipe that says nothing about classes, as the defaults do."""
    return recipe(*splits, classes=Evaluation().classes, **options)


@pytest.fixture
def root(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    return tmp_path


def measured(root, name, content, **options):
    (root / name).write_text(json.dumps(content))
    config = recipe_of(str(root / name), **options)
    return Evaluator(config)(model(config))


REPEATED = [{"image": f"{i}.jpg", "caption": f"thing {i} number {j}"} for i in range(4) for j in range(5)]


def test_entries_that_repeat_an_image_are_one_image(root):
    grouped = [{"image": f"{i}.jpg", "caption": [f"thing {i} number {j}" for j in range(5)]} for i in range(4)]
    want = measured(root, "lists.json", grouped)
    assert (want["lists/images"], want["lists/texts"]) == (4, 20)
    found = measured(root, "repeated.json", REPEATED)
    assert {key.replace("repeated/", "lists/"): value for key, value in found.items()} == want
    lines = "".join(f"{json.dumps(entry)}\n" for entry in REPEATED)
    (root / "lines.jsonl").write_text(lines)
    config = recipe_of(str(root / "lines.jsonl"))
    found = Evaluator(config)(model(config))
    assert {key.replace("lines/", "lists/"): value for key, value in found.items()} == want


def test_wrong_captions_stay_with_their_own_caption(root):
    """Entries of one image, each with a caption and its negatives: two items, one image of the gallery."""
    entries = [
        {"image": "0.jpg", "caption": "a cat", "negatives": ["a dog"]},
        {"image": "0.jpg", "caption": "a sofa", "negatives": ["a chair"]},
        {"image": "1.jpg", "caption": "a tree"},
    ]
    found = measured(root, "negatives.json", entries)
    assert (found["negatives/images"], found["negatives/texts"]) == (2, 3)
    split = Evaluator(recipe_of(str(root / "negatives.json"))).tasks[0].split
    assert [(item.captions, item.negatives) for item in split.items] == [
        (["a cat"], {"negatives": ["a dog"]}), (["a sofa"], {"negatives": ["a chair"]}), (["a tree"], {}),
    ]  # fmt: skip


def test_cocos_captions_are_a_split_and_what_is_no_caption_is_left_out(root, caplog):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(4)]
    captions = [{"image_id": i % 4, "caption": f"c {i}"} for i in range(10)]
    found = measured(
        root, "coco.json", {"images": images, "annotations": [*captions, {"image_id": 1, "caption": None}]}
    )
    assert (found["coco/images"], found["coco/texts"]) == (4, 10)
    assert "left out 1 null caption" in caplog.text
    sentences = [[None, "a", "b"], ["c", "  "], [7, "d"]]
    karpathy = [
        {"filename": f"{i}.jpg", "split": "test", "sentences": [{"raw": one} for one in listed]}
        for i, listed in enumerate(sentences)
    ]
    caplog.clear()
    (root / "karpathy.json").write_text(json.dumps({"images": karpathy}))
    assert Evaluator(recipe_of(str(root / "karpathy.json"))).tasks[0].split.caption_lists == [["a", "b"], ["c"], ["d"]]
    assert "left out 1 null caption, 1 blank caption, 1 caption that is a number" in caplog.text
    with pytest.raises(UserError, match=r"0.jpg has no caption; take it out of the file, or give it one"):
        measured(root, "null.json", [{"image": "0.jpg", "caption": None}])


def folder_of(root, names, texts=()):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    for name in texts:
        (root / name).with_suffix(".txt").write_text(f"about {name}\nmore\n")
    config = recipe_of(str(root))
    return Evaluator(config)(model(config))


def test_a_folder_of_pictures_is_measured_by_what_it_holds(tmp_path, caplog):
    """Texts: retrieval; class folders: zero-shot, though no key says so; both: both; neither is told."""
    classes = ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg"]
    found = folder_of(tmp_path / "classes", classes)
    assert "classes/zero_shot_top1" in found
    assert "classes/images" not in found
    found = folder_of(tmp_path / "both", classes, classes)
    assert (found["both/images"], found["both/texts"], "both/zero_shot_top1" in found) == (3, 6, True)
    found = folder_of(tmp_path / "some", classes, classes[:1])
    assert "some/images" not in found
    assert "1 of 3 pictures have a .txt: retrieval needs all" in caplog.text
    found = folder_of(tmp_path / "photos", ["0.jpg", "1.jpg"], ["0.jpg", "1.jpg"])
    assert (found["photos/images"], found["photos/texts"], "photos/zero_shot_top1" in found) == (2, 4, False)
    with pytest.raises(UserError, match=r"expected a .txt beside each picture, or a folder for each class, got 2 pict"):
        folder_of(tmp_path / "bare", ["0.jpg", "1.jpg"])


def test_shards_without_classes_are_measured_by_retrieval_alone(tmp_path):
    """The default says nothing about where classes are: emoji's own field is the quickstart's business."""
    config = recipe_of(str(write_split(tmp_path / "mine", 6)))
    found = Evaluator(config)(model(config))
    assert found["mine/images"] == 6
    assert not any("zero_shot" in name for name in found)


def test_splits_have_names():
    config = recipe_of()
    named = config.evaluation.model_copy(update={"splits": {"photos": "/data/x", "coco": "/data/y.json"}})
    assert split_names(named) == {"photos": "/data/x", "coco": "/data/y.json"}
    paths = [
        "emoji/val_style", "/data/flickr30k/", "/a/coco/{000..331}.tar", "/a/dataset_coco.json#val",
        "/a/mine/index.json",
        "https://host/bucket/cc3m/{0..3}.tar?x=/y", "pipe:aws s3 cp s3://bucket/laion/{0..3}.tar", "/a/imagenet/val",
        "/b/places/val", "photos",
    ]  # fmt: skip
    assert list(short_names(paths).values()) == [
        "emoji/val_style", "flickr30k", "coco", "dataset_coco#val", "mine", "cc3m", "laion", "imagenet/val",
        "places/val", "photos",
    ]  # fmt: skip
    alike = ["/me/cc3m/{0..3}.tar", "/me/cc3m/{4..7}.tar", "s3://me:key@b/0.tar", "https://b/1.tar?key", "x/y", "/x/y"]
    assert list(short_names(alike).values()) == ["cc3m/0..3", "cc3m/4..7", "b/0", "b/1", "x/y (1)", "x/y (2)"]
    twice = config.evaluation.model_copy(update={"splits": ["/data/x", "/data/x"]})
    with pytest.raises(UserError, match=r"^evaluation.splits: expected every split once, got /data/x twice"):
        split_names(twice)


def test_training_data_and_probes_have_names_too():
    """{photos: PATH} wherever data sets are named; what has no path is told by name."""
    listed = ["/data/cc3m/{0..3}.tar", "emoji/train"]
    named = {"web": "/data/cc3m/{0..3}.tar", "emoji": "emoji/train"}
    assert known_as(build({"data": {"train": named}, "train": {"epochs": 1}}).data.train) == named
    assert known_as(listed) == {"cc3m": listed[0], "emoji/train": "emoji/train"}
    assert [one.name for one in resolve_all({"emoji": "emoji/train"}, "data.train")] == ["emoji/train"]
    with pytest.raises(UserError, match=r"^data.train: expected where web and photos lie on this machine, got null .*"
                       r"; set data.train=\{web: PATH, emoji: emoji/train, photos: PATH\}$"):  # fmt: skip
        resolve_all({"web": None, "emoji": "emoji/train", "photos": None}, "data.train")
    probes = [{"train": {"mine": "/data/x/train"}, "test": "/data/y/val"}]
    evaluation = build(
        {"train": {"epochs": 1}, "evaluation": {"splits": {"held": "/data/y/val"}, "probes": probes}}
    ).evaluation
    assert probe_name(evaluation.probes[0], evaluation) == "held from mine"
    with pytest.raises(UserError, match=r"^evaluation.probes.0.test: "):
        build({"evaluation": {"probes": [{"train": "a", "test": {"b": "c", "d": "e"}}]}})


def test_results_are_called_by_the_names(tmp_path):
    mine = str(write_split(tmp_path / "mine", 6))
    config = recipe_of()
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"splits": {"photos": mine}})})
    found = Evaluator(config)(model(config))
    assert "photos/image_to_text_R@1" in found
    assert not any(str(tmp_path) in name for name in found)
    assert found["photos/images"] == 6
