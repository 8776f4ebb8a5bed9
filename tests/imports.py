"""What the commands import, all of it at once: for processes that are forked from one that has it,
and for those in which what is there should be there early."""

from __future__ import annotations

import atexit
import gc
import importlib
import pkgutil

import qadapter

_LEFT_OUT = ("qadapter.exporting.gguf.in_llama_cpp", "qadapter.integrations.lm_eval")
"""They need packages that qadapter does without."""
_IMPORTED_LATE = (
    "matplotlib.backends.backend_agg", "matplotlib.figure",
    "peft.utils.transformers_weight_conversion",
    "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "pydantic.type_adapter", "safetensors.torch",
    "torch._dynamo", "torch.profiler", "torch.utils.serialization", "transformers.trainer",
    "transformers.models.llama.modeling_llama", "trl",
)
"""What commands import when they get there."""


def names() -> list[str]:
    """Of all those modules."""
    ours = (module.name for module in pkgutil.walk_packages(qadapter.__path__, "qadapter."))
    return [*(name for name in ours if name not in _LEFT_OUT), *_IMPORTED_LATE]


def import_all() -> None:
    """Nothing is computed: threads don't outlive a fork."""
    for name in names():
        importlib.import_module(name)


def leave_to_stay() -> None:
    """What is there now is in no later collection: a full one walks all that torch and transformers
    have imported, in a third of a second."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or Triton's bindings report it all as leaked
