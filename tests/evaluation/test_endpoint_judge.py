"""The judge behind an endpoint, against a local server that speaks the protocol."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import yaml

from qadapter import QAdapterError
from qadapter.evaluation.judges import win_rate
from qadapter.evaluation.judges.endpoint import ATTEMPTS, PROMPT_FILE, EndpointJudge, JudgePrompt

PROMPTS = ["Which color?", [{"role": "user", "content": "Is it hot?"}], "Why {answer_b}?"]
GOOD, BAD = ["good a", "good b", "good {answer_b}"], ["bad a", "bad b", "bad c"]


class Server(ThreadingHTTPServer):
    """Prefers the answer that begins with "good"; ``script`` holds what it does first instead."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.script, self.lock = [], [], threading.Lock()
        self.verdict = lambda first, second: (
            "A" if first.startswith("good") and not second.startswith("good") else
            "B" if second.startswith("good") and not first.startswith("good") else "TIE"
        )
        self.usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            act = self.server.script.pop(0) if self.server.script else None
        if isinstance(act, int):
            # No waiting in tests: the client honours this header.
            return self.send(act, {"error": {"message": f"status {act}"}}, {"retry-after-ms": "1"})
        if act is not None:
            return self.send(200, act)
        text = body["messages"][-1]["content"]
        first = text.split("[Answer A]\n")[1].split("\n[The end of answer A]")[0]
        second = text.split("[Answer B]\n")[1].split("\n[The end of answer B]")[0]
        reply = f"The format is [[B]]. Because.\n[[{self.server.verdict(first, second)}]]"
        return self.send(200, completion(reply, self.server.usage))

    def send(self, status, value, headers=None):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def completion(text, usage=None):
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": "m", "usage": usage,
        "choices": [{"index": 0, "finish_reason": "stop",
                     "message": {"role": "assistant", "content": text}}],
    }


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-the-test")
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    found = Server()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def judge(server, file=None, **options):
    return EndpointJudge("m", base_url=server.url, judgements_file=file, **options)


def test_both_orders_are_asked_and_their_verdict_is_the_answers(server):
    found = judge(server)
    assert found.compare(PROMPTS, GOOD, BAD).tolist() == [1, 1, 1]
    assert found.compare(PROMPTS, BAD, GOOD).tolist() == [0, 0, 0]
    # The other way round is the same two questions.
    assert len(server.requests) == 6
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and body["model"] == "m" and body["temperature"] == 0
    assert {k.lower(): v for k, v in headers.items()}["authorization"] == (
        "Bearer secret-of-the-test"
    )
    texts = {body["messages"][-1]["content"] for _, _, body in server.requests}
    # What stands in braces in a prompt or an answer stays there.
    assert sum("Why {answer_b}?" in t and "good {answer_b}" in t for t in texts) == 2
    assert found.usage.first_wins == found.usage.verdicts / 2
    result = win_rate(found, PROMPTS, [GOOD], [BAD])
    assert result.win_rate.value == 1.0


def test_a_judge_that_takes_the_first_answer_says_nothing(server):
    server.verdict = lambda first, second: "A"
    found = judge(server)
    assert found.compare(PROMPTS, GOOD, BAD).tolist() == [0.5] * 3
    assert found.usage.disagreements == 3
    assert found.usage.as_dict()["share_for_first"] == 1.0


def test_ties_and_answers_that_are_alike(server):
    found = judge(server)
    assert found.compare(PROMPTS, GOOD, GOOD).tolist() == [0.5] * 3
    assert server.requests == []
    assert found.compare(PROMPTS[:1], ["bad x"], ["bad y"]).tolist() == [0.5]
    assert found.usage.disagreements == 0 and len(server.requests) == 2
    # Half a verdict and a tie do not agree: a tie.
    server.verdict = lambda first, second: "A" if first.startswith("good") else "TIE"
    assert found.compare(PROMPTS[:1], ["good z"], ["bad z"]).tolist() == [0.5]


def test_refused_requests_are_repeated_with_waits(server):
    server.script = [429, 500, 503, 429]
    assert judge(server).compare(PROMPTS, GOOD, BAD).tolist() == [1, 1, 1]
    assert len(server.requests) == 6 + 4


def test_replies_that_cannot_be_read_are_asked_again_and_then_left_out(server):
    unreadable = [
        completion("I like both."), completion(None), {"choices": []}, {"nonsense": 1},
        b"this is not JSON", completion("[[C]]"),
    ]
    server.script = [unreadable[0], unreadable[1]]
    found = judge(server, concurrency=1)
    assert found.compare(PROMPTS[:1], GOOD[:1], BAD[:1]).tolist() == [1]
    assert len(server.requests) == 4 and found.usage.replies == 4 and found.usage.unread == 0
    for start in (0, 3):
        server.script = unreadable[start : start + ATTEMPTS]
        found = judge(server, concurrency=1)
        verdicts = found.compare(PROMPTS[:2], GOOD[:2], BAD[:2])
        assert np.isnan(verdicts[0]) and verdicts[1] == 1
        assert found.usage.unread == 1 and found.usage.verdicts == 3


