"""A language model behind an OpenAI-compatible endpoint as the judge.

The prompt and the reading of replies stand in a file (``endpoint_prompt.yaml``) that can be
replaced. Every judgement is written down as it arrives: a run that was broken off goes on where it
stopped, and no verdict is paid for twice; a reply that could not be read is asked for again.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from qadapter.data import Prompt
from qadapter.errors import QAdapterError, shown
from qadapter.evaluation.judges.endpoint_prompt import JudgePrompt, shortened
from qadapter.evaluation.judges.interface import Judge, Progress, check_lengths
from qadapter.evaluation.judges.texts import prompt_text
from qadapter.system.documents import parse_json
from qadapter.system.sealed import opened, sealed

ATTEMPTS = 3
"""Times a comparison is asked while its reply can't be read."""
MAX_REPLY_BYTES = 2**24
"""Of a whole reply, in bytes: no verdict is that long."""
_MOST_TOKENS = 2**40
_COUNTS = ("replies", "prompt_tokens", "completion_tokens", "without_usage")


@dataclass
class Usage:
    """What was asked for. ``unread`` comparisons have no verdict; ``without_usage`` replies did not
    say how many tokens they took."""

    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    without_usage: int = 0
    unread: int = 0
    disagreements: int = 0
    """Pairs whose two orders did not get the same verdict."""
    first_wins: float = 0.0
    """Verdicts for the answer shown first, a tie as one half: half of all without a bias."""
    verdicts: int = 0

    def cost(self, input_price: float, output_price: float) -> float:
        """At prices per million tokens."""
        return (self.prompt_tokens * input_price + self.completion_tokens * output_price) / 1e6

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {
            "share_for_first": self.first_wins / self.verdicts if self.verdicts else None
        }


def _limited_client() -> Any:
    """A client of the library's own kind that reads no more than ``MAX_REPLY_BYTES`` of a reply."""
    import openai

    # Which httpx that is (httpx2, of late) is the library's choice.
    kind = openai.DefaultHttpxClient
    httpx = importlib.import_module(kind.__mro__[1].__module__.partition(".")[0])

    class Limited(httpx.SyncByteStream):
        def __init__(self, stream: Any):
            self.stream = stream

        def __iter__(self) -> Iterator[bytes]:
            size = 0
            for chunk in self.stream:
                size += len(chunk)
                if size > MAX_REPLY_BYTES:
                    raise QAdapterError(f"a reply has more than {MAX_REPLY_BYTES:,} bytes")
                yield chunk

        def close(self) -> None:
            self.stream.close()

    def limit(response: Any) -> None:
        # Zipped, a small reply may be a large one.
        if response.headers.get("content-encoding", "identity") != "identity":
            raise QAdapterError("a reply is zipped, which was not asked for")
        response.stream = Limited(response.stream)

    return kind(event_hooks={"response": [limit]})


class _Question(NamedTuple):
    key: str
    prompt: str
    first: str
    second: str


