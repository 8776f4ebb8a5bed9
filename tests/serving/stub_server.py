"""A server without a model that speaks what ``qadapter serve`` speaks, as far as its page asks."""

from __future__ import annotations

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from qadapter.serving.page import page


class Stub(ThreadingHTTPServer):
    """Says what it is told to say, and remembers what it was asked.

    Attributes:
        asked: (path, body, headers) of every POST, in order.
        key: where not empty, what it wants as an API key.
        failing: path → (status, message) it is answered with; message None: no JSON at all.
        busy: so many requests for an answer are to be asked again in a moment.
        keeps: whether it saves preferences; ``saved`` are those.
        go: an answer's first piece goes out at once, the others when this is set.
        left: set when a client left an answer before its end.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, dict, dict]] = []
        self.key = ""
        self.failing: dict[str, tuple[int, str]] = {}
        self.busy = 0
        self.adapters = {"polite": 1.0}
        self.keeps = True
        self.saved: list[dict] = []
        self.go, self.left = threading.Event(), threading.Event()
        self.go.set()
        self.finish = "stop"
        self.breaks = ""
        """"off": the stream ends in the middle; "error": an event says what went wrong;
        "garbage": one says nothing at all."""

    def answer(self, model: str, prompt: str, strength: float | None) -> str:
        if model == "base":
            return f"The base says: {prompt}"
        return f"{model} at {strength:.2f} says: {prompt} ✓é"

    def reward(self, token: str, number: int) -> float:
        return (1 if number % 2 else -1) * len(token) / 10

    def bodies(self, path: str, **fields: object) -> list[dict]:
        return [body for asked, body, _ in self.asked
                if asked == path and fields.items() <= body.items()]


@contextmanager
def stub_server():
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.go.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, text: str, kind: str, headers: dict | None = None) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": kind,
                            "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value), "application/json")

    def _refuse(self, status: int, message: str, **headers: str) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self._send(status, json.dumps({"error": error}), "application/json", headers)

    def _refused(self) -> bool:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self._refuse(401, "this server wants another API key")
        elif self.path in self.server.failing:
            status, message = self.server.failing[self.path]
            if message is None:  # something between us and the server
                self._send(status, "<html>Bad Gateway</html>", "text/html")
            else:
                self._refuse(status, message)
        else:
            return False
        return True

    def do_GET(self) -> None:
        if self.path == "/":
            text, headers = page()
            self._send(200, text, "text/html; charset=utf-8", headers)
        elif self.path != "/v1/models":
            self._refuse(404, "no such page")
        elif not self._refused():
            data = [{"id": "base", "kind": "base", "strength": 0.0}]
            data += [{"id": name, "kind": "adapter", "strength": strength}
                     for name, strength in self.server.adapters.items()]
            self._json({"object": "list", "data": [
                {"id": model.pop("id"), "object": "model", "owned_by": "qadapter",
                 "qadapter": {**model, "saves_preferences": self.server.keeps}}
                for model in data
            ]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, dict(self.headers)))
        if self._refused():
            return
        if self.path == "/v1/chat/completions" and self.server.busy > 0:
            self.server.busy -= 1
            self._refuse(429, "one answer at once", **{"Retry-After": "1"})
        elif self.path == "/v1/chat/completions":
            self._stream(body)
        elif self.path == "/v1/qadapter/rewards":
            tokens = [
                {"text": token, "reward": self.server.reward(token, number)}
                for number, token in enumerate([*re.findall(r"\n+| *\S+|\s+", body["answer"]), ""])
            ]
            self._json({"tokens": tokens, "total": sum(token["reward"] or 0 for token in tokens)})
        else:
            self.server.saved.append(body)
            self._json({"saved": len(self.server.saved)})

    def _stream(self, body: dict) -> None:
        answer = self.server.answer(body["model"], body["messages"][-1]["content"],
                                    body.get("strength"))
        first, rest = answer[:4], answer[4:]
        self.line_end = "\r\n" if body["model"] == "base" else "\n"  # both are right
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        try:
            self._chunk({"role": "assistant", "content": ""})
            self._chunk({"content": first})
            while not self.server.go.wait(0.05):
                self.wfile.write(b": still here\n\n")  # by which a client that left is noticed
            if self.server.breaks == "error":
                self._event(json.dumps({"error": {"message": "the model ran out of room"}}))
            if self.server.breaks == "garbage":
                self._event("<html>")
            if self.server.breaks:
                return
            for begin in range(0, len(rest), 5):
                self._chunk({"content": rest[begin:begin + 5]})
            self._chunk({}, self.server.finish)
            self._event("[DONE]")
        except (BrokenPipeError, ConnectionResetError):
            self.server.left.set()

    def _chunk(self, delta: dict, finish: str | None = None) -> None:
        self._event(json.dumps({"object": "chat.completion.chunk", "choices": [
            {"index": 0, "delta": delta, "finish_reason": finish}
        ]}, ensure_ascii=False))

    def _event(self, data: str) -> None:
        # In several writes, which cut a character, a line or an event anywhere.
        written = f"data: {data}{self.line_end}{self.line_end}".encode()
        for part in (written[:-7], written[-7:-1], written[-1:]):
            self.wfile.write(part)
            self.wfile.flush()
