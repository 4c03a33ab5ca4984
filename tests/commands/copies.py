"""Several `train` commands, each in a copy of one process that has imported what they need, one after another.

python -m tests.commands.copies '[["--config", "quickstart", ...], ...]' prints a line of JSON for each: its exit code,
what it said, and what it complained of.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import amclr_scale.commands.job  # noqa: F401 - heavy, and wanted by every command
from tests.commands.additions.job import forked


def told(words: list[str]) -> tuple[int, str, str]:
    """Of one command, with what its libraries write to either stream themselves."""
    kept = [os.dup(stream) for stream in (1, 2)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        for stream, file in zip((1, 2), files, strict=True):
            opened = os.open(file, os.O_WRONLY | os.O_CREAT)
            os.dup2(opened, stream)
            os.close(opened)
        code = forked(words)
        for stream, before in zip((1, 2), kept, strict=True):
            os.dup2(before, stream)
            os.close(before)
        return code, *(file.read_text() for file in files)


if __name__ == "__main__":
    for line in [told(words) for words in json.loads(sys.argv[1])]:
        print(json.dumps(line), flush=True)
