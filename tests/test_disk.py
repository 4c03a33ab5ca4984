"""Files of weights are for those that the files beside them are for."""

import os
import re
import stat
from pathlib import Path

import pytest
import torch

import amclr_scale
from amclr_scale.disk import save_tensors
from amclr_scale.encoders.weights import read_weights
from amclr_scale.errors import UserError


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_umask_holds_for_weights(tmp_path, umask):
    file, before = tmp_path / "weights.safetensors", os.umask(umask)
    try:
        save_tensors({"a": torch.ones(3)}, file, {"format": "pt"})
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert torch.equal(read_weights(str(file), "checkpoint")["a"], torch.ones(3))


def test_all_weights_are_written_so():
    package = Path(amclr_scale.__file__).parent
    direct = {
        path.relative_to(package).as_posix() for path in package.rglob("*.py")
        if re.search(r"\bsave_file\(", path.read_text("utf-8"))
    }  # fmt: skip
    assert direct == {"disk.py"}


def test_weights_that_this_user_cannot_read_are_no_missing_ones(tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    save_tensors({"a": torch.ones(3)}, file)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"^checkpoint: expected a file that this user can read, got .*no permission"):
        read_weights(str(file), "checkpoint")
