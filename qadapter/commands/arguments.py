"""What the commands take beside ``QAdapterConfig``. Names follow TRL where it has them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from qadapter.errors import QAdapterError, shown


def _field(default: Any, help_text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **metadata})


def require_not_negative(name: str, value: float | None) -> None:
    """Refuse a number below 0, NaN or infinity; none is fine.

    Raises:
        QAdapterError: names the option and the value.
    """
    if value is not None and not 0 <= value < math.inf:  # not so for NaN either
        raise QAdapterError(f"{name} must be finite and not negative, got {value}")


@dataclass
class ModelArguments:
    """The base to customise."""

    model_name_or_path: str = _field(
        "smollm2",
        "Base model: a folder, a hub name, or smollm2 (found or fetched by itself).",
    )
    model_revision: str | None = _field(None, "Branch, tag or commit of a hub model.")
    dtype: str = _field(
        "auto", "Data type of the frozen base. auto: the checkpoint's on a GPU; on a CPU what that "
        "CPU multiplies faster, bfloat16 or float32.",
        choices=["auto", "float32", "bfloat16", "float16"],
    )


@dataclass
class AdapterArguments(ModelArguments):
    """A model to look at: an adapter, or a plain model."""

    model_name_or_path: str = _field(
        "runs/demo", "What qadapter train wrote, or a plain causal language model."
    )
    base_model_name_or_path: str | None = _field(
        None, "Where the adapter's base is, if not where it was trained from."
    )
    trust_remote_code: bool = _field(
        False, "Run Python code that comes with a model or tokenizer."
    )
    chat_template_path: str | None = _field(
        None, "Chat template instead of the adapter's or the tokenizer's own: a .jinja file, a "
        "folder or hub name whose tokenizer has one, or plain (roles as words, for bases without "
        "one).", flag="chat_template",
    )
    model_init_kwargs: dict[str, Any] | None = field(default=None, metadata={
        "help": "Keyword arguments for loading the base, as {device_map: auto, "
        "attn_implementation: eager}."
    })
    strength: float | None = _field(
        None, "Dial of the policy: 0 is the base, 1 the trained policy, more than 1 goes further."
    )

    def __post_init__(self) -> None:
        require_not_negative("strength", self.strength)


@dataclass
class DataArguments:
    """Preference pairs."""

    dataset_name: str | None = _field(
        None, "Preference pairs: a .json, .jsonl or .parquet file, a folder of them, or a hub name."
    )
    dataset_config: str | None = _field(None, "Configuration of a hub dataset.")
    columns: dict[str, str] | None = field(default=None, metadata={
        "help": "Column names, as {prompt: question, chosen: good, rejected: bad}."
    })
    domain: str | None = _field(
        None, "DSP data: the domain whose answers are chosen."
    )
    rejected_domains: list[str] | None = field(default=None, metadata={
        "help": "DSP data: whose answers are rejected, as [normal, business]; default: all others'."
    })
    max_rows: int | None = _field(None, "Read only this many rows.")

    def load_kwargs(self) -> dict[str, Any]:
        """For ``load_preferences``.

        Raises:
            QAdapterError: ``columns`` or ``rejected_domains`` of the wrong shape.
        """
        if self.columns is not None and not isinstance(self.columns, dict):
            raise QAdapterError(
                f"columns must read {{chosen: name in the file, …}}, got {shown(self.columns)}"
            )
        if self.rejected_domains is not None and not isinstance(self.rejected_domains, list):
            raise QAdapterError(
                f"rejected_domains must read [name, …], got {shown(self.rejected_domains)}"
            )
        return {
            "config": self.dataset_config, "columns": self.columns, "domain": self.domain,
            "rejected_domains": self.rejected_domains, "limit": self.max_rows,
        }


@dataclass
class ScriptArguments(DataArguments):
    """Data and folders of a training run."""

    dataset_train_split: str = _field("train", "Split to train on.")
    dataset_test_split: str | None = _field(
        None, "Split held out for evaluation; default: test_fraction of the prompts."
    )
    test_dataset_name: str | None = _field(
        None, "Held-out pairs, where they are a file or dataset of their own."
    )
    test_fraction: float = _field(
        0.1, "Share of the prompts held out where no test split is named; 0 holds out none."
    )
    streaming: bool = _field(
        False, "Read the training pairs as training goes, not before: needs max_steps. They are "
        "shuffled by shuffle_buffer."
    )
    features_only: bool = _field(
        False, "Compute the base's features into feature_cache_dir and stop. The same command on "
        "several machines, or several times on one, shares the work; without this flag it then "
        "trains on them."
    )
    retention_dataset_name: str | None = _field(
        None, "Unrelated texts for retention_coef: .txt (one a line) or .jsonl (key: text), "
        "built-in (English passages that come with qadapter), or own (the base's own answers to "
        "the training prompts, which are drawn first). Default: built-in."
    )
    overwrite_output_dir: bool = _field(False, "Replace an earlier run in output_dir.")
    report_prompts: int = _field(
        6, "Of those prompts, how many report.html shows answered at strengths 0, 0.5, 1 and 2. 0 "
        "for none."
    )


@dataclass
class PlanArguments(ModelArguments, ScriptArguments):
    """A training run to be planned, and where it would run."""

    model_name_or_path: str = _field(
        "smollm2", "Base model: a folder (config.json is enough), a hub name, or smollm2.",
        flag="model",
    )
    dataset_name: str | None = _field(
        None, "Preference pairs, as qadapter train takes them: a file, a folder or a hub name.",
        flag="pairs",
    )
    gpus: str | None = _field(
        None, "GPUs, as 8xH100; 2x8xH100 for two nodes of eight. Default: this machine's."
    )


@dataclass
class EvalDataArguments(DataArguments):
    """Data and folders of an evaluation."""

    dataset_split: str = _field("train", "Split to evaluate on (a single file is 'train').")
    max_length: int | None = _field(1024, "Most tokens of prompt and answer; none for no limit.")
    output_dir: str | None = _field(
        None, "Folder for eval.json, pairs.jsonl, report.md and calibration.png; none: only print."
    )
    overwrite_output_dir: bool = _field(False, "Replace an earlier evaluation in output_dir.")


@dataclass
class MeasureArguments:
    """What an evaluation measures, and how."""

    retention_file: str | None = _field(
        None, "Texts to measure retention on: .txt (one a line) or .jsonl (key: text)."
    )
    answer_prompts: int = _field(
        16, "Held-out prompts that both models answer greedily: for answer statistics, and for "
        "retention on the base's own answers. 0 for none."
    )
    answer_tokens: int = _field(96, "Most tokens of each of those answers.")
    measure_batch_size: int = _field(8, "Pairs, texts or prompts in a batch of an evaluation.")
    bootstrap_resamples: int = _field(2000, "Resamples behind the 95% intervals.")
    measure_seed: int = _field(0, "Seed of the resamples and of the prompts chosen.")


@dataclass
class KnowledgeArguments:
    """What a model still knows: benchmarks of the base beside the customised policy."""

    lm_eval: str | None = _field(
        None, "Tasks of lm-evaluation-harness, separated by commas; the policy itself is run "
        "(pip install 'qadapter[lm-eval]')."
    )
    lm_eval_limit: float | None = _field(
        None, "Examples of each task, or a share of them below 1; default: all."
    )
    lm_eval_num_fewshot: int | None = _field(
        None, "Worked examples in every prompt; default: the task's own number."
    )
    lm_eval_batch_size: int = _field(8, "Requests in a batch.")
    lm_eval_include_path: str | None = _field(None, "A folder of task files (YAML) of your own.")
    lm_eval_apply_chat_template: bool = _field(
        False, "Put the prompts through the chat template."
    )
    exemplar_probe: bool = _field(
        False, "Ask what needs no hub: the 371 worked examples that lm-evaluation-harness ships."
    )


@dataclass
class OpponentArguments:
    """Whose answers those of the model are held against."""

    opponent: str | None = _field(
        None, "An adapter or a plain model to hold the answers against; default: the model's base."
    )
    opponent_strength: float | None = _field(None, "Dial of an opponent that is an adapter.")

    def __post_init__(self) -> None:
        require_not_negative("opponent_strength", self.opponent_strength)


@dataclass
class JudgeDataArguments(DataArguments):
    """Prompts to answer, and the folder of a contest."""

    dataset_split: str = _field("train", "Split to take prompts from (a single file is 'train').")
    num_prompts: int = _field(64, "Prompts to answer, drawn at random.")
    output_dir: str | None = _field(
        None, "Folder for answers, judgements and judge.json; the same command goes on with what "
        "is there. None: only print."
    )
    overwrite_output_dir: bool = _field(False, "Replace an earlier contest in output_dir.")


@dataclass
class DrawArguments:
    """How answers are drawn."""

    draws: int = _field(2, "Answers of the model to every prompt.")
    opponent_draws: int = _field(
        4, "Answers of the opponent: its luck is shared by all that is compared with it."
    )
    max_new_tokens: int = _field(128, "Most tokens of an answer.")
    temperature: float = _field(1.0, "Temperature of the sampling.")
    top_p: float = _field(1.0, "Sample from the likeliest tokens that hold this probability.")
    batch_size: int = _field(8, "Answers generated or read at once.")
    seed: int = _field(0, "Seed of the prompts and draws.")
    control_system: str | None = _field(
        None, "A system message that asks for what the preferences want: the opponent prompted "
        "with it is judged too, as a control."
    )


@dataclass
class JudgeArguments:
    """Who judges."""

    judge_model: str | None = _field(
        None, "A model behind an OpenAI-compatible endpoint, by the endpoint's name for it; its "
        "key is read from OPENAI_API_KEY (pip install 'qadapter[judge]')."
    )
    judge_url: str | None = _field(
        None, "The endpoint, as http://localhost:8000/v1; default: OpenAI's own."
    )
    judge_prompt_file: str | None = _field(
        None, "What the endpoint is asked and how its replies are read; default: "
        "qadapter/evaluation/judges/endpoint_prompt.yaml."
    )
    judge_concurrency: int = _field(4, "Requests at a time.")
    judge_input_price: float | None = _field(
        None, "Price of a million tokens read by the endpoint, to show the cost."
    )
    judge_output_price: float | None = _field(
        None, "Price of a million tokens written by the endpoint."
    )
    reward_model: str | None = _field(
        None, "A reward model with one label (AutoModelForSequenceClassification): a folder or a "
        "hub name."
    )
    judge_dataset_name: str | None = _field(
        None, "Preference pairs that no policy was trained on, to train two judges on: one on the "
        "base's hidden states, one on words."
    )
    judge_fraction: float = _field(
        0.0, "Instead: the share of the prompts in dataset_name to train those judges on; the "
        "others are answered."
    )


@dataclass
class GenerateArguments:
    """Prompts and sampling."""

    prompt: str | None = _field(None, "One prompt; without it and prompts_file: a chat.")
    prompts_file: str | None = _field(
        None, "Prompts: .txt (one a line) or .jsonl (key prompt: text or messages; tools and "
        "chat_template_kwargs, if any, reach the chat template)."
    )
    output_file: str | None = _field(
        None, "File for the answers to prompts_file, as JSON Lines; default: print them."
    )
    system: str | None = _field(None, "System message before every prompt.")
    base_only: bool = _field(False, "Answer with the base, as strength 0 does.")
    max_new_tokens: int = _field(256, "Most tokens of an answer.")
    do_sample: bool = _field(False, "Sample; otherwise answers are greedy.")
    temperature: float = _field(0.7, "Temperature of the sampling.")
    top_p: float = _field(0.95, "Sample from the likeliest tokens that hold this probability.")
    top_k: int = _field(0, "Sample from this many likeliest tokens; 0 for all.")
    repetition_penalty: float = _field(1.0, "Above 1: repeated tokens become less likely.")
    best_of: int = _field(
        1, "Sample this many answers to --prompt and print the one the adapter rewards most."
    )
    batch_size: int = _field(8, "Answers generated at once, to a prompts_file or for best_of.")
    seed: int = _field(0, "Seed of the sampling.")


@dataclass
class DemoArguments:
    """The demo."""

    output_dir: str = _field("runs/demo", "Folder for the adapter, numbers, pictures and report.")
    model_name_or_path: str = _field("smollm2", "Base model of the demo.")
    fast: bool = _field(False, "A shortened run, to see that everything works.")
    seed: int = _field(0, "Seed of the training.")
