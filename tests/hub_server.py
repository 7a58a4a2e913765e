"""A Hugging Face hub in small, on loopback: one model whose revisions are folders."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Hub:
    """What the server holds and what it was asked.

    Args:
        name: the model's name.
        revisions: a folder of files for each revision.
        token: what a request must carry as a bearer token; None lets anyone in.
    """

    def __init__(self, name: str, revisions: dict[str, Path], token: str | None = None) -> None:
        self.name, self.revisions, self.token = name, revisions, token
        self.asked: list[tuple[str, str]] = []
        self.address = ""

    def folder(self, revision: str) -> Path | None:
        """The folder of a revision's name or commit."""
        commits = {commit_of(r): folder for r, folder in self.revisions.items()}
        return self.revisions.get(revision) or commits.get(revision)

    def downloads(self, ending: str) -> int:
        """How often a file was fetched."""
        return sum(kind == "GET" and path.endswith(ending) for kind, path in self.asked)


def commit_of(revision: str) -> str:
    """40 hexadecimal digits that stand for a revision's commit."""
    return hashlib.sha1(revision.encode()).hexdigest()


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Answer requests until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            hub.asked.append((self.command, self.path))
            api, _, rest = self.path.partition("/api/models/")
            if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._refuse(401, "RepoNotFound")
            if rest == f"{hub.name}/refs" and not api:
                refs = [
                    {"name": r, "ref": f"refs/heads/{r}", "targetCommit": commit_of(r)}
                    for r in hub.revisions
                ]
                content = json.dumps({"branches": refs, "tags": [], "converts": []}).encode()
                return self._send(content, {"Content-Type": "application/json"}, body=body)
            start = f"/{hub.name}/resolve/"
            if not self.path.startswith(start):
                return self._refuse(404, "RepoNotFound")
            revision, _, file = self.path.removeprefix(start).partition("/")
            folder = hub.folder(revision)
            if folder is None:
                return self._refuse(404, "RevisionNotFound")
            path = folder / file.partition("?")[0]
            if not path.is_file():
                return self._refuse(404, "EntryNotFound")
            content = path.read_bytes()
            name = next(r for r, f in hub.revisions.items() if f == folder)
            tag = hashlib.sha256(content).hexdigest()
            return self._send(
                content, {"ETag": f'"{tag}"', "X-Repo-Commit": commit_of(name)}, body=body
            )

        def _send(self, content: bytes, headers: dict[str, str], *, body: bool) -> None:
            self.send_response(200)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
