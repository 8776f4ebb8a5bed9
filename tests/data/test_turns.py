"""Where the assistant's turns stand, whatever the template does to earlier ones."""

import importlib.util
import itertools
from pathlib import Path

import chat_templates as templates
import pytest
from tiny import CHATML, LLAMA3, PLAIN, llama3, turns

from qadapter.data import tokenize_preferences
from qadapter.data.chat import ChatTemplate
from qadapter.data.tokens import token_ids
from qadapter.data.turns import _Rendering, common_prefix
from qadapter.errors import QAdapterError

ASKED = turns("What color is the sky?")
ENDS = {
    "qwen": (templates.THOUGHTS_OF_THE_LAST, "<|eot|>", "<|eot|>"),
    "deepseek": (templates.THOUGHTS_BEGUN, "<|eot|>", "<|eot|>"),
    "phi": (templates.END_OF_TEXT, "<|eot|>", "<|eot|>"),
    "gpt-oss": (templates.CHANNELS, "<|eot|>", "<|end|>"),
    "glm": (templates.NO_END, "", "<|end|>"),
    "parts": (templates.PARTS, "<|eot|>", "<|eot|>"),
    "llama": (LLAMA3, "<|eot|>", "<|eot|>"),
    "words": (PLAIN, "", "<|end|>"),
}


def prepare(row, template, **kwargs):
    rejected = [{"role": "assistant", "content": "Green, I think."}]
    return tokenize_preferences([{"rejected": rejected, **row}], llama3(template), **kwargs)


def scored(result, side="chosen"):
    """The stretches of an answer that are learned, as text."""
    row, tokenizer = result.dataset[0], llama3()
    ids = row[f"{side}_ids"]
    mask = row.get(f"{side}_mask") or [True] * len(ids)
    stretches = itertools.groupby(zip(ids, mask, strict=True), key=lambda x: x[1])
    return [tokenizer.decode([i for i, _ in pairs]) for own, pairs in stretches if own]


def call(city, text="", name="look"):
    function = {"name": name, "arguments": {"city": city}}
    return {"role": "assistant", "content": text, "tool_calls": [{"function": function}]}


def reply(text):
    return {"role": "tool", "content": text}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("texts", [
    ("Blue.", "Sure?", "Very."),
    ("Blue.", "Sure?", "No.", "So?", "Never."),
    ("blue", "blue", "blue"),
    ("What color is the sky?", "What color is the sky?", "What color is the sky?"),
    ("assistant", "user", "<|header|"),
])
def test_turns_are_found_whatever_became_of_earlier_ones(name, texts):
    template, middle, last = ENDS[name]
    found = scored(prepare({"prompt": ASKED, "chosen": turns(*texts, first="assistant")}, template))
    own = texts[::2]
    assert len(found) == len(own)
    for text, stretch, end in zip(own, found, [middle] * (len(own) - 1) + [last], strict=True):
        assert stretch.endswith(text + end)
        assert "user" not in stretch.removesuffix(text + end)


def test_scaffolding_that_the_model_writes_is_scored_and_what_it_is_given_is_not():
    row = {"prompt": ASKED, "chosen": turns("Blue.", "Sure?", "Very.", first="assistant")}
    assert scored(prepare(row, templates.CHANNELS)) == [
        " final<|end_header|>Blue.<|eot|>", " final<|end_header|>Very.<|end|>"
    ]
    assert scored(prepare(row, templates.THOUGHTS_OF_THE_LAST)) == [
        "Blue.<|eot|>", "<think></think>Very.<|eot|>"
    ]
    assert scored(prepare(row, templates.THOUGHTS_BEGUN)) == ["Blue.<|eot|>", "Very.<|eot|>"]


def test_the_masks_are_those_of_templates_that_mark_what_is_generated():
    tokenizer = llama3(templates.MARKED)
    messages = turns("Hi?", "Blue.", "Sure?", "blue", "blue", "Very.")
    chosen = messages[1:]
    rejected = turns("Never.", first="assistant")
    [row] = tokenize_preferences(
        [{"prompt": messages[:1], "chosen": chosen, "rejected": rejected}], tokenizer
    ).dataset
    theirs = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert row["prompt_ids"] + row["chosen_ids"] == theirs["input_ids"]
    ours = [False] * len(row["prompt_ids"]) + row["chosen_mask"]
    assert ours == [bool(x) for x in theirs["assistant_masks"]]


