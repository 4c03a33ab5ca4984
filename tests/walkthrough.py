"""Runs the commands of a page in a folder, in one process: python -m tests.walkthrough PAGE FOLDER ...

Of a block `yaml title="NAME"` the file NAME is made, the words behind `$ ` in a block `console` are a command of the
package, and the lines below it are what it says, up to numbers. A block `python` is run as it stands.
"""

import contextlib
import functools
import http.server
import os
import re
import shlex
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import deepspeed  # noqa: F401 - these are heavy, and wanted by most
import matplotlib.pyplot  # noqa: F401

import amclr_scale.commands.job
import amclr_scale.commands.preview  # noqa: F401
from amclr_scale.commands.main import main

NUMBER = re.compile(r"\d+(?:[.,:e+-]*\d+)*")


def like(line):
    """A line without its numbers and how they are padded."""
    return " ".join(NUMBER.sub("#", line).split())


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder):
    """The port at which a folder's files can be fetched."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def command(words, expected, codes=(0, 75)):
    """Run one in a process forked after the seconds that imports take, and find every line that it is to say."""
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if not child:
            code = 1
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                code = main(words)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        text = out.read()
    print(text, file=sys.stderr)
    assert code in codes, (words, code)
    said = like(text)
    for line in expected:
        assert like(line.replace(" on laptop,", f" on {os.uname().nodename},")) in said, (words, line)


def walk(page, port):
    """Do what a page says, in this folder."""
    done = 0
    for kind, body in re.findall(r"^```(\S[^\n]*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        if title := re.match(r'yaml title="(.*)"', kind):
            Path(title[1]).write_text(body)
        elif kind == "console":
            for one in body.split("$ ")[1:]:
                first, *expected = one.splitlines()
                program, *words = shlex.split(first.replace("localhost:8000", f"localhost:{port}"))
                assert program == "amclr-scale", program
                command(words, expected)
                done += 1
        elif kind == "python":
            exec(body, {})
            done += 1
    print(f"{done} done")


if __name__ == "__main__":
    for page, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        text = Path(page).read_text()
        os.chdir(folder)
        with served(".") as port:
            walk(text, port)
