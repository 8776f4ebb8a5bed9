"""The forms an adapter can be exported in, and what an adapter alone says against one of them.

All of it is known before a base is there, so that nobody waits for one to hear of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from qadapter.adapters.head_adapter import AdapterConfig
from qadapter.errors import QAdapterError

if TYPE_CHECKING:
    from peft import PeftConfig

Form = Literal["merged", "lm_head_lora", "peft", "gguf", "ollama"]
FORMS = ("merged", "lm_head_lora", "peft", "gguf", "ollama")
FROM_MERGED = ("gguf", "ollama")
"""Made from a merged checkpoint, and nothing else."""


class Words(NamedTuple):
    """How a caller asks for things."""

    form: str
    """With the form's name for ``{}``."""
    approximate: str
    texts: str
    strength: str
    """Of 1."""

    def of(self, form: str) -> str:
        """What asks for a form."""
        return self.form.format(form)


IN_PYTHON = Words('form="{}"', "approximate=True", "texts=…", "set_policy(strength=1)")
ON_THE_COMMAND_LINE = Words("--form {}", "--approximate", "--texts_file FILE", "--strength 1")


def require_exportable(
    adapter: AdapterConfig | PeftConfig, weights: tuple[float, float], form: str, *,
    adapters: int = 1, approximate: bool = False, texts: bool = False, words: Words = IN_PYTHON,
) -> None:
    """
    Args:
        adapter: its configuration; a composition of adapters in the trunk: the first one's.
        weights: (p_a, p_b), the policy's of the adapted and of the base stream.
        adapters: how many are composed in the trunk.
        approximate, texts: whether these were asked for and given.
        words: the caller's, for messages.

    Raises:
        QAdapterError: there is no exact export of this form, or what was asked for doesn't go
            together; says why, and what does.
    """
    if form not in FORMS:
        raise QAdapterError(f"form must be {', '.join(FORMS[:-1])} or {FORMS[-1]}, got {form!r}")
    if texts and not approximate and form not in FROM_MERGED:
        raise QAdapterError(
            f"{words.texts} is for {words.approximate}, and for "
            f"{' and '.join(map(words.of, FROM_MERGED))}"
        )
    if weights[0] == 0:
        raise QAdapterError(
            "at strength 0 the policy is the base itself: there is nothing to export"
        )
    if isinstance(adapter, AdapterConfig):
        _check_head(adapter, weights, form, approximate, texts, words)
    else:
        _check_trunk(weights, form, adapters, approximate, words)


def _check_head(
    adapter: AdapterConfig, weights: tuple[float, float], form: str, approximate: bool,
    texts: bool, words: Words,
) -> None:
    if form == "peft":
        raise QAdapterError(
            f"{words.of(form)} is for LoRA in the trunk; a head adapter becomes a PEFT folder by "
            f"{words.of('lm_head_lora')}"
        )
    if form == "lm_head_lora" and sum(weights) <= 0:
        raise QAdapterError(
            f"{words.of(form)}: the streams' weights sum to {sum(weights):g}, so no LoRA beside "
            "the unscaled lm_head gives this policy at any temperature; "
            f"{words.of('merged')} does"
        )
    if adapter.form == "linear":
        if approximate:
            raise QAdapterError(
                f"{words.approximate} is not needed: a linear adapter is exported exactly"
            )
        return
    if not approximate:
        if adapter.form == "block":
            _check_block(weights, form, words)
            return
        raise QAdapterError(
            f"an adapter of form {adapter.form!r} is not linear, so no lm_head equals it: "
            f'{nearest_linear(words)}; one that is trained in form "block" is exported exactly'
        )
    if not texts:
        raise QAdapterError(
            f"{words.approximate} needs {words.texts} to fit to: texts like those the model is for"
        )


def _check_block(weights: tuple[float, float], form: str, words: Words) -> None:
    if form == "lm_head_lora":
        raise QAdapterError(
            f'an adapter of form "block" is no LoRA: {words.of("merged")} writes it as one decoder '
            f"layer more, exactly; for {words.of(form)}, {nearest_linear(words)}"
        )
    p_a, p_b = weights
    if p_b != 0:
        raise QAdapterError(
            f"this policy adds up two streams behind the final norm (weights {p_a:g} adapted, "
            f"{p_b:g} base), and a decoder layer more is the adapted one alone: export it at "
            f"strength 1 ({words.strength}) of the policy parametrization; {nearest_linear(words)}"
        )


def nearest_linear(words: Words = IN_PYTHON) -> str:
    """The way out for an adapter that has no exact export."""
    return (
        f"{words.approximate} with {words.texts}, texts like those the model is for, exports the "
        "nearest linear adapter and says how near it is"
    )


def _check_trunk(
    weights: tuple[float, float], form: str, adapters: int, approximate: bool, words: Words
) -> None:
    if approximate:
        raise QAdapterError(
            f"{words.approximate} is for head adapters, this one is in the trunk"
        )
    if form == "lm_head_lora":
        raise QAdapterError(
            f"{words.of(form)} is for head adapters; LoRA in the trunk takes "
            f"{words.of('merged')} or {words.of('peft')}"
        )
    if adapters > 1:
        raise QAdapterError(
            f"a composition of {adapters} adapters in the trunk runs as many streams, and no "
            "single model is all of them: serve it with QAdapterModel itself"
        )
    p_a, p_b = weights
    if p_b != 0:
        raise QAdapterError(
            f"this policy runs two streams through the trunk (weights {p_a:g} adapted, {p_b:g} "
            "base), and no single model is both. One trained in the policy parametrization needs "
            f"one stream at strength 1 ({words.strength}) and the α's it was trained with: export "
            "that"
        )
