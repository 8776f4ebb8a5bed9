"""The judge behind an endpoint, against a local server that speaks the protocol."""

import dataclasses
import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import yaml

from qadapter import QAdapterError
from qadapter.evaluation.judges import win_rate
from qadapter.evaluation.judges.endpoint import ATTEMPTS, EndpointJudge
from qadapter.evaluation.judges.endpoint_prompt import PROMPT_FILE, JudgePrompt

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
    # Shutting down waits for the next poll.
    threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True).start()
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


NO_COMPLETIONS = [
    {"error": {"message": "no such model"}}, [], None, b"", {"choices": {"a": 1}}, {"choices": 3},
    {"choices": [7]}, {"choices": [{"message": 3}]}, b"<html>sign in</html>", b"data: {}\n\n",
    b"\xff\xfe", b"[" * 10**5,
]


@pytest.mark.parametrize("reply", NO_COMPLETIONS, ids=lambda reply: str(reply)[:30])
def test_a_server_without_one_readable_reply_ends_in_an_error_and_is_asked_again(
    server, tmp_path, reply
):
    file = tmp_path / "judgements.jsonl"
    # A None in the script stands for the usual reply.
    server.script = [b"null" if reply is None else reply] * (2 * ATTEMPTS)
    with pytest.raises(QAdapterError, match=r"no reply of the judge at .* could be") as error:
        judge(server, file).compare(PROMPTS[:1], GOOD[:1], BAD[:1])
    assert "\n" not in str(error.value) and len(server.requests) == 2 * ATTEMPTS
    # The server is mended: the same command asks again, and knows what both times cost.
    found = judge(server, file)
    assert found.compare(PROMPTS[:1], GOOD[:1], BAD[:1]).tolist() == [1]
    assert found.usage.replies == 2 * ATTEMPTS + 2 and found.usage.unread == 0
    assert len(server.requests) == 2 * ATTEMPTS + 2
    # Later lines of the file count.
    assert judge(server, file).compare(PROMPTS[:1], GOOD[:1], BAD[:1]).tolist() == [1]
    assert len(server.requests) == 2 * ATTEMPTS + 2


def test_the_error_quotes_what_the_server_said_in_short(server):
    server.script = [{"error": {"message": "no such model " + "x" * 5000}}] * (2 * ATTEMPTS)
    with pytest.raises(QAdapterError, match=r"no such model x+…") as error:
        judge(server).compare(PROMPTS[:1], GOOD[:1], BAD[:1])
    assert len(str(error.value)) < 500


def test_one_verdict_that_cannot_be_read_is_asked_for_again_by_the_next_run(server, tmp_path):
    file = tmp_path / "judgements.jsonl"
    server.script = [completion("Hm.")] * ATTEMPTS
    found = judge(server, file, concurrency=1)
    assert np.isnan(found.compare(PROMPTS, GOOD, BAD)).sum() == 1
    asked = len(server.requests)
    # Not by the same run.
    found.compare(PROMPTS, BAD, GOOD)
    assert len(server.requests) == asked
    assert judge(server, file).compare(PROMPTS, GOOD, BAD).tolist() == [1, 1, 1]
    assert len(server.requests) == asked + 1


def test_half_a_character_in_a_reply(server, tmp_path):
    file = tmp_path / "judgements.jsonl"
    server.script = [completion("\ud83d [[A]]")]
    judge(server, file, concurrency=1).compare(PROMPTS[:1], GOOD[:1], BAD[:1])
    assert json.loads(file.read_text().splitlines()[0])["reply"] == "? [[A]]"


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


