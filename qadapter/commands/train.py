"""``qadapter train``: customise a base to preference pairs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import typer
from datasets import Dataset
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from qadapter.commands import arguments as args
from qadapter.commands.loading import (
    check_without_weights,
    loading_options,
    say_base,
    settle_template,
)
from qadapter.commands.measuring import Measurements, check_texts, measure, read_measures
from qadapter.commands.options import Group, command
from qadapter.console.environment import devices, peak_rss_bytes, quiet_libraries, versions
from qadapter.console.folders import (
    RUN_FILES,
    output_folder,
    remove_files,
    telling_how_to_go_on,
)
from qadapter.console.progress import TrainingProgress, progress_bar, saying
from qadapter.console.signals import Terminated, on_termination
from qadapter.console.terminal import Terminal
from qadapter.data import (
    PreferenceStream,
    TokenizedPreferences,
    load_preferences,
    split_by_prompt,
    stream_preferences,
    tokenize_preferences,
    without_prompts,
)
from qadapter.data.passages import BUILT_IN, read_held_to
from qadapter.errors import QAdapterError
from qadapter.evaluation import (
    comparison_table,
    plot_training_curves,
    write_metrics_jsonl,
    write_report,
)
from qadapter.evaluation.report import Section, in_words, pictures_markdown, write_json
from qadapter.evaluation.run_page import PAGE_NAME, write_run_page
from qadapter.policy import storage
from qadapter.policy.card import is_hub_name
from qadapter.system.caches import cache_dir
from qadapter.system.markup import markdown_list
from qadapter.system.processes import leave_group
from qadapter.training import QAdapterConfig, QAdapterTrainer, checks, streaming
from qadapter.training.checkpoints import find_checkpoint, how_to_go_on
from qadapter.training.feature_set import FeatureSet
from qadapter.training.own_samples import OWN
from qadapter.training.resuming import check_options
from qadapter.training.stopping import TrainingStopped
from qadapter.trunk.base_dtype import dtype_of
from qadapter.trunk.distributed_config import tp_size_of
from qadapter.trunk.loading import load_tokenizer
from qadapter.trunk.sharding import layout_of

_DATA = (
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split",
    "test_dataset_name", "test_fraction", "columns", "domain", "rejected_domains", "max_rows",
    "streaming",
)
_PREPARATION = ("max_length", "truncation_mode", "on_bad_row")
_OBJECTIVE = (
    "adapter_kind", "adapter_form", "adapter_rank", "lora_r", "lora_alpha", "lora_dropout",
    "lora_target_modules", "lora_layers", "alpha_0", "alpha_tilde", "gamma", "chi2_coef",
    "parametrization", "bootstrap", "length_normalization", "mask_alignment",
)
_RETENTION = ("retention_coef", "retention_states")
_TRAINING = (
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "eval_strategy",
    "eval_steps", "logging_steps", "save_strategy", "save_steps", "save_total_limit",
    "resume_from_checkpoint", "seed", "report_to",
)
_COMPLETIONS = ("log_completions", "num_completions_to_print", "max_completion_length")
_STREAMING = ("shuffle_buffer",)
_MEMORY = ("cache_features", "padding_free", "feature_cache_dir", "feature_batch_tokens",
           "feature_shard_mb", "workspace_mb", "pad_to_multiple_of", "dataset_num_proc",
           "model_init_kwargs", "trust_remote_code")
GROUPS = (
    Group(args.ModelArguments, "Model"),
    Group(args.ScriptArguments, "Data", _DATA),
    Group(QAdapterConfig, "Model", ("chat_template_path",)),
    Group(QAdapterConfig, "Data", (*_PREPARATION, *_STREAMING)),
    Group(QAdapterConfig, "Output", ("output_dir",)),
    Group(args.ScriptArguments, "Output", ("overwrite_output_dir",)),
    Group(QAdapterConfig, "Adapter and objective", _OBJECTIVE),
    Group(QAdapterConfig, "Retention (optional)", _RETENTION),
    Group(args.ScriptArguments, "Retention (optional)", ("retention_dataset_name",)),
    Group(QAdapterConfig, "Training", _TRAINING),
    Group(args.MeasureArguments, "Evaluation after training"),
    Group(args.ScriptArguments, "Evaluation after training", ("report_prompts",)),
    Group(QAdapterConfig, "Samples while training", _COMPLETIONS),
    Group(QAdapterConfig, "Memory and loading", _MEMORY),
    Group(args.ScriptArguments, "Memory and loading", ("features_only",)),
    Group(QAdapterConfig, "Options of transformers.TrainingArguments", hidden=True),
)
# The command decides these itself; they would be accepted and ignored.
WITHOUT = ("do_train", "do_eval", "do_predict", "local_rank", "parallelism_config")
# Measured (docs/compare.md, How to keep): at 1, ObjectiveConfig's own α, answers hardly move.
DEFAULTS = {
    "eval_strategy": "steps", "eval_steps": 0.1, "alpha_0": 0.3, "alpha_tilde": 0.3,
    "log_completions": True,
}
HELPS = {
    "output_dir": "Folder for the adapter, checkpoints, numbers, pictures and report.",
    "resume_from_checkpoint": "A checkpoint's folder, or true for the last one in output_dir.",
    "max_steps": "Training steps; above 0 it overrides num_train_epochs.",
    "eval_strategy": "When to evaluate on the held-out pairs: no, steps or epoch.",
    "eval_steps": "Steps between two evaluations: a count, or a share of all steps below 1.",
    "report_to": "Trackers, as trackio, wandb or tensorboard; default: none.",
    "save_strategy": "When to save checkpoints: no, steps, epoch or best.",
    "save_steps": "Steps between two checkpoints: a count, or a share of all steps below 1.",
}
NOTE = (
    "All options of transformers.TrainingArguments are taken too: qadapter train --help_all. "
    "Several processes: accelerate launch -m qadapter.cli train ..."
)


def app(show_hidden: bool = False) -> typer.Typer:
    return command(
        "train",
        "Customise a base model to preference pairs, and evaluate it on held-out prompts.",
        GROUPS, run, defaults=DEFAULTS, helps=HELPS, without=WITHOUT, note=NOTE,
        show_hidden=show_hidden,
    )


def run(
    model_args: args.ModelArguments, script: args.ScriptArguments, config: QAdapterConfig,
    measures: args.MeasureArguments, given: set[str],
) -> None:
    """Train, evaluate, write the run's folder."""
    start = time.monotonic()
    console = Terminal(quiet=config.process_index > 0)  # each line once
    if script.report_prompts < 0:
        raise QAdapterError(f"report_prompts must not be negative, got {script.report_prompts}")
    for name in ("dataset_name", "output_dir"):
        if name not in given:
            raise QAdapterError(f"train needs --{name}")
    if not 0 <= script.test_fraction < 1:
        raise QAdapterError(f"test_fraction must be from 0 to below 1, got {script.test_fraction}")
    resume: str | bool | None = config.resume_from_checkpoint
    resume = True if str(resume).lower() == "true" else resume
    if config.shuffle_buffer is not None and not script.streaming:
        raise QAdapterError("shuffle_buffer is for streaming: other data is shuffled as a whole")
    if script.features_only:
        _check_features_only(script, config, bool(resume))
    with _folder(model_args, script, config, measures, bool(resume)) as folder:
        if resume:
            resume = find_checkpoint(folder, resume, saying(console))
            check_options(  # what may differ is said when training begins
                config, Path(resume), lambda line: None, alike=_alike(config)
            )
        with telling_how_to_go_on(folder, lambda: how_to_go_on(folder)):
            _run(
                model_args, script, config, measures, given, folder, resume or None, console, start
            )
    leave_group()