def test_an_endpoint_that_fails_ends_in_one_line_and_a_second_run_goes_on(server, tmp_path):
    file = tmp_path / "judgements.jsonl"
    server.script = [completion("[[A]]"), completion("[[B]]"), 401]
    with pytest.raises(QAdapterError, match=r"(?s)failed.*401.*judgements.jsonl"):
        judge(server, file, concurrency=1).compare(PROMPTS, GOOD, BAD)
    kept = len(file.read_text().splitlines())
    assert kept == len(server.requests) - 1 >= 2
    # Killed while it wrote: the torn line is cut away.
    with file.open("a") as opened:
        opened.write('{"key": "torn')
    server.requests.clear()
    found = judge(server, file)
    assert found.compare(PROMPTS, GOOD, BAD).tolist() == [1, 1, 1]
    assert len(server.requests) == 6 - kept
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 6
    # Finished: nothing is asked, and what it cost is still known.
    again = judge(server, file)
    assert again.compare(PROMPTS, GOOD, BAD).tolist() == [1, 1, 1]
    assert len(server.requests) == 6 - kept and again.usage.replies == 6
    assert again.usage.prompt_tokens == 400 and again.usage.without_usage == 2
    assert again.usage.cost(2.5, 10.0) == pytest.approx((400 * 2.5 + 40 * 10) / 1e6)
    # Another model or prompt is another question.
    EndpointJudge("n", base_url=server.url, judgements_file=file).compare(
        PROMPTS[:1], GOOD[:1], BAD[:1]
    )
    assert len(server.requests) == 6 - kept + 2


def test_what_was_under_way_when_another_request_failed_is_kept(server, tmp_path):
    """Whatever was answered stands in the file."""
    file = tmp_path / "judgements.jsonl"
    server.script = [401]
    with pytest.raises(QAdapterError, match="401"):
        judge(server, file, concurrency=4).compare(PROMPTS[:2], GOOD[:2], BAD[:2])
    assert len(file.read_text().splitlines()) == len(server.requests) - 1


def test_a_reply_may_hold_any_character(server, tmp_path):
    server.script = [completion("a\u2028b\u0085c\n[[A]]")]
    file = tmp_path / "judgements.jsonl"
    judge(server, file, concurrency=1).compare(PROMPTS[:1], GOOD[:1], BAD[:1])
    assert len(judge(server, file).judgements) == 2


def test_usage_that_is_not_reported_is_counted(server):
    server.usage = None
    found = judge(server)
    found.compare(PROMPTS, GOOD, BAD)
    assert found.usage.without_usage == 6 and found.usage.prompt_tokens == 0


def test_no_key_and_a_damaged_file(server, tmp_path, monkeypatch):
    file = tmp_path / "judgements.jsonl"
    file.write_text('{"key": "x"}\nnonsense\n')
    with pytest.raises(QAdapterError, match=r"judgements.jsonl:2 is no judgement"):
        judge(server, file)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(QAdapterError, match="OPENAI_API_KEY"):
        judge(server)


def test_the_prompt_file_can_be_replaced(server, tmp_path):
    values = yaml.safe_load(PROMPT_FILE.read_text())
    values |= {"verdict": r"Winner: (one|two|none)", "first": "one", "second": "two",
               "tie": "none", "request": {"max_tokens": 7}}
    del values["system"]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values))
    prompt = JudgePrompt.read(file)
    assert [prompt.read_verdict(f"Winner: {x}") for x in ("one", "two", "none", "all")] == [
        1, 0, 0.5, None
    ]
    server.script = [completion("Winner: two\nWinner: one"), completion("Winner: two")]
    found = judge(server, prompt=prompt, concurrency=1)
    assert found.compare(PROMPTS[:1], ["x"], ["y"]).tolist() == [1]
    body = server.requests[0][2]
    assert body["max_tokens"] == 7 and "temperature" not in body and len(body["messages"]) == 1


@pytest.mark.parametrize(("change", "message"), [
    ({"user": "{prompt} {answer_a}"}, r"user has no \{answer_b\}"),
    ({"verdict": "A|B"}, "one group, has 0"),
    ({"verdict": "("}, "can't be used"),
    ({"verdicts": "x"}, "unexpected keyword argument 'verdicts'"),
    ({"first": 1}, r"first must be text \(in quotes\), got 1"),
    ({"request": "max_tokens: 7"}, "request must be keys and values"),
])
def test_prompt_files_that_cannot_be_used(tmp_path, change, message):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(PROMPT_FILE.read_text()) | change))
    with pytest.raises(QAdapterError, match=message):
        JudgePrompt.read(file)
    with pytest.raises(QAdapterError, match=r"none.yaml can't be used"):
        JudgePrompt.read(tmp_path / "none.yaml")
