"""The Triton backend without a GPU: its kernels interpreted, in the tests that hold torch to the same."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FEWEST = 40  # tests, or the selection in conftest.py has lost some


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is that process")
def test_the_similarity_tests_pass_interpreted():
    folder = Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--durations=8", str(folder)]
    done = subprocess.run(
        command, env=environment, cwd=folder.parents[1], capture_output=True, text=True, check=False, timeout=850
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= FEWEST
    assert "skipped" not in done.stdout
    assert "failed" not in done.stdout