def _folder(
    model_args: args.ModelArguments, script: args.ScriptArguments, config: QAdapterConfig,
    measures: args.MeasureArguments, resuming: bool,
) -> AbstractContextManager[Path]:
    """The output folder, for this run alone; of several processes the main one sees to it. One that
    only computes features leaves it alone."""
    if script.features_only or config.process_index > 0:
        return contextlib.nullcontext(Path(config.output_dir).expanduser())
    # The model card takes the name of a README that may be the user's own.
    return output_folder(
        config.output_dir, (*RUN_FILES, "README.md"), resuming or script.overwrite_output_dir,
        "choose another, continue it with --resume_from_checkpoint true, or replace it with "
        "--overwrite_output_dir",
        inputs={
            "model_name_or_path": model_args.model_name_or_path,
            "dataset_name": script.dataset_name, "test_dataset_name": script.test_dataset_name,
            "retention_dataset_name": script.retention_dataset_name,
            "retention_file": measures.retention_file,
        },
    )


def _check_features_only(
    script: args.ScriptArguments, config: QAdapterConfig, resuming: bool
) -> None:
    if config.cache_features in ("memory", "none"):
        raise QAdapterError(
            f"features_only writes features to disk: not with cache_features "
            f"{config.cache_features}"
        )
    for name, given in (("resume_from_checkpoint", resuming), ("streaming", script.streaming)):
        if given:
            raise QAdapterError(f"features_only does not go with {name}")
    config.cache_features = "disk"
    config.output_dir = str(config.feature_cache_dir or cache_dir() / "features")


