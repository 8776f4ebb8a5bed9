"""Canonical pairs to token ids: boundaries, BOS, end of turn, truncation, bad rows."""

import pytest
from datasets import Dataset
from tiny import PLAIN, RERENDERING, STRICT, chatml, llama3, turns

from qadapter.data import learn_end_of_turn, load_preferences, tokenize_preferences
from qadapter.errors import QAdapterError

SKY = turns("What color is the sky?")
PAIR = {
    "prompt": SKY,
    "chosen": turns("It is blue.", first="assistant"),
    "rejected": turns("It is red, I think.", first="assistant"),
}
TEXT = {"prompt": "What color is the sky?", "chosen": " It is blue.", "rejected": " It is red."}


def prepare(rows, tokenizer, **kwargs):
    return tokenize_preferences(rows, tokenizer, **kwargs)


def first(rows, tokenizer, **kwargs):
    return prepare(rows, tokenizer, **kwargs).dataset[0]


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_chatml_prompt_and_answers():
    tokenizer = chatml()
    got = first([PAIR], tokenizer)
    assert tokenizer.decode(got["prompt_ids"]) == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        "<|im_start|>user\nWhat color is the sky?<|im_end|>\n<|im_start|>assistant\n"
    )
    # The end of turn is learned, the template's newline behind it is not; pad has the same id.
    assert tokenizer.decode(got["chosen_ids"]) == "It is blue.<|im_end|>"
    assert tokenizer.decode(got["rejected_ids"]) == "It is red, I think.<|im_end|>"
    assert got["chosen_ids"][-1] == tokenizer.pad_token_id == tokenizer.eos_token_id
    # Training sees the very tokens that generation starts from.
    assert got["prompt_ids"] == tokenizer.apply_chat_template(
        SKY, add_generation_prompt=True, return_dict=False
    )


def test_own_system_message_replaces_the_default_one():
    tokenizer = chatml()
    row = {**PAIR, "prompt": [{"role": "system", "content": "Be brief."}, *SKY]}
    text = tokenizer.decode(first([row], tokenizer)["prompt_ids"])
    assert text.count("<|im_start|>system") == 1 and "Be brief." in text


def test_multi_turn_prompt():
    tokenizer = chatml()
    row = {**PAIR, "prompt": turns("Yes?", "No.", "I think so.")}
    got = first([row], tokenizer)
    text = tokenizer.decode(got["prompt_ids"])
    assert text.endswith("I think so.<|im_end|>\n<|im_start|>assistant\n")
    assert text.count("<|im_end|>") == 4  # the earlier ends of turn are no actions
    assert "chosen_mask" not in got


def test_bos_is_never_doubled():
    tokenizer = llama3()
    bos = tokenizer.bos_token_id
    assert tokenizer("x")["input_ids"][0] == bos  # it is one that adds a BOS
    conversation = first([PAIR], tokenizer)["prompt_ids"]
    text = first([TEXT], tokenizer)["prompt_ids"]
    written = first([{**TEXT, "prompt": "<|begin|>" + TEXT["prompt"]}], tokenizer)["prompt_ids"]
    for prompt in (conversation, text, written):
        assert prompt[0] == bos and prompt.count(bos) == 1
    assert text == written


def test_no_bos_where_the_tokenizer_adds_none():
    tokenizer = chatml()
    got = first([TEXT], tokenizer)
    assert got["prompt_ids"] == ids(tokenizer, TEXT["prompt"])


@pytest.mark.parametrize(
    ("tokenizer", "token", "from_template"),
    [
        (chatml(), "<|im_end|>", True),
        (chatml(eos_token="<|endoftext|>"), "<|im_end|>", True),
        (llama3(), "<|eot|>", True),  # not the eos token, and no named special token at all
        (llama3(PLAIN), "<|end|>", False),
    ],
)
def test_end_of_turn_is_what_the_template_ends_an_answer_with(tokenizer, token, from_template):
    end = learn_end_of_turn(tokenizer)
    assert tokenizer.convert_ids_to_tokens(end.token_id) == token
    assert end.from_template is from_template
    result = prepare([PAIR], tokenizer)
    for key in ("chosen_ids", "rejected_ids"):
        answer = result.dataset[0][key]
        assert answer[-1] == end.token_id and answer.count(end.token_id) == 1
    assert result.report.end_of_turn == token
    assert (result.report.end_of_turn_source == "chat template") is from_template


