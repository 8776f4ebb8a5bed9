"""Tokens to text as it comes, and OpenAI's shapes around it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from qadapter.serving.engine import Engine, EngineFailed
from qadapter.serving.requests import Asked, RequestError
from qadapter.serving.sampling import Drawn

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 16
"""Tokens after which bytes that make no character are shown as they are."""


class TextOfTokens:
    """The text of an answer, token by token, up to the first of some texts that end it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]):
        self.tokenizer = tokenizer
        self.stops = stops
        self.stopped = False
        self._ids: list[int] = []
        self._start = self._done = 0  # ids[start:done] are the context: their text is out
        self._held = ""

    def add(self, token: int) -> str:
        """The text that can be told with one token more."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        open_tokens = len(self._ids) - self._done
        if text.endswith(_UNFINISHED) and open_tokens < _LONGEST_CHARACTER:
            return ""
        return self._until_stop(self._new(text))

    def end(self) -> str:
        """What was held back."""
        if self.stopped:
            return ""
        new = self._until_stop(self._new(self._decode(self._ids[self._start :])))
        rest, self._held = new + self._held, ""
        return rest

    def _new(self, text: str) -> str:
        before = self._decode(self._ids[self._start : self._done])
        self._start, self._done = self._done, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def _until_stop(self, new: str) -> str:
        text = self._held + new
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that may become a stop."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if stop.startswith(text[-n:])), 0)


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one choice says next.

    Args:
        drawn: the tokens it comes of, without the one that ends the turn.
        finish: OpenAI's finish_reason, with the last piece.
        tokens: how many were written, the end of turn included; with the last piece.
    """

    choice: int
    text: str
    drawn: tuple[Drawn, ...]
    finish: str | None = None
    tokens: int = 0


async def write(engine: Engine, asked: Asked, choice: int) -> AsyncIterator[Piece]:
    """One choice: the answer number ``choice % n`` to the prompt ``choice // n``."""
    prompt = choice // asked.n
    served, sampling = asked.served, asked.sampling
    if sampling.seed is not None:
        seed = (sampling.seed + choice) % 2**63
        sampling = dataclasses.replace(sampling, seed=seed)
    text = TextOfTokens(served.tokenizer, asked.stops)
    count, ended = 0, False
    tokens = engine.write(
        asked.prompts[prompt], served.at(asked.strength), sampling, asked.max_tokens[prompt],
        served.ends,
    )
    async with contextlib.aclosing(tokens):
        async for drawn in tokens:
            count += 1
            if drawn.token in served.ends:
                ended = True
                break
            new = text.add(drawn.token)
            if new or sampling.top_logprobs is not None:
                yield Piece(choice, new, (drawn,))
            if text.stopped:
                break
    rest = text.end()
    yield Piece(choice, rest, (), "stop" if ended or text.stopped else "length", count)


async def write_all(engine: Engine, asked: Asked) -> AsyncIterator[Piece]:
    """The pieces of all choices as they come. Whoever stops listening ends them all.

    Raises:
        EngineFailed: one of them can't be finished.
    """
    pieces: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

    async def run(choice: int) -> None:
        try:
            async with contextlib.aclosing(write(engine, asked, choice)) as own:
                async for piece in own:
                    pieces.put_nowait(piece)
        except Exception as error:
            pieces.put_nowait(error)

    tasks = [asyncio.create_task(run(choice)) for choice in range(asked.answers)]
    try:
        left = len(tasks)
        while left:
            piece = await pieces.get()
            if isinstance(piece, BaseException):
                raise piece
            left -= piece.finish is not None
            yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --- OpenAI's shapes --------------------------------------------------------------------------


class Shape:
    """What a request is answered with, whole or in pieces."""

    def __init__(self, asked: Asked, chat: bool):
        self.asked = asked
        self.chat = chat
        kind = "chat.completion" if chat else "text_completion"
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "object": kind,
            "created": int(time.time()), "model": asked.served.name,
        }
        self.written = 0
        self._offsets = [0] * asked.answers

    def count(self, piece: Piece) -> None:
        self.written += piece.tokens

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(map(len, self.asked.prompts))
        return {
            "prompt_tokens": prompt, "completion_tokens": self.written,
            "total_tokens": prompt + self.written,
        }

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        choices = []
        for choice in range(self.asked.answers):
            own = [piece for piece in pieces if piece.choice == choice]
            text = "".join(piece.text for piece in own)
            drawn = [one for piece in own for one in piece.drawn]
            said = (
                {"message": {"role": "assistant", "content": text, "refusal": None}}
                if self.chat else {"text": text}
            )
            choices.append({
                "index": choice, **said, "logprobs": self._logprobs(choice, drawn),
                "finish_reason": own[-1].finish,
            })
        return {**self.head, "choices": choices, "usage": self.usage}

    def opening(self) -> list[dict[str, Any]]:
        """What comes before the first pieces: who speaks."""
        if not self.chat:
            return []
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk(c, said, None, None) for c in range(self.asked.answers)]

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        chunks = []
        if piece.text or piece.drawn:
            said = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
            logprobs = self._logprobs(piece.choice, piece.drawn)
            chunks.append(self._chunk(piece.choice, said, logprobs, None))
        if piece.finish is not None:
            said = {"delta": {}} if self.chat else {"text": ""}
            chunks.append(self._chunk(piece.choice, said, None, piece.finish))
        return chunks

    def closing(self) -> list[dict[str, Any]]:
        if not self.asked.usage:
            return []
        return [{**self._chunk_head(), "choices": [], "usage": self.usage}]

    def _chunk_head(self) -> dict[str, Any]:
        return {**self.head, **({"object": "chat.completion.chunk"} if self.chat else {})}

    def _chunk(
        self, choice: int, said: dict[str, Any], logprobs: Any, finish: str | None
    ) -> dict[str, Any]:
        chunk = {**self._chunk_head(), "choices": [
            {"index": choice, **said, "logprobs": logprobs, "finish_reason": finish}
        ]}
        return {**chunk, "usage": None} if self.asked.usage else chunk

    def _logprobs(self, choice: int, drawn: Sequence[Drawn]) -> dict[str, Any] | None:
        if self.asked.sampling.top_logprobs is None:
            return None
        if self.chat:
            return {"content": [
                {**self._token(one.token, one.logprob),
                 "top_logprobs": [self._token(*other) for other in one.top]}
                for one in drawn
            ], "refusal": None}
        texts = [self._text(one.token) for one in drawn]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[choice])
            self._offsets[choice] += len(text)
        return {
            "tokens": texts, "token_logprobs": [one.logprob for one in drawn],
            "top_logprobs": [{self._text(t): p for t, p in one.top} for one in drawn],
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        whole = _UNFINISHED not in text  # else only a part of a character
        return {
            "token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None
        }

    def _text(self, token: int) -> str:
        return self.asked.served.tokenizer.decode([token], clean_up_tokenization_spaces=False)


def failure(error: EngineFailed) -> RequestError:
    return RequestError(str(error), status=500, kind="server_error")
