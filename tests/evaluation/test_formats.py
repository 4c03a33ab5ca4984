"""Formats of benchmarks, probes, geometry and composition through the evaluator; mistakes in files told in words."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amclr_scale.config.schema import Config
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.errors import UserError
from amclr_scale.evaluation.composition import composition
from amclr_scale.evaluation.evaluators import gallery
from amclr_scale.evaluation.run import Evaluator
from amclr_scale.evaluation.shares import share
from tests.evaluation.shards import COLOURS, picture, write_split, write_tar
from tests.evaluation.test_run import model, recipe

N = 9


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """One folder with every format in it."""
    root = tmp_path_factory.mktemp("formats")
    (root / "pictures").mkdir()
    for i in range(N):
        (root / "pictures" / f"{i}.png").write_bytes(picture(i))
    listed = [
        {
            "image": f"pictures/{i}.png",
            "caption": [f"picture {i}", f"the image {i}"],
            "negatives": {"order": [f"{i} picture"], "attribute": [f"picture {i + 1}", f"picture {i + 2}"]},
        }
        for i in range(N)
    ]
    (root / "listed.json").write_text(json.dumps(listed))
    pairs = [{"image": f"pictures/{i // 3}.png", "caption": f"picture {i}", "image_id": i // 3} for i in range(N)]
    (root / "pairs.json").write_text(json.dumps(pairs))
    karpathy = [
        {
            "filepath": "pictures",
            "filename": f"{i}.png",
            "imgid": i,
            "split": "test" if i < 6 else "val",
            "sentences": [{"raw": f"picture {i} "}, {"raw": "same"}],
        }
        for i in range(N)
    ]
    (root / "karpathy.json").write_text(json.dumps({"images": karpathy, "dataset": "coco"}))
    for name in COLOURS[:3]:
        for part in ("train", "test"):
            (root / part / name).mkdir(parents=True)
            for i in range(8):
                (root / part / name / f"{i}.png").write_bytes(picture(100 * len(name) + i + 50 * (part == "test")))
    (root / "wds" / "test").mkdir(parents=True)
    write_tar(root / "wds" / "test" / "0.tar", [{"png": picture(i), "cls": str(i % 3)} for i in range(N)])
    (root / "wds" / "classnames.txt").write_text("\n".join(COLOURS[:3]))
    (root / "wds" / "zeroshot_classification_templates.txt").write_text("{c}!\na {c}\n")
    (root / "templates.txt").write_text("this is {}\n")
    (root / "names.txt").write_text("rouge\nvert\nbleu\n")
    return root


def opened(root: Path, name: str, **options) -> Evaluator:
    return Evaluator(recipe(str(root / name), **options))


def test_annotations_are_read_as_their_papers_wrote_them(root):
    task = opened(root, "listed.json").tasks[0]
    assert (task.retrieval, task.class_names, task.split.num_samples) == (True, [], N)
    assert task.split.caption_lists[2] == ["picture 2", "the image 2"]
    assert task.split.items[4].negatives["order"] == ["4 picture"]
    texts, owners, _, keep = gallery(opened(root, "pairs.json").tasks[0].split)
    assert texts == [f"picture {i}" for i in range(N)]
    assert owners.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert keep.tolist() == [True] * 3  # one item per image, with the captions of all its entries
    assert opened(root, "karpathy.json").tasks[0].split.num_samples == 6
    val = opened(root, "karpathy.json#val").tasks[0].split
    assert val.caption_lists == [[f"picture {i}", "same"] for i in (6, 7, 8)]
    moved = root / "elsewhere.json"
    moved.write_text(json.dumps([{"image": "0.png", "caption": "one"}]))
    assert opened(root, "elsewhere.json", image_root=str(root / "pictures")).tasks[0].split.num_samples == 1


def test_classes_and_prompts_come_from_the_data_set_unless_said_otherwise(root):
    task = opened(root, "wds").tasks[0]
    assert (task.retrieval, task.class_names, task.templates) == (False, ["red", "green", "blue"], ["{c}!", "a {c}"])
    assert task.labels.tolist() == [i % 3 for i in range(N)]
    folders = opened(root, "test").tasks[0]
    assert (folders.class_names, folders.templates) == (["blue", "green", "red"], ["a photo of a {}."])
    assert folders.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    named = opened(root, "wds", class_names=str(root / "names.txt"), templates=str(root / "templates.txt")).tasks[0]
    assert (named.class_names, named.templates) == (["rouge", "vert", "bleu"], ["this is {}"])
    assert named.labels.tolist() == task.labels.tolist()
    with pytest.raises(UserError, match=r"^evaluation.class_names: .*expected names that say whose they are"):
        opened(root, "test", class_names=str(root / "names.txt"))  # folders are blue, green and red


def test_imagenet_has_its_names_and_prompts(root):
    from amclr_scale.evaluation.class_names import listed
    from amclr_scale.evaluation.splits import _templates

    names, templates = listed("imagenet"), _templates("imagenet")
    assert (len(names), len(templates)) == (1000, 80)
    assert names[:2] == ["tench", "goldfish"]
    assert all(template.count("{}") == 1 for template in templates)
    with pytest.raises(UserError, match=r"^evaluation.class_names: .* has 3 classes, imagenet 1000"):
        opened(root, "wds", class_names="imagenet")


def write_cifar(folder: Path, n: int = 4, hundred: bool = False) -> np.ndarray:
    """The binary version with n records a file; returns the test images (n, 32, 32, 3)."""
    folder.mkdir(parents=True)
    parts = ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for number, part in enumerate(parts):
        pixels = np.random.default_rng(number).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        labels = np.arange(n, dtype=np.uint8)[:, None] % 3
        coarse = np.full((n, 1), 9, dtype=np.uint8)
        rows = [*([coarse] if hundred else []), labels, pixels.reshape(n, -1)]
        np.concatenate(rows, axis=1).tofile(folder / f"{part}.bin")
    (folder / ("fine_label_names.txt" if hundred else "batches.meta.txt")).write_text("plane\ncar\nbird\n\n")
    return pixels.transpose(0, 2, 3, 1)


@pytest.mark.parametrize("hundred", [False, True])
def test_cifars_binary_files(tmp_path, hundred):
    folder = tmp_path / ("cifar-100-binary" if hundred else "cifar-10-batches-bin")
    pixels = write_cifar(folder, hundred=hundred)
    task = opened(tmp_path, folder.name).tasks[0]
    assert (task.retrieval, task.class_names, task.labels.tolist()) == (False, ["plane", "car", "bird"], [0, 1, 2, 0])
    shown = np.concatenate([batch.images[0].numpy() for batch in task.split.batches(3)])
    want = [np.asarray(Image.fromarray(one).resize((16, 16), Image.Resampling.BICUBIC)) for one in pixels]
    np.testing.assert_array_equal(shown.transpose(0, 2, 3, 1), want)
    assert opened(tmp_path, f"{folder.name}#train").tasks[0].split.num_samples == (4 if hundred else 20)
    assert opened(tmp_path.parent, tmp_path.name).tasks[0].split.num_samples == 4  # the folder around it
    probes = [{"train": f"{folder}#train", "test": str(folder), "validation": 0.5, "l2": [0.1], "neighbours": [1]}]
    config = recipe(str(folder), probes=probes)
    results = Evaluator(config)(model(config))
    assert {f"{folder.name}/zero_shot_top1", f"{folder.name} from {folder.name}#train/knn_top1"} <= set(results)
    with pytest.raises(UserError, match=r"expected one of the splits train, test, got val"):
        opened(tmp_path, f"{folder.name}#val")
    file = folder / ("test.bin" if hundred else "test_batch.bin")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"expected records of 3,07[34] bytes, got .* is the file complete"):
        opened(tmp_path, folder.name)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        opened(tmp_path, folder.name)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize(("names", "archive"), [(("batches.meta", "test_batch"), "10"), (("meta", "test"), "100")])
def test_cifars_pickles_are_not_opened(tmp_path, names, archive):
    for name in names:
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError) as refused:
        opened(tmp_path.parent, tmp_path.name)
    assert "files are pickles" in str(refused.value)
    assert f"Take the binary version (cifar-{archive}-binary.tar.gz" in str(refused.value)


WIDE = ["A half-red/half-blue picture, isn't it?", "word " * 40]


def test_conventions_of_albef_in_every_format(tmp_path):
    """Squashed pictures and cleaned captions, beside the defaults: centre crops, captions as they stand."""
    wide = np.zeros((16, 48, 3), dtype=np.uint8)
    wide[:, :24, 0] = wide[:, 24:, 2] = 255
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    (tmp_path / "wide.png").write_bytes(buffer.getvalue())
    listed = [{"image": "wide.png", "caption": WIDE, "negatives": {"order": ["Blue; red!"]}}]
    (tmp_path / "listed.json").write_text(json.dumps(listed))
    write_tar(tmp_path / "00000.tar", [{"png": buffer.getvalue(), "txt": "\n".join(WIDE), "json": {}}])
    (tmp_path / "wds" / "test").mkdir(parents=True)
    write_tar(tmp_path / "wds" / "test" / "0.tar", [{"png": buffer.getvalue(), "txt": "\n".join(WIDE)}])
    (tmp_path / "wds" / "dataset_type.txt").write_text("retrieval\n")
    cleaned = ["a half red half blue picture isnt it", "word " * 29 + "word"]
    for name in ("listed.json", "00000.tar", "wds"):
        plain = opened(tmp_path, name, classes=None).tasks[0].split
        theirs = opened(tmp_path, name, classes=None, resize="squash", clean_captions=True).tasks[0].split
        assert plain.caption_lists == [[WIDE[0], WIDE[1].strip()]]
        assert theirs.caption_lists == [cleaned]
        cut, squashed = (next(split.batches(1)).images[0][0] for split in (plain, theirs))
        assert cut.shape == squashed.shape == (3, 16, 16)
        want = np.asarray(Image.fromarray(wide).resize((16, 16), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(squashed.permute(1, 2, 0).numpy(), want)
        np.testing.assert_array_equal(cut.permute(1, 2, 0).numpy(), wide[:, 16:32])
    assert opened(tmp_path, "listed.json", clean_captions=True).tasks[0].split.items[0].negatives == {
        "order": ["blue red"]
    }


def everything(root: Path) -> dict[str, float]:
    names = ("listed.json", "pairs.json", "karpathy.json", "wds", "test")
    probes = [{"train": str(root / "train"), "test": str(root / "test"), "validation": 0.3, "l2": [1e-1, 1.0]}]
    config = recipe(*(str(root / name) for name in names), geometry=True, probes=probes)
    return Evaluator(config, rank=rank(), world_size=world_size())(model(config))


def test_all_of_it_on_any_number_of_ranks(ranks, root):
    want = everything(root)
    assert {
        "listed/composition_order",
        "listed/composition_attribute/low",
        "karpathy/cross_uniformity",
        "wds/zero_shot_top1/chance",
        "test from train/probe_top1",
        "test from train/knn_tower_top1/high",
        "test from train/probe_tower_l2",
    } <= set(want)
    assert want["listed/composition_attribute/chance"] == pytest.approx(1 / 3)
    assert want["pairs/images"] == 3
    assert "wds/image_to_text_R@1" not in want
    for got in ranks(3, everything, root):
        assert list(got) == list(want)
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def compositions():
    g = torch.Generator().manual_seed(0)
    image, caption = torch.randn(7, 4, generator=g), torch.randn(7, 4, generator=g)
    samples = torch.tensor([0, 0, 1, 2, 2, 2, 3, 5, 6])
    kind = torch.tensor([0, 1, 0, 1, 1, 0, 0, 0, 1])
    wrong = torch.randn(9, 4, generator=g)
    wrong[2] = caption[1]  # a tie
    image[5] = torch.nan  # a comparison with it is false
    here, mine = (slice(s.start, s.stop) for s in (share(7), share(9)))
    numbers = composition(
        image[here], caption[here], wrong[mine],
        sample_of_wrong=samples[mine], kind_of_wrong=kind[mine], kinds=["a", "b"],
    )  # fmt: skip
    want = {}
    for place, name in enumerate("ab"):
        has = [i for i in range(7) if any(samples[j] == i and kind[j] == place for j in range(9))]
        rivals = [[j for j in range(9) if samples[j] == i and kind[j] == place] for i in has]
        right = [all(image[i] @ wrong[j] < image[i] @ caption[i] for j in js if j != 2) and 2 not in js
                 for i, js in zip(has, rivals, strict=True)]  # fmt: skip
        want[name] = (sum(right) / len(has), sum(1 / (1 + len(js)) for js in rivals) / len(has))
    return {name.removeprefix("composition_"): (one.value, one.chance) for name, one in numbers.items()}, want


def test_composition_is_its_definition(ranks):
    for got, want in [compositions(), *ranks(2, compositions)]:
        for name in "ab":
            assert got[name] == pytest.approx(want[name])


def test_a_probe_learns_what_there_is_to_learn(tmp_path):
    """Flat colours: any features tell them apart, so every method is right on every image."""
    import io

    from PIL import Image

    for part, shade in (("train", 200), ("test", 230)):
        for place, name in enumerate(("blue", "green", "red")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(10):
                colour = [20 + i] * 3
                colour[2 - place] = shade + i
                buffer = io.BytesIO()
                Image.new("RGB", (16, 16), tuple(colour)).save(buffer, "PNG")
                (tmp_path / part / name / f"{i}.png").write_bytes(buffer.getvalue())
    probes = [
        {"train": str(tmp_path / "train"), "test": str(tmp_path / "test"), "validation": 0.2, "neighbours": [1, 3]}
    ]
    config = recipe(probes=probes)
    results = Evaluator(config)(model(config))
    found = {name.rpartition("/")[2]: value for name, value in results.items() if name.endswith("top1")}
    assert found == {"probe_top1": 1, "knn_top1": 1, "probe_tower_top1": 1, "knn_tower_top1": 1}


def test_mistakes_in_files(root, tmp_path):
    def refused(message: str, content, **options):
        file = tmp_path / "wrong.json"
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            Evaluator(recipe(str(file), **options))

    refused(r"^evaluation.splits: .*expected a list of \{image, caption\}", {"pictures": 3})
    refused(r"^evaluation.splits: .*entry 0: expected image and caption", [{"caption": "x"}])
    refused(r"^evaluation.splits: .*a.png has no caption", [{"image": "a.png", "caption": []}])
    refused(r"^evaluation.image_root: .*1 images of 1 that do not exist", [{"image": "a.png", "caption": "x"}])
    refused(r"^evaluation.splits: .* is empty", [])
    refused(r"^evaluation.splits: .*expected one of the splits train, got test", {"images": [
        {"split": "train", "filename": "a.png", "sentences": []}]})  # fmt: skip
    refused(
        r"^evaluation.splits: .*images\[0\]: expected an image with its split \(Karpathy's format\), got 3",
        {"images": [3]},
    )
    refused(r"^evaluation.splits: .*images\[0\]: expected filename and sentences with raw, got \{", {"images": [
        {"split": "test", "filename": "a.png", "sentences": [{"tokens": ["x"]}]}]})  # fmt: skip
    for content in (b'{"images": [', b'["caf\xe9"]'):
        (tmp_path / "broken.json").write_bytes(content)
        with pytest.raises(UserError, match=r"^evaluation.splits: .*broken.json( cannot be read)?: .*expected JSON"):
            Evaluator(recipe(str(tmp_path / "broken.json")))
    with pytest.raises(UserError, match=r"^evaluation.templates: expected a list, imagenet or a file"):
        opened(root, "wds", templates="nowhere.txt")
    with pytest.raises(UserError, match=r"^evaluation.class_names: expected imagenet or a file"):
        opened(root, "wds", class_names="nowhere.txt")
    (tmp_path / "classes" / "full").mkdir(parents=True)
    (tmp_path / "classes" / "full" / "0.png").write_bytes(picture(0))
    (tmp_path / "classes" / "void").mkdir()
    with pytest.raises(UserError, match=r"^evaluation.splits: .*the class void has no images"):
        Evaluator(recipe(str(tmp_path / "classes")))
    (tmp_path / "wds" / "test").mkdir(parents=True)
    write_tar(tmp_path / "wds" / "test" / "0.tar", [{"png": picture(0), "cls": "0"}])
    with pytest.raises(UserError, match=r"^evaluation.splits: .*expected a classnames.txt"):
        Evaluator(recipe(str(tmp_path / "wds")))
    write_tar(tmp_path / "wds" / "test" / "0.tar", [{"png": picture(0), "cls": "7"}])
    (tmp_path / "wds" / "classnames.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"^evaluation.classes: .*sample 0 has the class 7, which is none of the 2"):
        Evaluator(recipe(str(tmp_path / "wds")))
    pairs = write_split(tmp_path / "pairs", 4)
    probe = {"train": str(root / "train"), "test": str(tmp_path / "classes")}
    with pytest.raises(UserError, match=r"^evaluation.probes.test: .*the class void has no images"):
        Evaluator(Config.model_validate({"data": {"image_size": 16}, "evaluation": {"probes": [probe]}}))
    probe = {"train": str(root / "train"), "test": str(pairs), "classes": "json.concept"}
    with pytest.raises(UserError, match=r"^evaluation.probes.test: .* has other classes \(4\) than .* \(3\)"):
        Evaluator(Config.model_validate({"data": {"image_size": 16}, "evaluation": {"probes": [probe]}}))
    (tmp_path / "alone" / "full").mkdir(parents=True)
    (tmp_path / "alone" / "full" / "0.png").write_bytes(picture(0))
    probe = {"train": str(tmp_path / "alone"), "test": str(tmp_path / "alone")}
    with pytest.raises(UserError, match=r"^evaluation.probes.train: expected at least 2 labelled .* got 1 in .*alone"):
        Evaluator(Config.model_validate({"data": {"image_size": 16}, "evaluation": {"probes": [probe]}}))
    bad = tmp_path / "bad.json"
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad.write_text(json.dumps([{"image": "bad.png", "caption": "x"}]))
    config = recipe(str(bad))
    evaluator = Evaluator(config)
    with pytest.raises(UserError, match=r"^evaluation.splits: .*bad.png cannot be used"):
        evaluator(model(config))


def test_a_split_of_one_pair_has_no_geometry(tmp_path):
    config = recipe(str(write_split(tmp_path / "one", 1)), geometry=True)
    results = Evaluator(config)(model(config))
    assert results["one/R@mean"] == 1.0
    assert not [name for name in results if "uniformity" in name or "alignment" in name]
