"""LoRA in the trunk: PEFT adapters that can be gated off, for a whole batch or groups of its rows.

The base stream is the same weights with the adapter off. PEFT's ``disable_adapter()`` walks the
model, flips ``requires_grad`` and takes some 50 ms on 224 layers (peft#3447); flipping one flag on
a kept list of layers takes under 1 ms and changes nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import peft
import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qadapter.adapters.gating import (
    GatedDropout,
    PutStreams,
    RowsOfStreams,
    frozen_module,
    sums_adapters,
)
from qadapter.adapters.peft_config import require_adapting, require_matching
from qadapter.adapters.streams import BASE
from qadapter.errors import QAdapterError, beginning
from qadapter.trunk.checkpointing import checkpoints_reentrantly
from qadapter.trunk.lm_head import input_device, trunk
from qadapter.trunk.loading import shell_of
from qadapter.trunk.sharding import (
    freeze,
    layout_of,
    require_whole,
    require_whole_matrices,
    reshard,
    stand_ins,
    within,
)
from qadapter.trunk.split import SplitTrunk, lowest_adapted

PRESETS = {
    "paper": {
        "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"],
    },
}
"""``paper``: what the authors trained (Li et al., ICLR 2025, and their published code)."""
_DROPOUTS = ("rank_dropout", "module_dropout")
"""Fields by which PEFT drops without a module for it."""


def preset(name: str) -> PeftConfig:
    """A LoRA configuration by name.

    Raises:
        QAdapterError: no such preset.
    """
    if name not in PRESETS:
        raise QAdapterError(
            f"adapter {name!r}: neither a preset ({', '.join(PRESETS)}), a qadapter.AdapterConfig "
            "nor a peft configuration"
        )
    return peft.LoraConfig(**PRESETS[name], task_type="CAUSAL_LM")


class LoraAdapter:
    """PEFT adapters injected into a base's trunk, mostly one. Not a module: its weights are the
    base's.

    Args:
        base: a frozen causal LM; PEFT's layers take the places of those they adapt.
        config: any PEFT configuration that adapts layers (LoRA, DoRA, rsLoRA, patterns, …).

    Raises:
        QAdapterError: the configuration fits no layer, adapts the head, or changes the base.
    """

    def __init__(self, base: PreTrainedModel, config: PeftConfig):
        name = type(base).__name__
        require_whole_matrices(base, "an adapter of PEFT's")
        freeze(base)
        require_adapting(config)
        require_matching(config, (name for name, _ in base.named_modules()))
        before = _probe(base)
        reshard(base)
        frozen = {id(p) for p in base.parameters()}
        try:
            with warnings.catch_warnings(), stand_ins(base):
                # PEFT reads a property by the name that transformers gives up.
                warnings.simplefilter("ignore", FutureWarning)
                self.peft_model = peft.get_peft_model(base, _trainable(config))
        except Exception as error:  # a class for each kind of adapter, with checks of its own
            raise QAdapterError(
                f"PEFT can't adapt {name}: {beginning(error)}; a head adapter fits any base"
            ) from error
        if not checkpoints_reentrantly(base):
            # PEFT asks for them as transformers does: see QAdapterModel.
            base.disable_input_require_grads()
        self.config = self.peft_model.peft_config["default"]
        self.names = ["default"]
        """Of the adapters, as PEFT calls them."""
        self._weights = [n for n, p in base.named_parameters() if id(p) not in frozen]
        """By their names in the base: a move may put others in their places."""
        self._rows = RowsOfStreams()
        self._originals: list[tuple[nn.Module, dict[str, Tensor]]] = []
        self._find_layers(base)
        self._check(base, before)

    def add(self, config: PeftConfig, weights: dict[str, Tensor]) -> None:
        """One more adapter on the same base; all are frozen from then on.

        Args:
            config: of the kind of those that are there.
            weights: as ``state_dict`` gives them.

        Raises:
            QAdapterError: PEFT can't hold both.
        """
        base, name = self.peft_model.get_base_model(), f"adapter_{len(self.names)}"
        reshard(base)
        frozen = {id(p) for p in base.parameters()} - {id(p) for p in self.parameters()}
        require_matching(config, (name for name, _ in base.named_modules()))
        try:
            with stand_ins(base):
                self.peft_model.add_adapter(name, _trainable(config))
        except Exception as error:
            raise QAdapterError(
                f"PEFT can't hold these adapters together: {beginning(error)}"
            ) from error
        set_peft_model_state_dict(self.peft_model, weights, adapter_name=name)
        self.names.append(name)
        self._weights = [n for n, p in base.named_parameters() if id(p) not in frozen]
        base.requires_grad_(False)
        self._find_layers(base)

    def _find_layers(self, base: PreTrainedModel) -> None:
        self.layers = [
            m for m in base.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        ]
        for layer in self.layers:
            self._gate_rows(layer)
        self._split: tuple[SplitTrunk | None, str] | None = None

    # --- the streams ------------------------------------------------------------------------

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The base stream: inside, the trunk is the frozen base's, bit for bit."""
        self._check_apart()
        for layer in self.layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self.layers:
                layer._disable_adapters = False

    @contextlib.contextmanager
    def on(self, streams: Sequence[int], rows: int, tokens: int) -> Iterator[None]:
        """One stream; or several in one forward, a group of a batch's rows each, for inference.

        Args:
            streams: adapters, or ``BASE``, in the order of the groups, which are of one size.
            rows, tokens: shape of the input.
        """
        self._activate(streams)
        if len(streams) > 1:
            self._check_apart()
            self._rows.set(streams, rows, tokens)
        try:
            yield
        finally:
            self._rows.clear()

    @contextlib.contextmanager
    def on_tokens(self, stream_T: Tensor) -> Iterator[None]:
        """Streams of the tokens of one packed row, for inference.

        Args:
            stream_T: int64 [T], adapters or ``BASE``, on the base's device.
        """
        streams = stream_T.unique().tolist()
        if streams == [BASE]:
            with self.off():
                yield
            return
        if len(streams) == 1:
            with self.on(streams, 1, len(stream_T)):
                yield
            return
        self._check_apart()
        self._activate(streams)
        self._rows.set_tokens(streams, stream_T)
        try:
            yield
        finally:
            self._rows.clear()

    def _activate(self, streams: Sequence[int]) -> None:
        if len(self.names) > 1:
            names = [self.names[stream] for stream in streams if stream != BASE]
            for layer in self.layers:
                # One that sums its adapters takes all of them, each with its gate.
                layer._active_adapter = names if sums_adapters(layer) else names[:1]

    @property
    def split(self) -> SplitTrunk | None:
        """The base's trunk in two parts, all adapted layers in the upper one, made when it is first
        asked for. None where nothing lies below them, or the trunk can't be run in parts."""
        return self._split_or_refusal[0]

    @property
    def split_refused(self) -> str:
        """Why the trunk can't be run in parts, though its lower blocks are not adapted; or ''."""
        return self._split_or_refusal[1]

    @property
    def _split_or_refusal(self) -> tuple[SplitTrunk | None, str]:
        if self._split is None:
            base = self.peft_model.get_base_model()
            first, self._split = lowest_adapted(base), (None, "")
            if first:
                try:
                    self._split = SplitTrunk.of(base, first), ""
                except QAdapterError as error:
                    self._split = None, str(error)
        return self._split

    def merge(self) -> None:
        """Add the adapter to the weights it adapts; the frozen ones are kept, on the CPU."""
        self._check_apart()
        if len(self.names) > 1:
            raise QAdapterError("several adapters are several streams: they can't be merged")
        base = self.peft_model.get_base_model()
        if getattr(base, "is_quantized", False):
            raise QAdapterError("the base is quantized: its adapter can't be merged exactly")
        require_whole(base, "merging the adapter")
        layers = [layer for layer in self.layers if isinstance(layer, BaseTunerLayer)]
        self._originals = []
        for layer in layers:
            wrapped = layer.get_base_layer()
            kept = {name: p.detach().to("cpu", copy=True) for name, p in wrapped.named_parameters()}
            self._originals.append((wrapped, kept))
        for layer in layers:
            layer.merge()

    def unmerge(self) -> None:
        """Take the adapter apart again; the frozen weights are put back bit for bit."""
        if not self._originals:
            raise QAdapterError("the adapter is not merged")
        for layer in self.layers:
            if isinstance(layer, BaseTunerLayer):
                layer.unmerge()
        with torch.no_grad():
            for wrapped, kept in self._originals:
                for name, original in kept.items():
                    wrapped.get_parameter(name).copy_(original)
        self._originals = []

    def _check_apart(self) -> None:
        if self._originals:
            raise QAdapterError(
                "the adapter is merged and its base stream gone: call unmerge_adapter() first"
            )

    def _gate_rows(self, layer: nn.Module) -> None:
        if sums_adapters(layer):
            # A LoRA of zeros is zero: its input is where the rows are told apart.
            for stream, name in enumerate(self.names):
                dropout = layer.lora_dropout[name] if name in layer.lora_dropout else None
                if dropout is not None and not isinstance(dropout, GatedDropout):
                    layer.lora_dropout[name] = GatedDropout(dropout, self._rows, stream)
        elif not any(isinstance(h, PutStreams) for h in layer._forward_hooks.values()):
            layer.register_forward_hook(PutStreams(self._rows, self.names), with_kwargs=True)

    def bare_base(self) -> PreTrainedModel:
        """The base without adapters, as another model that shares its tensors; of a sharded one, to
        be read alone. (PEFT's ``unload`` leaves the trained copies of ``modules_to_save`` in it.)
        """
        self._check_apart()
        base = shell_of(self.peft_model.get_base_model())
        _unwrap(base)
        del base.peft_config
        return base

    # --- parameters -------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapter's own parameters."""
        return (parameter for _, parameter in self._named_weights())

    def _named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        base = self.peft_model.get_base_model()
        return ((name, base.get_parameter(name)) for name in self._weights)

    @property
    def drops(self) -> bool:
        """Whether training drops anything at random."""
        frozen = {m for layer in self.layers for m in frozen_module(layer).modules()}
        own = {m for layer in self.layers for m in layer.modules()} - frozen
        return (
            any(isinstance(m, nn.Dropout) and m.p > 0 for m in own)
            or any(getattr(self.config, name, 0) for name in _DROPOUTS)
        )

    def requires_grad_(self, trainable: bool = True) -> None:
        for parameter in self.parameters():
            parameter.requires_grad_(trainable)

    def train(self, mode: bool = True) -> None:
        """Dropout of the adapter, on or off; what it wraps stays in evaluation mode."""
        if mode:
            self._check_apart()
        for layer in self.layers:
            layer.train(mode)
            frozen_module(layer).eval()
        for module in self.peft_model.modules():
            # These switch checkpointing by their own mode; the modules inside keep theirs.
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                module.training = mode
                drop = getattr(module, "dropout", 0.0)
                if mode and isinstance(drop, float) and drop > 0:
                    raise QAdapterError(
                        f"{type(module).__name__} drops activations when it is checkpointed: "
                        f"load the base with dropout=0 (it has {drop}), or train without "
                        "gradient_checkpointing"
                    )

    def state_dict(
        self, state_dict: dict[str, Tensor] | None = None, adapter: int = 0
    ) -> dict[str, Tensor]:
        """Weights of one adapter by their names in PEFT's files.

        Args:
            state_dict: of the whole ``QAdapterModel``, where a trainer gathered it.
        """
        if state_dict is None and layout_of(self.peft_model.get_base_model()).engine:
            # The base's own would let go of what it gathered, in this process alone.
            state_dict = dict(self._named_weights())
        if state_dict is not None:
            state_dict = {
                "base_model.model." + name.removeprefix("base."): x
                for name, x in state_dict.items()
            }
        return get_peft_model_state_dict(
            self.peft_model, state_dict, adapter_name=self.names[adapter],
            save_embedding_layers=False,
        )

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        set_peft_model_state_dict(self.peft_model, weights)

    def _check(self, base: PreTrainedModel, before: Tensor) -> None:
        body = set(trunk(base).modules())
        outside = [n for n, m in base.named_modules() if m in self.layers and m not in body]
        reason = None
        if not self.layers:
            reason = "it fits no layer"
        elif outside:
            reason = f"it adapts {', '.join(outside)}: the two streams share a frozen head"
        elif layout_of(base).engine and any(p.isnan().any() for p in self.parameters()):
            reason = "it is made from the base's weights, of which each process keeps a part"
        else:
            with self.off(), _recording(base) as ran:
                after = _probe(base)
            reason = self._unreached(base, ran)
            if not torch.equal(after, before):
                reason = (
                    "it changes the base's own weights (init_lora_weights="
                    f"{getattr(self.config, 'init_lora_weights', None)!r}?)"
                )
        if reason is not None:
            self.peft_model.unload()
            kind = self.config.peft_type.value
            raise QAdapterError(f"this {kind} can't be a Q-adapter: {reason}")


    def _unreached(self, base: PreTrainedModel, ran: set[nn.Module]) -> str | None:
        """What is adapted though no text runs it (a vision tower), and how to leave it out. Experts
        to which a router sent no token are not meant: others like them ran."""
        names = {n: m for n, m in base.named_modules() if m in set(self.layers)}
        tops = {n: _first_that_did_not_run(base, n, ran) for n in names}
        unused = sorted({top for top in tops.values() if top})
        if not unused:
            return None
        used = [n.split(".") for n, top in tops.items() if not top]
        way = "choose target_modules in the language model"
        if used:
            levels = zip(*(path[:-1] for path in used), strict=False)
            shared = itertools.takewhile(lambda names: len(set(names)) == 1, levels)
            prefix = "".join(f"{names[0]}\\." for names in shared)
            leaves = "|".join(sorted({path[-1] for path in used}))
            way = f"reach the language model alone: target_modules=r'{prefix}.*\\b({leaves})'"
        return f"no text runs {', '.join(unused)}, which it adapts: {way}"