class EndpointJudge(Judge):
    """Asks a chat model which of two answers is better, in both orders.

    Answers that are alike are a tie without a request.

    Args:
        model: the endpoint's name for it.
        base_url: of the endpoint, ending in ``/v1``; default: OPENAI_BASE_URL, else OpenAI's own.
        judgements_file: JSON Lines that judgements are read from and added to; None: kept in memory
            only.
        prompt: what is asked, and how replies are read.
        concurrency: requests at a time.
        max_retries: after a 429, a 5xx or a lost connection, with growing waits; then an error.
        timeout: of a request, in seconds.

    Raises:
        QAdapterError: no client library, no key (OPENAI_API_KEY) or one that can't be sent, an
            address that is none, a damaged judgements file.
    """

    def __init__(
        self, model: str, *, base_url: str | None = None,
        judgements_file: str | Path | None = None, prompt: JudgePrompt | None = None,
        concurrency: int = 4, max_retries: int = 6, timeout: float = 120.0,
    ):
        try:
            import openai
        except ImportError as error:
            raise QAdapterError(
                "judging by an endpoint needs the openai client: pip install 'qadapter[judge]'"
            ) from error
        if base_url is not None:
            check_url(base_url, "base_url")
        elif os.environ.get("OPENAI_BASE_URL"):
            check_url(os.environ["OPENAI_BASE_URL"], "OPENAI_BASE_URL")
        try:
            self.client = openai.OpenAI(
                base_url=base_url, max_retries=max_retries, timeout=timeout,
                default_headers={"Accept-Encoding": "identity"}, http_client=_limited_client(),
            )
        except openai.OpenAIError as error:
            raise QAdapterError(
                "judging by an endpoint needs its key in OPENAI_API_KEY (anything for a server "
                f"that asks for none): {error}"
            ) from error
        key = self.client.api_key or ""
        if not key.isascii() or not key.isprintable() or " " in key:
            # Not quoted: it is a secret.
            raise QAdapterError(
                "OPENAI_API_KEY is no key: it holds spaces or characters that can't be sent (only "
                "printable ASCII can)"
            )
        self.model, self.concurrency = model, concurrency
        self.name = f"{model} (endpoint)"
        self.prompt = JudgePrompt.read() if prompt is None else prompt
        self.judgements_file = None if judgements_file is None else Path(judgements_file)
        known = {} if self.judgements_file is None else _read(self.judgements_file)
        self.judgements = {k: v for k, v in known.items() if v["verdict"] is not None}
        # Asked again, as the server may be another by now; what they cost is not forgotten.
        self._unread = {k: v for k, v in known.items() if v["verdict"] is None}
        self.usage = Usage()

    def compare(
        self, prompts: Sequence[Prompt], answers_a: Sequence[str], answers_b: Sequence[str],
        progress: Progress | None = None,
    ) -> np.ndarray:
        check_lengths(prompts, answers_a, answers_b)
        questions: list[tuple[_Question, _Question] | None] = []
        for prompt, a, b in zip(map(prompt_text, prompts), answers_a, answers_b, strict=True):
            alike = a.strip() == b.strip()
            questions.append(
                None if alike else (self._question(prompt, a, b), self._question(prompt, b, a))
            )
        asked = {q.key: q for pair in questions if pair is not None for q in pair}
        self._ask_all([q for q in asked.values() if q.key not in self.judgements], progress)
        self._count(asked, [pair for pair in questions if pair is not None])
        if asked and not self.usage.verdicts:
            reply = next(self.judgements[key]["reply"] for key in asked)
            raise QAdapterError(
                f"no reply of the judge at {self.client.base_url} could be read as a verdict; one "
                f"was {shortened(reply)!r} (the same command asks again)"
            )
        return np.array([
            0.5 if pair is None else self._verdict(*pair) for pair in questions
        ], dtype=np.float64)

    def _question(self, prompt: str, first: str, second: str) -> _Question:
        """The key names all that the reply depends on."""
        parts = [self.model, str(self.client.base_url), asdict(self.prompt), prompt, first, second]
        text = json.dumps(parts, sort_keys=True)
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return _Question(key, prompt, first, second)

    def _ask_all(self, questions: list[_Question], progress: Progress | None) -> None:
        if not questions:
            return
        import openai

        pool = ThreadPoolExecutor(self.concurrency)
        futures = [pool.submit(self._ask, question) for question in questions]
        failure: openai.OpenAIError | None = None
        try:
            # Written here and not in the threads: one line at a time.
            for done, future in enumerate(as_completed(futures), 1):
                self._keep(future.result())
                if progress is not None:
                    progress(done, len(questions))
        except openai.OpenAIError as error:
            failure = error
        finally:
            # What was not begun is dropped; what is under way is waited for and kept: it is paid.
            pool.shutdown(cancel_futures=True)
            for future in futures:
                if not future.cancelled() and future.exception() is None:
                    self._keep(future.result())
        if failure is not None:
            # The client wraps what is raised while it reads.
            own = isinstance(failure.__cause__, QAdapterError)
            raise self._explained(failure.__cause__ if own else failure) from failure

    def _explained(self, error: Exception) -> QAdapterError:
        import openai

        message = f"the judge at {self.client.base_url} failed: {shortened(str(error), 400)}"
        if isinstance(error, openai.AuthenticationError):
            message += "; its key is read from OPENAI_API_KEY"
        if self.judgements_file is not None and self.judgements_file.exists():
            message += (
                f"; the judgements so far are in {self.judgements_file}: the same command goes on "
                "from them"
            )
        return QAdapterError(message)

    def _keep(self, judgement: dict[str, Any]) -> None:
        if judgement["key"] in self.judgements:
            return
        self.judgements[judgement["key"]] = judgement
        if self.judgements_file is not None:
            _append(self.judgements_file, judgement)

    def _ask(self, question: _Question) -> dict[str, Any]:
        """One judgement; asked again while the reply can't be read."""
        messages = self.prompt.messages(question.prompt, question.first, question.second)
        before = self._unread.get(question.key, dict.fromkeys(_COUNTS, 0))
        judgement: dict[str, Any] = {
            "key": question.key, "verdict": None, "reply": None,
            **{name: before[name] for name in _COUNTS},
        }
        for _ in range(ATTEMPTS):
            raw = self.client.chat.completions.with_raw_response.create(
                model=self.model, messages=messages, **self.prompt.request
            )
            try:
                reply = raw.parse()
            except (ValueError, RecursionError):
                reply = None  # says JSON in its header and is none: as good as an unreadable reply
            text, tokens = _read_reply(reply)
            judgement["replies"] += 1
            judgement["verdict"] = self.prompt.read_verdict(text or "")
            # Not a chat completion: what came says what is wrong with the server.
            judgement["reply"] = shortened(raw.text, 1000) if text is None else text
            if tokens is None:
                judgement["without_usage"] += 1
            else:
                judgement["prompt_tokens"] += tokens[0]
                judgement["completion_tokens"] += tokens[1]
            if judgement["verdict"] is not None:
                break
        return judgement

    def _verdict(self, forth: _Question, back: _Question) -> float:
        """For the first answer of ``forth``."""
        one, two = (self.judgements[q.key]["verdict"] for q in (forth, back))
        if one is None or two is None:
            return float("nan")
        return one if one == 1 - two else 0.5

    def _count(
        self, asked: dict[str, _Question], pairs: list[tuple[_Question, _Question]]
    ) -> None:
        usage = self.usage
        for key in asked:
            judgement = self.judgements[key]
            for name in _COUNTS:
                setattr(usage, name, getattr(usage, name) + judgement[name])
            if judgement["verdict"] is None:
                usage.unread += 1
            else:
                usage.verdicts += 1
                usage.first_wins += judgement["verdict"]
        for forth, back in pairs:
            one, two = (self.judgements[q.key]["verdict"] for q in (forth, back))
            usage.disagreements += None not in (one, two) and one != 1 - two


