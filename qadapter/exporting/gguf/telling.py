"""What is said of a GGUF file: on its card, and on the terminal."""

from __future__ import annotations

from qadapter.exporting.gguf.check import GgufCheck, Loss

_MIB = 2**20


def rows(check: GgufCheck) -> dict[str, str]:
    """The check, as a table of two columns."""
    found = {"type of the weights": f"{check.kind}, {check.size / _MIB:,.1f} MiB"}
    if check.weights is not None:
        found["largest error of a weight, over what rounding to the type explains"] = (
            f"{check.weights:.3g} (0: the same)"
        )
    for where, loss in (
        ("fixed prompts, in transformers", check.prompts),
        ("given texts, in transformers", check.texts),
        ("fixed prompts, in llama.cpp", check.llama_cpp),
    ):
        if loss is not None:
            found |= _of_loss(where, loss)
    if check.llama_cpp is not None:
        found["answers in llama.cpp equal to the checkpoint's"] = (
            f"{check.llama_cpp_answers} of {check.llama_cpp_prompts}"
        )
    return found


def _of_loss(where: str, loss: Loss) -> dict[str, str]:
    return {
        f"KL(policy ‖ file), {where}": f"{loss.kl:.3g} nats a token, {loss.states:,} tokens",
        f"same most likely token, {where}": f"{loss.same_top:,} of {loss.states:,}",
    }


def how_checked(check: GgufCheck) -> str:
    """A sentence or two for the card."""
    sentences = []
    if check.unread:
        sentences.append(f"Stock transformers doesn't read it: {check.unread}.")
    else:
        sentences.append(
            "Stock transformers read the file beside the checkpoint it was made from, in a process "
            "without qadapter: weights, settings, and probabilities in float32."
        )
    if check.llama_cpp is None:
        sentences.append(
            "It was **not run in llama.cpp** (`pip install llama-cpp-python` before exporting has "
            "it checked there too)."
        )
    else:
        sentences.append(
            f"llama.cpp (llama-cpp-python {check.llama_cpp_version}) ran it: its tokenizer reads "
            "the same tokens, chat included, and its logits are the file's within rounding."
        )
    return " ".join(sentences)