def test_template_without_special_tokens_gets_an_eos_instead_of_its_tail():
    tokenizer = llama3(PLAIN)
    assert learn_end_of_turn(tokenizer).tail == "\n"
    assert tokenizer.decode(first([PAIR], tokenizer)["chosen_ids"]).endswith("is blue.<|end|>")


def test_text_gets_one_eos():
    tokenizer = llama3()
    row = {**TEXT, "rejected": " It is red.<|end|>"}
    got = first([row], tokenizer)
    assert tokenizer.decode(got["chosen_ids"]) == " It is blue.<|end|>"
    assert tokenizer.decode(got["rejected_ids"]) == " It is red.<|end|>"


def test_prompt_may_be_empty_where_there_is_a_bos():
    row = {**TEXT, "prompt": ""}
    assert first([row], llama3())["prompt_ids"] == [llama3().bos_token_id]
    with pytest.raises(QAdapterError, match="the prompt has no tokens"):
        prepare([row], chatml())


def test_token_across_the_boundary_belongs_to_the_answer():
    tokenizer = llama3()
    row = {"prompt": "The color ", "chosen": "is blue.", "rejected": "and green."}
    result = prepare([row], tokenizer)
    got = result.dataset[0]
    bos = [tokenizer.bos_token_id]
    assert got["prompt_ids"] == bos + ids(tokenizer, "The color")
    assert got["prompt_ids"] + got["chosen_ids"][:-1] == bos + ids(tokenizer, "The color is blue.")
    assert result.report.notes == {"boundary_merged": 1}
    assert result.report.first_rows == {"boundary_merged": [0]}


def test_generation_prompt_that_merges_with_the_answer():
    tokenizer = llama3(PLAIN)
    result = prepare([PAIR], tokenizer)
    got = result.dataset[0]
    assert tokenizer.decode(got["prompt_ids"]).endswith("assistant:")
    assert tokenizer.decode(got["chosen_ids"]) == " It is blue.<|end|>"
    assert result.report.notes == {"boundary_merged": 1}


def test_rerendered_prompt_keeps_the_users_turn_out_of_the_answer():
    tokenizer = llama3(RERENDERING)
    result = prepare([{**PAIR, "chosen": turns("Blue.", first="assistant")}], tokenizer)
    got = result.dataset[0]
    assert tokenizer.decode(got["prompt_ids"]).endswith("<|header|>assistant<|end_header|>")
    assert tokenizer.decode(got["chosen_ids"]) == "Blue.<|eot|>"
    assert result.report.notes == {"prompt_rerendered": 1}


def test_implicit_text_prompt_is_split_between_tokens():
    tokenizer = llama3()
    row = {"chosen": "What color? It is blue.", "rejected": "What color? It is black."}
    got = first([row], tokenizer)
    bos = [tokenizer.bos_token_id]
    for side in ("chosen", "rejected"):
        whole = bos + ids(tokenizer, row[side]) + [tokenizer.eos_token_id]
        assert got["prompt_ids"] + got[f"{side}_ids"] == whole
    assert got["chosen_ids"][0] != got["rejected_ids"][0]


@pytest.mark.parametrize("tokenizer", [chatml(), llama3(), llama3(PLAIN)])
def test_only_the_assistants_turns_of_an_answer_are_learned(tokenizer):
    chosen = turns("It is blue.", "So?", "I think so.", first="assistant")
    result = prepare([PAIR, {**PAIR, "chosen": chosen}], tokenizer)
    plain, several = result.dataset
    assert plain["chosen_mask"] == [True] * len(plain["chosen_ids"])
    assert several["rejected_mask"] == [True] * len(several["rejected_ids"])
    mask, answer = several["chosen_mask"], several["chosen_ids"]
    assert len(mask) == len(answer) and mask[0] and mask[-1]
    end = result.report.end_of_turn if tokenizer.chat_template != PLAIN else ""
    learned = tokenizer.decode([i for i, own in zip(answer, mask, strict=True) if own])
    passed = tokenizer.decode([i for i, own in zip(answer, mask, strict=True) if not own])
    assert learned.replace(" ", "").startswith(f"Itisblue.{end}Ithinkso.")
    assert "So?" in passed and "blue" not in passed and "think" not in passed


