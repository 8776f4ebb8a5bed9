"""A reward model with a sequence-classification head as the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pickle import UnpicklingError

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
)

from qadapter.data import Prompt
from qadapter.data.chat import ChatTemplate
from qadapter.data.messages import answered
from qadapter.data.report import BadRow
from qadapter.errors import QAdapterError
from qadapter.evaluation.judges.interface import Progress, RewardJudge, check_lengths
from qadapter.evaluation.judges.texts import judged_messages, prompt_text
from qadapter.evaluation.scoring import evaluating
from qadapter.trunk.loading import auto_dtype, require_no_kernels
from qadapter.trunk.whole import require_own_shards

# RuntimeError: weights of other shapes than the config says.
_UNREADABLE = (
    OSError, ValueError, ImportError, RuntimeError, SafetensorError, UnpicklingError
)


class SequenceClassificationJudge(RewardJudge):
    """The one logit of an ``AutoModelForSequenceClassification``.

    Prompt and answer go through the reward model's own chat template where it has one; else they
    are its tokenizer's pair of texts.

    Args:
        model_name_or_path: a folder or a hub name.
        max_length: most tokens; what is too long loses its start. Default: what the tokenizer says,
            if it says anything below a million.
        device: default: a GPU where there is one.

    Raises:
        QAdapterError: it can't be loaded, lacks weights (as a plain language model lacks those of
            the head), or has more than one label.
    """

    def __init__(
        self, model_name_or_path: str, *, revision: str | None = None, dtype: str = "auto",
        trust_remote_code: bool = False, max_length: int | None = None, batch_size: int = 8,
        device: str | None = None,
    ):
        options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        require_own_shards(model_name_or_path)
        try:
            config = AutoConfig.from_pretrained(model_name_or_path, **options)
            if not trust_remote_code:
                require_no_kernels(config, model_name_or_path)
            if dtype == "auto":
                dtype = auto_dtype(config, None, device_map=device)
            self.tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, **options)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                model_name_or_path, dtype=dtype, output_loading_info=True, **options
            )
        except _UNREADABLE as error:
            raise QAdapterError(
                f"the reward model {model_name_or_path} can't be loaded: {error}"
            ) from error
        if missing := sorted(loading["missing_keys"]):
            # transformers draws them at random, and would score by that.
            raise QAdapterError(
                f"{model_name_or_path} is not a reward model with one label (a plain language "
                f"model?): it holds no weights for {missing[0]}"
            )
        if model.config.num_labels != 1:
            raise QAdapterError(
                f"{model_name_or_path} has {model.config.num_labels} labels; a reward model has one"
            )
        self.model = model.to(device).eval()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # The head finds an answer's last token by what padding is.
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.truncation_side, self.tokenizer.padding_side = "left", "right"
        known = self.tokenizer.model_max_length
        self.max_length = max_length or (known if known < 10**6 else None)
        self.batch_size = batch_size
        self.name = f"{model_name_or_path.rstrip('/').rsplit('/', 1)[-1]} (reward model)"

    def scores(
        self, prompts: Sequence[Prompt], answers: Sequence[str], progress: Progress | None = None
    ) -> np.ndarray:
        check_lengths(prompts, answers)
        order = sorted(range(len(answers)), key=lambda i: -len(answers[i]))
        found = np.empty(len(answers))
        with evaluating(self.model):
            for first in range(0, len(order), self.batch_size):
                indices = order[first : first + self.batch_size]
                batch = self._encode([prompts[i] for i in indices], [answers[i] for i in indices])
                logits = self.model(**batch.to(self.model.device)).logits
                found[indices] = logits[:, 0].double().cpu().numpy()
                if progress is not None:
                    progress(first + len(indices), len(order))
        return found

    def _encode(self, prompts: list[Prompt], answers: list[str]) -> BatchEncoding:
        options = {
            "padding": True, "truncation": self.max_length is not None,
            "max_length": self.max_length, "return_tensors": "pt",
        }
        if not self.tokenizer.chat_template:
            return self.tokenizer([prompt_text(prompt) for prompt in prompts], answers, **options)
        chat = ChatTemplate(self.tokenizer)
        try:
            rendered = [
                chat.whole(
                    answered(judged_messages(prompt), [{"role": "assistant", "content": answer}]),
                    # Its other keywords are for the template of the model that answered.
                    {"tools": prompt.get("tools") if isinstance(prompt, Mapping) else None},
                )
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
        except BadRow as bad:
            raise QAdapterError(
                f"{self.name}: its chat template can't render an answer: {bad.detail}"
            ) from bad
        # The template wrote the special tokens.
        return self.tokenizer(rendered, add_special_tokens=False, **options)
