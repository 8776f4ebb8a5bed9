"""As much of the Hugging Face hub as a push asks for, on this machine."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

TOKEN = "hf_secretsecretsecret"


class StubHub:
    """What was asked of it. ``refused``: path's pattern → status that it is answered with."""

    def __init__(self, url: str):
        self.url = url
        self.repos: dict[str, dict[str, bytes]] = {}
        """Repository → path → content."""
        self.commits: list[tuple[str, str, list[str]]] = []
        """Repository, message and paths of each."""
        self.private: dict[str, bool] = {}
        self.refused: dict[str, int] = {}
        self.asked: list[str] = []


def _answer(hub: StubHub, path: str, body: bytes) -> object:
    if path == "/api/repos/create":
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        hub.repos.setdefault(repo, {})
        hidden = wanted.get("private") or wanted.get("visibility") == "private"
        hub.private.setdefault(repo, hidden)
        return {"url": f"{hub.url}/{repo}", "name": repo}
    if path == "/api/validate-yaml":
        return {"errors": [], "warnings": []}
    if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
        return {"files": [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
            for file in json.loads(body)["files"]
        ]}
    if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
        lines = [json.loads(line) for line in body.splitlines()]
        files = {x["value"]["path"]: base64.b64decode(x["value"]["content"])
                 for x in lines if x["key"] == "file"}
        hub.repos[found[1]] |= files
        message = next(x["value"]["summary"] for x in lines if x["key"] == "header")
        hub.commits.append((found[1], message, sorted(files)))
        return {"success": True, "commitOid": "0" * 40,
                "commitUrl": f"{hub.url}/{found[1]}/commit/{'0' * 40}"}
    return None


@contextlib.contextmanager
def stub_hub() -> Iterator[StubHub]:
    """The hub that this process knows, as long as it lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.asked.append(path)
            refused = next((s for p, s in hub.refused.items() if re.search(p, path)), None)
            if refused is None and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                refused = 401
            found = None if refused else _answer(hub, path, body)
            answer = json.dumps({"error": "no"} if found is None else found).encode()
            self.send_response(refused or (404 if found is None else 200))
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = StubHub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
