"""One conversation in the forms that files hold it in, and what of it reaches the template."""

import json

import chat_templates as templates
import pytest
from datasets import Dataset
from tiny import LLAMA3, STRICT, llama3, turns

from qadapter.data import PlainText, PromptEncoder, as_preferences, prompt_of, tokenize_preferences
from qadapter.data.chat import ChatTemplate, Lost
from qadapter.data.messages import normal_messages
from qadapter.data.report import BadRow
from qadapter.errors import QAdapterError

ASKED = turns("What color is the sky?")
BLUE, RED = (turns(text, first="assistant") for text in ("It is blue.", "It is red."))
PAIR = {"prompt": ASKED, "chosen": BLUE, "rejected": RED}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "look", "description": "out of the window",
                                           "parameters": {"type": "object", "properties": {}}}}]


def called(arguments, **more):
    function = {"name": "look"} | ({} if arguments is ... else {"arguments": arguments})
    return {"role": "assistant", "content": "", "tool_calls": [{"function": function}], **more}


def prepare(row, template, **kwargs):
    return tokenize_preferences([{**PAIR, **row}], llama3(template), max_length=None, **kwargs)


def tokens(row, template):
    [found] = prepare(row, template).dataset
    return {name: found[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")}


# --- one form -----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
@pytest.mark.parametrize("arrow", [False, True])
def test_lists_of_text_parts_are_their_text(kind, arrow):
    def parts(message):
        half = len(message["content"]) // 2
        texts = message["content"][:half], message["content"][half:]
        return {**message, "content": [{"type": kind, "text": text} for text in texts]}

    rows = [{name: list(map(parts, messages)) for name, messages in PAIR.items()}]
    found = as_preferences(Dataset.from_list(rows) if arrow else rows)
    assert found.to_list() == as_preferences([PAIR]).to_list()
    encode = PromptEncoder(llama3())
    assert encode(rows[0]["prompt"]) == encode(ASKED)


@pytest.mark.parametrize("part", [
    {"type": "image_url", "image_url": {"url": "x"}}, {"type": "image"},
    {"type": "input_audio", "input_audio": {}},
])
def test_parts_that_are_no_text_are_named(part):
    prompt = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}]
    [row] = as_preferences([{**PAIR, "prompt": prompt}])
    assert row["problem"] == f"not_text: prompt[0] holds a part of type {part['type']!r}"
    with pytest.raises(QAdapterError, match=f"something other than text .*{part['type']}"):
        PromptEncoder(llama3())(prompt)


@pytest.mark.parametrize("template", [templates.TOOLS, templates.ARGUMENTS_AS_TEXT])
@pytest.mark.parametrize("form", [
    lambda call: call | {"arguments": json.dumps(call["arguments"])},
    lambda call: call | {"arguments": json.dumps(call["arguments"], indent=2)},
])
def test_arguments_have_the_same_tokens_as_an_object_and_as_json(template, form):
    def row(change):
        def call(city):
            function = change({"name": "look", "arguments": {"city": city, "days": [1, None]}})
            return [{"role": "assistant", "content": "", "tool_calls": [{"function": function}]}]

        asked = [*ASKED, *call("Rome"), {"role": "tool", "content": "blue"}]
        return {"prompt": asked, "chosen": call("Oslo"), "rejected": call("Bern")}

    expected = tokens(row(lambda call: call), template)
    assert tokens(row(form), template) == expected
    assert '"city": "Oslo"' in llama3().decode(expected["chosen"])
    encode = PromptEncoder(llama3(template))
    assert encode(row(form)["prompt"]) == expected["prompt"]


@pytest.mark.parametrize("empty", ["", " ", None, {}, "{}", ...])
def test_no_arguments_are_an_empty_object(empty):
    [message] = normal_messages([called(empty)], "chosen")
    assert message["tool_calls"] == [
        {"type": "function", "function": {"name": "look", "arguments": {}}}
    ]


@pytest.mark.parametrize("arguments", ["{", "[1]", '"{}"', "Rome", 5, ["Rome"]])
def test_arguments_that_are_no_object_are_named(arguments):
    with pytest.raises(BadRow, match="arguments of the tool call 'look' are no"):
        normal_messages([*ASKED, called(arguments)], "chosen")


def test_other_forms_of_a_call_are_the_same_call():
    expected = normal_messages([called({"city": "Rome"}), {"role": "tool", "content": "x"}], "a")
    flat = {"role": "assistant", "content": "",
            "tool_calls": [{"name": "look", "arguments": {"city": "Rome"}}]}
    text = {**flat, "tool_calls": json.dumps(flat["tool_calls"])}
    older = {"role": "assistant", "content": "",
             "function_call": {"name": "look", "arguments": '{"city": "Rome"}'}}
    for call, role in ((flat, "tool"), (text, "tool"), (older, "function")):
        assert normal_messages([call, {"role": role, "content": "x"}], "a") == expected


