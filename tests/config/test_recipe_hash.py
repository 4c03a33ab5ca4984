"""Recipes over versions, and over bases that name other data."""

from amclr_scale.config.load import load, recipe, recipe_hash


def test_keys_that_came_later_leave_the_hashes_of_older_recipes_alone():
    """Else a run that goes on with another version begins anew, and every finished cell of a study is out of date."""
    for name, known in (("clip", "0c312f2e763d"), ("sogclr", "219bb19bd1c5")):
        words = ["train.epochs=1", f"objective.name={name}"]
        assert recipe_hash(load(None, words)) == known
        for word in (
            "optimizer.layer_decay=0.9", "model.image.frozen=true", "model.text.frozen_head=true",
            "data.text_negative=number", "model.image.options={a: 1}", "objective.reference=true",
        ):  # fmt: skip
            more = ["objective.name=negclip", "data.text_negatives=1"] if "negative" in word else []
            files = ["data.image_reference=a.npy", "data.text_reference=b.npy"] if "reference" in word else []
            plain, changed = load(None, [*words, *more]), load(None, [*words, *more, *files, word])
            assert recipe_hash(changed) != recipe_hash(plain), word
            key = word.partition("=")[0]
            there = [any(f"{k}.".startswith(f"{key}.") for k in recipe(config)) for config in (plain, changed)]
            assert there == [False, True], word
    of_filip = ["train.epochs=1", "objective.name=filip"]
    assert recipe_hash(load(None, of_filip)) == "169141b0a748"  # keys that other objectives have had before
    assert recipe_hash(load(None, [*of_filip, "objective.mask_duplicates=text"])) != "169141b0a748"


def test_data_sets_with_names_replace_those_of_the_base(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {train: {a: emoji/train}, lanes: 4}\ntrain: {epochs: 1}\n")
    found = load(tmp_path / "a.yaml", ["data.train={b: emoji/val_style}", "train.global_batch_size=32"])
    assert (found.data.train, found.data.lanes) == ({"b": "emoji/val_style"}, 4)
    assert (found.train.epochs, found.train.global_batch_size) == (1, 32)
