"""From a policy's checkpoint to its GGUF file: written here, or by llama.cpp's converter."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.exporting.engines import GGUF_TYPES
from qadapter.exporting.forms import FROM_MERGED
from qadapter.exporting.gguf.architectures import ARCHITECTURES, NotWritten, layout_of
from qadapter.exporting.gguf.converter import SCRIPT, convert, find_converter
from qadapter.exporting.gguf.vocabulary import vocabulary
from qadapter.trunk.base_dtype import dtype_name

TYPES = ("f32", "f16", "bf16", "q8_0")
"""Of the weights. Vectors (norms, biases) are float32 in all of them, as in llama.cpp's files."""


def own_type(dtype: torch.dtype) -> str:
    """The type that holds weights of a dtype as they are."""
    return GGUF_TYPES.get(dtype_name(dtype), "f32")


def require_options(form: str, gguf_type: str, llama_cpp_dir: str | Path | None) -> None:
    """
    Raises:
        QAdapterError: options of GGUF files for another form, a type that is none, or no gguf
            library.
    """
    if form not in FROM_MERGED:
        if gguf_type != "auto" or llama_cpp_dir is not None:
            raise QAdapterError(
                f"gguf_type and llama_cpp_dir are for form {' and '.join(FROM_MERGED)}"
            )
        return
    if gguf_type not in ("auto", *TYPES):
        raise QAdapterError(f"gguf_type must be auto, {', '.join(TYPES)}, got {gguf_type!r}")
    if importlib.util.find_spec("gguf") is None:
        raise QAdapterError("GGUF files need the gguf library: pip install 'qadapter[gguf]'")


def require_architecture(
    config: PreTrainedConfig, own_head: bool, llama_cpp_dir: str | Path | None
) -> None:
    """Whether policies on a base can become GGUF files.

    Args:
        own_head: whether the policy has an output layer of its own.

    Raises:
        QAdapterError: they can't; the message says why, and what can be done.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise QAdapterError(
            "the base is quantized, and a GGUF file is made from plain weights: load it in 16 or "
            "32 bits; gguf_type q8_0 is the file's own way to be small"
        )
    converter = find_converter(llama_cpp_dir)
    try:
        layout = layout_of(config)
    except NotWritten as reason:
        if converter is None:
            raise _no_way(reason) from None
        return
    if own_head and not layout.reads_output_layer:
        raise QAdapterError(
            f"llama.cpp's {config.model_type} takes the input embedding for the output layer, "
            "and this policy needs one of its own; that of a LoRA in the trunk does not"
        )


def require_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, rows: int, llama_cpp_dir: str | Path | None
) -> None:
    """
    Args:
        rows: of the embedding.

    Raises:
        QAdapterError: there is none, or it can't be written.
    """
    if tokenizer is None:
        raise QAdapterError("a GGUF file holds its tokenizer, and this base came without one")
    try:
        vocabulary(tokenizer, rows, ())
    except NotWritten as reason:
        if find_converter(llama_cpp_dir) is None:
            raise _no_way(reason) from None


def make_gguf(
    checkpoint: Path, file: Path, kind: str, name: str, end_ids: Sequence[int],
    llama_cpp_dir: str | Path | None,
) -> str:
    """Write the file.

    Args:
        checkpoint: a folder of transformers'. kind: one of ``TYPES``. name: of the model.
        end_ids: tokens that end an answer.

    Returns:
        What wrote it.

    Raises:
        QAdapterError: nothing at hand can, or llama.cpp doesn't compute it.
    """
    from qadapter.exporting.gguf.writing import write_gguf

    try:
        write_gguf(checkpoint, file, kind, name, end_ids)
    except NotWritten as reason:
        converter = find_converter(llama_cpp_dir)
        if converter is None:
            raise _no_way(reason) from None
        file.unlink(missing_ok=True)
        convert(converter, checkpoint, file, kind)
        return f"llama.cpp's {SCRIPT}"
    return f"gguf {importlib.metadata.version('gguf')}"


def _no_way(reason: NotWritten) -> QAdapterError:
    return QAdapterError(
        f"{reason} ({', '.join(ARCHITECTURES)} are, with the usual tokenizers). llama.cpp's "
        f"{SCRIPT} may do it: name llama.cpp's folder as llama_cpp_dir, or put it on PATH"
    )
