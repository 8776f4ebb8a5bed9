"""Every format gives the same canonical pairs; every pair that has none gives its reason."""

import json

import pytest
from datasets import Dataset, DatasetDict
from tiny import turns

from qadapter.data import as_preferences, load_preferences
from qadapter.errors import QAdapterError

PROMPT = [{"role": "user", "content": "What color is the sky?"}]
BLUE = [{"role": "assistant", "content": "It is blue."}]
RED = [{"role": "assistant", "content": "It is red."}]
PAIR = {"prompt": PROMPT, "chosen": BLUE, "rejected": RED}
HH = {
    "chosen": "\n\nHuman: What color is the sky?\n\nAssistant: It is blue.",
    "rejected": "\n\nHuman: What color is the sky?\n\nAssistant: It is red.",
}
DSP = {
    "query": "What color is the sky?",
    "responses": {"academy": "It is blue.", "normal": "It is red.", "business": "It sells."},
}


def pair(row):
    return {key: row[key] for key in ("prompt", "chosen", "rejected")}


def only(rows, **kwargs):
    dataset = as_preferences(rows, **kwargs)
    assert len(dataset) == 1
    return dataset[0]


def problem(row, **kwargs):
    """The reason why the second of two rows, the first of which is good, is unusable."""
    good = {
        "messages": PAIR,
        "text": {"prompt": "a", "chosen": "b", "rejected": "c"},
        "implicit": {"chosen": "a b", "rejected": "a c"},
        "hh": HH,
        "ids": {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
    }[kwargs.pop("beside")]
    dataset = as_preferences([good, row], **kwargs)
    assert dataset[0]["problem"] is None and list(dataset["row"]) == [0, 1]
    return dataset[1]["problem"]


CONVERSATIONAL = {
    "explicit": PAIR,
    "implicit": {"chosen": PROMPT + BLUE, "rejected": PROMPT + RED},
    "prompt repeated in the answers": {**PAIR, "chosen": PROMPT + BLUE, "rejected": PROMPT + RED},
    "prompt as text": {**PAIR, "prompt": PROMPT[0]["content"]},
    "prompt as text beside conversations": {
        "prompt": PROMPT[0]["content"],
        "chosen": PROMPT + BLUE,
        "rejected": PROMPT + RED,
    },
    "answers as text": {"prompt": PROMPT, "chosen": "It is blue.", "rejected": "It is red."},
    "hh": HH,
}


@pytest.mark.parametrize("row", CONVERSATIONAL.values(), ids=CONVERSATIONAL.keys())
@pytest.mark.parametrize("source", ["list", "arrow", "file"])
def test_conversational_formats(row, source, tmp_path):
    if source == "file":
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        got = load_preferences(tmp_path / "a.jsonl")[0]
    else:
        got = only([row] if source == "list" else Dataset.from_list([row]))
    assert pair(got) == PAIR
    assert got["problem"] is None


def test_prompt_ids_agree_across_formats_and_datasets():
    ids = {only([row])["prompt_id"] for row in CONVERSATIONAL.values()}
    ids |= set(as_preferences([DSP], domain="academy")["prompt_id"])
    ids.add(
        only([{"prompt": " What color is \nthe sky?", "chosen": "b", "rejected": "c"}])["prompt_id"]
    )
    assert len(ids) == 1
    system = [{"role": "system", "content": "Be brief."}]
    assert only([{**PAIR, "prompt": system + PROMPT}])["prompt_id"] not in ids


def test_text_formats():
    row = {"prompt": "Sky?", "chosen": " Blue.", "rejected": " Red.", "id": 7}
    assert pair(only([row])) == {k: row[k] for k in ("prompt", "chosen", "rejected")}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Sky? Blue.", "Sky? Red.", "Sky?"),
        ("Sky? Bold.", "Sky? Blue.", "Sky?"),  # a word is never cut in two
        ("Sky?\n\nBlue.", "Sky?\n\nRed.", "Sky?\n\n"),
        ("Bot:Yes", "Bot:No", "Bot:"),
        ("Say it: yes", "Say it: yes indeed", "Say it:"),  # one is the start of the other
        ("天空什么颜色?蓝色", "天空什么颜色?蓝的", "天空什么颜色?"),
    ],
)
def test_implicit_text_prompt(chosen, rejected, prompt):
    got = only([{"chosen": chosen, "rejected": rejected}])
    assert got["prompt"] == prompt
    assert got["prompt"] + got["chosen"] == chosen
    assert got["prompt"] + got["rejected"] == rejected