def test_template_keywords_tools_and_extra_keys_reach_the_template():
    tokenizer = llama3(STRICT)
    row = {
        **PAIR,
        "prompt": [{**SKY[0], "mood": "glad"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "chat_template_kwargs": {"style": "brief"},
    }
    plain = {**PAIR, "prompt": SKY}
    for data in ([row, plain], Dataset.from_list([row, plain])):
        dataset = prepare(data, tokenizer).dataset
        question = "<|header|>user<|end_header|>What color is the sky?<|eot|><|header|>assistant"
        assert [tokenizer.decode(prompt) for prompt in dataset["prompt_ids"]] == [
            f"1 tools brief(glad){question}<|end_header|>",
            f"{question}<|end_header|>",
        ]


def test_tokenized_input_is_taken_as_it_is():
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [8]}]
    result = prepare(rows, chatml())
    got = result.dataset[0]
    assert {k: got[k] for k in rows[0]} == rows[0]
    assert result.report.end_of_turn is None


def test_tokenizing_again_changes_nothing():
    several = {**PAIR, "chosen": turns("It is blue.", "So?", "Yes.", first="assistant")}
    once = prepare([{**PAIR, "chosen": None}, several], chatml()).dataset
    twice = prepare(once, chatml()).dataset
    assert twice[0] == once[0] and once[0]["row"] == 1 and not all(once[0]["chosen_mask"])


def test_keep_start_cuts_the_end_of_an_answer():
    tokenizer = chatml()
    whole = first([PAIR], tokenizer)
    prompt, chosen, rejected = (whole[f"{k}_ids"] for k in ("prompt", "chosen", "rejected"))
    assert len(chosen) < len(rejected)
    limit = len(prompt) + len(chosen)
    result = prepare([PAIR], tokenizer, max_length=limit)
    got = result.dataset[0]
    assert got["prompt_ids"] == prompt and got["chosen_ids"] == chosen
    assert got["rejected_ids"] == rejected[: len(chosen)]
    assert tokenizer.eos_token_id not in got["rejected_ids"]  # what is cut has no end of turn
    assert result.report.notes == {"rejected_truncated": 1}
    assert result.report.longest == limit
    assert result.report.answer_tokens == 2 * len(chosen)
    both = prepare([PAIR], tokenizer, max_length=limit - 1).report
    assert both.notes == {"chosen_truncated": 1, "rejected_truncated": 1}


def test_keep_end_cuts_the_start_of_the_prompt():
    tokenizer = chatml()
    whole = first([PAIR], tokenizer)
    limit = 5 + len(whole["rejected_ids"])
    result = prepare([PAIR], tokenizer, max_length=limit, truncation_mode="keep_end")
    got = result.dataset[0]
    assert got["prompt_ids"] == whole["prompt_ids"][-5:]
    assert got["chosen_ids"] == whole["chosen_ids"]
    assert got["rejected_ids"] == whole["rejected_ids"]
    assert result.report.notes == {"prompt_truncated": 1}


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_one_token_must_be_left_on_either_side(mode):
    row = {"prompt_ids": [1] * 6, "chosen_ids": [2] * 6, "rejected_ids": [3, 2]}
    got = first([row], chatml(), max_length=7, truncation_mode=mode)
    assert len(got["chosen_ids" if mode == "keep_start" else "prompt_ids"]) == 1
    reason = "no room for an answer" if mode == "keep_start" else "an answer alone does not fit"
    with pytest.raises(QAdapterError, match=reason):
        prepare([row], chatml(), max_length=6, truncation_mode=mode)


def test_masks_are_cut_with_their_answers():
    chosen = turns("It is blue.", "So?", "I think so.", first="assistant")
    row = {**PAIR, "chosen": chosen}
    whole = first([row], chatml())
    limit = len(whole["prompt_ids"]) + len(whole["chosen_ids"]) - 2
    cut = first([row], chatml(), max_length=limit)
    assert cut["chosen_mask"] == whole["chosen_mask"][:-2]
    assert len(cut["chosen_mask"]) == len(cut["chosen_ids"])


def test_no_limit():
    long = {**PAIR, "chosen": turns("blue " * 3000, first="assistant")}
    result = prepare([long], chatml(), max_length=None)
    assert result.report.longest > 3000 and not result.report.notes


def long_prompt_length():
    return len(first([PAIR], chatml())["prompt_ids"])


