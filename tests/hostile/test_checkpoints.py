"""Checkpoints that somebody forged, with hashes that fit: what they say is refused in words."""

import json

import pytest
import torch
from safetensors.torch import save_file

from amclr_scale.checkpoint import contents, files, state
from amclr_scale.checkpoint.resume import find
from amclr_scale.config.load import load
from amclr_scale.config.yaml_text import parse
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.errors import UserError
from tests.checkpoint.test_files import configuration, write


def forge(checkpoint, name, change):
    """Rewrite a JSON file, and the hashes that say it is whole."""
    file = checkpoint / name
    file.write_text(change(json.loads(file.read_text())) if callable(change) else change)
    listed = json.loads((checkpoint / files.MANIFEST).read_text())["files"]
    staged = files.staging(checkpoint.parent, files.step_of(checkpoint))
    checkpoint.rename(staged)
    written = [files.describe(staged / one["name"], staged) for one in listed]
    return files.commit(checkpoint.parent, files.step_of(checkpoint), written)


STATES = {
    "step": (-5, 1e30, "x", True, None, 10**30, 21), "samples": (-1, "many", 7, 10**400), "number": ("x", 1.5, -2),
    "total_steps": ("x", [], -1), "ranks": (-1, "2", 1e9), "config": (3, [], None), "data_fingerprint": (3, {}),
    "recipe": ([],), "tokenizer_fingerprint": (7,),
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in STATES.items() for value in values])
def test_a_forged_state(tmp_path, key, value):
    config = configuration(tmp_path, resume="auto")
    old, new = write(tmp_path, 10, config), write(tmp_path, 20, config)
    forge(new, "state.json", lambda content: json.dumps({**content, key: value}))
    found = find(config)
    assert found.checkpoint == old
    assert "state.json is not what a run has written: " in found.complaints[0]
    with pytest.raises(UserError, match=r"^resume: .* cannot be used: .*state\.json is not what a run has written"):
        find(configuration(tmp_path, resume=str(new)))


@pytest.mark.parametrize("text", ["[]", "3", "[" * 100_000, '{"config":' + '{"a":' * 20_000], ids=range(4))
def test_a_state_that_is_none(tmp_path, text):
    config = configuration(tmp_path, resume="auto")
    forge(write(tmp_path, 10, config), "state.json", text)
    with pytest.raises(UserError, match="no checkpoint of this run can be used"):
        find(config)


@pytest.mark.parametrize("key", ["config", "samples", "number", "data_fingerprint"])
def test_a_state_that_lacks_something(tmp_path, key):
    config = configuration(tmp_path, resume="auto")
    new = write(tmp_path, 10, config)
    forge(new, "state.json", lambda content: json.dumps({k: v for k, v in content.items() if k != key}))
    with pytest.raises(UserError, match=f"cannot be used: its state.json lacks {key}"):
        find(config)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../../etc/passwd", "a\0b", 3, None], ids=["absolute", "above", "nul", "number", "null"]
)
def test_a_manifest_that_names_other_files(tmp_path, name):
    new = write(tmp_path, 10, configuration(tmp_path))
    manifest = {"format": 1, "step": 10, "files": [{"name": name, "size": 1, "sha256": "0"}]}
    (new / files.MANIFEST).write_text(json.dumps({**manifest, "sha256": files._own_hash(manifest)}))
    assert files.fault(new).startswith("manifest.json names what no checkpoint holds")


@pytest.mark.parametrize("entries", [3, [3], [{}], [{"name": "a"}], None], ids=str)
def test_a_manifest_without_files(tmp_path, entries):
    new = write(tmp_path, 10, configuration(tmp_path))
    manifest = {"format": 1, "step": 10, "files": entries}
    (new / files.MANIFEST).write_text(json.dumps({**manifest, "sha256": files._own_hash(manifest)}))
    assert files.fault(new).startswith("manifest.json names what no checkpoint holds")