def _first_that_did_not_run(base: nn.Module, name: str, ran: set[nn.Module]) -> str | None:
    """The outermost part around a layer that did not run; None where it did, or where another of
    its kind beside it did (experts)."""
    if base.get_submodule(name) in ran:
        return None
    path = name.split(".")
    for end in range(1, len(path) + 1):
        part = base.get_submodule(".".join(path[:end]))
        if part in ran or isinstance(part, (nn.ModuleList, nn.ModuleDict)):
            continue
        beside = base.get_submodule(".".join(path[: end - 1])).children()
        if any(type(other) is type(part) and other in ran for other in beside):
            return None
        return ".".join(path[:end])
    return None


@contextlib.contextmanager
def _recording(base: nn.Module) -> Iterator[set[nn.Module]]:
    """The modules that run inside."""
    ran: set[nn.Module] = set()

    def note(module: nn.Module, args: Any) -> None:
        ran.add(module)

    handles = [module.register_forward_pre_hook(note) for module in base.modules()]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _trainable(config: PeftConfig) -> PeftConfig:
    config = copy.deepcopy(config)
    config.task_type = config.task_type or peft.TaskType.CAUSAL_LM
    config.inference_mode = False
    config.base_model_name_or_path = config.revision = None  # PEFT would name the base
    return config


def _unwrap(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        while isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            child = frozen_module(child)
        setattr(module, name, child)
        _unwrap(child)


@torch.no_grad()
def _probe(base: PreTrainedModel) -> Tensor:
    vocabulary = base.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(1, 9, device=input_device(base))[None] % vocabulary
    run = functools.partial(trunk(base), input_ids=tokens, use_cache=False)
    return within(base, run).last_hidden_state
