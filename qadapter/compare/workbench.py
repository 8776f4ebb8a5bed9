"""What all runs of a comparison share: the base, the data, and what is made once from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from qadapter.adapters.head_adapter import AdapterConfig
from qadapter.adapters.peft_config import in_upper_blocks
from qadapter.adapters.planning import planned_weights
from qadapter.compare.config import (
    ANSWERS_NAME,
    FIRST_NAME,
    JUDGES_NAME,
    CompareConfig,
    DataConfig,
)
from qadapter.compare.data import PreferenceData, load_texts, prepare
from qadapter.compare.first import teach_first
from qadapter.compare.kinds import DPO, AdapterSpec, Method, Prompted, QAdapter, retention_names
from qadapter.data import Prompt, check_pairs, use_chat_template
from qadapter.data.passages import read_held_to
from qadapter.data.templates import PLAIN
from qadapter.errors import QAdapterError
from qadapter.evaluation.answers import encode_prompt, with_system
from qadapter.evaluation.judges import (
    HiddenStateJudge,
    RewardJudge,
    WordPresenceJudge,
    preference_texts,
    score_draws,
)
from qadapter.evaluation.judges.contest import AnswerStore, Draws, texts
from qadapter.evaluation.judges.trained import TrainedJudge
from qadapter.evaluation.report import write_json
from qadapter.evaluation.token_rewards import reward_answers
from qadapter.objective import ObjectiveConfig
from qadapter.policy.model import QAdapterModel
from qadapter.system.documents import read_json
from qadapter.system.sealed import opened, sealed
from qadapter.training.own_samples import OWN, Sample, different_prompts, load_or_sample
from qadapter.trunk.loading import LoadedBase, load_base, load_tokenizer, resolve_base
from qadapter.trunk.memo import TrunkMemo


class Workbench:
    """One comparison's base and data.

    Args:
        folder: of the results; the base's own answers are kept in it.
        say: gets a line about anything slow.
    """

    def __init__(self, config: CompareConfig, folder: Path, say: Callable[[str], None]) -> None:
        self.config, self.folder, self.say = config, folder, say
        base = resolve_base(self._base_name(), say)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(base.name)
        if config.chat_template is not None:
            # "plain" is no file beside the configuration.
            named = config.chat_template
            line = use_chat_template(
                self.tokenizer, named if named == PLAIN else config.find(named)
            )
            say(line or "chat template: the tokenizer's own")
        self.loaded = self._load_base()
        self.new = self._prepare(config.data, "data")
        # No prompt on both sides: what a policy trains on would be what a judge was trained on.
        self.old = None if config.old is None else self._prepare(
            config.old, "old", self.new.prompt_ids
        )
        self.texts = {t.name: load_texts(t, config.find(t.file), self.tokenizer)
                      for t in config.evaluation.retention}
        self.memo = TrunkMemo()
        self._base_scores: dict[tuple[str, str], np.ndarray] = {}

    def learn_first(self) -> None:
        """Teach the base the old preference, if the comparison asks for that and it is not yet."""
        first = self.config.first
        if first is not None and not (self.folder / FIRST_NAME).is_dir():
            teach_first(first, self.loaded, self.old, self.tokenizer, self.folder, self.say)
            self.loaded = self._load_base()

    def _load_base(self) -> LoadedBase:
        """The base that is compared: the one named, or what that became first."""
        return load_base(self._base_name(), dtype=self.config.dtype, say=self.say)

    def _base_name(self) -> str:
        first = self.folder / FIRST_NAME
        if self.config.first is not None and first.is_dir():
            return str(first)
        return self.config.find(self.config.model_name_or_path)

    def _prepare(
        self, data: DataConfig, key: str, without: Iterable[str] = ()
    ) -> PreferenceData:
        found = prepare(data, self.config.find(data.dataset_name), self.tokenizer, key, without)
        for part in (found.train, found.validation, found.test, found.judge):
            check_pairs(part.tokens, self.loaded.model, self.tokenizer, key)
        return found

    def check_prompted(self, method: Prompted) -> None:
        """Render one prompt: a template that refuses a system message does so now.

        Raises:
            QAdapterError: it does.
        """
        _, prompts = self.new.test.prompts(1, 0)
        [asked] = with_system(prompts, method.system, self.tokenizer, "system")
        encode_prompt(self.tokenizer, asked)

    def check_adapter(self, method: Method) -> None:
        """Make out on no data what a method would train.

        Raises:
            QAdapterError: the base can't be adapted so.
        """
        planned_weights(self.loaded.model, self.adapter_config(method))

    # --- models -----------------------------------------------------------------------------

    def spec(self, method: Method) -> AdapterSpec:
        """The adapter that a method trains."""
        return method.adapter or self.config.adapter

    def adapter_config(self, method: Method) -> AdapterConfig | LoraConfig:
        spec = self.spec(method)
        if spec.kind == "head":
            return AdapterConfig(form=spec.form, rank=spec.rank)
        return LoraConfig(
            r=spec.r, lora_alpha=spec.lora_alpha, lora_dropout=spec.lora_dropout,
            task_type="CAUSAL_LM", **in_upper_blocks(
                spec.layers, spec.target_modules, self.loaded.model, "adapter.layers"
            ),
        )

    def base(self, method: Method) -> LoadedBase:
        """A base to put an adapter on: the shared one, unless layers are put into it."""
        return self.loaded if self.spec(method).kind == "head" else self._load_base()

    def model(self, method: Method, objective: ObjectiveConfig, seed: int) -> QAdapterModel:
        """An untrained adapter; its start depends on the seed alone."""
        base = self.base(method)
        torch.manual_seed(seed)
        return self._remembering(
            QAdapterModel.from_base(base, self.adapter_config(method), objective)
        )

    def load(self, method: Method, folder: Path) -> QAdapterModel:
        """A trained adapter."""
        return self._remembering(QAdapterModel.from_pretrained(folder, self.base(method).model))

    @functools.cached_property
    def fresh(self) -> QAdapterModel:
        """The base, as a model whose adapter does nothing."""
        return self._remembering(QAdapterModel.from_base(self.loaded, AdapterConfig(rank=1)))

    def _remembering(self, model: QAdapterModel) -> QAdapterModel:
        model.trunk_memo = self.memo
        return model

    # --- judges and answers -----------------------------------------------------------------

    @functools.cached_property
    def judges(self) -> dict[str, list[RewardJudge]]:
        """"new" and "old" preference → two judges that fail differently, trained on pairs that no
        policy sees; once, and kept in the results' folder."""
        return {
            name: [
                self._judge(name, data, self._hidden_state_judge()),
                self._judge(name, data, WordPresenceJudge()),
            ]
            for name, data in self.kinds.items()
        }

    def _judge(self, kind: str, data: PreferenceData, judge: TrainedJudge) -> TrainedJudge:
        path = self.folder / JUDGES_NAME / f"{kind}-{judge.name.replace(' ', '-')}.json"
        if path.is_file():
            try:
                judge.restore(opened(read_json(path)))
            except (QAdapterError, LookupError, TypeError, ValueError):
                self.say(f"{path} is not what was written: trained again")
            else:
                return judge
        self.say(f"training the judge of the {kind} preference by {judge.name}")
        judge.fit(preference_texts(data.judge.pairs, self.tokenizer))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, sealed(judge.fitted()))
        return judge

    @property
    def kinds(self) -> dict[str, PreferenceData]:
        """"new" and, if there is one, "old"."""
        return {"new": self.new} | ({} if self.old is None else {"old": self.old})

    def _hidden_state_judge(self) -> HiddenStateJudge:
        return HiddenStateJudge(
            self.fresh, self.tokenizer, max_length=self.config.data.max_length,
            batch_size=self.config.evaluation.batch_size,
        )

    @functools.cached_property
    def reward(self) -> Callable[[Sequence[Prompt], Sequence[str]], list[float]]:
        """The reward model of the online method: Bradley–Terry on the *training* pairs, in standard
        deviations of its scores there."""
        self.say("training the reward model on the training pairs")
        texts = preference_texts(self.new.train.pairs, self.tokenizer)
        judge = self._hidden_state_judge()
        judge.fit(texts)
        scores = judge.scores(texts.prompts * 2, texts.chosen + texts.rejected)
        mean, spread = float(scores.mean()), float(scores.std()) or 1.0

        def reward(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
            return ((judge.scores(prompts, answers) - mean) / spread).tolist()

        return reward

    def sample(
        self, model: QAdapterModel, prompts: Sequence[Prompt], draws: int, *, seed: int,
        strength: float | None = None, file: Path | None = None,
    ) -> Draws:
        """Sampled answers.

        Args:
            file: of draws to keep; those in it are taken as they are.
        """
        spec = self.config.evaluation
        return AnswerStore(file, prompts).draw(
            "customised" if file is None else "base", draws, model, self.tokenizer, prompts,
            seed=seed, max_new_tokens=spec.max_new_tokens, batch_size=4 * spec.batch_size,
            strength=strength, temperature=spec.temperature, top_p=1.0, top_k=0,
        )

    def base_answers(
        self, name: str, prompts: Sequence[Prompt], draws: int, seed: int
    ) -> Draws:
        """The base's answers, from the file in the results' folder if they are there."""
        path = self.folder / ANSWERS_NAME / f"{name}.jsonl"
        if not path.is_file():
            self.say(f"the base answers {len(prompts)} prompts, {draws} times: {name}")
        return self.sample(self.fresh, prompts, draws, seed=seed, strength=0.0, file=path)

    def base_scores(
        self, judge: RewardJudge, name: str, prompts: Sequence[Prompt], draws: Draws
    ) -> np.ndarray:
        """A judge's scores of the base's answers, [draws, prompts]; the same for every run."""
        key = judge.name, name
        if key not in self._base_scores:
            self._base_scores[key] = score_draws(judge, prompts, texts(draws))
        return self._base_scores[key]

    @functools.cached_property
    def replayed(self) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, answer ids): the base's own answers to the old data's training prompts."""
        if self.old is None:
            raise QAdapterError("replay needs old data (the key old)")
        seen: dict[str, list[int]] = {}
        for name, ids in zip(
            self.old.train.tokens["prompt_id"], self.old.train.tokens["prompt_ids"], strict=True
        ):
            seen.setdefault(name, list(ids))
        prompts = list(seen.values())
        [draw] = self.base_answers("replay", prompts, 1, self.config.evaluation.seed + 10_000)
        return [(p, a.token_ids) for p, a in zip(prompts, draw, strict=True)]

    def best_answers(self, judge: QAdapterModel, n: int) -> list[Sample]:
        """(prompt ids, answer ids): to each training prompt, of the base's n answers the one that
        a trained model rewards most."""
        prompts = self._training_prompts
        seed = self.config.evaluation.seed + 20_000
        found = []
        for prompt, *answers in zip(
            prompts, *self.base_answers("training", prompts, n, seed), strict=True
        ):
            rewarded = reward_answers(
                judge, self.tokenizer, prompt, [answer.token_ids for answer in answers],
                batch_size=self.config.evaluation.batch_size,
            )
            found.append((prompt, max(rewarded, key=lambda answer: answer.total).token_ids))
        return found

    def retention_texts(self, method: DPO | QAdapter) -> list[str | Sample] | None:
        """What a method is held to; None for nothing.

        Raises:
            QAdapterError: a file that is missing or no file of texts.
        """
        if method.retention_coef == 0:
            return None
        names = retention_names(method)
        if not names and self.old is not None:  # what replay rehearses
            return self.replayed
        return [
            text for name in names or [OWN] for text in (
                self.own_samples if name == OWN else read_held_to(self.config.find(name))
            )
        ]

    @functools.cached_property
    def own_samples(self) -> list[Sample]:
        """The base's own answers to training prompts, as the trainer draws them."""
        return load_or_sample(self.fresh, self._training_prompts, self.tokenizer, say=self.say)

    @property
    def _training_prompts(self) -> list[list[int]]:
        """The different ones of the new preference."""
        return different_prompts(self.new.train.tokens)

    @functools.cached_property
    def budget(self) -> float:
        """Tokens each method sees: of both answers of all training pairs, prompts included."""
        tokens = self.new.train.tokens
        lengths = [np.array([len(x) for x in tokens[f"{name}_ids"]])
                   for name in ("prompt", "chosen", "rejected")]
        epoch = (2 * lengths[0] + lengths[1] + lengths[2]).sum()
        return float(epoch * self.config.training.num_train_epochs)
