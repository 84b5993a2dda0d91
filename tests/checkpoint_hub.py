"""A small server that speaks the routes of the Hugging Face hub which downloading needs."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Hub:
    """What the server holds: files by kind ("models", "datasets"), repository and path; and what was asked of it."""

    files: dict[tuple[str, str], dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    revisions: tuple[str, ...] = ("main", "v1", "refs/pr/1", SHA)
    fetched: list[str] = field(default_factory=list)


class HubServer(ThreadingHTTPServer):
    """Serves a `Hub` on a free port of this machine."""

    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub

    @property
    def endpoint(self) -> str:
        """The address for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""

    def do_HEAD(self) -> None:
        """The headers of a file."""
        self.answer(body=False)

    def do_GET(self) -> None:
        """A listing, or a file."""
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        """Find what is asked for."""
        path = urlsplit(self.path).path
        if found := API.fullmatch(path):
            self.listing(found["kind"], found["repo"], found["what"], unquote(found["revision"] or "main"))
        elif found := RESOLVE.fullmatch(path):
            kind = "datasets" if found["kind"] else "models"
            self.file(kind, found["repo"], unquote(found["revision"]), unquote(found["file"]), body)
        else:
            self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def listing(self, kind: str, repo: str, what: str | None, revision: str) -> None:
        """A repository's files, as its information or as a tree."""
        files = self.server.hub.files.get((kind, repo))
        if files is None:
            self.reply(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif revision not in self.server.hub.revisions:
            self.reply(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        elif what == "tree":
            tree = [{"type": "file", "path": path, "size": len(data), "oid": SHA} for path, data in files.items()]
            self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        else:
            names = [{"rfilename": path} for path in files]
            content = {"_id": "1", "id": repo, "sha": SHA, "private": False, "tags": [], "siblings": names}
            self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def file(self, kind: str, repo: str, revision: str, name: str, body: bool) -> None:
        """One file, with the headers that the hub sends."""
        hub = self.server.hub
        data = hub.files.get((kind, repo), {}).get(name)
        if repo in hub.gated:
            self.reply(403, b"", {"X-Error-Code": "GatedRepo"})
        elif data is None or revision not in hub.revisions:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
        else:
            if body:
                hub.fetched.append(name)
            self.reply(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": SHA}, body)

    def reply(self, status: int, content: bytes, headers: dict[str, str], body: bool = True) -> None:
        """Send it."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)