def test_thoughts_that_a_template_drops_are_told_of():
    chosen = turns("<think>hm</think>Blue.", "Sure?", "<think>well</think>Very.", first="assistant")
    result = prepare({"prompt": ASKED, "chosen": chosen}, templates.THOUGHTS_OF_THE_LAST)
    assert scored(result) == ["Blue.<|eot|>", "<think>well</think>Very.<|eot|>"]
    assert result.report.notes == {"turn_rewritten": 1}


def test_a_prompt_whose_thoughts_are_gone_once_it_is_answered():
    """Earlier thoughts in the prompt are dropped with the next question, not with the answer."""
    history = turns("Hi?", "<think>hm</think>Yes.")
    asked = [*history, *turns("So?")]
    result = prepare(
        {"prompt": asked, "chosen": turns("Blue.", "Sure?", "Very.", first="assistant"),
         "rejected": turns("Red.", "Sure?", "Never.", first="assistant")},
        templates.THOUGHTS_OF_THE_LAST,
    )
    assert scored(result)[0] == "Blue.<|eot|>" and scored(result, "rejected")[0] == "Red.<|eot|>"


def test_answers_that_begin_alike_are_scored_from_their_start():
    row = {"chosen": turns("I think so.", "Sure?", "Yes.", first="assistant"),
           "rejected": turns("I think so.", "Sure?", "No.", first="assistant"), "prompt": ASKED}
    for side, last in (("chosen", "Yes."), ("rejected", "No.")):
        found = scored(prepare(row, templates.THOUGHTS_BEGUN), side)
        assert found == ["I think so.<|eot|>", f"{last}<|eot|>"]


def test_tool_calls_and_their_replies():
    answer = [call("Rome"), reply("Rome: blue"), {"role": "assistant", "content": "Blue."}]
    row = {"prompt": ASKED, "chosen": answer}
    assert scored(prepare(row, templates.TOOLS)) == [
        '<call>{"name": "look", "arguments": {"city": "Rome"}}</call><|eot|>', "Blue.<|eot|>"
    ]
    # Its end of turn is another than an answer's, and its name stands in the reply too.
    assert scored(prepare(row, templates.CHANNELS)) == [
        ' to=look<|end_header|>{"city": "Rome"}<|pad|>', " final<|end_header|>Blue.<|end|>"
    ]
    ends_in_a_call = {"prompt": ASKED, "chosen": [call("Rome")]}
    assert scored(prepare(ends_in_a_call, templates.CHANNELS)) == [
        ' to=look<|end_header|>{"city": "Rome"}<|pad|>'
    ]


def test_empty_turns_are_their_end_of_turn():
    chosen = turns("", "Sure?", "Very.", first="assistant")
    assert scored(prepare({"prompt": ASKED, "chosen": chosen}, CHATML.replace(
        "<|im_end|>", "<|eot|>"
    )))[0] == "<|eot|>"


def test_what_cannot_be_told_apart_is_dropped_with_that_reason():
    answer = [call("Rome", "I look."), reply("Rome: blue"),
              {"role": "assistant", "content": "Blue."}]
    row = {"prompt": ASKED, "chosen": answer}
    told = "row 0: the assistant's turns can't be told apart .*within a turn of the assistant's"
    with pytest.raises(QAdapterError, match=told):
        prepare(row, templates.REPLY_WITHIN, on_bad_row="raise")


@pytest.mark.parametrize("template", [templates.THOUGHTS_OF_THE_LAST, LLAMA3, PLAIN])
@pytest.mark.parametrize("count", [3, 41])
def test_slow_tokenizers_have_no_offsets(template, count, monkeypatch):
    answer = turns(*(f"Blue {i}, I think." for i in range(count)), first="assistant")
    row = {"prompt": ASKED, "chosen": answer, "rejected": turns("Red.", first="assistant")}
    fast = tokenize_preferences([row], llama3(template), max_length=None).dataset[0]

    class Slow(type(llama3())):
        is_fast = False

    slow = llama3(template)
    slow.__class__ = Slow
    read = []
    monkeypatch.setattr(
        "qadapter.data.encoding.token_ids",
        lambda tokenizer, text: read.append(len(text)) or token_ids(tokenizer, text),
    )
    assert tokenize_preferences([row], slow, max_length=None).dataset[0] == fast
    if template != PLAIN:  # without special tokens there are no sections
        assert sum(read) < 8 * len(slow.apply_chat_template([*ASKED, *answer], tokenize=False))


@pytest.mark.parametrize("kind", [str, list])
def test_common_prefix(kind):
    for length in (0, 1, 63, 64, 65, 200, 1000):
        left = kind("ab" * 500)
        for right in (left[:length], left[:length] + kind("x") * 300):
            assert common_prefix(left, right) == common_prefix(right, left) == length


