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


def tried(make, seeds, folder, use):
    """What is made of each input: what ``use`` gives, or its error."""
    found = []
    for seed in seeds:
        hostile = make(seed)
        path = folder / hostile.name
        path.write_bytes(hostile.data)
        try:
            found.append(use(hostile, path))
        except QAdapterError as error:
            found.append(error)
        path.unlink()
    refused = sum(isinstance(one, QAdapterError) for one in found)
    assert 0 < refused < len(found)  # neither are all broken nor none
    return zip(seeds, found, strict=True)


@pytest.mark.parametrize("start", range(0, 160, 40))
def test_data_files(tmp_path, tokenizer, start):
    seeds = range(start, start + 40)
    for seed, found in tried(data_file, seeds, tmp_path, lambda *x: read(*x, tokenizer)):
        if isinstance(found, QAdapterError):
            assert "\n" not in str(found) and len(str(found)) < 1500, seed
        else:
            assert len(found), seed


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
    for seed, found in tried(configuration, range(start, start + 60), tmp_path, settle):
        assert not isinstance(found, QAdapterError) or len(str(found)) < 2200, seed


def test_a_seed_gives_its_input_alone():
    assert [data_file(seed) for seed in range(30, 40)] == list(itertools.islice(data_files(30), 10))
    assert len({hostile.data for hostile in itertools.islice(configurations(0), 50)}) > 20
