"""What `export --push` puts into a repository, held by a server here that speaks the hub's calls, not the hub."""

import base64
import re
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import constants

from amclr_scale.commands.export import main
from amclr_scale.trained.publish import prepare
from tests.hub import serving
from tests.trained.test_export import TREE, run

__all__ = ["run"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with serving(monkeypatch, tmp_path / "cache") as server:
        yield server


@pytest.fixture
def exported(tmp_path):
    folder = tmp_path / "exported"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "README.md").write_text(
        "# A dual encoder\n\n    import amclr_scale\n    amclr_scale.load('THIS FOLDER')\n"
    )
    (folder / "weights.safetensors").write_bytes(b"weights" * 100)
    (folder / "config.yaml").write_text(yaml.safe_dump(TREE))
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder


def content_of(commit, name, large=None):
    line = commit[name]
    return base64.b64decode(line["value"]["content"]) if line["key"] == "file" else large[line["value"]["oid"]]


def test_an_export_becomes_a_private_repository_in_one_commit(hub, exported, capsys):
    assert main([str(exported), "--push", "me/model"]) == 0
    assert hub.made["me/model"]["visibility"] == "private"
    (commit,) = hub.commits
    assert sorted(commit) == ["README.md", "config.yaml", "tokenizer/tokenizer.json", "weights.safetensors"]
    assert content_of(commit, "weights.safetensors", hub.large) == b"weights" * 100
    card = content_of(commit, "README.md").decode()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["library_name"] == "amclr_scale"
    assert head["pipeline_tag"] == "zero-shot-image-classification"
    assert "license" not in head
    assert "    from huggingface_hub import snapshot_download\n" in card
    assert "amclr_scale.load(snapshot_download('me/model'))" in card
    assert "THIS FOLDER" in (exported / "README.md").read_text()  # which stays as it was
    said = capsys.readouterr().out
    assert f"4 files, 0.0 MiB -> {hub.address}/me/model/commit/{'1' * 40} (made, private)" in said

    assert main([str(exported), "--push", "me/model", "--public"]) == 0
    assert hub.made["me/model"]["visibility"] == "private"
    assert "(there already: who can see it is as it was)" in capsys.readouterr().out
    assert main([str(exported), "--push", "me/seen", "--public"]) == 0
    assert hub.made["me/seen"]["visibility"] == "public"


def test_hidden_files_stay_and_links_lead_nowhere_else(hub, exported, tmp_path, capsys):
    for name in (".env", "tokenizer/.env", ".git/config"):
        (exported / name).parent.mkdir(exist_ok=True)
        (exported / name).write_text("HF_TOKEN=secret")
    (exported / "again.json").symlink_to(exported / "tokenizer" / "tokenizer.json")  # inside: a file like others
    assert main([str(exported), "--push", "me/model"]) == 0
    assert "hidden files stay here: .env, .git, tokenizer/.env" in capsys.readouterr().err
    names = ["README.md", "again.json", "config.yaml", "tokenizer/tokenizer.json", "weights.safetensors"]
    assert sorted(hub.commits[0]) == names
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    for place in (tmp_path / "private" / "key", tmp_path / "private", tmp_path / "nothing", exported / "tokenizer"):
        link = exported / "tokenizer" / "link"
        link.symlink_to(place)
        assert main([str(exported), "--push", "me/model"]) == 2
        assert f"or out of {exported}: {link}; remove them" in capsys.readouterr().err
        link.unlink()
    assert len(hub.commits) == 1


