"""Text to token ids, fast where it is long.

Rows of megabytes are rare and real (a scraped page, a log); a tokenizer takes seconds for one, and
a pair has each prompt three times: alone, and before either answer.
"""

import itertools
import re

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qadapter.errors import QAdapterError
from qadapter.system.textfiles import is_unicode

_LONG = 20_000
"""Characters from which on the shortcuts are worth their checks."""
_KEPT = 4
"""Long sections that are kept."""


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """``tokenizer(text, add_special_tokens=False)["input_ids"]``.

    Raises:
        QAdapterError: the text holds half of a surrogate pair.
    """
    try:
        return _token_ids(tokenizer, text)
    except (TypeError, UnicodeEncodeError) as error:
        if is_unicode(text):
            raise
        raise QAdapterError(
            f"a text holds half of a surrogate pair, which is no character: {text[:60]!r}"
        ) from error


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if _is_plain(tokenizer):
        # The same ids without every token's place in the text: about half the time.
        backend = tokenizer.backend_tokenizer
        return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether calling it comes down to its backend, as that is set now."""
    return (
        tokenizer.is_fast
        and type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus
        and not tokenizer.split_special_tokens
        and tokenizer.backend_tokenizer.truncation is None
        and tokenizer.backend_tokenizer.padding is None
    )


class SectionedText:
    """`token_ids` of texts that have long sections in common, such as a prompt alone and with its
    answers.

    Added tokens cut a text into sections that a tokenizer works on one by one, so that what stands
    before one of them is tokenized once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.kept: dict[str, list[int]] = {}
        added = tokenizer.added_tokens_decoder.values() if tokenizer.is_fast else ()
        # A token that swallows white space around it, or is found after normalizing, is no cut.
        self.cuts = {
            str(token) for token in added
            if token.special and not (token.lstrip or token.rstrip or token.single_word
                                      or token.normalized)
        }
        # Longest first, as the tokenizer finds them, and those that are no cut among them.
        words = sorted(map(str, added), key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, words)) or r"(?!)")

    def __call__(self, text: str) -> list[int]:
        if len(text) < _LONG or not self.cuts:
            return token_ids(self.tokenizer, text)
        starts = [m.start() for m in self.added.finditer(text) if m.group() in self.cuts]
        bounds = [0, *starts, len(text)]
        ids: list[int] = []
        for start, end in itertools.pairwise(bounds):
            if start < end:
                ids += self._section(text[start:end])
        return ids

    def _section(self, text: str) -> list[int]:
        if len(text) < _LONG:
            return token_ids(self.tokenizer, text)
        if text not in self.kept:
            if len(self.kept) == _KEPT:
                del self.kept[next(iter(self.kept))]
            self.kept[text] = token_ids(self.tokenizer, text)
        return self.kept[text]
