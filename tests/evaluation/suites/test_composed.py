"""SugarCrepe, ARO, Winoground and WinoGAViL from files as their authors publish them, against plain definitions."""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from amclr_scale.errors import UserError
from amclr_scale.evaluation.suites.aro_relations import LEFT_OUT
from amclr_scale.evaluation.suites.choices import (
    Case,
    open_aro_attribution,
    open_aro_order,
    open_aro_relation,
    open_sugarcrepe,
    won,
)
from amclr_scale.evaluation.suites.pairs import above
from amclr_scale.evaluation.suites.winogavil import guessed, jaccards, open_winogavil, prompt
from amclr_scale.evaluation.suites.winoground import judged, open_winoground
from tests.evaluation.suites.made import Directions, pictures, place, winogavil


def features(paths, texts, boxes=None):
    """What the model makes of picture files (16 x 16, or parts of that size) and texts, by our own hands."""
    model, seen = Directions(), []
    for number, path in enumerate(paths):
        with Image.open(path) as opened:
            cut = opened.convert("RGB").crop(boxes[number]) if boxes else opened.convert("RGB")
        seen.append(torch.from_numpy(np.array(cut)).permute(2, 0, 1))
    tokens = place("winoground", "winoground", paths[0], paths[0]).reading.tokenizer(list(texts))
    return model(images=(torch.stack(seen),))["image"], model(texts=(tokens,))["text"]


def test_sugarcrepe(tmp_path):
    names = [f"{i:012d}.jpg" for i in range(6)]
    pictures(tmp_path / "val2017", names)
    told = {
        str(3 * i): {"filename": names[i % 6], "caption": f"a cat {i}", "negative_caption": f"a dog {i}"}
        for i in range(20)
    }
    file = tmp_path / "sugarcrepe" / "swap_att.json"
    file.parent.mkdir()
    file.write_text(json.dumps(told))
    opened = open_sugarcrepe(place("sugarcrepe", "swap_att", file, tmp_path))
    got = opened.measure(Directions())[0]["right"]
    image, right = features([tmp_path / "val2017" / one["filename"] for one in told.values()],
                            [one["caption"] for one in told.values()])  # fmt: skip
    _, wrong = features([tmp_path / "val2017" / names[0]], [one["negative_caption"] for one in told.values()])
    want = ((image * right).sum(1) > (image * wrong).sum(1)).double().mean()
    assert 0 < want < 1
    assert got.value == pytest.approx(float(want), abs=1e-12)
    assert got.chance == 0.5
    assert len(got.parts[0].sums) == 6  # captions of one picture belong together
    assert set(opened.files) == {"file:swap_att.json", *names}
    (tmp_path / "val2017" / names[3]).unlink()
    with pytest.raises(UserError, match=r"^--data: swap_att: 1 of 6 pictures do not exist, the first is .*0003.jpg"):
        open_sugarcrepe(place("sugarcrepe", "swap_att", file, tmp_path))
    file.write_text(json.dumps({"7": {"filename": "x.jpg", "caption": "a"}}))
    with pytest.raises(UserError, match=r"^--data: swap_att: entry 7 of .*: expected filename, caption, negative_cap"):
        open_sugarcrepe(place("sugarcrepe", "swap_att", file, tmp_path))
    file.write_text("{}")
    with pytest.raises(UserError, match=r"^--data: swap_att: expected entries in .*, found none"):
        open_sugarcrepe(place("sugarcrepe", "swap_att", file, tmp_path))