GOOD = {"shapes": {"a": [3]}, "scalars": {"a": {"step": {"value": 3.0, "dtype": "float32", "shape": []}}},
        "counters": {"global_steps": 3}, "loss_scale": {}}  # fmt: skip
NOTES = [
    None, [], {}, {**GOOD, "shapes": {"a": [-3]}}, {**GOOD, "shapes": {"a": "x"}}, {**GOOD, "counters": {"module": 3}},
    {**GOOD, "counters": {"global_steps": "x"}}, {**GOOD, "loss_scale": {"cur_scale": "x"}},
    {**GOOD, "scalars": {"a": {"step": {"value": 3, "dtype": "save"}}}},
    {**GOOD, "scalars": {"a": {"step": {"value": 3, "shape": [10**9]}}}},
    {**GOOD, "scalars": {"a": {"step": {"value": float("nan")}}}}, {**GOOD, "scalars": {"a": 3}},
    {**GOOD, "random": {"python": [3, [1], None], "numpy": ["MT19937", [1] * 624, 0, 0, 0.0]}},
    {**GOOD, "random": {"python": "x"}},
]  # fmt: skip


@pytest.mark.parametrize("notes", NOTES, ids=range(len(NOTES)))
def test_notes_that_no_run_writes(tmp_path, notes):
    place = tmp_path / "step_00000010"
    place.mkdir()
    (place / "state.json").write_text('{"ranks": 1}')
    save_file({"parameter/a@0": torch.zeros(3)}, place / state.file_of(0), metadata={"notes": json.dumps(GOOD)})
    assert state.open_pieces(place).shapes == {"a": [3]}
    save_file({"parameter/a@0": torch.zeros(3)}, place / state.file_of(0), metadata={"notes": json.dumps(notes)})
    with pytest.raises(UserError, match="cannot be used: notes that no run writes"):
        state.open_pieces(place)


def test_pieces_of_other_forms_and_files_that_are_none(tmp_path):
    place = tmp_path / "step_00000010"
    place.mkdir()
    (place / "state.json").write_text('{"ranks": 1}')
    notes = {"notes": json.dumps(GOOD)}
    for tensors in ({"parameter/a@x": torch.zeros(3)}, {"parameter/a@0": torch.zeros(3, 1)}):
        save_file(tensors, place / state.file_of(0), metadata=notes)
        with pytest.raises(UserError, match="cannot be used: a piece"):
            state.open_pieces(place)
    save_file({"a": torch.zeros(1)}, place / state.file_of(0))
    with pytest.raises(UserError, match="cannot be used"):
        state.open_pieces(place)
    (place / state.file_of(0)).write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="cannot be used"):
        state.open_pieces(place)
    (place / "state.json").write_text('{"ranks": 1000000000}')
    with pytest.raises(UserError, match="expected files of 1,000,000,000 ranks"):
        state.open_pieces(place)


@pytest.mark.parametrize("name", ["itself", 3, None, "/etc"])
def test_a_tokenizer_that_names_another(tmp_path, name):
    content = {"tokenizer": str(tmp_path) if name == "itself" else name}
    (tmp_path / "amclr_scale_tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="expected emoji or clip, got"):
        load_tokenizer(str(tmp_path), 16)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text", ["[" * 700, "".join(f"{' ' * i}a:\n" for i in range(700)), LAUGHS, "a: &a [*a]", "? [x]\n: y"],
    ids=["brackets", "sections", "laughs", "itself", "list as a key"],
)  # fmt: skip
def test_yaml_that_is_too_deep(tmp_path, text):
    with pytest.raises(UserError, match="not readable as YAML"):
        parse(text, "x")
    (tmp_path / "c.yaml").write_text(text[:5000])
    with pytest.raises(UserError):
        load(tmp_path / "c.yaml")


def test_aliases_of_honest_files_are_read():
    assert parse("a: &x [1, 2]\nb: *x\n", "x") == {"a": [1, 2], "b": [1, 2]}
    assert contents.parse("[1]") == [1]