def test_an_error_names_the_key_and_only_a_file_that_is_there(server, tmp_path):
    server.script = [401, 401]  # the other order may be under way
    with pytest.raises(QAdapterError, match="OPENAI_API_KEY") as error:
        judge(server, tmp_path / "judgements.jsonl", concurrency=1).compare(
            PROMPTS[:1], GOOD[:1], BAD[:1]
        )
    assert "judgements" not in str(error.value)
    server.script = [404, 404]
    with pytest.raises(QAdapterError, match="404") as error:
        judge(server, concurrency=1).compare(PROMPTS[:1], GOOD[:1], BAD[:1])
    assert "OPENAI_API_KEY" not in str(error.value)


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
    whole = {"key": "x", "verdict": 1.0, "replies": 1, "prompt_tokens": 1,
             "completion_tokens": 1, "without_usage": 0}
    for line, reason in (
        ("nonsense", "the line is not JSON: Expecting value"), ("[]", "it is no object"),
        ('{"key": "x", "verdict": null}', "it has no 'replies'"),
        (json.dumps(whole | {"verdict": "A"}), "its verdict is 'A'"),
        (json.dumps(whole | {"replies": None}), "its replies are None"),
    ):
        file.write_text(json.dumps(whole) + f"\n{line}\n")
        with pytest.raises(
            QAdapterError, match=rf"judgements.jsonl:2 is no judgement: {reason}"
        ):
            judge(server, file)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(QAdapterError, match="OPENAI_API_KEY"):
        judge(server)


@pytest.mark.parametrize("key", ["sk-…", "ключ", "sk-a\n", "sk a"])
def test_keys_that_cannot_be_sent(server, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(QAdapterError, match="OPENAI_API_KEY is no key") as error:
        judge(server)
    assert key.strip() not in str(error.value)


@pytest.mark.parametrize("url", [
    "notaurl", "", "ftp://host/v1", "http://", "http://host:99999/v1", "http://host:x/v1",
    "http://a..b/v1", "http://[::1/v1", "http://a b/v1", "localhost:8000/v1",
])
def test_addresses_that_are_none(server, monkeypatch, url):
    with pytest.raises(QAdapterError, match="base_url must be the address of an endpoint"):
        EndpointJudge("m", base_url=url)
    if url:
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        with pytest.raises(QAdapterError, match="OPENAI_BASE_URL must be the address"):
            EndpointJudge("m")


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
    ({"verdicts": "x"}, r"mine.yaml can't be used: unknown key 'verdicts'; did you mean 'verdict'"),
    ({"first": 1}, r"first must be text \(in quotes\), got 1"),
    ({"request": "max_tokens: 7"}, "request must be keys and values"),
    ({"request": {"temperatur": 0}}, "mine.yaml can't be used: request takes no 'temperatur'; "
     "did you mean 'temperature'"),
    ({"request": {"model": "y"}}, "request takes no 'model'"),
    ({"request": {"stream": True}}, "request takes no 'stream'"),
    ({"request": {"self": 1}}, "request takes no 'self'"),
    ({"request": {1: 0}}, "request takes no 1"),
    ({"request": {"temperature": float("nan")}}, "not JSON compliant"),
    ({"request": {"extra_body": "x"}}, "extra_body must be keys and values, got 'x'"),
])
def test_prompt_files_that_cannot_be_used(tmp_path, change, message):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(PROMPT_FILE.read_text()) | change))
    with pytest.raises(QAdapterError, match=message):
        JudgePrompt.read(file)
    with pytest.raises(QAdapterError, match=r"none.yaml can't be used"):
        JudgePrompt.read(tmp_path / "none.yaml")