def test_system_messages_and_turns_stay_in_the_prompt():
    shared = [{"role": "system", "content": "Be brief."}, *turns("a", "b", "c")]
    got = only([{"chosen": shared + BLUE, "rejected": shared + RED}])
    assert pair(got) == {"prompt": shared, "chosen": BLUE, "rejected": RED}


def test_prompt_as_text_beside_conversations_with_a_system_message():
    shared = [{"role": "system", "content": "Be brief."}, *PROMPT]
    row = {"prompt": PROMPT[0]["content"], "chosen": shared + BLUE, "rejected": shared + RED}
    assert pair(only([row])) == {"prompt": shared, "chosen": BLUE, "rejected": RED}


def test_answers_of_several_turns_part_at_the_first_that_differs():
    chosen, rejected = turns("a", "b", "c", "d"), turns("a", "x")
    got = only([{"chosen": chosen, "rejected": rejected}])
    assert pair(got) == {"prompt": chosen[:1], "chosen": chosen[1:], "rejected": rejected[1:]}


def test_transcript_turns_and_stray_colons():
    text = "\n\nHuman: hi: Human: x\n\nAssistant: \n\nhello\n\nHuman:\n\nAssistant:"
    got = only([{"chosen": text + " a", "rejected": text + " b"}])
    assert got["prompt"] == turns("hi: Human: x", "hello", "")
    assert got["chosen"] == [{"role": "assistant", "content": "a"}]


def test_dsp_gives_a_pair_for_every_other_domain():
    dataset = as_preferences([DSP, DSP], domain="academy")
    assert [r["rejected"][0]["content"] for r in dataset] == ["It is red.", "It sells."] * 2
    assert pair(dataset[0]) == PAIR
    assert list(dataset["row"]) == [0, 0, 1, 1]
    assert len(set(dataset["prompt_id"])) == 1
    one = as_preferences([DSP], domain="normal", rejected_domains=["academy"])
    assert pair(one[0]) == {"prompt": PROMPT, "chosen": RED, "rejected": BLUE}


@pytest.mark.parametrize("as_arrow", [False, True])
def test_dsp_gaps_are_problems_of_their_pairs(as_arrow):
    holes = [
        {"query": "q", "responses": {"academy": "a", "normal": None, "business": " "}},
        {"query": "q", "responses": {"academy": None, "normal": "n", "business": "b"}},
        {"query": None, "responses": None},
    ]
    rows = [DSP, *holes]
    dataset = as_preferences(Dataset.from_list(rows) if as_arrow else rows, domain="academy")
    assert [p and p.split(":")[0] for p in dataset["problem"]] == [
        *(None, None),
        *("missing_value", "empty_answer"),
        *["missing_value"] * 4,
    ]


def test_token_ids():
    row = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9], "prompt": "ignored"}
    got = only([row])
    assert {k: got[k] for k in row if k != "prompt"} == {k: row[k] for k in row if k != "prompt"}
    assert got["prompt_id"] == only([{**row, "chosen_ids": [1]}])["prompt_id"]


