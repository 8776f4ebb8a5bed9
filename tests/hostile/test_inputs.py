"""Generated inputs in small: each is read, or refused in one line. ``make endurance`` has more."""

import itertools

import pytest
from data.tiny import chatml
from hostile.inputs import configuration, configurations, data_file, data_files

from qadapter.commands import options, train
from qadapter.compare.reading import read_config
from qadapter.data import load_preferences, read_prompts, read_texts, tokenize_preferences
from qadapter.data.encoding import PromptEncoder
from qadapter.errors import QAdapterError
from qadapter.evaluation.judges.endpoint_prompt import JudgePrompt


@pytest.fixture(scope="module")
def tokenizer():
    return chatml()


def read(hostile, path, tokenizer):
    """As the command in `argv` does before it loads a model."""
    given = dict(itertools.pairwise(hostile.argv))
    if hostile.argv[0] == "train":
        pairs = load_preferences(path, domain=given.get("--domain"))
        return tokenize_preferences(pairs, tokenizer).dataset
    if hostile.argv[0] == "eval":
        return read_texts(str(path))
    return [PromptEncoder(tokenizer)(prompt) for prompt in read_prompts(str(path))]


@pytest.mark.parametrize("start", range(0, 160, 40))
def test_data_files(tmp_path, tokenizer, start):
    seen = {"read": 0, "refused": 0}
    for seed in range(start, start + 40):
        hostile = data_file(seed)
        path = tmp_path / hostile.name
        path.write_bytes(hostile.data)
        try:
            found = read(hostile, path, tokenizer)
        except QAdapterError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 1500, seed
            seen["refused"] += 1
        else:
            assert len(found), seed
            seen["read"] += 1
        path.unlink()
    assert all(seen.values())  # neither are all broken nor none


def settle(hostile, path):
    """As the command does with its options and files, before it reads any data."""
    if hostile.argv[0] == "judge":
        return JudgePrompt.read(path)
    if hostile.argv[0] == "compare":
        return read_config(path)
    known = options.options(
        train.GROUPS, defaults=train.DEFAULTS, helps=train.HELPS, without=train.WITHOUT
    )
    values = {"output_dir": str(path.parent)}
    if "--config" in hostile.argv:
        values |= options.read_config(path, known)
    else:
        name, _, text = hostile.argv[-1].removeprefix("--").partition("=")
        values[name] = known[name].convert(text, name)
    classes = list(dict.fromkeys(group.arguments for group in train.GROUPS))
    _, script, config, _ = options.build(classes, known, values)
    script.load_kwargs()
    return config


@pytest.mark.parametrize("start", range(0, 240, 60))
def test_configurations(tmp_path, start):
    seen = {"read": 0, "refused": 0}
    for seed in range(start, start + 60):
        hostile = configuration(seed)
        path = tmp_path / hostile.name
        path.write_bytes(hostile.data)
        try:
            settle(hostile, path)
        except QAdapterError as error:
            assert len(str(error)) < 2200, seed
            seen["refused"] += 1
        else:
            seen["read"] += 1
    assert all(seen.values())


def test_a_seed_gives_its_input_alone():
    assert [data_file(seed) for seed in range(30, 40)] == list(itertools.islice(data_files(30), 10))
    assert len({hostile.data for hostile in itertools.islice(configurations(0), 50)}) > 20