def test_no_calls_are_none():
    plain = [{"role": "assistant", "content": "x"}]
    assert normal_messages([{**plain[0], "tool_calls": []}], "a") == plain
    assert normal_messages([{**plain[0], "tool_calls": None}], "a") == plain


def test_a_call_needs_no_content_where_a_template_takes_none():
    for content in ({}, {"content": None}):
        message = {k: v for k, v in called({"city": "Rome"}).items() if k != "content"} | content
        assert tokens({"chosen": [message]}, templates.TOOLS) == tokens(
            {"chosen": [called({"city": "Rome"})]}, templates.TOOLS
        )


# --- what reaches the template ------------------------------------------------------------------

def test_answers_whose_calls_a_template_drops_are_dropped():
    answer = [called({"city": "Rome"}), {"role": "tool", "content": "blue"}, *BLUE]
    for row in ({"chosen": answer}, {"rejected": [called({"city": "Rome"})]}):
        with pytest.raises(QAdapterError, match="leaves out part of an answer"):
            prepare(row, templates.CONTENT_ALONE, on_bad_row="raise")


@pytest.mark.parametrize(("prompt", "more"), [
    ([*ASKED, called({"city": "Rome"}), {"role": "tool", "content": "blue"}], {}),
    (ASKED, {"tools": TOOLS}),
])
def test_what_a_template_drops_of_a_prompt_is_noted(prompt, more):
    kept = prepare({"prompt": prompt, **more}, templates.TOOLS).report
    assert not kept.notes
    noted = prepare({"prompt": prompt, **more}, templates.CONTENT_ALONE).report
    assert noted.notes == {"prompt_left_out": 1} and noted.kept == 1
    lost = PromptEncoder(llama3(templates.CONTENT_ALONE)).lost({"prompt": prompt, **more})
    assert [x.what for x in lost] == ["tools" if more else "tool calls"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_a_template_does_not_know_is_noted(name):
    chosen = [{**BLUE[0], name: "I look up."}]
    assert prepare({"chosen": chosen}, LLAMA3).report.notes == {"reasoning_left_out": 1}


def test_a_role_that_a_template_passes_over_is_told_of():
    template = LLAMA3.replace("in messages", "in messages if message.role != 'critic'")
    asked = [{"role": "critic", "content": "Be brief."}, *ASKED]
    assert prepare({"prompt": asked}, template).report.notes == {"prompt_left_out": 1}
    assert not prepare({"prompt": asked}, LLAMA3).report.notes


@pytest.mark.parametrize("passed_over", ["in messages if message.role != 'developer'",
                                         "in messages | rejectattr('role', 'eq', 'developer')"])
def test_a_developer_is_the_system_where_a_template_knows_no_other(passed_over):
    asked = [{"role": "developer", "content": "Be brief."}, *ASKED]
    template = LLAMA3.replace("in messages", passed_over)
    assert tokens({"prompt": asked}, template) == tokens({"prompt": [SYSTEM, *ASKED]}, LLAMA3)
    assert "developer" in llama3().decode(tokens({"prompt": asked}, LLAMA3)["prompt"])


@pytest.mark.parametrize("template", [templates.PARTS, templates.MIXED_PARTS])
def test_templates_that_look_into_lists_of_parts_alone_get_them(template):
    row = {"prompt": [SYSTEM, *ASKED]}
    result = prepare(row, template)
    text = llama3().decode(result.dataset[0]["prompt_ids"] + result.dataset[0]["chosen_ids"])
    for part in ("Be brief.", "What color is the sky?", "It is blue.<|eot|>"):
        assert part in text
    assert not result.report.notes and result.report.end_of_turn == "<|eot|>"


def test_shapes_are_tried_once():
    tokenizer = llama3(templates.PARTS)
    chat, renderings = ChatTemplate(tokenizer), []
    render = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *args, **kwargs: renderings.append(1) or render(
        *args, **kwargs
    )
    for text in ("a", "b", "c"):
        chat.render(turns(text), {}, ask=True)
    assert len(renderings) == 3 + 2  # as text, and as parts
    assert chat.lost([*turns("a"), called({"city": "Rome"})], {}) == (Lost("tool calls", 1),)


@pytest.mark.parametrize("name", ["add_generation_prompt", "tokenize", "chat_template"])
def test_keywords_that_say_how_to_render_are_refused(name):
    with pytest.raises(QAdapterError, match=f"chat_template_kwargs can't set '{name}'"):
        prepare({"chat_template_kwargs": {name: True}}, LLAMA3, on_bad_row="raise")


def test_documents_reach_the_template():
    template = "{{ documents[0].text if documents else '' }}" + LLAMA3
    row = {"chat_template_kwargs": {"documents": [{"title": "a", "text": "It rains."}]}}
    assert "It rains." in llama3().decode(tokens(row, template)["prompt"])


# --- the same prompt for every use --------------------------------------------------------------

@pytest.mark.parametrize(("row", "template"), [
    ({}, LLAMA3),
    ({"prompt": [SYSTEM, *ASKED]}, LLAMA3),
    ({"tools": TOOLS}, templates.TOOLS),
    ({"tools": json.dumps(TOOLS)}, templates.TOOLS),
    ({"chat_template_kwargs": {"style": "brief"}, "tools": TOOLS}, STRICT),
    ({"prompt": [*ASKED, called('{"city": "Rome"}'), {"role": "tool", "content": "x"}]},
     templates.ARGUMENTS_AS_TEXT),
    ({"prompt": [*ASKED, {"role": "assistant", "content": "It"}]}, LLAMA3),
    ({"prompt": "What color is the sky?", "chosen": " It is blue.", "rejected": " It is red."},
     LLAMA3),
    ({"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8]}, LLAMA3),
])
def test_prompts_are_those_trained_on(row, template):
    row = row if "prompt_ids" in row else PAIR | row
    tokenizer = llama3(template)
    pairs = as_preferences([row])
    [trained] = tokenize_preferences(pairs, tokenizer).dataset
    assert PromptEncoder(tokenizer)(prompt_of(pairs[0])) == trained["prompt_ids"]


def test_a_string_is_a_users_turn_unless_it_is_plain_text():
    encode = PromptEncoder(llama3())
    assert encode("Hot?") == encode(turns("Hot?")) == encode({"prompt": "Hot?"})
    assert encode(PlainText("Hot?")) == llama3()("Hot?")["input_ids"]


# --- conversations that end with the assistant ----------------------------------------------------

def test_a_prompt_that_ends_with_the_assistant_is_continued_in_that_turn():
    prompt = [*ASKED, {"role": "assistant", "content": "It is"}]
    row = {"prompt": prompt, "chosen": turns(" blue.", first="assistant"),
           "rejected": turns(" red.", first="assistant")}
    for template in (LLAMA3, templates.THOUGHTS_OF_THE_LAST, templates.CHANNELS, templates.PARTS):
        got = tokens(row, template)
        whole = tokens({**PAIR, "chosen": BLUE, "rejected": RED}, template)
        for side in ("chosen", "rejected"):
            assert got["prompt"] + got[side] == whole["prompt"] + whole[side]
        assert llama3().decode(got["prompt"]).endswith("It is")
        assert PromptEncoder(llama3(template))(prompt) == got["prompt"]


def test_a_continued_turn_with_others_behind_it():
    row = {"prompt": [*ASKED, {"role": "assistant", "content": "It is"}],
           "chosen": turns(" blue.", "Sure?", "Yes.", first="assistant"),
           "rejected": turns(" red.", first="assistant")}
    result = prepare(row, LLAMA3)
    [found] = result.dataset
    own = [i for i, x in zip(found["chosen_ids"], found["chosen_mask"], strict=True) if x]
    assert llama3().decode(own) == " blue.<|eot|>Yes.<|eot|>"


def test_a_prompt_that_ends_with_a_call_is_refused():
    prompt = [*ASKED, called({"city": "Rome"})]
    with pytest.raises(QAdapterError, match="ends with the assistant's tool call"):
        PromptEncoder(llama3(templates.TOOLS))(prompt)
    with pytest.raises(QAdapterError, match="ends with the assistant's tool call"):
        prepare({"prompt": prompt}, templates.TOOLS, on_bad_row="raise")


def test_shared_turns_of_the_assistant_stay_turns():
    """Without a prompt column: none is continued in the turn after it."""
    shared = [*ASKED, {"role": "assistant", "content": "Hm."}]
    pair = {"chosen": shared + BLUE, "rejected": shared + RED}
    [row] = as_preferences([pair])
    assert row["prompt"] == ASKED and row["chosen"] == shared[1:] + BLUE


# --- tokenizers ---------------------------------------------------------------------------------

def test_a_vocabulary_without_the_letter_one_probes_with():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "0": 2, "1": 3, "+": 4}))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    row = {"prompt": "1 + 0 ", "chosen": "1", "rejected": "0"}
    [found] = tokenize_preferences([row], tokenizer).dataset
    assert found["prompt_ids"] == [0, 3, 4, 2] and found["chosen_ids"] == [3, 1]
    assert PromptEncoder(tokenizer)("1 +") == [0, 3, 4]
