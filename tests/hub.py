"""A server here that speaks the hub's calls, as far as huggingface_hub makes them; not the hub."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from huggingface_hub import constants


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: who asks for what, and the files of each commit; weights come as large files do."""

    def log_message(self, *words):
        pass

    def answer(self, status, content, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: self.server.cut or None])

    def refuses(self, repository):
        """Whether it has said that nobody may see it."""
        server = self.server
        if repository in server.gated and self.headers.get("Authorization") != f"Bearer {server.token}":
            self.answer(server.gated[repository], {"error": "Access is restricted."}, X_Error_Code="GatedRepo")
        elif repository not in {*server.made, *server.repositories}:
            self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
        else:
            return False
        return True

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path))
        if "/resolve/" in path:
            return self.file(*path.strip("/").partition("/resolve/")[::2])
        repository, _, revision = path.removeprefix("/api/models/").partition("/revision/")
        if self.refuses(repository):
            return None
        if repository not in self.server.repositories:
            return self.answer(200, {"id": repository, "sha": "0" * 40})
        commit, files = self.commit(repository, revision or "main")
        if files is None:
            return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return self.answer(200, {"id": repository, "sha": commit, "siblings": [{"rfilename": one} for one in files]})

    def do_HEAD(self):
        self.do_GET()

    def commit(self, repository, revision):
        revisions, commits = self.server.repositories[repository]
        commit = revisions.get(revision, revision)
        return commit, commits.get(commit)

    def file(self, repository, rest):
        if self.refuses(repository):
            return
        revision, _, name = rest.partition("/")
        commit, files = self.commit(repository, revision)
        content = files[name]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        etag = hashlib.sha256(content).hexdigest()
        self.answer(206 if start else 200, content[start:], X_Repo_Commit=commit, ETag=f'"{etag}"')

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer(200, {})

    def do_POST(self):
        body, server = self.rfile.read(int(self.headers["Content-Length"])), self.server
        if self.headers.get("Authorization") != f"Bearer {server.token}":
            return self.answer(401, {"error": "Invalid username or password."})
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            if asked["organization"] != "me":
                return self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
            server.made[f"me/{asked['name']}"] = asked
            return self.answer(200, {"url": f"{server.address}/me/{asked['name']}", "name": f"me/{asked['name']}"})
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "lfs" if name.endswith(".safetensors") else "regular",
                      "shouldIgnore": False} for name in names]  # fmt: skip
            return self.answer(200, {"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{server.address}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            server.commits.append({line["value"]["path"]: line for line in lines if line["key"] != "header"})
            url = f"{server.address}/me/model/commit/{'1' * 40}"
            return self.answer(200, {"commitUrl": url, "commitOid": "1" * 40, "success": True})
        return self.answer(404, {"error": path})


class Server(ThreadingHTTPServer):
    """What it holds, and what it was asked.

    Attributes:
        repositories: name -> (revision -> commit, commit -> file -> content), to be fetched.
        gated: name -> the status that those without the token get.
        cut: bytes of a body after which the connection ends; 0: none.
        made, commits, large: what was published.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        self.made, self.commits, self.large, self.token = {}, [], {}, "secret"
        self.repositories, self.gated, self.cut, self.asked = {}, {}, 0, []
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def holds(self, repository, folder: Path, commit: str, *revisions: str) -> None:
        """Let a folder be a commit of a repository, and revisions be this commit."""
        names, commits = self.repositories.setdefault(repository, ({}, {}))
        paths = [path for path in folder.rglob("*") if path.is_file()]
        commits[commit] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        names.update(dict.fromkeys(revisions, commit))

    def fetched(self, ending: str) -> int:
        """How many times a file was sent."""
        return sum(command == "GET" and path.endswith(ending) for command, path in self.asked)


def point(address, home, setattr_=setattr) -> None:
    """Let this process, which has imported huggingface_hub already, take an address for the hub."""
    for name, value in (
        ("ENDPOINT", address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True), ("HF_HUB_CACHE", str(home)),
        ("HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"),
    ):  # fmt: skip
        setattr_(constants, name, value)


@contextmanager
def serving(monkeypatch, home):
    """A server that this process takes for the hub."""
    server = Server()
    point(server.address, home, monkeypatch.setattr)
    yield server
    server.shutdown()
    server.server_close()
