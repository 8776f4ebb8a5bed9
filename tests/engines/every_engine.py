"""Engines that serve our exports answer as we do: ``make test-engines``.

Not a part of the usual suite: it needs each engine's own environment and takes half an
hour. Every row of the tables in README.md and docs/serving.md is a test here; what they find is
written to benchmarks/results/engines.json, in the place of what it had of the same cases.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from comparing import Compared, compare
from policies import BASE, MARGIN, PROMPTS, RANKS, TOKENS, Expected, Policies
from servers import ENGINES, ROOT, Engine, answer_of, ask, serving, version_of

from qadapter.console.environment import devices, versions
from qadapter.exporting.engines import Served, Way, ways

RESULTS = ROOT / "benchmarks" / "results" / "engines.json"


@dataclass(frozen=True)
class Case:
    """A policy, and the form in which an engine is to serve it."""

    engine: str
    form: str
    """As ``qadapter export`` calls it; "saved": the adapter's own folder, by the plug-in."""
    adapter: str
    untied: bool = False
    """Whether on a base whose output layer is no input embedding."""
    strength: float = 1.0

    def __str__(self) -> str:
        return f"{self.engine}, {self.label}"

    @property
    def label(self) -> str:
        what = {"lora": "LoRA"}.get(self.adapter, f"{self.adapter} head")
        form = "as saved" if self.form == "saved" else self.form
        base = {True: ", untied base", False: ", tied base" if form == "lm_head_lora" else ""}
        dial = "" if self.strength == 1.0 else f", strength {self.strength:g}"
        return f"{form}: {what}{base[self.untied]}{dial}"


CASES = (
    *(Case(engine, "merged", adapter) for engine in ("vLLM", "llama.cpp", "transformers serve")
      for adapter in ("linear", "block", "lora")),
    Case("vLLM", "lm_head_lora", "linear"),
    Case("vLLM", "lm_head_lora", "linear", untied=True),
    Case("vLLM", "peft", "lora"),
    Case("vLLM", "saved", "mlp"),
    Case("vLLM", "saved", "block", strength=0.5),
    Case("llama.cpp", "gguf", "linear"),
    Case("llama.cpp", "gguf", "block"),
    Case("llama.cpp", "lm_head_lora", "linear", untied=True),
    Case("llama.cpp", "peft", "lora"),
)
BASE_ITSELF = "the base itself"
REFUSED = (Case("llama.cpp", "lm_head_lora", "linear"),)
"""What the table of ways says an engine can't do."""


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> Policies:
    folder = tmp_path_factory.mktemp("engines")
    sources = ROOT / ENGINES["llama.cpp"].environment / "llama.cpp"
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py"):
        if (sources / name).exists():  # commands are for a folder with the converters in it
            (folder / name).symlink_to(sources / name)
    return Policies(folder)


@pytest.fixture(scope="module")
def found():
    """Rows by engine; written at the end."""
    rows: dict[str, list[dict]] = {}
    yield rows
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"engines": {}}
    order = [BASE_ITSELF, *(case.label for case in CASES)]
    for name, new in rows.items():
        old = before["engines"].get(name, {"rows": []})["rows"]
        its = list(({row["form"]: row for row in (*old, *new)}).values())
        its.sort(key=lambda row: order.index(row["form"]))
        before["engines"][name] = {
            "date": datetime.date.today().isoformat(), "version": version_of(ENGINES[name]),
            "options of this lane": list(ENGINES[name].options), "rows": its,
        }
    text = json.dumps(
        {
            "base": BASE, "prompts": len(PROMPTS), "tokens": TOKENS, "dtype": "float32",
            "machine": devices(), "processor": platform.machine(), "cores": os.cpu_count(),
            "versions": versions(), "engines": before["engines"],
        }, indent=1, ensure_ascii=False,
    )
    RESULTS.write_text(text + "\n", encoding="utf-8")


