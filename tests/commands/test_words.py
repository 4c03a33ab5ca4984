"""What a file system refuses ends a command with a line and an exit code, whatever library met it."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from amclr_scale.commands import embed, export, fit, leaderboard, main, study, train_tokenizer
from amclr_scale.commands.words import refused

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (FULL, 1, "--out: No space left on device; make room there, or write elsewhere"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            1,
            "--out: No space left on device; make",
        ),
        (Exception("Permission denied (os error 13)"), 1, "--out: Permission denied; expected a place that this user"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 1, "/a/b: Permission denied; expected"),
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), 1, "/a/b: Read-only file system; expected"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300),
            2,
            f"{'x' * 60}...: expected a path that a file",
        ),
        (RuntimeError("Could not determine home directory."), 2, "~: expected a user with a home folder"),
    ],
)
def test_what_a_file_system_refuses(error: Exception, code: int, words: str) -> None:
    told = refused(error, "--out")
    assert told is not None
    assert told[0] == code
    assert told[1].startswith(words)


def test_memory_that_is_not_there() -> None:
    torch_s = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 240000000000 bytes. Error code 12"
    told = refused(RuntimeError(torch_s), "--out")
    assert told is not None
    assert told[0] == 1
    assert "expected what fits this machine's memory, got 223.5 GiB at once" in told[1]


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "no"), RuntimeError("a fault"), KeyError("os")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    assert refused(error, "--out") is None


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        (embed.main, ["x" * 300, "photos"]),
        (export.main, ["x" * 300, "--out", "out"]),
        (fit.main, ["--config", "x" * 300, "--gpus", "2"]),
        (leaderboard.main, ["x" * 300]),
        (study.main, ["x" * 300]),
        (train_tokenizer.main, ["~nobody-is-called-so/shards", "--out", "out"]),
    ],
)
def test_a_path_that_nothing_can_have_is_a_mistake(
    command: Callable[[list[str]], int], argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert command(argv) == 2
    assert ": expected " in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("shards index {}", "shards"),
        ("shards tokenizer {} --out t.json", "data"),
        ("shards paraphrase {} --model none --out p", "data"),
        ("shards communities {} --image a --text b --out c.npy", "shards"),
    ],
)
def test_a_file_that_is_no_shard_is_told_under_the_argument_that_names_it(
    words: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "0.tar").write_bytes(b"hello" * 1000)
    monkeypatch.chdir(tmp_path)
    assert main.main(words.format(tmp_path / "0.tar").split()) == 2
    assert f"\n{key}: {tmp_path}/0.tar: expected a tar of samples" in f"\n{capsys.readouterr().err}"


@pytest.mark.slow
def test_a_training_run_too() -> None:
    command = [sys.executable, "-m", "amclr_scale", "train", "--config", "x" * 300]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "expected a path that a file system can hold" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_full_disk_that_another_library_meets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["shards", "tokenizer", "emoji/val_concept", "--entries", "300", "--out", "/dev/full"]) == 1
    assert "--out: No space left on device; make room there" in capsys.readouterr().err


@pytest.mark.slow
def test_what_trains_nothing_imports_no_deepspeed() -> None:
    """It takes most of a second, and says on a CPU that there is no GPU, before the words that were asked for."""
    names = ("communities", "embed", "evaluate", "export", "search")
    imports = "; ".join(f"import amclr_scale.commands.{name}" for name in names)
    code = f"import sys; {imports}; import amclr_scale.evaluation.run; print('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_command_line_is_read_without_torch() -> None:
    """Help and mistakes then come at once; making shards and vocabularies needs none of it at all."""
    names = (
        "communities", "corpus", "embed", "evaluate", "export", "fit", "index_shards", "leaderboard", "make_shards",
        "paraphrase", "search", "study", "supervise", "train", "train_tokenizer",
    )  # fmt: skip
    assert {module for module, _ in main.VERBS.values()} == set(names)
    imports = "; ".join(f"import amclr_scale.commands.{name}" for name in names)
    code = f"import sys; {imports}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.slow
def test_no_list_of_deepspeed_operators_is_made() -> None:
    """It starts compilers, and asks devices; nor do the imports of a run bring Triton, before it is needed."""
    code = (
        "import sys, deepspeed.ops; from amclr_scale.distributed.process_group import leave_messages_to_gloo; "
        "leave_messages_to_gloo(); import amclr_scale.commands.job; "
        "print(deepspeed.ops.__compatible_ops__, 'triton' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "{'deepspeed_shm_comm': False} False"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--entries -5 --out t.json", "--entries: expected at least 259, of bytes and marks alone, got -5"),
        ("--out nowhere/t.json", "--out: expected a name in a folder that is there, got nowhere/t.json"),
        ("--captions txt json.nope --out t.json", "--captions: expected txt or json.FIELD that samples have, got"),
    ],
)  # fmt: skip
def test_a_vocabulary_of_nothing_is_a_mistake(
    words: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(["shards", "tokenizer", "emoji/val_concept", *words.split()]) == 2
    assert told in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("embed run photos --batch-size 0", "--batch-size: expected at least 1, got 0"),
        ("shards make folder --images . --out o --per-shard -1", "--per-shard: expected at least 1, got -1"),
        ("shards make folder --images . --out o --resize -3", "--resize: expected at least 1, got -3"),
        ("shards make folder --images . --out o --quality 0", "--quality: expected at least 1, got 0"),
        ("shards make folder --images . --out o --quality 1000", "--quality: expected at most 100, got 1000"),
        ("shards make folder --images . --out o --workers -2", "--workers: expected at least 0, got -2"),
        ("shards index emoji/val_concept --workers -1", "--workers: expected at least 0, got -1"),
        ("shards paraphrase emoji/val_concept --model m --out o --batch -1", "--batch: expected at least 1, got -1"),
    ],
)
def test_a_number_that_is_none_is_a_mistake(
    words: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.main(words.split()) == 2
    assert capsys.readouterr().err == f"{told}\n"
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("missing", "package"),
    [("open_clip.factory", "open_clip_torch"), ("timm", "timm"), ("deepspeed.ops", "'amclr_scale[train]'")],
)
def test_a_package_that_a_part_of_a_command_lacks_is_named(
    missing: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(argv: list[str]) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(export, "main", lacking)
    assert main.main(["export", "runs/a", "--to", "open_clip", "--out", "o"]) == 2
    told = f"amclr-scale export needs {missing}, which is not installed: pip install {package}\n"
    assert capsys.readouterr().err == told
