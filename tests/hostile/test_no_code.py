"""Files that a run reads are data: no call lets one of them bring code, and a folder that does is refused in words."""

import ast
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from amclr_scale.config.schema import TextTower
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.encoders.text_towers import build_text_tower
from amclr_scale.errors import UserError

ROOT = Path(__file__).parents[2]
# What a call of a library has to say so that nothing is executed, by the call's name.
SAFE = {
    "from_pretrained": ("trust_remote_code", False),
    "from_config": ("trust_remote_code", False),
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "open_clip.create_model": ("weights_only", True),
    "open_clip.create_model_and_transforms": ("weights_only", True),
}
NEVER = {"pickle", "dill", "joblib", "shelve", "cloudpickle"}


def nodes(path: Path, words: Iterable[str]) -> Iterator[ast.AST]:
    """A file's syntax tree, node by node, where the file has any of these words at all."""
    text = path.read_text("utf-8")
    return ast.walk(ast.parse(text)) if any(word in text for word in words) else iter(())


def calls(path: Path):
    last = {name.rpartition(".")[2] for name in SAFE}
    for node in nodes(path, last):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in last:
            whole = f"{ast.unparse(node.func.value)}.{node.func.attr}"
            rule = SAFE.get(node.func.attr) or SAFE.get(whole)
            if rule:
                yield node, rule


def sources():
    return [path for folder in ("amclr_scale", "launch", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_every_call_says_that_nothing_is_run():
    found, unsafe = 0, []
    for path in sources():
        name = str(path.relative_to(ROOT))
        for call, (word, wanted) in calls(path):
            found += 1
            said = next((k.value for k in call.keywords if k.arg == word), None)
            if not (isinstance(said, ast.Constant) and said.value is wanted):
                unsafe.append(f"{name}:{call.lineno}: {ast.unparse(call)} without {word}={wanted}")
    assert found > 8
    assert unsafe == []


def test_nothing_is_unpickled():
    wrong = []
    for path in sources():
        for node in nodes(path, NEVER):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and [one.name for one in node.names] != ["UnpicklingError"]:
                names.append(node.module or "")
            wrong += [f"{path.relative_to(ROOT)}: {name}" for name in names if name.partition(".")[0] in NEVER]
    assert wrong == []


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tokenizer and a tower of a Python file in their folder, which leaves a mark when it is run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    home = tmp_path / "model"
    home.mkdir()
    (home / "own.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w').close()\n"
        "from transformers import PretrainedConfig, PreTrainedTokenizer\n"
        "class Config(PretrainedConfig):\n    model_type = 'own'\n"
        "class Words(PreTrainedTokenizer):\n    pass\n"
    )
    (home / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}))
    words = {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": ["own.Words", None]}}
    (home / "tokenizer_config.json").write_text(json.dumps(words))
    return home


def test_a_tokenizer_with_code_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"^data\.tokenizer: .*model: expected a folder of a transformers tokenizer"):
        load_tokenizer(str(folder), 16)
    assert not (tmp_path / "mark").exists()


def test_a_tower_with_code_is_refused(folder, tmp_path):
    tower = TextTower(name=f"transformers/{folder}")
    with pytest.raises(UserError, match=r"^model\.text\.name: .*code of the folder's own, which is never run"):
        build_text_tower(tower, vocab_size=100, pad_id=0, end_id=1, context_length=16)
    assert not (tmp_path / "mark").exists()
