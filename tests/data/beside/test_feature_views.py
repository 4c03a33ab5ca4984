"""Further image views beside features of images: rows of other samples of the group, drawn as their pictures are."""

import logging
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from amclr_scale.commands.embedding.of_towers import write_features
from amclr_scale.config.schema import Config
from amclr_scale.data.pipeline import Pipeline
from amclr_scale.errors import UserError
from amclr_scale.memory.account import account
from amclr_scale.memory.towers import trace
from amclr_scale.study.planning.cost import encoder_cost, encoder_flops
from tests.data.beside.test_features import B, compared, config, near, opened
from tests.data.shards import Member, pair, write_tar
from tests.data.test_loader import assert_same, joined, take

CONCEPTS = ("a", "b", "a", "c", "b", "a", "a", "b", "d", "d", None, ["a"])  # of every twelve; c is alone in the first
FEATURES, NONE = ("image",), ()
AMCLR = {"name": "amclr", "omega": 1, "gamma": 0.8}
VIEWS = {
    "data__image_views": 1, "data__image_view_from": "group", "data__image_group": "json.concept",
    "data__text_views": 1, "data__resident": "host", "objective": AMCLR,
}  # fmt: skip


def members(concepts: Any = CONCEPTS) -> list[Member]:
    """24 samples; the picture of 5 and the caption of 14 cannot be read, and 3 is alone with what it shows."""
    found = [member for i in range(24) for member in pair(i, concept="e" if i == 15 else concepts[i % len(concepts)])]
    found[3 * 5] = found[3 * 5][0], b"no picture"
    found[3 * 14 + 1] = found[3 * 14 + 1][0], b" "
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with samples, and features of their images."""
    folder = tmp_path_factory.mktemp("views")
    write_tar(folder / "0.tar", members())
    list(write_features(config(folder, FEATURES), device="cpu", batch_size=7))
    return folder


def test_views_are_rows_of_the_samples_that_the_reading_path_draws(made, caplog):
    """Each picture's row beside it: those of a run that opens pictures say whose they are by their colour."""
    caplog.set_level(logging.INFO)
    changed = {**VIEWS, "data__image_views": 2, "objective": {**AMCLR, "omega": 2}, "data__text_views": 2}
    pictures, rows = (take(config(made, sides, **changed).data, 15) for sides in (NONE, FEATURES))
    table, others = torch.from_numpy(np.load(made / "image.npy")), 0
    for ours, theirs in zip(rows, pictures, strict=True):
        assert torch.equal(ours.ids, theirs.ids)
        assert all(map(torch.equal, ours.texts, theirs.texts))
        for view, (features, images) in enumerate(zip(ours.images, theirs.images, strict=True)):
            whose = images[:, 0, 0, -1].long()  # the red of sample i is i
            assert torch.equal(features, table[whose])
            others += int((whose != ours.ids).sum()) if view else 0
    assert 150 < others < 200  # of 240: 6 of 23 show their own
    said = [record.getMessage() for record in caplog.records if "image_group" in record.getMessage()]
    alone = "data: 2 of 24 samples are alone in their data.image_group, and 5 have nothing there, or no picture; their"
    assert len(said) == 2
    assert all(line.startswith(alone) for line in said)


def test_ranks_workers_and_a_later_start_get_the_same(made):
    data = config(made, FEATURES, **VIEWS).data
    plain = take(data, 6)
    assert_same(joined([take(data, 6, rank=rank, world_size=2, workers=rank) for rank in range(2)]), plain)
    assert_same(take(data, 3, start_step=3), plain[3:])


def test_repeated_views_are_counted_as_those_of_pictures(made):
    changed = {**VIEWS, "data__image_views": 3, "data__text_views": 3, "objective": {**AMCLR, "omega": 3}}
    loaders = [opened(config(made, sides, **changed)).loader for sides in (NONE, FEATURES)]
    for loader in loaders:
        list(islice(loader, 9))
    of_pictures, of_rows = (loader.repeated() for loader in loaders)
    assert of_rows == of_pictures
    assert 0 < of_rows["repeated_images"] < 0.5
    assert 0 < of_rows["repeated_texts"] < 1


@pytest.mark.parametrize(
    ("world", "objective", "stage"),
    [
        (2, AMCLR, 0),
        (2, {"name": "clip", "omega": 1}, 0),
        pytest.param(1, AMCLR, 0, marks=pytest.mark.slow),
        pytest.param(2, {**AMCLR, "name": "xamclr"}, 3, marks=pytest.mark.slow),
    ],
)
def test_training_is_that_with_the_tower(ranks, made, world, objective, stage):
    """Micro-batches of two, of which the second pass repeats all; no picture is opened."""
    for plain, found in ranks(
        world, compared, made, FEATURES, **{**VIEWS, "objective": objective}, execution__zero_stage=stage
    ):
        near(found["weights"], plain["weights"], 1e-6)
        assert found["ids"] == plain["ids"]
        assert not {5, 14} & {*found["ids"]}
        assert found["decoded"] == 0
        assert found["flops"].image == 2 * 2 * 64 * 8  # the head's, of two views


