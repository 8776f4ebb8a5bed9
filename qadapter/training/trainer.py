"""QAdapterTrainer: transformers' Trainer with Q-Adapter's loss, features and checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset, IterableDataset
from huggingface_hub import EvalResult
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from qadapter.data import (
    PreparationReport,
    check_pairs,
    check_sequences,
    set_chat_template,
    tokenize_preferences,
    use_chat_template,
)
from qadapter.data.passages import BUILT_IN
from qadapter.data.splits import evenly
from qadapter.data.streams import DatasetSource, PreferenceStream
from qadapter.data.templates import default_of
from qadapter.data.tokenization import TokenizedPreferences
from qadapter.data.vocabulary import num_positions, num_tokens
from qadapter.errors import QAdapterError
from qadapter.policy.card import CARD_NAME
from qadapter.policy.model import QAdapterModel
from qadapter.system.progress import Reporter
from qadapter.system.room import require_writable
from qadapter.training import card, checks, streaming
from qadapter.training.assembly import EitherCollator, as_qadapter_model
from qadapter.training.completions import LogCompletions
from qadapter.training.config import (
    OWN_SAMPLES_COEF,
    RETENTION_COEF,
    QAdapterConfig,
    default_learning_rate,
)
from qadapter.training.engines import SHARDED
from qadapter.training.feature_set import FeatureCollator, FeatureSet, PackedCollator
from qadapter.training.losses import Totals, averages, batch_loss, count
from qadapter.training.own_samples import OWN, different_prompts
from qadapter.training.retention import as_texts, check_head, scored_sequences
from qadapter.training.runs import Runs
from qadapter.training.streaming import StreamedPairs
from qadapter.trunk.loading import load_tokenizer
from qadapter.trunk.sharding import layout_of, make_alike
from qadapter.trunk.shells import depth_of
from qadapter.trunk.split import lowest_adapted


class QAdapterTrainer(Runs):
    """Trains the adapter of a ``QAdapterModel`` on preference pairs.

    Everything that transformers' Trainer does (schedules, checkpoints, callbacks, data parallel
    runs under ``accelerate launch``) it does here; the loss does not depend on how a step's pairs
    are split over micro-batches and processes.

    Args:
        model: a ``QAdapterModel``; or a causal LM, its folder or its name, which gets the adapter
            and objective that ``args`` describe.
        args: default: ``QAdapterConfig()``. A ``QAdapterModel`` keeps its own objective, which
            ``args`` take over; an objective in ``args`` that is neither that nor the default is an
            error.
        data_collator: for tokenized pairs, where features are not cached, such as
            ``qadapter.data.PreferenceCollator``, which pads; default: they are laid out in one row.
        train_dataset: pairs in any format of ``qadapter.data``, raw or tokenized; or all that
            ``tokenize_preferences`` gives, whose report is kept. An ``IterableDataset``, or what
            ``stream_preferences`` gives, is read as training goes; that needs ``max_steps``.
        eval_dataset: the same, or a dict of them.
        processing_class: the tokenizer; default: the base's, loaded by its name.
        compute_metrics: gets ``EvalPrediction`` with ``predictions`` [P, 2], the rewards of chosen
            and rejected, and ``label_ids`` [P], the preferred one's index (0).
        quantization_config: for loading a base given by name.
        peft_config: a LoRA in the trunk instead of the head adapter that ``args`` describe.
        callbacks, optimizers: as in transformers.
        retention_dataset: unrelated texts for ``retention_coef``: a dataset with a ``text`` column,
            strings, or (prompt ids, answer ids); "own" for the base's own samples for the training
            prompts, drawn once and cached; "built-in", the default, for English passages that come
            with the library.
        reporter: shows how far the base is with its one pass over the data; default: tqdm's bars,
            unless ``args.disable_tqdm``.
        say: gets a line about what was decided here: where features are kept, why sequences are
            padded, a cache that can't be written, an option that does nothing. Default: Python's
            logging.

    Attributes:
        reports: name of a split → ``PreparationReport``, what was kept and dropped.

    Raises:
        QAdapterError: a model, option or dataset that can't be used; the message names it.
    """

    # The loss is a share of its whole step already: transformers must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: QAdapterModel | PreTrainedModel | str | Path,
        args: QAdapterConfig | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        retention_dataset: Any = None,
        reporter: Reporter | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        args = QAdapterConfig() if args is None else args
        if not isinstance(args, QAdapterConfig):
            raise QAdapterError(f"args must be a QAdapterConfig, got {type(args).__name__}")
        self._reporter, self._say = reporter, say
        if isinstance(train_dataset, IterableDataset):
            train_dataset = PreferenceStream(DatasetSource(train_dataset))
        if isinstance(train_dataset, PreferenceStream):
            streaming.check_arguments(args)
            args.cache_features = "none"
        elif args.shuffle_buffer is not None:
            raise QAdapterError("shuffle_buffer is for streams: other data is shuffled as a whole")
        self.args = args
        if args.push_to_hub:
            self._make_repo()
        model = as_qadapter_model(
            model, args, quantization_config, peft_config,
            say if args.process_index == 0 else None,
        )
        if args.should_save:
            try:
                require_writable(args.output_dir)
            except OSError as error:
                raise QAdapterError(
                    f"output_dir {args.output_dir} can't be written to: {error.strerror}"
                ) from error
        if args.n_gpu > 1:
            # nn.DataParallel would copy the whole base to every GPU at every step.
            args._n_gpu = 1
        if data_collator is not None and args.cache_features != "none":
            raise QAdapterError('a data_collator is for tokens: it needs cache_features="none"')
        if retention_dataset is not None and args.retention_coef == 0:
            raise QAdapterError("retention_dataset is for a retention_coef above 0")
        self._retention_sum: Tensor | None = None
        self._retention_count = 0
        self.reports: dict[str, PreparationReport] = {}
        self._tokenizer_args = {"trust_remote_code": args.trust_remote_code} | {
            name: value for name, value in (args.model_init_kwargs or {}).items()
            if name in ("revision", "trust_remote_code")
        }
        self.model, self.args, self.processing_class = model, args, processing_class
        self._settle_checkpointing()
        self._settle_chat_template()
        names = list(eval_dataset) if isinstance(eval_dataset, Mapping) else []
        checks.check_evaluation(
            args, None if eval_dataset is None else names, cached=self.caches_features,
            own_metrics=compute_metrics is not None,
        )
        if train_dataset is not None:
            train_dataset = self._prepare(train_dataset, "train")
        self._settle_learning_rate()
        self._settle_retention(retention_dataset, train_dataset)
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._prepare(d, name) for name, d in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prepare(eval_dataset, "eval")
        if args.log_completions:  # features take the place of prompts
            completed_prompts = self._some_prompts(eval_dataset)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset,
            data_collator=EitherCollator(
                FeatureCollator(args.pad_to_multiple_of),
                data_collator or PackedCollator(
                    model.objective.mask_alignment, self._pad_token_id, args.pad_to_multiple_of
                ),
            ),
            processing_class=self.processing_class, compute_metrics=compute_metrics,
            callbacks=callbacks, optimizers=optimizers,
        )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # of an Accelerator made before
            raise QAdapterError(f"DeepSpeed and FSDP of accelerate can't be honoured: {SHARDED}")
        if layout_of(model.base).engine:
            if args.world_size != dist.get_world_size():
                raise QAdapterError(
                    f"the base is sharded over {dist.get_world_size()} processes, and training "
                    f"would run on {args.world_size}: on CPUs pass use_cpu and ddp_backend gloo"
                )
            if (size := layout_of(model.base).tp_size) not in (1, args.world_size):
                raise QAdapterError(
                    f"tensor parallelism splits the base over {size} of {args.world_size} "
                    "processes, which can't be trained on: start as many as tp_size says"
                )
        self._follow_runs()
        if args.log_completions:
            self.add_callback(LogCompletions(self, completed_prompts))
        self.model_accepts_loss_kwargs = True
        self._train_sums: Tensor | None = None
        self._step_losses: list[tuple[Tensor, Tensor]] = []
        self._gradients_checked = self._resumed = False
        self._eval_columns: list[Tensor] = []

    def _settle_chat_template(self) -> None:
        """The one that ``args`` name; else the tokenizer's; else the one the adapter has."""
        named, tokenizer = self.args.chat_template_path, self.processing_class
        line = ""
        if named is not None:
            tokenizer = self._load_tokenizer()
            line = use_chat_template(tokenizer, named)
        elif self.model.chat_template and tokenizer is not None and not tokenizer.chat_template:
            line = set_chat_template(tokenizer, self.model.chat_template, "the adapter's")
        if line:
            self._tell(line)
        if tokenizer is not None and tokenizer.chat_template:
            self.model.chat_template = default_of(tokenizer.chat_template)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The one given, or the base's, with the template of an adapter that is trained on."""
        if self.processing_class is None:
            self.processing_class = load_tokenizer(
                self.model.base_identity.name, **self._tokenizer_args
            )
            if self.model.chat_template:
                set_chat_template(self.processing_class, self.model.chat_template, "the adapter's")
        return self.processing_class

    def _settle_checkpointing(self) -> None:
        """A frozen trunk keeps no activations: recipes may ask to recompute them all the same."""
        asked = [name for name in checks.CHECKPOINTING if getattr(self.args, name, None)]
        if asked and not self.model.adapts_trunk:
            self._tell(f"{asked[-1]} does nothing here: a head adapter's trunk is frozen and keeps "
                       "no activations")
            for name in asked:
                setattr(self.args, name, False)

    def _settle_learning_rate(self) -> None:
        if self.args.learning_rate is not None:
            return
        blocks, what = None, "a head adapter"
        if self.model.adapts_trunk:
            depth = depth_of(self.model.base)
            blocks = depth - (lowest_adapted(self.model.base) or 0)
            what = f"an adapter in {blocks} of {depth} blocks"
        self.args.learning_rate = default_learning_rate(blocks)
        self._tell(f"learning rate {self.args.learning_rate:g}, for {what}", logging.INFO)

    def _settle_retention(
        self, dataset: Any, train_dataset: Dataset | FeatureSet | None
    ) -> None:
        """What the policy is held to, and how firmly. Where nothing was asked for, it is held to
        the library's passages if they can be read; a line says so if not."""
        args, own = self.args, isinstance(dataset, str) and dataset == OWN
        self._training_prompts: Sequence[list[int]] = []
        if args.retention_coef is None and train_dataset is None:
            args.retention_coef = 0.0
        if args.retention_coef == 0:
            return
        if own:
            self._training_prompts = _prompts(train_dataset)
        else:
            self._retention_texts = as_texts(BUILT_IN if dataset is None else dataset)
        if args.retention_coef is None:
            args.retention_coef = OWN_SAMPLES_COEF if own else RETENTION_COEF
            if dataset is None and (reason := self._unreadable_passages()):
                args.retention_coef, self._retention_texts = 0.0, None
                self._tell(f"held to no texts: {reason}")
        elif dataset is None:
            self._load_tokenizer()

    def _unreadable_passages(self) -> str | None:
        """Why the policy can't be held to the library's passages."""
        try:
            check_head(self.model)
            scored_sequences(
                self.model, self._load_tokenizer(), self._retention_texts, self.args.max_length
            )
        except QAdapterError as error:
            return str(error)
        return None

    # --- processes --------------------------------------------------------------------------

    def get_total_train_batch_size(self, args: QAdapterConfig) -> int:
        """Pairs an optimizer step."""
        return self._train_batch_size * args.gradient_accumulation_steps * self._data_size

    def _wrap_model(
        self, model: nn.Module, training: bool = True, dataloader: DataLoader | None = None
    ) -> nn.Module:
        """A sharded base stays where it is, and as it is: accelerate would move it, and refuses to
        wrap it. It leaves alone what is wrapped already."""
        if not layout_of(self.model.base).engine:
            return super()._wrap_model(model, training, dataloader)
        if training:
            make_alike(p.data for p in self.model.parameters() if p.requires_grad)
        return _Wrapped(self.model)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not layout_of(self.model.base).engine:  # else it is where it computes
            super()._move_model_to_device(model, device)

    # --- data -------------------------------------------------------------------------------

    def _prepare(self, dataset: Any, name: str) -> Dataset | FeatureSet | StreamedPairs:
        if isinstance(dataset, PreferenceStream):
            return self._prepare_stream(dataset, name)
        if isinstance(dataset, FeatureSet):
            dataset.check(self.model, f"the {name} data")
            return dataset
        if isinstance(dataset, TokenizedPreferences):
            tokenized, self.reports[name] = dataset
            check_pairs(tokenized, self.model, self.processing_class, f"the {name} data")
            return tokenized
        tokenized, self.reports[name] = tokenize_preferences(
            dataset, self._load_tokenizer(), max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode, on_bad_row=self.args.on_bad_row,
            num_proc=self.args.dataset_num_proc,
        )
        check_pairs(tokenized, self.model, self.processing_class, f"the {name} data")
        return tokenized

    def _prepare_stream(self, stream: PreferenceStream, name: str) -> StreamedPairs:
        if name != "train":
            raise QAdapterError(f"the {name} data is a stream: load_preferences reads all of it")
        pairs = StreamedPairs(
            stream, self._load_tokenizer(), max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode, on_bad_row=self.args.on_bad_row,
            known=num_tokens(self.model), positions=num_positions(self.model),
            shuffle_buffer=streaming.buffer_of(self.args),
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )
        self.reports[name] = pairs.report
        return pairs

    def _some_prompts(self, dataset: Any) -> list[list[int]]:
        """So many of the held-out prompts as are answered while training goes on."""
        if isinstance(dataset, Mapping):
            dataset = next(iter(dataset.values()), None)
        if not isinstance(dataset, Dataset) or self.args.eval_strategy == "no":
            raise QAdapterError(
                "log_completions needs held-out prompts (eval_dataset, no features) and an "
                "eval_strategy"
            )
        tokenizer = self._load_tokenizer()
        prompts = evenly(different_prompts(dataset), self.args.num_completions_to_print)
        check_sequences(
            prompts, self.model, tokenizer, "log_completions: held-out prompt",
            more=self.args.max_completion_length,
        )
        return prompts

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = [
            "prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask", "row",
        ]

    # --- the loss ---------------------------------------------------------------------------

    def compute_loss_context_manager(self) -> AbstractContextManager:
        """Mixed precision, where it is asked for: transformers leaves it to the model's forward,
        which the loss does not go through."""
        return self.accelerator.autocast()

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Totals]:
        """A step's micro-batches and what they hold on all processes together."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        counts = [count(batch, self.model.objective.mask_alignment) for batch in batches]
        totals = torch.stack(
            [torch.stack([torch.as_tensor(x, device=device) for x in c]) for c in counts]
        ).sum(0)
        alike = layout_of(self.model.base).tp_size
        totals = Totals(*(x // alike for x in self.accelerator.reduce(totals, "sum").tolist()))
        self.state.num_input_tokens_seen += totals.tokens
        return batches, totals

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Totals | None = None,
    ) -> Any:
        """The loss of a micro-batch: its share of the step whose totals are given."""
        # Not through the wrapped model: only the adapter has gradients, and training_step averages
        # them over processes in one go.
        output = batch_loss(
            self.model, inputs, num_items_in_batch, workspace_mb=self.args.workspace_mb
        )
        if num_items_in_batch is None:
            return (output.loss, output) if return_outputs else output.loss
        self._step_losses.append((inputs["rows"], output.columns))
        # Gradients and logged losses are averaged over processes, shares must be summed.
        loss = output.loss * self._data_size
        if self.args.retention_coef > 0 and self.accelerator.sync_gradients:
            loss = loss + self.args.retention_coef * self._retention_loss().to(loss.device)
        return (loss, output) if return_outputs else loss

    def _retention_loss(self) -> Tensor:
        """Once an optimizer step, at states that depend on the seed and the step alone."""
        seed = self.args.seed + self.state.global_step
        loss = self._retention_states.loss(self.model, self.args.retention_states, seed)
        told = loss.detach()
        self._retention_sum = told if self._retention_sum is None else self._retention_sum + told
        self._retention_count += 1
        return loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Totals | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            parameters = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            self._check_gradients_exist(parameters)
            self._average_gradients([p for _, p in parameters])
            self._end_of_step([p for _, p in parameters])
        return loss

    def _check_gradients_exist(self, parameters: list[tuple[str, Tensor]]) -> None:
        if self._gradients_checked:
            return
        missing = [name for name, parameter in parameters if parameter.grad is None]
        if missing:
            raise QAdapterError(
                f"trainable, but without gradient after the first step: {', '.join(missing)}; "
                "they have no part in the loss: freeze them (requires_grad_(False)) or connect them"
            )
        self._gradients_checked = True

    def _average_gradients(self, parameters: list[Tensor]) -> None:
        if self.accelerator.num_processes == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in parameters])
        flat = self.accelerator.reduce(flat, "mean")
        for parameter, grad in zip(
            parameters, flat.split([p.numel() for p in parameters]), strict=True
        ):
            parameter.grad.copy_(grad.view_as(parameter))

    def _end_of_step(self, parameters: list[Tensor]) -> None:
        """Add the step to the logged sums; stop before the optimizer sees a number that is none."""
        rows = torch.cat([rows for rows, _ in self._step_losses])
        columns = torch.cat([columns for _, columns in self._step_losses])
        self._step_losses.clear()
        finite_P = columns.isfinite().all(1)
        healthy = finite_P.all()
        if self.accelerator.scaler is None:  # a gradient scaler skips overflowing steps by itself
            finite = [p.grad.isfinite().all().to(healthy.device) for p in parameters]
            healthy = healthy & torch.stack(finite).all()
        unhealthy, self._stopping = self._any_process(~healthy, self.stop_wanted)
        if unhealthy:
            step = self.state.global_step + 1
            bad = rows[~finite_P].tolist()
            where = f"at rows {', '.join(map(str, bad))}" if bad else "in the gradient"
            raise QAdapterError(
                f"not finite {where} of the training data in step {step}: stopped before the "
                "update; checkpoints are as they were (try a lower learning_rate)"
            )
        sums = torch.cat([columns.new_tensor([len(columns)]), columns.sum(0)]).double()
        self._train_sums = sums if self._train_sums is None else self._train_sums + sums

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Of one training step on a batch: head and adapter, and the trunk where it runs."""
        head = self.model.head.shape.numel()  # its weight may lie on several processes
        adapter = sum(p.numel() for p in self.model.adapter.parameters())
        if "offsets" not in inputs:
            base = self.model.base.num_parameters()
            return inputs["input_ids"].numel() * (2 * base + 4 * head + 6 * adapter)
        flops = len(inputs["tokens"]) * 4 * head
        if "packing" not in inputs:
            return flops + len(inputs["tokens"]) * 6 * adapter
        body = self.model.base.base_model
        if "entering" in inputs:
            body = self.model.split_trunk.above
        weights = sum(p.numel() for p in body.parameters() if p.dim() == 2)
        # Forward and, for a LoRA, back to where it is; its base's once more if that is not cached.
        passes = 4 * self.model.adapts_trunk + 2 * ("base_logsumexp" not in inputs)
        return flops + len(inputs["packing"].ids_N) * (passes * weights + 6 * adapter)

    # --- evaluation and logs ------------------------------------------------------------------

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(loss, rewards [B, 2], index of the preferred answer [B])."""
        self._leave_evaluation()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = batch_loss(self.model, inputs, workspace_mb=self.args.workspace_mb)
        self._eval_columns.append(self.gather_function(output.columns))
        if prediction_loss_only:
            return output.loss, None, None
        labels = torch.zeros(len(output.rewards), dtype=torch.int64, device=output.rewards.device)
        return output.loss, output.rewards, labels

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._eval_columns = []
        if self._data_size < self.accelerator.num_processes:  # all see all pairs
            self.gather_function = lambda x: x
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        # transformers' own mean of batch means weighs the last, smaller batch like the others.
        means = averages(torch.cat(self._eval_columns))
        means["loss"] = (
            means["preference_loss"] + self.model.objective.chi2_coef * means["chi2_loss"]
        )
        output.metrics.update({f"{metric_key_prefix}_{name}": x for name, x in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means over the window since the last log to a log of training."""
        if "loss" in logs and self._train_sums is not None:
            logs.update(averages(self.accelerator.reduce(self._train_sums, "sum")))
            logs["num_tokens"] = self.state.num_input_tokens_seen
            if self.args.retention_coef > 0:
                logs["retention_kl"] = (self._retention_sum / self._retention_count).item()
                self._retention_sum, self._retention_count = None, 0
            self._train_sums = None
        if self._resumed:
            # transformers divides the losses of the steps since then by the number of all.
            logs.pop("train_loss", None)
        super().log(logs, start_time)

    def _forget_sums(self) -> None:
        self._train_sums, self._gradients_checked = None, False
        self._step_losses.clear()
        self._retention_sum, self._retention_count = None, 0

    # --- the card ---------------------------------------------------------------------------------

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None, license: str | None = None,
        results: Sequence[EvalResult] | None = None,
    ) -> None:
        """Write README.md to ``output_dir``, unless one is there that people wrote or edited.

        Args:
            model_name: default: the folder's name. dataset_name: on the hub.
            results: what was measured; default: the last evaluation's numbers.
        """
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero() and not card.write(
            self, folder, model_name, dataset_name, tags or (), license, results
        ):
            self._tell(f"{folder / CARD_NAME} was written or edited by people: it stays as it is")


class _Wrapped(nn.Module):
    """What the loss, which does not go through it, is trained by."""

    def __init__(self, module: QAdapterModel):
        super().__init__()
        self.module = module


def _prompts(dataset: Dataset | FeatureSet | StreamedPairs | None) -> Sequence[list[int]]:
    """What the base's own samples answer."""
    if isinstance(dataset, StreamedPairs):
        return dataset.prompts
    if not isinstance(dataset, Dataset):
        raise QAdapterError(
            'retention_dataset "own" needs training data with prompts to sample from: these are '
            "features already"
        )
    return different_prompts(dataset)
