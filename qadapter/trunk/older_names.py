"""What transformers 4 calls the same: names that version 5 has given up, written beside its own.

Version 5 keeps what it knows of rotary positions in ``rope_parameters``; version 4 reads
``rope_theta``, ``rope_scaling`` and more, and takes its defaults, without a word, where they are
missing. Other engines go by either. Both are written, and both are read again here: version 5 knows
the older names, so that they are right where it makes the same configuration of them.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import FULL_TOKENIZER_FILE, TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME

_LOCAL = "rope_local_base_freq"
"""The base of the layers that see a window, where other layers have another."""
_GPT_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
"""What its kin calls these."""
_OLDER_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor", _LOCAL, *_GPT_NEOX.values())
_OF_THE_CLASS = (
    "padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces",
)
"""What a tokenizer's file says only where it is not its class's."""
_NEWER_NAMES = ("rope_parameters", "dtype")


def add_older_names(folder: Path, kind: type[PretrainedConfig]) -> bool:
    """Complete ``config.json`` so that version 4 reads the same of it.

    Args:
        kind: of configuration.

    Returns:
        Whether it does, as far as version 5 can tell.
    """
    path = folder / CONFIG_NAME
    config = kind.from_pretrained(folder)
    written = json.loads(path.read_text(encoding="utf-8"))
    wanted = config.to_dict()
    best, sure = None, False
    for with_local in (False, True):
        both = _with_older(config, written, with_local)
        if not sure and _same(_read(config, both), wanted):
            sure = _same(_read(config, _without(both, _NEWER_NAMES)), wanted)
            best = both if sure or best is None else best
    if best is not None:
        path.write_text(json.dumps(best, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sure


def _with_older(
    config: PretrainedConfig, written: dict[str, Any], with_local: bool
) -> dict[str, Any]:
    """What was written of a configuration and of those within it, and the older names."""
    found = dict(written)
    for name in config.sub_configs:
        if isinstance(written.get(name), dict):
            found[name] = _with_older(getattr(config, name), written[name], with_local)
    for alias, name in config.attribute_map.items():  # some have changed sides between the versions
        if name in written:
            found.setdefault(alias, written[name])
    if "dtype" in written:
        found["torch_dtype"] = written["dtype"]
    if rope := written.get("rope_parameters"):
        found |= _older_rope(config.model_type, rope, written, with_local)
    return found


def _older_rope(
    model_type: str, rope: dict[str, Any], written: dict[str, Any], with_local: bool
) -> dict[str, Any]:
    """``rope_parameters`` as fields of their own."""
    kinds = {name: x for name, x in rope.items() if isinstance(x, dict)}
    main = kinds.get("full_attention", rope)
    found = {
        name: main[name] for name in ("rope_theta", "partial_rotary_factor")
        if main.get(name) is not None
    }
    if with_local and "sliding_attention" in kinds:
        found[_LOCAL] = kinds["sliding_attention"]["rope_theta"]
    if main["rope_type"] != "default":
        found["rope_scaling"] = {
            name: x for name, x in main.items() if name not in found and not isinstance(x, dict)
        }
    if main["rope_type"] == "longrope":
        found["original_max_position_embeddings"] = main["original_max_position_embeddings"]
        if model_type.startswith("phi3"):  # takes these three alone
            found["rope_scaling"] = {
                "type": "longrope",
                **{name: main[name] for name in ("short_factor", "long_factor")},
            }
    if model_type.startswith("gpt_neox"):
        found |= {_GPT_NEOX[name]: x for name, x in found.items() if name in _GPT_NEOX}
    return found


def _without(fields: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {
        name: _without(x, names) if isinstance(x, dict) else x
        for name, x in fields.items() if name not in names
    }


def _read(config: PretrainedConfig, fields: dict[str, Any]) -> dict[str, Any] | None:
    try:
        return type(config).from_dict(copy.deepcopy(fields)).to_dict()
    except Exception:  # each model's own checks
        return None


def _same(found: Any, wanted: Any) -> bool:
    """Whether what is wanted was found; names that were never wanted may be there too."""
    if isinstance(wanted, dict):
        # Beside the newer names, the older ones may be left over from a class's defaults.
        skipped = {"_name_or_path", *(_OLDER_ROPE if "rope_parameters" in wanted else ())}
        return isinstance(found, dict) and all(
            _same(found.get(name), x) for name, x in wanted.items() if name not in skipped
        )
    return found == wanted


def add_older_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let version 4 read the tokenizer that is in ``tokenizer.json``, as version 5 does.

    Its classes for single models add a beginning of the text by switches that version 5 doesn't
    write, and where version 5 wrote the class of all of them there is none of that name. The class
    that both have takes the file as it is.

    Args:
        tokenizer: what was saved there.
    """
    path = folder / TOKENIZER_CONFIG_FILE
    if not path.is_file() or not (folder / FULL_TOKENIZER_FILE).is_file():
        return
    fields = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or "auto_map" in fields:
        return
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in _OF_THE_CLASS:
        fields.setdefault(name, getattr(tokenizer, name))
    if isinstance(fields.get("extra_special_tokens"), list):
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    path.write_text(
        json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
