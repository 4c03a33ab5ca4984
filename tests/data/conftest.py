"""Every test has its own cache folder, and small shards made to order."""

import contextlib
import functools
import http.server
import threading
import time

import pytest

from amclr_scale.data import remote, streaming


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


class _Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; a path in `failures` fails that often, in the way that is asked for."""

    failures: dict[str, list[str]]
    log: list[str]

    def do_GET(self):
        self.log.append(self.path)
        way = self.failures.get(self.path, []).pop(0) if self.failures.get(self.path) else ""
        if way == "refuse":
            self.send_error(503)
        elif way == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)
            self.close_connection = True
        elif way == "slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # until nobody listens any more
                for _ in range(400):
                    self.wfile.write(b"x")
                    time.sleep(0.02)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder, its address, and what the server was asked."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    folder = tmp_path / "served"
    folder.mkdir()
    handler = type("Handler", (_Server,), {"failures": {}, "log": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A folder in place of the machine's shared memory."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(streaming, "MEMORY", folder)
    return folder