def families():
    """Chat templates of many models, as TRL ships them; none where it is not installed."""
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec else Path("nowhere")
    return sorted(folder.glob("*.jinja"))


@pytest.mark.parametrize("file", families(), ids=lambda file: file.stem)
def test_every_familys_template(file):
    template = file.read_text(encoding="utf-8")
    row = {"prompt": ASKED, "chosen": turns("Blue.", "Sure?", "Very.", first="assistant")}
    found = scored(prepare(row, template, max_length=None))
    assert len(found) == 2
    assert "Blue." in found[0] and "Very." in found[1] and "Sure?" not in "".join(found)
    assert "sky" not in "".join(found)


# --- many turns -----------------------------------------------------------------------------------


def long_answer(count, *, same, tools):
    """An answer of `count` turns, every third of the assistant's a tool call."""
    found = []
    for i in range(count):
        text = "Yes." if same else f"Turn {i} of {count * 7 % (i + 3)}."
        asked = tools and i % 6 == 2 and i < count - 1
        if i % 2 == 0:
            found.append(call("Rome" if same else f"{i}", name="look") if asked else (
                {"role": "assistant", "content": text}
            ))
        else:
            found.append(reply(text) if "tool_calls" in found[-1] else turns(text)[0])
    return found


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("same", [False, True])
def test_many_turns_are_found_as_few_are(name, same, monkeypatch):
    template = ENDS[name][0]
    row = {"prompt": ASKED, "chosen": long_answer(61, same=same, tools=name == "gpt-oss")}
    together = prepare(row, template, max_length=None).dataset[0]
    # One by one, and nothing looked up.
    monkeypatch.setattr("qadapter.data.turns._APART", 10**6)
    original = _Rendering.behind
    monkeypatch.setattr(
        _Rendering, "behind",
        lambda self, *args, **options: self._behind.clear() or original(self, *args, **options),
    )
    assert prepare(row, template, max_length=None).dataset[0] == together


@pytest.mark.parametrize("name", ENDS)
def test_renderings_do_not_grow_with_the_turns(name, monkeypatch):
    counts = []
    for turns_of_it in (41, 161):
        rendered = []
        original = ChatTemplate._apply
        monkeypatch.setattr(
            ChatTemplate, "_apply",
            lambda *args, count=rendered, apply=original, **options: (
                count.append(1) or apply(*args, **options)
            ),
        )
        answer = long_answer(turns_of_it, same=False, tools=name == "gpt-oss")
        prepare({"prompt": ASKED, "chosen": answer}, ENDS[name][0], max_length=None)
        monkeypatch.setattr(ChatTemplate, "_apply", original)
        counts.append(len(rendered))
    assert counts[1] <= counts[0] + 4, counts


@pytest.mark.parametrize("where", [3, 20, 38])
def test_a_text_that_repeats_what_follows_it_is_still_one_turn(where):
    answer = long_answer(41, same=False, tools=False)
    tokenizer = llama3()
    whole = tokenizer.apply_chat_template([*ASKED, *answer], tokenize=False)
    at = whole.index(f"Turn {where + 1} ")
    # As if the next turns stood there twice.
    answer[where]["content"] += whole[at - 40 : at + 600]
    found = scored(prepare({"prompt": ASKED, "chosen": answer}, LLAMA3, max_length=None))
    own = [turn["content"] for turn in answer if turn["role"] == "assistant"]
    assert [text.removesuffix("<|eot|>") for text in found] == own


def test_shapes_that_are_remembered_do_not_add_up(monkeypatch):
    monkeypatch.setattr("qadapter.data.chat._MOST_PLANNED", 50)
    chat = ChatTemplate(llama3())
    for length in range(2, 30):
        chat.render(turns(*["Hot."] * length), {})
        assert sum(len(key[0]) for key in chat._plans) <= 50


def test_many_roles_do_not_multiply_what_is_tried(monkeypatch):
    tried = []
    apply = ChatTemplate._apply
    monkeypatch.setattr(
        ChatTemplate, "_apply", lambda *a, **k: tried.append(1) or apply(*a, **k)
    )
    asked = [{"role": f"role {i}", "content": "Hot?"} for i in range(40)]
    chat = ChatTemplate(llama3("{% for m in messages %}{{ m.role }}{% endfor %}"))
    assert len(chat.lost(asked, {})) == 40 and len(tried) < 10