def check_url(url: str, name: str) -> None:
    """Whether requests can be sent there at all: the client would try for a minute, and after all
    answers are drawn.

    Args:
        name: of the option, for the message.

    Raises:
        QAdapterError: it has no http or https, no host, or a port that is none.
    """
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        good = parts.scheme in ("http", "https") and host and parts.port != 0
    except ValueError:  # of the port, of brackets, of the host's name
        good = False
    if not good or re.search(r"[\s\x00-\x1f\x7f]", url):
        raise QAdapterError(
            f"{name} must be the address of an endpoint, as http://localhost:8000/v1, got {url!r}"
        )


def _read_reply(reply: Any) -> tuple[str | None, tuple[int, int] | None]:
    """(text, (prompt tokens, completion tokens)) of whatever the server sent."""
    choices = getattr(reply, "choices", None)
    # A server may send anything; the client checks no types.
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = getattr(choice, "message", None)
    text = getattr(message, "content", None)
    usage = getattr(reply, "usage", None)
    tokens = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
    return (
        # JSON can hold half a character (a lone surrogate), a file can't.
        text.encode("utf-8", "replace").decode() if isinstance(text, str) else None,
        tokens if all(type(c) is int and 0 <= c < _MOST_TOKENS for c in tokens) else None,
    )


def _append(path: Path, judgement: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(sealed(judgement), ensure_ascii=False) + "\n")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Judgements by key. A last line that was broken off is cut away, so that what is appended
    stands on a line of its own."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    judgements = {}
    # Not splitlines(): a reply may hold characters that it takes for the end of a line.
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            judgement = opened(parse_json(line.decode(), "the line"))
            if judgement["verdict"] not in (None, 0, 0.5, 1):
                raise TypeError(f"its verdict is {shown(judgement['verdict'])}")
            for name in _COUNTS:
                if type(judgement[name]) is not int:
                    raise TypeError(f"its {name} are {shown(judgement[name])}")
            judgements[judgement["key"]] = judgement
        except (QAdapterError, ValueError, KeyError, TypeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise QAdapterError(
                f"{path}:{number} is no judgement: {reason}; remove the line to ask again"
            ) from error
    return judgements