def _run(
    model_args: args.ModelArguments, script: args.ScriptArguments, config: QAdapterConfig,
    measures: args.MeasureArguments, given: set[str], folder: Path, resume: str | None,
    console: Terminal, start: float,
) -> None:
    quiet_libraries()
    measured_texts = read_measures(measures)
    named = script.retention_dataset_name
    retention_texts = None if named in (None, OWN) else read_held_to(named)
    if script.streaming:
        train_pairs, test_pairs = _open_stream(script, config, given)
    else:
        train_pairs, test_pairs = _load_pairs(script, config.seed, console)
    if test_pairs is None:
        if "eval_strategy" in given and config.eval_strategy != "no":
            raise QAdapterError("eval_strategy needs held-out pairs: set test_fraction above 0")
        config.eval_strategy = "no"
    if config.eval_strategy == "no" and "log_completions" not in given:
        config.log_completions = False
    checks.check_evaluation(
        config, None if test_pairs is None else (), cached=config.cache_features != "none"
    )
    loading = loading_options(model_args, config.trust_remote_code, config.model_init_kwargs)
    base_name = say_base(model_args.model_name_or_path, console)
    tokenizer = load_tokenizer(
        base_name, revision=loading["revision"], trust_remote_code=loading["trust_remote_code"]
    )
    settle_template(tokenizer, config.chat_template_path, resume, console)
    check_texts("retention_file", measures.retention_file, measured_texts, tokenizer)
    check_texts("retention_dataset_name", named, retention_texts, tokenizer)
    # All that needs no weights comes before they are loaded.
    train = train_pairs
    if not script.streaming:
        train = _tokenize(train_pairs, tokenizer, config)
        checks.check_best_is_met(
            config, len(train.dataset), config.world_size // _alike(config)
        )
    test = None if test_pairs is None else _tokenize(test_pairs, tokenizer, config)
    check_without_weights(
        base_name, loading, tokenizer, config.adapter_config,
        train=None if script.streaming else train.dataset,
        eval=None if test is None else test.dataset,
    )
    for name, tokenized in (("training", train), ("held-out", test)):
        if isinstance(tokenized, TokenizedPreferences):
            console.print(f"{name} pairs:")
            console.print(tokenized.report.table())
    config.model_init_kwargs = {k: v for k, v in loading.items() if v is not None}
    say = saying(console)
    with progress_bar(console, "loading the base", "", closing=False):
        trainer = QAdapterTrainer(
            base_name, config, train_dataset=train, eval_dataset=test, processing_class=tokenizer,
            retention_dataset=OWN if named == OWN else retention_texts, say=say,
            reporter=functools.partial(progress_bar, console),
        )
    model = trainer.model
    if config.retention_coef and "retention_coef" not in given:
        held_to = {
            BUILT_IN: "the library's own English passages",
            OWN: "the base's own answers to training prompts, sampled first",
        }.get(named or BUILT_IN, named)
        console.print(f"held to {held_to} (--retention_coef {config.retention_coef:g}; 0: off)",
                      highlight=False)
    main_process = config.process_index == 0
    if main_process and script.overwrite_output_dir and not resume:
        remove_files(folder, RUN_FILES)
    if script.features_only:
        trainer.read_base()
        console.print("the features are on disk: train by the same command without "
                      "--features_only", highlight=False)
        return
    # The tokenized pairs: training puts their features in place of them.
    test_dataset = trainer.eval_dataset
    _train(trainer, resume, folder, console)
    if not main_process and not layout_of(model.base).engine:
        return  # else all measure with the first one: what it runs is a collective
    if main_process and config.save_strategy == "no":
        trainer.save_model()
    if trainer.stop_wanted:  # in its last step
        raise Terminated(f"the adapter is there, not yet measured: qadapter eval {folder}")
    measured = (
        None if test_dataset is None
        else measure(
            model, tokenizer, test_dataset, measures, measured_texts, console, pairs=test_pairs,
            along_dial=script.report_prompts, base_states=_base_states(trainer),
        )
    )
    if not main_process:
        return
    with telling_how_to_go_on(folder, f"the adapter is there: qadapter eval {folder}"):
        _write(trainer, measured, folder, time.monotonic() - start)
        told = {
            "dataset_name": script.dataset_name if is_hub_name(script.dataset_name) else None,
            "results": measured.results() if measured else None,
        }
        if not config.push_to_hub:
            trainer.create_model_card(**told)
    if measured is not None:
        console.print(comparison_table(measured.rows, title="held-out pairs", note=measured.note))
    console.print(f"to look at: {folder / PAGE_NAME}", highlight=False)
    if config.push_to_hub:  # last, as it may fail
        console.print(f"sent: {trainer.push_to_hub(**told).commit_url}", highlight=False)
    console.print(
        f"wrote {folder} in {time.monotonic() - start:.0f} s, peak memory "
        f"{peak_rss_bytes() / 2**30:.2f} GiB", highlight=False,
    )