def visual_genome(folder, kinds, key):
    """A file of VG-Relation or VG-Attribution, whose boxes cut 16 x 16 pixels out of pictures of 24 x 24."""
    names = [f"{i}.jpg" for i in range(5)]
    pictures(folder / "images", names, size=24)
    told = [
        {
            "image_path": names[i % 5], "true_caption": f"the {i} is {kind}", "false_caption": f"{kind} is the {i}",
            "bbox_x": i % 7, "bbox_y": i % 3, "bbox_w": 16, "bbox_h": 16, key: kind,
        }
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    boxes = [(one["bbox_x"], one["bbox_y"], one["bbox_x"] + 16, one["bbox_y"] + 16) for one in told]
    paths = [folder / "images" / one["image_path"] for one in told]
    image, right = features(paths, [one["true_caption"] for one in told], boxes)
    _, wrong = features(paths[:1], [one["false_caption"] for one in told], [(0, 0, 16, 16)])
    return told, ((image * right).sum(1) > (image * wrong).sum(1)).numpy()


def test_aro_relation_is_a_macro_accuracy_over_the_boxes(tmp_path):
    kinds = ["on", "under", "near", "holding", "on", "on", "under", "near", "on", "holding", "holding", "on"]
    told, hits = visual_genome(tmp_path, kinds, "relation_name")
    file = tmp_path / "visual_genome_relation.json"
    file.write_text(json.dumps(told))
    numbers, plain = open_aro_relation(place("aro", "visual_genome_relation", file, tmp_path)).measure(Directions())
    kept = [kind for kind in sorted(set(kinds)) if kind != "near"]  # near is symmetric: the authors leave it out
    want = np.mean([hits[[k == kind for k in kinds]].mean() for kind in kept])
    assert numbers["macro_right"].value == pytest.approx(want, abs=1e-12)
    assert numbers["right"].value == pytest.approx(hits.mean(), abs=1e-12)
    assert numbers["macro_right"].value != numbers["right"].value
    rows = {kind: np.array([k == kind for k in kinds]) for kind in kept}
    pictures = np.array([(one["image_path"], one["bbox_x"], one["bbox_y"]) for one in told])
    drawn = {kind: len(np.unique(pictures[mine], axis=0)) for kind, mine in rows.items()}
    assert min(drawn.values()) > 1
    moves = sum(
        np.where(mine, hits - hits[mine].mean(), 0) / mine.sum() / 3 * (drawn[kind] / (drawn[kind] - 1)) ** 0.5
        for kind, mine in rows.items()
    )
    by_picture = [moves[(pictures == one).all(1)].sum() for one in np.unique(pictures, axis=0)]
    assert numbers["macro_right"].standard_error == pytest.approx(np.linalg.norm(by_picture), abs=1e-12)
    assert (numbers["macro_right"].chance, plain) == (pytest.approx(0.5), {"kinds": 3.0})
    assert len(LEFT_OUT) == 157
    assert {"near", "next to", "in front of"} & LEFT_OUT == {"near", "next to"}
    file.write_text(json.dumps([{**told[0], "relation_name": "near"}]))
    with pytest.raises(UserError, match="expected relations that the authors count, found none"):
        open_aro_relation(place("aro", "visual_genome_relation", file, tmp_path))
    for key, value, box in (
        ("bbox_w", 0, "0, 0, 0, 16"),
        ("bbox_x", float("nan"), "nan, 0, 16, 16"),
        ("bbox_h", float("inf"), "0, 0, 16, inf"),
    ):
        file.write_text(json.dumps([{**told[0], key: value}]))
        with pytest.raises(UserError, match=rf"entry 0 of .*: expected a box with pixels in it, got \({box}\)"):
            open_aro_relation(place("aro", "visual_genome_relation", file, tmp_path))
    for name in ("../elsewhere.jpg", "/elsewhere.jpg"):
        file.write_text(json.dumps([{**told[0], "image_path": name}]))
        with pytest.raises(
            UserError, match=r"expected names of pictures inside their folder in .*, got .*elsewhere.jpg"
        ):
            open_aro_relation(place("aro", "visual_genome_relation", file, tmp_path))


def test_aro_attribution_counts_pairs_with_25_cases(tmp_path):
    kinds = [["old", "red"]] * 26 + [["wet", "big"]] * 30 + [["few", "small"]] * 24
    told, hits = visual_genome(tmp_path, kinds, "attributes")
    file = tmp_path / "visual_genome_attribution.json"
    file.write_text(json.dumps(told))
    opened = open_aro_attribution(place("aro", "visual_genome_attribution", file, tmp_path))
    numbers, plain = opened.measure(Directions())
    assert numbers["macro_right"].value == pytest.approx((hits[:26].mean() + hits[26:56].mean()) / 2, abs=1e-12)
    assert plain == {"kinds": 2.0}
    file.write_text(json.dumps(told[56:]))
    with pytest.raises(UserError, match="expected pairs of attributes with at least 25 cases"):
        open_aro_attribution(place("aro", "visual_genome_attribution", file, tmp_path))


def test_aro_order(tmp_path):
    pictures(tmp_path / "coco", ["a.jpg", "b.jpg"])
    told = [{"image": f"{'ab'[i % 2]}.jpg", "caption_options": [f"{k} of {i}" for k in range(5)]} for i in range(12)]
    file = tmp_path / "coco_order.json"
    file.write_text(json.dumps(told))
    numbers, _ = open_aro_order(place("aro", "coco_order", file, tmp_path)).measure(Directions())
    hits = []
    for one in told:
        image, text = features([tmp_path / "coco" / one["image"]], one["caption_options"])
        hits.append(int((image @ text.T).argmax() == 0))
    assert 0 < sum(hits) < 12
    assert numbers["right"].value == pytest.approx(sum(hits) / 12, abs=1e-12)
    assert numbers["right"].chance == pytest.approx(0.2)
    file.write_text(json.dumps([{"image": "a.jpg", "caption_options": ["alone"]}]))
    with pytest.raises(UserError, match="expected caption_options with the right caption and wrong ones behind it"):
        open_aro_order(place("aro", "coco_order", file, tmp_path))


def test_ties_and_what_is_no_number_lose():
    one, two = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])), torch.tensor([[1.0, 0.0]])
    assert won(two, one, [Case(0, 0, [1]), Case(0, 0, [2]), Case(0, 0, [2, 1])]).tolist() == [0, 1, 0]
    nan = float("nan")
    first, second = torch.tensor([1.0, 0.5 + 5e-7, nan, 1.0]), torch.tensor([nan, 0.5, 0.0, 0.0])
    assert above(first, second).tolist() == [False, False, False, True]