def commands(case: Case, policies: Policies) -> tuple[list[str], str]:
    """Shell lines, and what requests call the model."""
    folder = policies.exported(case.adapter, case.form, case.untied)
    base = policies.untied if case.untied else policies.tied
    if case.form == "saved":
        overrides = {"architectures": ["QAdapterLlamaForCausalLM"], "qadapter": folder}
        if case.strength != 1.0:
            overrides["qadapter_strength"] = case.strength
        return [f"vllm serve {base.name} --dtype float32 --hf-overrides "
                f"'{json.dumps(overrides)}'"], base.name
    way = way_of(case, folder, base.name, tied=not case.untied)
    assert not way.reason, way.reason
    card = (policies.folder / folder / "README.md").read_text(encoding="utf-8")
    assert all(line in card for line in way.commands)
    return list(way.commands), way.model or folder


def way_of(case: Case, folder: str, base: str, tied: bool) -> Way:
    """What the cards say of a case."""
    served = Served(
        case.form, folder, base=base, rank=RANKS.get(case.adapter, 1), tied=tied, dtype="float32",
    )
    return next(way for way in ways(served) if way.engine == case.engine)


def asked(
    engine: Engine, lines: Sequence[str], model: str, policies: Policies, expected: Expected
) -> Compared:
    """Serve and ask."""
    with serving(engine, lines, policies.folder) as url:
        with ThreadPoolExecutor(len(PROMPTS)) as pool:  # what batches is asked for a batch
            choices = list(pool.map(
                lambda prompt: ask(url, model, prompt, engine.gives_logprobs), PROMPTS
            ))
    end = policies.tokenizer.eos_token
    return compare(expected, [
        answer_of(choice, reference.answer, end)
        for choice, reference in zip(choices, expected.references, strict=True)
    ])


def row(label: str, compared: Compared) -> dict:
    return {
        "form": label, "same": compared.same, "compared": compared.compared,
        "difference": compared.difference, "gaps": list(compared.gaps),
        "tolerance": compared.tolerance, "wrong": compared.wrong,
    }


def with_own_error(engine: Engine, expected: Expected, policies: Policies, found) -> Expected:
    """With the tolerance that the engine's own arithmetic needs on the base itself, which nobody
    customised: llama.cpp's rotary angles, products of many factors in float32, err more than ours.
    """
    if not engine.gives_logprobs:
        return expected
    rows = found.setdefault(engine.name, [])
    if not rows:
        base = policies.expected("linear", False, 0.0)
        case = Case(engine.name, "merged", BASE_ITSELF)
        way = way_of(case, policies.tied.name, policies.tied.name, tied=True)
        compared = asked(engine, way.commands, way.model or policies.tied.name, policies, base)
        rows.append(row(BASE_ITSELF, compared) | {"wrong": []})
    return dataclasses.replace(
        expected, tolerance=max(expected.tolerance, MARGIN * rows[0]["difference"])
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_answers_as_we_do(case: Case, policies: Policies, found):
    assert not policies.answers_as_the_base(case.adapter, case.untied, case.strength)
    engine = ENGINES[case.engine]
    expected = policies.expected(case.adapter, case.untied, case.strength)
    expected = with_own_error(engine, expected, policies, found)
    compared = asked(engine, *commands(case, policies), policies, expected)
    found.setdefault(case.engine, []).append(row(case.label, compared))
    print(case, compared)
    assert not compared.wrong


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_the_cards_say_an_engine_refuses(case: Case, policies: Policies):
    """The commands of the same form on a base of the other kind, run on this one."""
    folder = policies.exported(case.adapter, case.form, case.untied)
    base = policies.tied.name
    way = way_of(case, folder, base, tied=True)
    assert way.reason
    tried = way_of(case, folder, base, tied=False)
    with (
        pytest.raises(pytest.fail.Exception, match="did not serve"),
        serving(ENGINES[case.engine], tried.commands, policies.folder),
    ):
        pass