def test_tools_and_template_keywords_keep_their_own_keys(tmp_path):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]
    rows = [
        PAIR | {"tools": tools, "chat_template_kwargs": {"think": False}},
        PAIR | {"tools": json.dumps(tools), "chat_template_kwargs": {"style": "x"}},
        PAIR,
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    dataset = load_preferences(tmp_path / "a.json")
    assert list(dataset["tools"]) == [tools, tools, None]
    assert list(dataset["chat_template_kwargs"]) == [{"think": False}, {"style": "x"}, None]


def test_arrow_nulls_are_not_keys_of_a_message():
    rows = [
        {
            "chosen": [{**PROMPT[0], "mood": "glad"}, *BLUE],
            "rejected": [{**PROMPT[0], "mood": "glad"}, *RED],
        },
        {"chosen": PROMPT + BLUE, "rejected": PROMPT + RED},
    ]
    for data in (rows, Dataset.from_list(rows)):
        dataset = as_preferences(data)
        assert dataset[0]["prompt"] == [{**PROMPT[0], "mood": "glad"}]
        assert dataset[1]["prompt"] == PROMPT


def test_assistant_turn_of_tool_calls_needs_no_text():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    got = only([{"prompt": PROMPT, "chosen": [call], "rejected": RED}])
    assert got["problem"] is None and [m["role"] for m in got["chosen"]] == ["assistant"]
    assert got["chosen"][0]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    ("beside", "row", "reason"),
    [
        ("text", {"prompt": None, "chosen": "b", "rejected": "c"}, "missing_value: prompt"),
        ("text", {"prompt": "a", "chosen": "b"}, "missing_value: rejected"),
        ("text", {"chosen": "a b", "rejected": "a c"}, "missing_value: prompt"),
        ("text", {"prompt": "a", "chosen": 3, "rejected": "c"}, "wrong_type: chosen is a int"),
        ("text", {"prompt": "a", "chosen": "\ud800", "rejected": "c"}, "wrong_type: chosen is not"),
        ("text", {"prompt": "a", "chosen": "b", "rejected": " \n"}, "empty_answer: rejected"),
        ("text", {"prompt": "a", "chosen": "b", "rejected": "b"}, "identical_answers"),
        ("implicit", {"chosen": "a b", "rejected": "a b"}, "identical_answers"),
        ("implicit", {"chosen": "yes", "rejected": "no"}, "prompt_differs"),
        ("implicit", {"chosen": "yes", "rejected": "yellow"}, "prompt_differs"),
        ("messages", {**PAIR, "chosen": None}, "missing_value: chosen"),
        ("messages", {**PAIR, "chosen": 3}, "wrong_type: chosen is a int"),
        ("messages", {**PAIR, "prompt": []}, "empty_prompt"),
        ("messages", {**PAIR, "rejected": []}, "empty_answer: rejected"),
        ("messages", {**PAIR, "chosen": [{"content": "x"}]}, "bad_messages: chosen[0] has no role"),
        ("messages", {**PAIR, "chosen": ["x"]}, "bad_messages"),
        ("messages", {**PAIR, "chosen": [{**BLUE[0], "content": None}]}, "bad_messages"),
        ("messages", {**PAIR, "chosen": [{**BLUE[0], "content": ["x"]}]}, "bad_messages"),
        ("messages", {**PAIR, "chosen": [{**BLUE[0], "content": "\udc00"}]}, "wrong_type"),
        ("messages", {**PAIR, "chosen": [{**BLUE[0], "content": " "}]}, "empty_answer: chosen"),
        ("messages", {**PAIR, "chosen": BLUE, "rejected": BLUE}, "identical_answers"),
        ("messages", {**PAIR, "chosen": PROMPT + BLUE}, "prompt_differs"),
        (
            "messages",
            {**PAIR, "chosen": turns("x", "y"), "rejected": turns("x", "z")},
            "prompt_differs: chosen has a user turn",
        ),
        ("messages", {**PAIR, "chosen": [{"role": "tool", "content": "x"}]}, "answer_role"),
        ("messages", {**PAIR, "chosen": BLUE + PROMPT}, "answer_role"),
        ("messages", {**PAIR, "tools": "{"}, "wrong_type: tools"),
        ("messages", {**PAIR, "tools": {}}, "wrong_type: tools"),
        ("messages", {**PAIR, "chat_template_kwargs": []}, "wrong_type: chat_template_kwargs"),
        ("hh", {**HH, "chosen": "\n\nHuman: What?\n\nAssistant: x"}, "prompt_differs"),
        ("hh", {**HH, "chosen": "hello"}, "wrong_type: chosen is no Human/Assistant transcript"),
        ("hh", {**HH, "chosen": HH["rejected"]}, "identical_answers"),
        ("hh", {**HH, "chosen": HH["rejected"] + "\n\nHuman: x\n\nAssistant: y"}, "empty_answer"),
        ("hh", {**HH, "chosen": "\n\nHuman: What color is the sky?\n\nAssistant:"}, "empty_answer"),
        ("ids", {"prompt_ids": [], "chosen_ids": [2], "rejected_ids": [3]}, "empty_prompt"),
        ("ids", {"prompt_ids": [1], "chosen_ids": [], "rejected_ids": [3]}, "empty_answer"),
        ("ids", {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}, "identical_answers"),
        ("ids", {"prompt_ids": [1], "chosen_ids": ["2"], "rejected_ids": [3]}, "wrong_type"),
        ("ids", {"prompt_ids": [1], "chosen_ids": [-1], "rejected_ids": [3]}, "wrong_type"),
        ("ids", {"prompt_ids": 1, "chosen_ids": [2], "rejected_ids": [3]}, "wrong_type"),
    ],
)
def test_unusable_rows_are_kept_with_their_reason(beside, row, reason):
    assert problem(row, beside=beside).startswith(reason)


