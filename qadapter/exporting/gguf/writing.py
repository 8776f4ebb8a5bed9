"""Writing a GGUF file: a tensor at a time, whatever the checkpoint's size.

Shapes: as in transformers; GGUF lists dimensions in the other order.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from qadapter.errors import QAdapterError
from qadapter.exporting.gguf.architectures import Layout, NotWritten, layout_of
from qadapter.exporting.gguf.vocabulary import vocabulary

_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
"""GGUF's numbers of what most weights are."""
_BLOCK = 32
"""Weights that share a scale in q8_0: only rows of a multiple are stored in it."""


def write_gguf(
    checkpoint: Path, file: Path, kind: str, name: str, end_ids: Sequence[int]
) -> None:
    """A checkpoint of transformers as a GGUF file.

    Args:
        checkpoint: a folder with config, safetensors and tokenizer.
        kind: one of ``making.TYPES``. name: of the model, for people.
        end_ids: tokens that end an answer.

    Raises:
        NotWritten: an architecture or a tokenizer that isn't written here.
        QAdapterError: one that llama.cpp doesn't compute, or weights beyond f16's range.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    layout = layout_of(config)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with _opened(checkpoint) as weights:
        targets = _targets(weights, layout, config.num_hidden_layers)
        rows = weights["model.embed_tokens.weight"].shape[0]
        writer = gguf.GGUFWriter(file, layout.architecture)
        metadata = {
            "general.name": name,
            "general.file_type": _FILE_TYPES[kind],
            "general.quantization_version": gguf.GGML_QUANT_VERSION,
            **{f"{layout.architecture}.{key}": value for key, value in layout.metadata.items()},
            **vocabulary(tokenizer, rows, end_ids),
        }
        for key, value in metadata.items():
            _ADD[type(value)](writer, key, value)
        kinds = {source: _kind_of(weights[source].shape, kind) for source in targets}
        for source, target in targets.items():
            _announce(writer, target, weights[source].shape, kinds[source])
        for target, array in layout.tensors.items():
            _announce(writer, target, array.shape, _kind_of(array.shape, kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        try:
            for source in targets:
                array = _as_stored_there(weights[source].read(), source, layout)
                writer.write_tensor_data(_quantized(array, source, kinds[source]))
            for array in layout.tensors.values():
                writer.write_tensor_data(array)
        finally:
            writer.close()


_ADD: Mapping[type, Callable[[gguf.GGUFWriter, str, Any], None]] = {
    str: gguf.GGUFWriter.add_string, bool: gguf.GGUFWriter.add_bool,
    int: gguf.GGUFWriter.add_uint32, float: gguf.GGUFWriter.add_float32,
    list: gguf.GGUFWriter.add_array,
}


# --- tensors ------------------------------------------------------------------------------------


class _Weight(NamedTuple):
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@contextlib.contextmanager
def _opened(checkpoint: Path) -> Iterator[dict[str, _Weight]]:
    """The tensors of a checkpoint, to be read one by one."""
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    files = {SAFE_WEIGHTS_NAME}
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(checkpoint / f, "pt")) for f in sorted(files)]
        yield {
            name: _Weight(tuple(f.get_slice(name).get_shape()), partial(f.get_tensor, name))
            for f in opened for name in f.keys()
        }


def _targets(weights: Iterable[str], layout: Layout, blocks: int) -> dict[str, str]:
    """Name there of each tensor here."""
    architecture = next(
        (k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == layout.architecture), None
    )
    if architecture is None:
        raise NotWritten(f"this version of gguf does not know {layout.architecture}: a newer one")
    names = gguf.get_tensor_name_map(architecture, blocks)
    targets = {name: names.get_name(name, (".weight", ".bias")) for name in weights}
    if "lm_head.weight" in targets and not layout.reads_output_layer:
        raise QAdapterError(
            f"llama.cpp's {layout.architecture} has no output layer beside the input embedding, "
            "and this policy needs one: a LoRA in the trunk, at strength 1, does not"
        )
    if "lm_head.bias" in targets:
        raise QAdapterError(f"llama.cpp's {layout.architecture} has no bias in the output layer")
    unknown = [name for name, target in targets.items() if target is None]
    if unknown:
        raise NotWritten(f"{unknown[0]} has no place in a GGUF file of {layout.architecture}")
    return targets


def _as_stored_there(weight: Tensor, name: str, layout: Layout) -> np.ndarray:
    """A tensor in float32, its rows in llama.cpp's order."""
    heads = layout.paired_heads.get(name.rpartition(".")[0].rpartition(".")[2])
    if heads is not None:
        # Halves of a head [heads, 2, pairs, …] beside each other [heads, pairs, 2, …].
        weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    array = weight.to(torch.float32)
    if name.endswith("norm.weight"):
        array = array + layout.norm_offset
    return array.contiguous().numpy()


# --- types --------------------------------------------------------------------------------------


def _kind_of(shape: Sequence[int], kind: str) -> gguf.GGMLQuantizationType:
    if len(shape) < 2:
        kind = "f32"
    elif kind == "q8_0" and shape[-1] % _BLOCK:
        kind = "f16"
    return gguf.GGMLQuantizationType[kind.upper()]


def _announce(
    writer: gguf.GGUFWriter, name: str, shape: Sequence[int], kind: gguf.GGMLQuantizationType
) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    writer.add_tensor_info(
        name, shape, np.dtype(np.float32), math.prod(shape) // block * size, kind
    )


def _quantized(array: np.ndarray, name: str, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = gguf.quantize(array, kind)
    if stored.dtype == np.float16 and not np.isfinite(stored).all():
        raise QAdapterError(f"{name} does not fit f16: take gguf_type bf16, or f32")
    return stored