def _base_states(trainer: QAdapterTrainer) -> Callable[[int], tuple[Tensor, Tensor]] | None:
    """What training has read of the held-out pairs, where that is all that measuring wants."""
    held_out, model = trainer.eval_dataset, trainer.model
    alike = not model.adapts_trunk and model.objective.mask_alignment == "action"
    return held_out.base_states if alike and isinstance(held_out, FeatureSet) else None


def _alike(config: QAdapterConfig) -> int:
    """Processes that see the same pairs, of a base that is not loaded yet."""
    kwargs = config.model_init_kwargs
    return tp_size_of(kwargs.get("distributed_config")) if isinstance(kwargs, dict) else 1


def _tokenize(
    pairs: Dataset, tokenizer: PreTrainedTokenizerBase, config: QAdapterConfig
) -> TokenizedPreferences:
    return tokenize_preferences(
        pairs, tokenizer, max_length=config.max_length, truncation_mode=config.truncation_mode,
        on_bad_row=config.on_bad_row, num_proc=config.dataset_num_proc,
    )


def _open_stream(
    script: args.ScriptArguments, config: QAdapterConfig, given: set[str]
) -> tuple[PreferenceStream, Dataset | None]:
    """(training pairs as a stream, held-out pairs or None)."""
    streaming.check_arguments(config)
    if script.max_rows is not None:
        raise QAdapterError("max_rows is not for streaming: max_steps ends it")
    apart = script.test_dataset_name or script.dataset_test_split
    if not apart and "test_fraction" in given and script.test_fraction:
        raise QAdapterError(
            "test_fraction needs all prompts, and a stream is not read before training: name "
            "held-out pairs with test_dataset_name or dataset_test_split, or set it to 0"
        )
    options = script.load_kwargs()
    options.pop("limit")
    stream = stream_preferences(script.dataset_name, split=script.dataset_train_split, **options)
    if not apart:
        return stream, None
    test = _load_test(script)
    stream.left_out = frozenset(test["prompt_id"])
    return stream, test


