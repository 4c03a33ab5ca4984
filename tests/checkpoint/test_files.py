"""A damaged checkpoint is never read silently, an older valid one is, and the message says so."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.resume import differences, find
from amclr_scale.checkpoint.start import agree_on_start, lock_new
from amclr_scale.config.load import build, recipe_hash
from amclr_scale.errors import UserError

NAMES = (
    "manifest.json", "state.json", "objective.safetensors", "rank_00000.safetensors", "rank_00001.safetensors",
    "tokenizer/tokenizer.json",
)  # fmt: skip


def configuration(folder, **keys):
    tree = {"train": {"samples": 6400, "global_batch_size": 64}, "run": {"folder": str(folder), "name": "a"}}
    for key, value in keys.items():
        section, _, name = key.partition("__")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    return build(tree)


def write(home, step, config, number=1, **about):
    folder = home / "a" / "checkpoints"
    here = files.staging(folder, step)
    here.mkdir(parents=True)
    state = {
        "step": step, "samples": step * 64, "total_steps": 100, "number": number, "recipe": recipe_hash(config),
        "config": config.model_dump(mode="json"), "data_fingerprint": "f", "tokenizer_fingerprint": "t", "ranks": 2,
        **about,
    }  # fmt: skip
    (here / "state.json").write_text(json.dumps(state))
    for name in NAMES[2:]:
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(name.encode() * 20 + bytes([step]))
    written = [files.describe(here / name, here) for name in NAMES[1:]]
    return files.commit(folder, step, written)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-5])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.fixture
def two(tmp_path):
    config = configuration(tmp_path, resume="auto")
    return config, write(tmp_path, 10, config), write(tmp_path, 20, config)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [truncated, flipped, lambda path: path.unlink()])
def test_a_damaged_file_sends_to_the_older_checkpoint(two, name, damage):
    config, old, new = two
    assert find(config).checkpoint == new
    damage(new / name)
    found = find(config)
    assert found.checkpoint == old
    assert len(found.complaints) == 1
    assert str(new) in found.complaints[0]
    assert name in found.complaints[0]
    with pytest.raises(UserError, match="cannot be used"):
        find(configuration(new.parents[2], resume=str(new)))
    damage(old / name)
    with pytest.raises(UserError, match="no checkpoint of this run can be used"):
        find(config)


def test_every_byte_of_the_manifest_counts(two):
    _, _, new = two
    manifest = new / "manifest.json"
    content = manifest.read_bytes()
    for at in range(0, len(content), 7):
        changed = bytearray(content)
        changed[at] ^= 1
        manifest.write_bytes(changed)
        try:
            same = json.loads(changed) == json.loads(content)  # white space
        except ValueError:
            same = False
        assert (files.fault(new) is None) == same


def test_latest_that_points_nowhere_is_told_and_not_needed(two):
    config, old, new = two
    (new.parent / "latest").write_text("step_00000099\n")
    found = find(config)
    assert found.checkpoint == new
    assert "latest points to step_00000099" in found.complaints[0]
    (new.parent / "latest").unlink()
    assert find(config).checkpoint == new
    shutil.rmtree(new)
    assert find(config).checkpoint == old


def test_what_was_being_written_is_never_read(two):
    config, _, new = two
    half = files.staging(new.parent, 30)
    shutil.copytree(new, half)
    assert find(config).checkpoint == new
    files.clean(new.parent)
    assert not half.exists()


@pytest.mark.parametrize("call", ["rename", "replace"])
def test_a_stop_between_two_calls_leaves_a_whole_checkpoint(two, monkeypatch, call):
    config, _, new = two
    with monkeypatch.context() as patch:
        patch.setattr(f"pathlib.Path.{call}", stop)
        with pytest.raises(KeyboardInterrupt):
            write(new.parents[2], 30, config)
    found = find(config)
    expected = new if call == "rename" else files.name_of(30)  # renamed already, though `latest` is behind
    assert found.checkpoint.name == getattr(expected, "name", expected)
    assert files.fault(found.checkpoint) is None


def stop(*_):
    raise KeyboardInterrupt


def test_newest_and_every_kth_are_kept(tmp_path):
    config = configuration(tmp_path)
    for number in range(1, 8):
        write(tmp_path, number * 10, config, number)
        files.thin_out(tmp_path / "a" / "checkpoints", 2, 3)
    assert files.steps(tmp_path / "a" / "checkpoints") == [70, 60, 30]
    assert (tmp_path / "a" / "checkpoints" / "latest").read_text() == "step_00000070\n"


@pytest.mark.parametrize("keep_every", [None, 1])
@pytest.mark.parametrize("harm", [truncated, lambda path: path.unlink(), lambda path: path.write_text("[]")])
def test_an_old_one_that_is_damaged_is_no_reason_to_end_a_run(tmp_path, keep_every, harm):
    config = configuration(tmp_path)
    harm(write(tmp_path, 10, config) / "state.json")
    write(tmp_path, 20, config)
    files.thin_out(tmp_path / "a" / "checkpoints", 1, keep_every)
    assert files.steps(tmp_path / "a" / "checkpoints") == [20]


def test_newer_ones_than_the_one_resumed_from_do_not_count(two):
    _, old, new = two
    files.set_aside_after(new.parent, 10)
    assert files.steps(new.parent) == [10]
    files.thin_out(new.parent, 1, None)
    assert files.fault(old) is None


def test_a_changed_recipe_is_refused_key_by_key(tmp_path):
    write(tmp_path, 10, configuration(tmp_path))
    changed = configuration(tmp_path, resume="auto", optimizer__lr=0.5, data__lanes=4)
    with pytest.raises(UserError) as refused:
        find(changed)
    assert "resume_changed=data.lanes,optimizer.lr" in str(refused.value)
    assert "optimizer.lr: 0.001 in the checkpoint, 0.5 now" in str(refused.value)
    accepted = changed.model_copy(update={"resume_changed": ["optimizer", "data.lanes"]})
    assert [line.split(":")[0] for line in find(accepted).changed] == ["data.lanes", "optimizer.lr"]


def test_keys_that_nothing_read_may_go(tmp_path):
    """Releases before 0.2 let them stand in a recipe, which is refused now until they are removed."""
    before = configuration(tmp_path)
    view = {**before.data.augmentation.model_dump(mode="json"), "flip": 0.25}
    tree = before.model_dump(mode="json")
    tree["data"] |= {"image_view": view, "text_view": "rules"}
    assert differences(tree, before) == {}
    seen = before.model_copy(update={"data": before.data.model_copy(update={"image_views": 1})})
    assert "data.image_view.flip: 0.25 in the checkpoint, nothing now" in differences(tree, seen).values()


def test_a_changed_execution_is_no_change(tmp_path):
    write(tmp_path, 10, configuration(tmp_path))
    how = configuration(
        tmp_path, resume="auto", execution__zero_stage=3, execution__micro_batch_size=4, train__max_hours=1.5,
        checkpoint__keep=9, data__cache="elsewhere",
    )  # fmt: skip
    found = find(how)
    assert found.changed == ()
    assert found.step(how) == 10


def test_a_changed_batch_size_counts_in_samples(tmp_path):
    write(tmp_path, 10, configuration(tmp_path))
    keys = {"resume": "auto", "resume_changed": "train.global_batch_size"}
    config = configuration(tmp_path, train__global_batch_size=128, **keys)
    assert find(config).step(config) == 5
    config = configuration(tmp_path, train__global_batch_size=512, **keys)
    with pytest.raises(UserError, match=r"train\.global_batch_size: expected a divisor of the 640 samples"):
        find(config).step(config)


def test_other_data_is_refused(two):
    config, _, _ = two
    found = find(config)
    found.check_data(config, "f")
    with pytest.raises(UserError, match=r"data\.train: the shards are not those"):
        found.check_data(config, "g")


def test_other_features_beside_the_data_are_refused(two):
    config, _, new = two
    data = config.data.model_copy(update={"image_reference": "r.npy"})
    config = config.model_copy(update={"data": data})
    found = dataclasses.replace(find(two[0]), fingerprint="f-image_reference:1")
    found.check_data(config, "f-image_reference:1")
    with pytest.raises(UserError, match=rf"^data\.image_reference: the features in r\.npy are not those that {new}"):
        found.check_data(config, "f-image_reference:2")
    with pytest.raises(UserError, match=r"^data\.train: the shards are not those"):
        found.check_data(config, "g-image_reference:1")
    for accepted in ("data.image_reference", "data.train", "data"):
        found.check_data(config.model_copy(update={"resume_changed": [accepted]}), "f-image_reference:2")


def test_a_checkpoint_that_does_not_say_what_was_in_a_reference(tmp_path):
    config = configuration(tmp_path, resume="auto", objective__name="cwcl", data__image_reference="r.npy")
    write(tmp_path, 10, config)
    found = find(config)
    found.check_data(config, "f-image_reference:1")
    assert any("does not say what was in data.image_reference: not checked" in note for note in found.notes())
    write(tmp_path, 11, config, data_fingerprint="f-image_reference:1")
    assert not any("does not say" in note for note in find(config).notes())


def test_another_tokenizer_is_refused(two):
    config, _, new = two
    found = find(config)
    found.check_tokenizer(config, "t")
    with pytest.raises(UserError) as refused:
        found.check_tokenizer(config, "u")
    assert str(refused.value).startswith(f"data.tokenizer: emoji is not what it was when {new} was trained")
    assert f"data.tokenizer={new}/tokenizer" in str(refused.value)
    accepted = config.model_copy(update={"resume_changed": ["data.tokenizer"]})
    found.check_tokenizer(accepted, "u")
    (new / "state.json").write_text((new / "state.json").read_text().replace("tokenizer_fingerprint", "before"))
    manifest = json.loads((new / "manifest.json").read_text())
    listed = [files.Written(**file) for file in manifest["files"] if file["name"] != "state.json"]
    new.rename(files.staging(new.parent, 20))
    staged = files.staging(new.parent, 20)
    files.commit(new.parent, 20, [*listed, files.describe(staged / "state.json")])
    older = find(config)  # of a version that did not say: told, not refused
    older.check_tokenizer(config, "u")
    assert any("does not say what its tokenizer was" in note for note in older.notes())


def test_where_a_run_begins(two):
    """Found, checked and locked in one; what is refused leaves no lock."""
    config, old, new = two
    run = new.parents[1]
    same, other = (SimpleNamespace(fingerprint=lambda words=words: words) for words in "tu")
    with pytest.raises(UserError, match=r"^data\.tokenizer: emoji is not what it was"):
        agree_on_start(config, run, "f", other, 0)
    with pytest.raises(UserError, match=r"^data\.train: the shards are not those"):
        agree_on_start(config, run, "g", same, 0)
    assert not (run / ".holder.json").exists()
    found, folder, lock = agree_on_start(config, run, "f", same, 0)
    with lock:
        assert (found.checkpoint, folder) == (new, run)
        assert (run / ".holder.json").exists()
    unnamed = configuration(run.parent, resume="auto", run__name=None)
    found, folder, lock = agree_on_start(unnamed, run.parent / "elsewhere", "f", same, 0)
    with lock:
        assert (found.checkpoint, folder) == (new, run)
    assert not (run.parent / "elsewhere").exists()
    path = configuration(run.parent, resume=str(old), run__name="b")
    found, folder, lock = agree_on_start(path, run.parent / "b", "f", same, 0)
    assert (found.checkpoint, folder, lock) == (old, run.parent / "b", None)
    assert not folder.exists()  # nothing is written before all has been built
    with lock_new(folder, 0):
        assert (folder / ".holder.json").exists()
    (run.parent / "b" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"^run\.name: another job has made .*b meanwhile"):
        lock_new(folder, 0)
    assert not (folder / ".holder.json").exists()
    with pytest.raises(UserError, match=r"^run\.name: .*b holds another run than the one"):
        agree_on_start(path, run.parent / "b", "f", same, 0)


def test_auto_without_a_name_finds_the_newest_unfinished_run_of_the_recipe(tmp_path):
    config = configuration(tmp_path, resume="auto", run__name=None)
    assert find(config) is None
    write(tmp_path, 10, configuration(tmp_path, optimizer__lr=0.5))
    assert find(config) is None  # of another recipe
    write(tmp_path, 20, config)
    assert find(config).checkpoint.name == files.name_of(20)
    write(tmp_path, 100, config)
    assert find(config) is None  # it came to its end


def test_a_path_may_be_the_run_its_checkpoints_or_one_of_them(two):
    config, old, new = two
    for path, expected in ((new.parents[1], new), (new.parent, new), (old, old)):
        assert find(config.model_copy(update={"resume": str(path)})).checkpoint == expected
    with pytest.raises(UserError, match="resume: expected never, auto, or a folder"):
        find(config.model_copy(update={"resume": str(new.parents[3])}))