BAD = {
    "missing_value": ({**PAIR, "chosen": None}, {}),
    "wrong_type": ({**PAIR, "chosen": 7}, {}),
    "bad_messages": ({**PAIR, "chosen": [{"role": "assistant"}]}, {}),
    "prompt_differs": ({**PAIR, "chosen": turns("x", "y"), "rejected": turns("z", "y")}, {}),
    "empty_prompt": ({**PAIR, "prompt": []}, {}),
    "empty_answer": ({**PAIR, "chosen": turns(" ", first="assistant")}, {}),
    "answer_role": ({**PAIR, "chosen": [{"role": "tool", "content": "x"}]}, {}),
    "identical_answers": (
        # The same once the template trims.
        {
            **PAIR,
            "chosen": turns("Yes. ", first="assistant"),
            "rejected": turns(" Yes.", first="assistant"),
        },
        {},
    ),
    "template_error": ({**PAIR, "prompt": SKY + SKY}, {}),
    "prompt_too_long": ({**PAIR, "prompt": turns("x " * 200)}, {"max_length": 100}),
    "answer_too_long": (
        {**PAIR, "rejected": turns("x " * 200, first="assistant")},
        {"max_length": 100, "truncation_mode": "keep_end"},
    ),
    "identical_after_truncation": (
        {
            **PAIR,
            "chosen": turns("x " * 200 + "a", first="assistant"),
            "rejected": turns("x " * 200 + "b", first="assistant"),
        },
        {"max_length": 100},
    ),
}
STRICT_TRIMMING = STRICT.replace("message['content'] +", "(message['content'] | trim) +")


@pytest.mark.parametrize("reason", BAD)
def test_every_reason_drops_its_row_or_raises(reason):
    row, kwargs = BAD[reason]
    tokenizer = llama3(STRICT_TRIMMING)
    kwargs = {"max_length": 200} | kwargs
    result = prepare([PAIR, row, PAIR, row], tokenizer, **kwargs)
    assert list(result.dataset["row"]) == [0, 2]
    assert result.report.dropped == {reason: 2}
    assert result.report.first_rows[reason] == [1, 3]
    with pytest.raises(QAdapterError, match="row 1: ") as caught:
        prepare([PAIR, row, PAIR, row], tokenizer, on_bad_row="raise", **kwargs)
    assert "\n" not in str(caught.value)
    with pytest.raises(QAdapterError, match="no preference pair can be used: kept 0 of 2"):
        prepare([row, row], tokenizer, **kwargs)


def test_nothing_left_lists_every_reason_in_one_line():
    rows = [{**PAIR, "chosen": None}] * 7 + [{**PAIR, "chosen": PAIR["rejected"]}]
    with pytest.raises(QAdapterError) as caught:
        prepare(rows, chatml())
    assert str(caught.value) == (
        "no preference pair can be used: kept 0 of 8 pairs; dropped: "
        "7 × a value is missing (null) (row 0, 1, 2, 3, 4, …); "
        "1 × the two answers are the same (row 7)"
    )


@pytest.mark.parametrize(
    ("rows", "tokenizer", "kwargs", "words"),
    [
        ([PAIR], llama3(None), {}, "no chat template"),
        ([TEXT], llama3(eos_token=None), {}, "no eos token"),
        ([PAIR], llama3(PLAIN, eos_token=None), {}, "no eos token"),
        (
            [PAIR],
            llama3("{{ raise_exception('never') }}"),
            {},
            "cannot render a conversation: never",
        ),
        ([PAIR], chatml(), {"truncation_mode": "middle"}, "keep_start, keep_end, not 'middle'"),
        ([PAIR], chatml(), {"on_bad_row": "skip"}, "drop, raise, not 'skip'"),
        ([PAIR], chatml(), {"max_length": 1}, "at least 2"),
    ],
)
def test_unusable_settings(rows, tokenizer, kwargs, words):
    with pytest.raises(QAdapterError) as caught:
        prepare(rows, tokenizer, **kwargs)
    assert words in str(caught.value)


def test_two_processes_give_the_same():
    rows = [PAIR, {**PAIR, "chosen": None}, {**PAIR, "prompt": turns("Who?")}, PAIR]
    one, two = prepare(rows, chatml()), prepare(rows, chatml(), num_proc=2)
    assert one.dataset.to_list() == two.dataset.to_list()
    assert one.report == two.report


def test_nothing_is_written_to_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}')
    prepare(load_preferences(tmp_path / "a.jsonl"), llama3())
    assert not (tmp_path / "cache").exists()