def test_results_of_an_evaluation_stay_unless_the_card_names_them(hub, exported, capsys):
    for name in ("results.json", "results.md", "sheet_1_0.png", "emoji/val.json"):
        (exported / "evaluation" / name).parent.mkdir(exist_ok=True)
        (exported / "evaluation" / name).write_text("measured")
    assert main([str(exported), "--push", "me/model", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "evaluation" not in said.out
    listed = ", ".join(
        f"evaluation/{name}" for name in ("emoji/val.json", "results.json", "results.md", "sheet_1_0.png")
    )
    assert f"--push: results of evaluate stay here: {listed}; those that the card, README.md, names" in said.err
    card = exported / "README.md"
    card.write_text(card.read_text() + "\n![Captions and what is found for them](evaluation/sheet_1_0.png)\n")
    assert main([str(exported), "--push", "me/model"]) == 0
    assert [name for name in hub.commits[0] if name.startswith("evaluation")] == ["evaluation/sheet_1_0.png"]
    assert content_of(hub.commits[0], "evaluation/sheet_1_0.png", hub.large) == b"measured"


@pytest.mark.parametrize(
    ("card", "named"),
    [
        ("see evaluation/a b.json.", ["a b.json"]),
        ("![x](./evaluation/a%20b.json)", ["a b.json"]),
        ("https://huggingface.co/me/model/resolve/main/evaluation/sheet.png?download=true", ["sheet.png"]),
        ("`evaluation/emoji/val.json`, evaluation/sheet.png", ["emoji/val.json", "sheet.png"]),
        ("evaluation/sheet.png.txt, evaluation/sheet.png-old and evaluation/sheet", ["sheet"]),
        ("my-evaluation/sheet.png, ours/evaluation/sheet.png, evaluation/ and evaluation/emoji", []),
    ],
)
def test_what_a_card_names_is_a_whole_name(exported, tmp_path, card, named):
    """Part of another file's name would publish results that nobody meant to."""
    for name in ("sheet", "sheet.png", "a b.json", "emoji/val.json"):
        (exported / "evaluation" / name).parent.mkdir(parents=True, exist_ok=True)
        (exported / "evaluation" / name).write_text("measured")
    (exported / "README.md").write_text(f"# A model\n{card}\n")
    prepare(str(exported), tmp_path / "out", "me/model", None, "weights")
    (tmp_path / "out" / "evaluation").mkdir(exist_ok=True)
    found = (path for path in (tmp_path / "out" / "evaluation").rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(tmp_path / "out" / "evaluation")) for path in found) == named


@pytest.mark.slow
def test_a_run_is_exported_first(hub, run, capsys):
    folder, *_ = run
    assert main([str(folder), "--push", "me/model", "--to", "transformers", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[:-1]] == [
        "README.md", "config.json", "config.yaml", "model.safetensors", "tokenizer/fingerprint.txt",
        "tokenizer/tokenizer.json", "weights.safetensors",
    ]  # fmt: skip
    assert "would go to me/model; nothing was uploaded" in said
    assert (hub.made, hub.commits) == ({}, [])
    assert main([str(folder / "checkpoints"), "--push", "me/model", "--which", "momentum"]) == 0
    card = content_of(hub.commits[0], "README.md").decode()
    assert "- weights: their moving average" in card
    assert str(folder) not in card + content_of(hub.commits[0], "config.yaml").decode()


@pytest.mark.parametrize(
    ("words", "change", "told"),
    [
        (["me/model"], {"env": "wrong"}, r"me/model cannot be published: the hub does not know the token"),
        (["others/model"], {}, r"others/model cannot be published: the token may not write there"),
        (["me/model"], {"offline": True}, r"me/model cannot be published: HF_HUB_OFFLINE is set; unset it"),
        (["me/model"], {"closed": True}, r"me/model cannot be published: the hub was not reached: "),
        (["me/model"], {"env": None}, r"me/model cannot be published: (there is no token|the hub does not know the)"),
        (["model"], {}, r"--push: expected OWNER/NAME, got model: whose it is comes first"),
        (["me/two words"], {}, r"--push: expected OWNER/NAME, got me/two words: Repo id must"),
        (["me/model", "--which", "momentum"], {}, r"--to, --which: .*exported is an export already"),
    ],
)
def test_mistakes_are_told_in_words(hub, exported, capsys, monkeypatch, words, change, told):
    how = SimpleNamespace(**{"env": "secret", "offline": False, "closed": False, **change})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how.offline)
    monkeypatch.setenv("HF_TOKEN", how.env) if how.env else monkeypatch.delenv("HF_TOKEN")
    if how.closed:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main([str(exported), "--push", *words]) == 2
    said = capsys.readouterr().err
    assert re.match(told, said), said
    assert hub.commits == []
    assert main([str(exported), "--out", str(exported / "x"), "--public"]) == 2
    assert "--public: expected it beside --push OWNER/NAME" in capsys.readouterr().err
    assert main([str(exported / "nothing"), "--push", "me/model"]) == 2
