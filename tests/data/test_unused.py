"""Prompts are read off the answers only where they are there."""

import json
import warnings

import pytest
from datasets import Dataset
from tiny import turns

from qadapter.data import as_preferences, load_preferences
from qadapter.errors import QAdapterError

TOPICS = ("rain", "bread", "prime numbers", "the moon", "tax law", "violins", "mosses", "Oslo",
          "glass", "salt")
# Answers alone: some begin alike by chance, as those of one model do.
ANSWERS = [
    ("The answer is simple.", "The details matter."), ("Sure! Here it is.", "Sure! Let me see."),
    ("I would say so.", "I am not certain."), ("Yes.", "No."), ("Perhaps.", "It depends."),
]


def rows(column, *, answers=ANSWERS, **more):
    return [
        {column: f"What should I know about {topic}, in short?", "chosen": chosen,
         "rejected": rejected, "source": "web", "id": f"row-{i}", **more}
        for i, (topic, (chosen, rejected)) in enumerate(zip(TOPICS, answers * 2, strict=True))
    ]


def message(data, **kwargs) -> str:
    with pytest.raises(QAdapterError) as caught:
        as_preferences(data, **kwargs)
    return str(caught.value)


ALIKE = [("The salt is white.", "The sea is blue."), ("The best is rest.", "The worst is work.")]
MODEL = [("Great question, here is what I know: a.", "Great question, here is what I know: b.")]


@pytest.mark.parametrize("column", ["question", "instruction", "query", "Input", "user_prompt"])
@pytest.mark.parametrize("answers", [ANSWERS, ALIKE * 2 + ANSWERS[:1], MODEL * 5])
@pytest.mark.parametrize("kind", ["list", "dataset", "jsonl", "parquet"])
def test_a_question_that_is_not_mapped_is_named(tmp_path, column, answers, kind):
    data = rows(column, answers=answers)
    if kind in ("jsonl", "parquet"):
        path = tmp_path / f"a.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in data))
        else:
            Dataset.from_list(data).to_parquet(path)
        with pytest.raises(QAdapterError) as caught:
            load_preferences(path)
        said = str(caught.value)
    else:
        said = message(data if kind == "list" else Dataset.from_list(data))
    assert "no column prompt" in said and f"--columns '{{prompt: {column}}}'" in said
    mapped = as_preferences(data, columns={"prompt": column})
    assert list(mapped["prompt"]) == [row[column] for row in data]


@pytest.mark.parametrize("answers", [ANSWERS, ALIKE * 2 + ANSWERS[:1]])
def test_a_column_of_any_name_is_named_if_the_answers_begin_with_no_prompt(answers):
    assert "frage" in message(rows("frage", answers=answers))


def test_without_another_column_too():
    data = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in ANSWERS[2:]]
    assert "a beginning in 1 of 3 rows, such as 'i'" in message(data)
    assert len(as_preferences(data[1:])) == 2


@pytest.mark.parametrize("shared", [[], [{"role": "system", "content": "Be brief."}]])
def test_messages_without_a_question(shared):
    def answer(text):
        return [*shared, {"role": "assistant", "content": text}]

    data = [row | {"chosen": answer(row["chosen"]), "rejected": answer(row["rejected"])}
            for row in rows("instruction")]
    assert "--columns '{prompt: instruction}'" in message(data)


EXPLANATION = "The first says more, and says it better than the second, at {0}."


@pytest.mark.parametrize("more", [
    {}, {"question": "What about {0}?"}, {"explanation": EXPLANATION}, {"id": "row of {0}"},
    {"instruction": "Answer the question."},
])
@pytest.mark.parametrize("prompt", ["Q: What  about {0}?\nA:", "What about {0}?"])
def test_implicit_prompts_as_text(more, prompt):
    data = [
        {"chosen": f"{prompt.format(topic)} Much.", "rejected": f"{prompt.format(topic)} Little."}
        | {key: value.format(topic) for key, value in more.items()}
        for topic in TOPICS
    ]
    with warnings.catch_warnings(action="error"):
        pairs = as_preferences(data)
    assert list(pairs["problem"]) == [None] * len(TOPICS)
    assert pairs[3]["prompt"] == prompt.format("the moon")


@pytest.mark.parametrize("question", ["What about {0}?", "What else about {0} is there to know?"])
def test_implicit_prompts_as_messages(question):
    data = [
        {"question": question.format(t), "chosen": turns(f"What about {t}?", "Much."),
         "rejected": turns(f"What about {t}?", "Little.")}
        for t in TOPICS
    ]
    assert list(as_preferences(data)["problem"]) == [None] * len(TOPICS)


def test_a_few_rows_without_a_prompt_are_dropped_as_ever():
    data = [{"chosen": f"Is {t} so? Yes.", "rejected": f"Is {t} so? No."} for t in TOPICS]
    data[4] = {"chosen": "Yes.", "rejected": "No."}
    assert [p for p in as_preferences(data)["problem"] if p] == [
        "prompt_differs: nothing is shared at the start"
    ]


@pytest.mark.parametrize("column", ["system", "input", "history"])
def test_what_belongs_to_a_prompt_and_is_left_out_is_said(column):
    text = "You only speak in rhymes."
    data = [row | {column: text if i % 2 else ""} for i, row in enumerate(rows("prompt"))]
    with pytest.warns(UserWarning, match=rf"column '{column}' is not used: 5 of the first 10 rows"):
        as_preferences(data)
    silent = [row | {column: ""} for row in data]
    repeated = [row | {"prompt": f"{text} {row['prompt']}"} for row in data]
    with warnings.catch_warnings(action="error"):
        as_preferences(silent)
        as_preferences(repeated)