def test_winoground(tmp_path):
    folder = tmp_path / "winoground" / "data"
    pictures(folder / "images", [f"ex_{i}_img_{k}.png" for i in range(30) for k in (0, 1)])
    told = [
        {
            "id": i, "image_0": f"ex_{i}_img_0", "image_1": f"ex_{i}_img_1", "caption_0": f"grass and mug {i}",
            "caption_1": f"mug {i} and grass", "collapsed_tag": "Object" if i % 3 else "Relation",
        }
        for i in range(30)
    ]  # fmt: skip
    file = folder / "examples.jsonl"
    file.write_text("\n".join(map(json.dumps, told)))
    numbers, _ = open_winoground(place("winoground", "winoground", file, tmp_path)).measure(Directions())
    want: dict[str, list[int]] = {"text_score": [], "image_score": [], "group_score": []}
    for one in told:
        i, c = features([folder / "images" / f"{one[f'image_{k}']}.png" for k in (0, 1)],
                        [one["caption_0"], one["caption_1"]])  # fmt: skip
        s = c @ i.T  # s[c, i]
        text = bool(s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1])
        image = bool(s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0])
        for name, hit in (("text_score", text), ("image_score", image), ("group_score", text and image)):
            want[name].append(hit)
    assert 0 < sum(want["group_score"]) <= sum(want["text_score"]) < 30
    assert want["text_score"] != want["image_score"]
    for name, hits in want.items():
        assert numbers[name].value == pytest.approx(np.mean(hits), abs=1e-12)
        assert numbers[f"{name}_Relation"].value == pytest.approx(np.mean(hits[::3]), abs=1e-12)
    assert [numbers[name].chance for name in want] == [1 / 4, 1 / 4, 1 / 6]
    for path in (folder / "images").iterdir():
        path.unlink()
    (folder / "images.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"^--data: winoground: expected the pictures of .*images.zip unpacked beside"):
        open_winoground(place("winoground", "winoground", file, tmp_path))


def test_a_model_that_maps_all_to_one_point_scores_nothing():
    same = torch.ones(4, 1)
    assert [float(hits.sum()) for hits in judged(same, same, [((0, 1), (0, 1)), ((2, 3), (2, 3))]).values()] == [0] * 3
    assert jaccards(same, same, [(0, [0, 1, 2, 3], [True, True, False, False])]).tolist() == [0.0]
    nan = torch.full((4, 1), float("nan"))
    assert jaccards(nan, same, [(0, [0, 1, 2], [True, True, False])]).tolist() == [pytest.approx(1 / 3)]


def test_winogavil(tmp_path):
    letters = [f"thing {k}" for k in range(12)]
    instances = [
        (f"{'owl' if i % 2 else 'Tree'} {i}", letters[: (5, 6, 10, 12)[i % 4]], letters[i % 3 : i % 3 + 2 + i % 2])
        for i in range(24)
    ]
    file = winogavil(tmp_path / "winogavil", instances)
    numbers, _ = open_winogavil(place("datacomp38", "winogavil", file, tmp_path)).measure(Directions())
    assert [prompt("Tree 2"), prompt("owl")] == ["A tree 2", "An owl"]
    want = []
    for cue, names, right in instances:
        image, text = features([tmp_path / "winogavil" / "images" / f"{one}.jpg" for one in names], [prompt(cue)])
        chosen = {names[k] for k in (-(image @ text.T)[:, 0]).argsort()[: len(right)].tolist()}
        want.append(len(chosen & set(right)) / len(chosen | set(right)))
    large = [score for score, (_, names, _) in zip(want, instances, strict=True) if len(names) >= 10]
    assert len(set(want)) > 2
    assert numbers["jaccard"].value == pytest.approx(np.mean(want), abs=1e-12)
    assert numbers["jaccard_10_12"].value == pytest.approx(np.mean(large), abs=1e-12)
    everyone = [len({0, 1} & set(chosen)) / len({0, 1} | set(chosen)) for chosen in combinations(range(5), 2)]
    assert guessed(5, 2) == pytest.approx(np.mean(everyone))
    few = winogavil(tmp_path / "few", instances[:2])
    with pytest.raises(UserError, match=r"^--data: winogavil: .*: expected instances with 10 and more candidates"):
        open_winogavil(place("datacomp38", "winogavil", few, tmp_path))
    bad = winogavil(tmp_path / "bad", [("cue", letters[:5], ["another"])])
    with pytest.raises(UserError, match=r"^--data: winogavil: row 0 of .*: expected a cue, and associations among"):
        open_winogavil(place("datacomp38", "winogavil", bad, tmp_path))


def test_pictures_are_looked_for_where_the_user_says(tmp_path):
    pictures(tmp_path / "elsewhere", ["a.jpg"])
    file = tmp_path / "swap_obj.json"
    file.write_text(json.dumps({"0": {"filename": "a.jpg", "caption": "x", "negative_caption": "y"}}))
    there = place("sugarcrepe", "swap_obj", file, tmp_path)
    with pytest.raises(
        UserError, match=r"^--data: swap_obj: expected the picture a.jpg in one of .*; put the pictures"
    ):
        open_sugarcrepe(there)
    options = there.options.model_copy(update={"image_root": str(tmp_path / "elsewhere")})
    assert open_sugarcrepe(replace(there, options=options)).items == 1