@pytest.mark.parametrize(("text", "message"), [
    ("", "it must hold keys and values"), ("- a", "it must hold keys and values"),
    ("user: x", "verdict is missing"), ("user: [", "is not YAML"),
])
def test_prompt_files_that_are_none(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(QAdapterError, match=rf"mine.yaml can't be used: .*{message}") as error:
        JudgePrompt.read(tmp_path / "mine.yaml")
    assert "\n" not in str(error.value)


# --- what a server, or a file, may be up to -----------------------------------------------------


def test_a_reply_without_end_is_not_read_to_its_end(server, monkeypatch):
    monkeypatch.setattr("qadapter.evaluation.judges.endpoint.MAX_REPLY_BYTES", 10_000)
    server.script = [completion("[[A]]" + "x" * 20_000)] * 2
    with pytest.raises(QAdapterError, match="a reply has more than 10,000 bytes"):
        judge(server, max_retries=0).compare(PROMPTS[:1], GOOD[:1], BAD[:1])
    server.script = []
    assert judge(server).compare(PROMPTS, GOOD, BAD).tolist() == [1, 1, 1]


def test_a_zipped_reply_is_refused(server, monkeypatch):
    original = Handler.send
    monkeypatch.setattr(Handler, "send", lambda self, status, value, headers=None: original(
        self, status, gzip.compress(json.dumps(value).encode()), {"content-encoding": "gzip"}
    ))
    with pytest.raises(QAdapterError, match="a reply is zipped"):
        judge(server, max_retries=0).compare(PROMPTS[:1], GOOD[:1], BAD[:1])
    headers = {k.lower(): v for k, v in server.requests[0][1].items()}
    assert headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("body", [
    b"[" * 100_000, b'{"choices": ' + b"9" * 5000 + b"}", b'{"choices": [{"message": 7}]}',
    json.dumps(completion("[[A]]", {"prompt_tokens": 10**400, "completion_tokens": -1})).encode(),
    json.dumps(completion("[[A]]", {"prompt_tokens": True, "completion_tokens": 1})).encode(),
])
def test_a_reply_of_any_content_is_a_reply(server, body, tmp_path):
    server.script = [body] * 2 * ATTEMPTS
    file = tmp_path / "judgements.jsonl"
    found = judge(server, file)
    if b"[[A]]" in body:
        assert found.compare(PROMPTS[:1], GOOD[:1], BAD[:1]).tolist() == [0.5]
        assert found.usage.cost(1, 1) == 0
    else:
        with pytest.raises(QAdapterError, match="could be read as a verdict"):
            found.compare(PROMPTS[:1], GOOD[:1], BAD[:1])
    judge(server, file)


@pytest.mark.parametrize(("changes", "problem"), [
    ({"verdict": "("}, "is no regular expression"), ({"verdict": "(" * 5000}, "5,000 characters"),
    ({"verdict": "(" * 1900}, "is no regular expression"),
    ({"verdict": "a{99999999999999999999}"}, "is no regular expression"),
    ({"user": 20260101}, "user must be text"),
    ({"request": {"seed": float("inf")}}, "Out of range"),
    ({"request": "x" * 100_000}, "request must be keys and values"),
])
def test_prompt_files_that_no_judge_can_use(tmp_path, changes, problem):
    values = yaml.safe_load(PROMPT_FILE.read_text()) | changes
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(QAdapterError, match=problem) as caught:
        JudgePrompt.read(tmp_path / "p.yaml")
    assert len(str(caught.value)) < 1000


def test_a_verdict_that_comes_to_no_end_is_named(server, monkeypatch):
    monkeypatch.setattr("qadapter.system.patterns.SECONDS", 0.05)
    prompt = dataclasses.replace(JudgePrompt.read(), verdict=r"(?:(a|aa)+)+\]$")
    server.script = [completion("a" * 60 + "!")] * 2
    with pytest.raises(QAdapterError, match="comes to no end on 'aaa"):
        judge(server, prompt=prompt).compare(PROMPTS[:1], GOOD[:1], BAD[:1])


@pytest.mark.parametrize("line", ["[" * 5000, '{"key": ' + "1" * 5000 + "}", "\ufffe", "[]", "7"])
def test_a_damaged_line_of_judgements_is_named(server, tmp_path, line):
    (tmp_path / "j.jsonl").write_text(line + "\n")
    with pytest.raises(QAdapterError, match=r"j\.jsonl:1 is no judgement: .*remove the line"):
        judge(server, tmp_path / "j.jsonl")