def _load_test(script: args.ScriptArguments) -> Dataset:
    return load_preferences(
        script.test_dataset_name or script.dataset_name,
        split=script.dataset_test_split or "train", **script.load_kwargs(),
    )


def _load_pairs(
    script: args.ScriptArguments, seed: int, console: Console
) -> tuple[Dataset, Dataset | None]:
    """(training pairs, held-out pairs or None); no prompt is in both."""
    if script.test_dataset_name is None and script.dataset_test_split is None:
        pairs = load_preferences(
            script.dataset_name, split=script.dataset_train_split, **script.load_kwargs()
        )
        if script.test_fraction == 0:
            return pairs, None
        return split_by_prompt(pairs, float(script.test_fraction), seed)
    train = load_preferences(
        script.dataset_name, split=script.dataset_train_split, **script.load_kwargs()
    )
    test = _load_test(script)
    kept = without_prompts(train, test["prompt_id"])
    if len(kept) == 0:
        raise QAdapterError("every training prompt is also held out: nothing is left to train on")
    if len(kept) < len(train):
        console.print(
            f"left out of training: {len(train) - len(kept):,} pairs whose prompt is held out",
            highlight=False,
        )
    return kept, test


def _train(
    trainer: QAdapterTrainer, resume: str | None, folder: Path, console: Console
) -> None:
    progress = TrainingProgress(console)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        trainer.add_callback(progress)
    try:
        with on_termination(trainer.stop_soon):
            trainer.train(resume_from_checkpoint=resume)
    except BaseException as error:
        # What was logged before training broke off is worth keeping; the error is worth more.
        # Where nothing was, an empty file would only pass for another run.
        with contextlib.suppress(OSError):
            if trainer.state.log_history and trainer.is_world_process_zero():
                write_metrics_jsonl(folder / "metrics.jsonl", trainer.state.log_history)
        if isinstance(error, TrainingStopped):
            raise Terminated(str(error)) from None
        raise
    finally:
        progress.stop()


def _write(
    trainer: QAdapterTrainer, measured: Measurements | None, folder: Path, seconds: float
) -> None:
    history, model = trainer.state.log_history, trainer.model
    write_metrics_jsonl(folder / "metrics.jsonl", history)
    setup = {
        "base": model.base_identity.name, "dtype": dtype_of(model),
        "adapter": storage.describe(model.adapter_config),
        "objective": dataclasses.asdict(model.objective),
    }
    write_json(folder / "summary.json", {
        **setup, **(measured.summary() if measured else {}),
        "data": {name: report.as_dict() for name, report in trainer.reports.items()},
        "steps": trainer.state.global_step, "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(), "seed": trainer.args.seed,
        "versions": versions(), "devices": devices(),
    })
    report = folder / "report.md"
    curves = plot_training_curves(history, folder)
    facts = {
        key: in_words(value) if isinstance(value, dict) else value for key, value in setup.items()
    }
    facts["adapter"] = in_words(storage.told(model.adapter_config))
    facts |= {f"{name} pairs": r.summary() for name, r in trainer.reports.items()}
    facts["steps"] = f"{trainer.state.global_step:,}, {seconds:.0f} s in all"
    title = f"{folder.resolve().name}: a customised model"
    write_report(report, title, [
        Section("What was done", markdown_list(f"{k}: {v}" for k, v in facts.items())),
        *(measured.sections(report) if measured else []),
        Section("Training", pictures_markdown(curves, report)),
    ])
    write_run_page(
        folder / PAGE_NAME, title, facts, history, **(measured.shown() if measured else {})
    )
