"""The main job with the additions that the first words name, as often as there are lines of words on standard input.

Each in a process of its own, forked after the seconds that imports take.
"""

import importlib
import json
import os
import sys
import traceback

import matplotlib.pyplot  # noqa: F401

import amclr_scale.commands.job  # noqa: F401 - heavy, and wanted by every job
from amclr_scale.commands.train import main


def forked(words: list[str]) -> int:
    """The exit code of a job in a child process."""
    child = os.fork()
    if not child:
        code = 1
        try:
            code = main(words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(f"tests.commands.additions.{name}")
    for line in sys.stdin:
        print(f"exit code {forked(json.loads(line))}", flush=True)
