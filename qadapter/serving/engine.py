"""Answers being written: transformers' continuous batching in a thread, requests of an event loop.

All methods are called in the event loop. A step that fails takes the answers of its batch with it,
and the next request starts the batching anew.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

import psutil
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import GenerationConfig

from qadapter.data.vocabulary import num_tokens
from qadapter.errors import QAdapterError, beginning
from qadapter.policy.decoding import CONTINUOUS_BATCHING
from qadapter.policy.requests import Mixture, RequestBatches
from qadapter.serving.models import ServedModel, ServedModels
from qadapter.serving.sampling import Drawing, Drawn, Sampling, draw

_PAGE = 32
"""Tokens of a block of keys and values; flash attention on a GPU wants its own size."""
_STEP_TOKENS = 256
"""Tokens that a step reads, of prompts for the most part."""
_SHARE = 0.4
"""Of the memory that is free once the base is loaded: most that keys and values take."""
_TOKENS_EACH = 1024
"""Of keys and values for each answer that may be written at once. Where they are longer together,
some are put aside meanwhile and read again."""
_ENDING = 0.01
"""Seconds between two looks at a thread that is about to end."""


class EngineFailed(Exception):
    """An answer ended before it was whole; says why, in a line for whoever asked for it."""


class Busy(Exception):
    """As many answers are being written as may be."""


def require_batching() -> None:
    """
    Raises:
        QAdapterError: the installed transformers is too old for continuous batching.
    """
    if Version(transformers.__version__) < Version(CONTINUOUS_BATCHING):
        raise QAdapterError(
            f"serve needs transformers {CONTINUOUS_BATCHING} or newer, and "
            f"{transformers.__version__} is installed: upgrade it"
        )


@dataclasses.dataclass(eq=False)
class Writing:
    """One answer that is being written. The engine's thread reads ``mixture`` and draws; all else
    belongs to the event loop."""

    key: str
    mixture: Mixture
    drawing: Drawing
    drawn: asyncio.Queue[Drawn | EngineFailed] = dataclasses.field(default_factory=asyncio.Queue)


class Engine:
    """Writes many answers at once.

    Args:
        models: what is served.
        max_length: most tokens of a prompt and its answer.
        max_concurrency: most answers being written at once.

    Raises:
        QAdapterError: an answer of ``max_length`` has no room in memory.
    """

    def __init__(self, models: ServedModels, max_length: int, max_concurrency: int):
        require_batching()
        self.models = models
        self.max_length = max_length
        self.max_concurrency = max_concurrency
        self.batches = RequestBatches(
            models.first, models.lora, models.final_norm, models.depth, self._choose
        )
        self._sizes = self._plan()
        self._manager: Any = None
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._numbers = itertools.count()
        self._reserved = 0
        self._rewarding = asyncio.Lock()

    @property
    def running(self) -> int:
        """Answers being written."""
        return len(self.batches.requests)

    def reserve(self, answers: int) -> None:
        """Take room for answers, before any of them begins; ``release`` gives it back.

        Raises:
            Busy: there is none.
        """
        if self._reserved + answers > self.max_concurrency:
            raise Busy
        self._reserved += answers

    def release(self, answers: int) -> None:
        self._reserved -= answers

    async def write(
        self, prompt: Sequence[int], mixture: Mixture, sampling: Sampling, max_tokens: int,
        ends: Sequence[int],
    ) -> AsyncIterator[Drawn]:
        """The tokens of one answer as they come, the end of turn included. Whoever stops listening
        (``aclose``) ends the answer.

        Raises:
            EngineFailed: it can't be finished.
        """
        manager = await self._started()
        writing = Writing(f"answer-{next(self._numbers)}", mixture, Drawing(sampling, prompt))
        self.batches.requests[writing.key] = writing
        finished = False
        try:
            manager.register_result_handler(writing.key, self._on_result)
            added = manager.add_request(
                list(prompt), request_id=writing.key, max_new_tokens=max_tokens,
                eos_token_id=list(ends) or -1,
            )
            if added is None:
                raise EngineFailed("the model failed a moment ago: ask again")
            for count in itertools.count(1):
                drawn = await writing.drawn.get()
                if isinstance(drawn, EngineFailed):
                    finished = True
                    raise drawn
                finished = drawn.token in ends or count == max_tokens
                yield drawn
                if finished:
                    return
        finally:
            self.batches.requests.pop(writing.key, None)
            if not finished:
                manager.cancel_request(writing.key)
                # Of what is cancelled no result comes, with which it would go.
                manager.output_router.result_handlers.pop(writing.key, None)

    async def check(self) -> None:
        """Writes a few tokens with every model, all streams in one batch.

        Raises:
            QAdapterError: the base or the adapters can't be batched.
        """
        async def tokens(served: ServedModel, strength: float) -> None:
            prompt = [1 % num_tokens(served.model)] * 3
            async for _ in self.write(prompt, served.at(strength), Sampling(0.0), 2, ()):
                pass

        dials = (0.0, 0.5, 1.0)
        try:
            await asyncio.gather(*(
                tokens(served, strength) for served in self.models.by_name.values()
                for strength in (dials if served.policy is not None else (0.0,))
            ))
        except EngineFailed as error:
            raise QAdapterError(f"these models can't be served together: {error}") from error
        except ValueError as error:  # an attention that no batching knows
            raise QAdapterError(f"the base can't be batched: {beginning(error)}") from error

    async def alone(self, work: Any, *args: Any) -> Any:
        """Runs work on the models in another thread, between two steps."""

        def locked() -> Any:
            with self.batches.apart():
                return work(*args)

        async with self._rewarding:
            return await asyncio.to_thread(locked)

    def end_all(self, reason: str) -> None:
        """Ends every answer that is being written; none is begun after."""
        self._stopped = True
        for writing in list(self.batches.requests.values()):
            writing.drawn.put_nowait(EngineFailed(reason))

    async def stop(self) -> None:
        """Ends the thread; no answer is begun after."""
        self._stopped = True
        manager, self._manager = self._manager, None
        if manager is not None and manager.is_running():
            await asyncio.to_thread(manager.stop, block=True, timeout=30, hard_stop=True)

    # --- the manager --------------------------------------------------------------------------

    async def _started(self) -> Any:
        """The manager; after a step that failed a new one, once the last one's thread has ended."""
        while self._manager is not None and self._manager.is_running() and not self._stopped:
            if self._manager.background_thread_status.can_accept_new_requests() is None:
                return self._manager
            await asyncio.sleep(_ENDING)
        if self._stopped:
            raise EngineFailed("the server is shutting down")
        self._loop = asyncio.get_running_loop()
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self._manager = self.batches.init_continuous_batching(
            config, transformers.ContinuousBatchingConfig(
                use_async_batching=False, use_cuda_graph=False,
                # Streams differ for the same tokens, where adapters lie in the trunk.
                allow_block_sharing=self.models.lora is None,
                max_requests_per_batch=self.max_concurrency, **self._sizes,
            )
        )
        self._manager.start()
        return self._manager

    def _plan(self) -> dict[str, int]:
        """Sizes of the cache. On a GPU the manager plans itself."""
        config = self.batches.config.get_text_config()
        if self.batches.device.type != "cpu":
            return {}
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * heads * size * config.num_hidden_layers * self.batches.dtype.itemsize
        blocks_each = math.ceil(self.max_length / _PAGE) + 1
        affordable = int(_SHARE * psutil.virtual_memory().available / (token * _PAGE))
        if affordable < blocks_each:
            raise QAdapterError(
                f"the keys and values of {self.max_length:,} tokens take "
                f"{token * self.max_length / 2**30:.1f} GiB, more than there is room for: choose a "
                "smaller max_length"
            )
        blocks = max(blocks_each, self.max_concurrency * min(blocks_each, _TOKENS_EACH // _PAGE))
        return {
            "page_size": _PAGE, "num_blocks": min(affordable, blocks),
            "max_batch_tokens": max(_STEP_TOKENS, self.max_concurrency),
        }

    def _choose(self, found: list[Writing | None], logits_NV: Tensor) -> list[int]:
        """In the manager's thread. An answer that was ended meanwhile takes any token."""
        rows = [i for i, writing in enumerate(found) if writing is not None]
        if not rows:
            return [0] * len(found)
        asked = [found[i] for i in rows]
        if len(rows) < len(found):
            logits_NV = logits_NV[torch.tensor(rows, device=logits_NV.device)]
        drawn = draw(logits_NV, [writing.drawing for writing in asked])
        tokens = [0] * len(found)
        for row, one in zip(rows, drawn, strict=True):
            tokens[row] = 0 if one is None else one.token
        self._loop.call_soon_threadsafe(_hand_out, asked, drawn)
        return tokens

    def _on_result(self, output: Any) -> None:
        writing = self.batches.requests.get(output.request_id)
        if output.error is not None and writing is not None:
            writing.drawn.put_nowait(EngineFailed(
                f"the model failed while it wrote: {beginning(output.error)}"
            ))


def _hand_out(asked: Sequence[Writing], drawn: Sequence[Drawn | None]) -> None:
    for writing, one in zip(asked, drawn, strict=True):
        writing.drawn.put_nowait(
            EngineFailed("the model's logits are not finite: nothing can be drawn")
            if one is None else one
        )