def test_of_a_sample_only_what_is_said_of_it_is_read(made, monkeypatch):
    opened_pictures = []
    monkeypatch.setattr(Pipeline, "_decoded", lambda *of: opened_pictures.append(of))
    take(config(made, FEATURES, **VIEWS).data, 4)
    assert opened_pictures == []


REFUSED = {  # what a run says otherwise: the words
    r"^data\.image_view_from: expected group beside data\.features\.image, .* \(such as json\.concept\), got image; or "
    r"set data\.image_views=0$": {"data__image_view_from": "image", "data__image_group": None},
    r"data\.image_view_from: expected group beside .*, got base; or": {
        "data__image_view_from": "base", "data__image_group": None,
    },
    r"^data\.image_group: image_view_from group reads it, expected such as json\.concept": {"data__image_group": None},
    r"^data\.resident: image_view_from group needs all samples at hand, expected host, got none$": {
        "data__resident": "none"
    },
    r"^data\.resident: expected host beside data\.features\.image: .*got device$": {"data__resident": "device"},
    r"^data\.image_view\.amclr: expected 0 beside data\.features\.image, .*got 1\.0$": {
        "data__image_view": {"amclr": 1.0, "crop_scale": [1, 1], "flip": 0}
    },
    r"^data\.image_group: expected a place where samples say what they show, got json\.conzept: none of 23": {
        "data__image_group": "json.conzept"
    },
    r"data\.image_negatives: expected 0 beside data\.features\.image": {
        "objective": {"name": "negclip"}, "data__image_negatives": 1, "data__text_negatives": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_rows_is_refused(made, words):
    with pytest.raises(UserError, match=f"(?m){words}"):
        take(config(made, FEATURES, **{**VIEWS, **REFUSED[words]}).data, 1)


def test_a_view_of_nothing_drawn_may_be_named(made):
    named = config(made, FEATURES, **VIEWS, data__image_view={"crop_scale": [1, 1], "flip": 0}).data
    assert_same(take(named, 2), take(config(made, FEATURES, **VIEWS).data, 2))


@pytest.mark.parametrize("sides", [NONE, FEATURES])
def test_groups_of_one_are_refused(made, tmp_path, sides):
    """Every further view would be the picture itself."""
    write_tar(tmp_path / "0.tar", members([f"of {i}" for i in range(23)] + [None]))
    list(write_features(config(tmp_path, FEATURES), device="cpu", batch_size=7))
    with pytest.raises(
        UserError,
        match=r"^data\.image_group: expected a place where several samples have the same, got json\.concept: of 24, 2 "
        r"have nothing there, or no picture, and 22 what no other has$",
    ):
        take(config(tmp_path, sides, **VIEWS).data, 1)


def test_features_of_another_corpus_are_refused(made, tmp_path):
    write_tar(tmp_path / "0.tar", members(("a", "b")))
    for name in ("image.npy", "image.npy.json"):
        shutil.copyfile(made / name, tmp_path / name)
    with pytest.raises(
        UserError, match=r"features\.image: .*expected rows of the samples in data\.train, got those of"
    ):
        take(config(tmp_path, FEATURES, **VIEWS).data, 1)


def costs(folder: Path, sides: tuple[str, ...], **changed: Any) -> Config:
    settings: Config = config(folder, sides, **changed)
    return settings


def test_a_view_costs_the_head_alone(made):
    one, two, pictures = costs(made, FEATURES), costs(made, FEATURES, **VIEWS), costs(made, NONE, **VIEWS)
    assert [encoder_cost(each) for each in (one, two, pictures)] == [1, 2, 2]
    more = {**VIEWS, "data__image_views": 2, "data__text_views": 0, "objective": {"name": "slip"}}
    assert encoder_cost(costs(made, FEATURES, **more)) == 1  # of images, no tower is run
    assert encoder_cost(costs(made, NONE, **more)) == 2
    assert encoder_flops(two) == 2 * encoder_flops(one)
    assert encoder_flops(pictures) > 3 * encoder_flops(two)
    assert trace(two, "image", "cpu").flops == 2 * trace(one, "image", "cpu").flops == 2 * 2 * 64 * 8


@pytest.mark.slow
def test_the_account_counts_a_row_for_each_view(made):
    one, two = (
        account(costs(made, FEATURES, **more), world_size=1, num_samples=24, device="cuda")
        for more in ({"data__resident": "host"}, VIEWS)
    )
    sizes = [{c.name: c.bytes for c in found.components} for found in (one, two)]
    assert sizes[1]["batch"] - sizes[0]["batch"] == 3 * B * (64 * 4 + 8 * 8)  # pinned twice, and once while it is made
    assert sizes[1]["image activations"] - sizes[0]["image activations"] >= 2 * 64 * 4  # a micro-batch's rows
    assert sizes[1]["towers at rest"] == sizes[0]["towers at rest"]