def test_columns_map_names_and_can_flip_the_preference():
    row = {"question": PROMPT, "good": BLUE, "bad": RED, "chosen": "decoy"}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert pair(only([row], columns=columns)) == PAIR
    flipped = only([PAIR], columns={"chosen": "rejected", "rejected": "chosen"})
    assert pair(flipped) == {"prompt": PROMPT, "chosen": RED, "rejected": BLUE}


@pytest.mark.parametrize(
    ("rows", "kwargs", "words"),
    [
        (
            [{"text": "a", "label": 1}],
            {},
            ["text, label", "chosen + rejected", "query + responses"],
        ),
        ([PAIR], {"columns": {"good": "chosen"}}, ["'good' is no column", "canonical name"]),
        (
            [PAIR],
            {"columns": {"chosen": "chossen"}},
            ["no column 'chossen'", "did you mean 'chosen'"],
        ),
        ([PAIR], {"domain": "academy"}, ["'academy'", "no query and responses"]),
        ([PAIR], {"rejected_domains": ["x"]}, ["rejected_domains needs a domain"]),
        ([DSP], {}, ["choose one with domain=", "academy, normal, business"]),
        ([DSP], {"domain": "academic"}, ["no domain 'academic'", "did you mean 'academy'"]),
        ([DSP], {"domain": "academy", "rejected_domains": ["x"]}, ["no domain 'x'"]),
        ([DSP], {"domain": "academy", "rejected_domains": []}, ["at least one"]),
        ([DSP], {"domain": "academy", "rejected_domains": ["academy"]}, ["other than 'academy'"]),
        ([], {}, ["no rows"]),
        (DatasetDict(a=Dataset.from_list([PAIR])), {}, ["splits a", "choose one"]),
    ],
)
def test_unusable_datasets(rows, kwargs, words):
    with pytest.raises(QAdapterError) as caught:
        as_preferences(rows, **kwargs)
    for word in words:
        assert word in str(caught.value)


def test_many_rows_keep_their_order_over_chunks(monkeypatch):
    monkeypatch.setattr("qadapter.data.spooled._CHUNK", 3)
    rows = [{"prompt": f"p{i}", "chosen": "b", "rejected": "c"} for i in range(8)]
    dataset = as_preferences(rows)
    assert list(dataset["prompt"]) == [f"p{i}" for i in range(8)]
    assert list(dataset["row"]) == list(range(8))


def test_canonical_data_passes_unchanged():
    dataset = as_preferences([PAIR])
    assert as_preferences(dataset) is dataset
