"""The server through OpenAI's own client: what it says is what the model generates."""

import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import requests
import torch
from running import ADAPTERS, reference, running, save_adapters, service_of
from tiny_models import batches_continuously

from qadapter.data import load_preferences
from qadapter.data.ends import end_of_turn_ids
from qadapter.evaluation.answers import encode_prompt
from qadapter.serving.preferences import PreferenceFile
from qadapter.trunk.loading import load_tokenizer

pytestmark = batches_continuously
QUESTION = [{"role": "user", "content": "What is blue?"}]
OTHERS = ("What is hot?", "Why green, and why never red?", "A short one", "always maybe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_adapters(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(folder):
    with running(service_of(folder, preferences=PreferenceFile(folder / "new.jsonl"))) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def expected(folder):
    """Greedy text, and its tokens, of a model alone."""
    tokenizer = load_tokenizer(folder / "base")
    found = {name: reference(folder, name) for name in (*ADAPTERS, "base")}

    def of(name, content, strength=None, tokens=12):
        model = found[name]
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": content}])
        ends = end_of_turn_ids(model, tokenizer)
        dial = {} if strength is None else {"strength": strength}
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=ends,
            pad_token_id=0, **dial,
        )[0, len(prompt) :].tolist()
        text = [i for i in ids if i not in ends]
        return tokenizer.decode(
            text, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ), ids

    return of


def ask(client, model, content="What is blue?", strength=None, **fields):
    extra = {} if strength is None else {"extra_body": {"strength": strength}}
    settings = {"temperature": 0, "max_tokens": 12} | fields
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], **settings, **extra
    )


# --- answers ----------------------------------------------------------------------------------


def test_models_are_listed(client):
    found = {model.id: model.qadapter for model in client.models.list()}
    assert list(found) == [*ADAPTERS, "base"]
    assert found["gated"] == {"kind": "adapter", "strength": 1.0, "saves_preferences": True}
    assert found["base"]["kind"] == "base"
    assert client.models.retrieve("block").id == "block"


@pytest.mark.parametrize("strength", [None, 0, 0.5, 2])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_answer_is_the_models_own(client, expected, name, strength):
    answer = ask(client, name, strength=strength)
    text, ids = expected(name, "What is blue?", 1.0 if strength is None else strength)
    [choice] = answer.choices
    assert choice.message.content == text and choice.message.role == "assistant"
    assert choice.finish_reason == ("length" if len(ids) == 12 else "stop")
    assert answer.usage.completion_tokens == len(ids)
    assert answer.model == name


def test_the_base_is_a_model_too_and_the_same_as_strength_0(client, expected):
    text = ask(client, "base").choices[0].message.content
    assert text == expected("base", "What is blue?")[0]
    assert text == ask(client, "low", strength=0).choices[0].message.content
    assert text != ask(client, "low").choices[0].message.content


def test_requests_of_all_models_and_strengths_at_once(client, expected):
    asked = [
        (name, content, strength)
        for name in ADAPTERS for content in OTHERS for strength in (0.0, 0.7, 1.0)
    ]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(
            lambda one: ask(client, one[0], one[1], one[2]).choices[0].message.content, asked
        ))
    assert found == [expected(*one)[0] for one in asked]


def test_a_stream_joins_to_the_answer(client, expected):
    chunks = list(ask(client, "gated", stream=True, stream_options={"include_usage": True}))
    text, ids = expected("gated", "What is blue?", 1.0)
    *pieces, last = chunks
    assert "".join(c.choices[0].delta.content or "" for c in pieces) == text
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")
    assert not last.choices and last.usage.completion_tokens == len(ids)
    assert all(c.object == "chat.completion.chunk" and c.id == last.id for c in chunks)
    assert len(pieces) > 4


def test_completions_continue_plain_text_and_token_ids(client, folder):
    tokenizer, model = load_tokenizer(folder / "base"), reference(folder, "gated")
    ids = tokenizer("What is", add_special_tokens=True).input_ids
    options = {"model": "gated", "temperature": 0, "max_tokens": 5}
    answer = client.completions.create(prompt=["What is", ids, "Why"], n=2, logprobs=2, **options)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert texts[0] == texts[1] == texts[2] == texts[3] and texts[4] == texts[5]
    one = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
    assert texts[0] == tokenizer.decode(one, clean_up_tokenization_spaces=False)
    told = answer.choices[0].logprobs
    assert "".join(told.tokens) == texts[0] and told.text_offset[0] == 0
    assert len(told.token_logprobs) == 5 and all(len(top) <= 2 for top in told.top_logprobs)
    streamed = client.completions.create(prompt="What is", stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == texts[0]
    assert client.completions.create(prompt="What is", model="gated").usage.completion_tokens <= 16


def test_log_probabilities_are_the_policys_own(client, folder, expected):
    tokenizer, model = load_tokenizer(folder / "base"), reference(folder, "low")
    _, ids = expected("low", "What is blue?", 0.5)
    answer = ask(client, "low", strength=0.5, logprobs=True, top_logprobs=3)
    told = answer.choices[0].logprobs.content
    assert len(told) == len(ids) - (answer.choices[0].finish_reason == "stop")
    prompt = encode_prompt(tokenizer, QUESTION)
    ids = prompt + ids
    with torch.no_grad():
        logits = model(torch.tensor([ids]), strength=torch.tensor([0.5])).logits[0]
    logprobs = logits.log_softmax(-1)
    for place, one in enumerate(told, len(prompt) - 1):
        best = logprobs[place].topk(3)
        # Rounding of a few products of size 32, of logits of size 10.
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )
        assert [top.token for top in one.top_logprobs] == [
            tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in best.indices
        ]
        token = tokenizer.decode([ids[place + 1]], clean_up_tokenization_spaces=False)
        assert one.token == token and one.logprob == one.top_logprobs[0].logprob
        assert one.bytes is None or bytes(one.bytes).decode() == token


# --- sampling ---------------------------------------------------------------------------------


def test_a_seed_repeats_whatever_else_is_in_the_batch(client):
    def draw(seed):
        answer = ask(client, "gated", temperature=1.5, seed=seed, n=3, max_tokens=10)
        return [choice.message.content for choice in answer.choices]

    alone = draw(7)
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, [7, 8, 9, 7]))
    assert together[0] == together[3] == alone
    assert together[1] != alone
    assert len({ask(client, "gated", temperature=1.5).choices[0].message.content
                for _ in range(4)}) > 1


def test_top_p_and_top_k_leave_the_likeliest(client):
    greedy = ask(client, "gated").choices[0].message.content
    for fields in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1}}):
        answer = client.chat.completions.create(
            model="gated", messages=QUESTION, temperature=2.0, max_tokens=12, **fields
        )
        assert answer.choices[0].message.content == greedy


def test_stop_texts_end_an_answer_and_are_not_in_it(client, expected):
    text, ids = expected("block", "What is blue?", 1.0, 40)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    wanted = text[: text.index(stop)]
    for stream in (False, True):
        answer = ask(client, "block", stop=["nowhere", stop], max_tokens=40, stream=stream)
        if stream:
            chunks = list(answer)
            found = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            found = answer.choices[0].message.content
            reason = answer.choices[0].finish_reason
            assert answer.usage.completion_tokens < len(ids)
        assert (found, reason) == (wanted, "stop")


# --- what is refused --------------------------------------------------------------------------

GOOD = {"model": "gated", "messages": QUESTION, "max_tokens": 4}


@pytest.mark.parametrize("change, status, param, said", [
    ({"model": "gatd"}, 404, "model", "there is no model 'gatd' here: gated, block"),
    ({"model": 3}, 400, "model", "must be the name of a model"),
    ({"messages": None}, 400, "messages", "missing"),
    ({"messages": []}, 400, "messages", "a list of messages"),
    ({"messages": "hello"}, 400, "messages", "a list of messages"),
    ({"messages": [{"content": "hello"}]}, 400, "messages", "each with a role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", ""),
    ({"strength": -0.1}, 400, "strength", "from 0 to 4"),
    ({"strength": 4.5}, 400, "strength", "from 0 to 4"),
    ({"strength": True}, 400, "strength", "a number"),
    ({"strength": "1"}, 400, "strength", "a number"),
    ({"model": "base", "strength": 1}, 400, "strength", "the dial of an adapter"),
    ({"max_tokens": 0}, 400, "max_tokens", "from 1"),
    ({"max_tokens": 1.5}, 400, "max_tokens", "a whole number"),
    ({"max_completion_tokens": 2000}, 400, "max_tokens", "takes 200 tokens"),
    ({"messages": [{"role": "user", "content": "blue " * 300}]}, 400, "messages", "takes 200"),
    ({"temperature": -1}, 400, "temperature", "from 0"),
    ({"top_p": 0}, 400, "top_p", "above 0"),
    ({"n": 0}, 400, "n", "from 1"),
    ({"n": 17}, 400, "n", "more than the 16"),
    ({"stop": [""]}, 400, "stop", "none of them empty"),
    ({"stop": ["a"] * 17}, 400, "stop", "up to 16"),
    ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "from 0 to 20"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "needs stream"),
    ({"seed": 2**70}, 400, "seed", "a whole number"),
    ({"presence_penalty": 2.5}, 400, "presence_penalty", "from -2 to 2"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", "above 0"),
    ({"min_p": 0.1}, 400, "min_p", "not supported"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
    ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    ({"temprature": 1}, 400, "temprature", "temperature"),
])
def test_what_cant_be_honoured_is_refused_with_its_field(server, change, status, param, said):
    body = {name: value for name, value in (GOOD | change).items()}
    answer = requests.post(server.url + "/v1/chat/completions", json=body, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_what_asks_for_nothing_is_taken(client):
    answer = ask(
        client, "gated", presence_penalty=0, frequency_penalty=0.0, user="me", n=1,
        response_format={"type": "text"}, tools=[], max_completion_tokens=3,
    )
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize("fields, status", [
    ({"data": b"{", "headers": {"content-type": "application/json"}}, 400),
    ({"data": b"\xff", "headers": {"content-type": "application/json"}}, 400),
    ({"data": b"[" * 9000, "headers": {"content-type": "application/json"}}, 400),
    ({"data": b"[1]", "headers": {"content-type": "application/json"}}, 400),
    ({"data": b'{"messages": NaN}', "headers": {"content-type": "application/json"}}, 400),
    ({"data": json.dumps(GOOD), "headers": {"content-type": "text/plain"}}, 415),
    ({"data": json.dumps(GOOD)}, 415),
    ({"json": GOOD | {"user": "x" * 10_000}}, 413),
    ({"json": GOOD, "headers": {"origin": "http://elsewhere.example"}}, 403),
    ({"json": GOOD, "headers": {"origin": "null"}}, 403),
    ({"json": GOOD, "headers": {"host": "elsewhere.example"}}, 403),
    ({"json": GOOD, "headers": {"host": "localhost.elsewhere.example:80"}}, 403),
])
def test_bodies_and_senders_that_are_refused(server, fields, status):
    answer = requests.post(server.url + "/v1/chat/completions", timeout=60, **fields)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "access-control-allow-origin" not in answer.headers


def test_a_body_without_a_length_is_cut_off_where_it_is_too_large(server):
    def parts():
        for _ in range(100):
            yield b" " * 1000

    answer = requests.post(
        server.url + "/v1/chat/completions", data=parts(),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 413


def test_addresses_that_are_not_there(server):
    for method, path, status in (
        ("GET", "/v1/nothing", 404), ("GET", "/docs", 404), ("GET", "/v1/models/none", 404),
        ("GET", "/v1/chat/completions", 405), ("DELETE", "/v1/models", 405),
    ):
        answer = requests.request(method, server.url + path)
        assert answer.status_code == status
        assert "message" in answer.json()["error"]


def test_the_page_is_at_the_root(server):
    answer = requests.get(server.url + "/", headers={"origin": server.url})
    assert answer.status_code == 200 and "<html" in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert requests.get(server.url + "/health").json() == {"status": "ok"}


# --- rewards and preferences ------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
def test_rewards_are_the_adapters_own(server, folder, name):
    from qadapter.evaluation.token_rewards import reward_answers

    body = {"model": name, "messages": QUESTION, "answer": "Yes, blue – ✓."}
    found = requests.post(server.url + "/v1/qadapter/rewards", json=body, timeout=60).json()
    assert "".join(token["text"] for token in found["tokens"]) == body["answer"]
    rewards = [token["reward"] for token in found["tokens"]]
    tokenizer, model = load_tokenizer(folder / "base"), reference(folder, name)
    ids = tokenizer(body["answer"], add_special_tokens=False).input_ids
    assert len(rewards) == len(ids) + 1  # the end of turn
    ids.append(end_of_turn_ids(model, tokenizer)[-1])
    [alone] = reward_answers(model, tokenizer, QUESTION, [ids[:-1]])
    # The last reward depends on whether a token follows.
    assert rewards[: len(ids) - 2] == pytest.approx(alone.rewards[: len(ids) - 2], abs=1e-4)
    assert found["total"] == pytest.approx(sum(rewards), abs=1e-6)
    assert len({round(reward, 6) for reward in rewards}) > 1


@pytest.mark.parametrize("change, said", [
    ({"model": "base"}, "the base"), ({"answer": None}, "missing"), ({"answer": " "}, "text"),
    ({"answer": "blue " * 300}, "takes 200 tokens"), ({"strength": 1}, "unknown field"),
    ({"messages": [{"role": "user", "content": 5}]}, "can't be"),
])
def test_rewards_that_are_refused(server, change, said):
    body = {"model": "gated", "messages": QUESTION, "answer": "Yes."} | change
    answer = requests.post(server.url + "/v1/qadapter/rewards", json=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_pairs_are_appended_as_training_reads_them(server, folder):
    file = folder / "new.jsonl"
    pair = {"prompt": QUESTION, "chosen": "Yes — ✓", "rejected": "No\n<b>"}
    url = server.url + "/v1/qadapter/preferences"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(
            lambda i: requests.post(url, json=pair | {"chosen": f"Yes {i}"}, timeout=60), range(16)
        ))
    assert {answer.status_code for answer in answers} == {200}
    found = load_preferences(str(file))
    assert len(found) == 16 and not any(found["problem"])
    chosen = sorted(row[0]["content"] for row in found["chosen"])
    assert chosen == sorted(f"Yes {i}" for i in range(16))
    for change in ({"chosen": "No\n<b>"}, {"chosen": ""}, {"rejected": 4}, {"prompt": []},
                   {"prompt": "text"}, {"more": 1}):
        assert requests.post(url, json=pair | change).status_code == 400, change
    assert len(file.read_text().splitlines()) == 16


# --- clients that leave, steps that fail --------------------------------------------------------


@contextlib.contextmanager
def slowed(server, seconds=0.02):
    """Inside, steps take so long, and no answer ends by itself; yields one entry for each step."""
    batches, steps = server.service.engine.batches, []
    choose, ends = batches.choose, sorted(server.service.models.by_name["base"].ends)

    def slow(found, logits):
        time.sleep(seconds)
        steps.append(1)
        logits[:, ends] = -torch.inf
        return choose(found, logits)

    batches.choose = slow
    try:
        yield steps
    finally:
        batches.choose = choose


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answers(server, client, stream):
    engine = server.service.engine
    body = {"model": "base", "messages": QUESTION, "n": 3, "stream": stream, "max_tokens": 170,
            "temperature": 1.0, "seed": 1}
    with slowed(server) as steps:
        if stream:
            url = server.url + "/v1/chat/completions"
            with requests.post(url, json=body, stream=True) as answer:
                lines = answer.iter_lines()  # one that is let go closes the connection
                next(lines)
                until(lambda: engine.running)
        else:
            with pytest.raises(requests.ReadTimeout):
                requests.post(server.url + "/v1/chat/completions", json=body, timeout=0.4)
        until(lambda: not engine.running and not engine._reserved)
        before = len(steps)
        time.sleep(0.3)
        assert len(steps) <= before + 1
        assert before < 150
    assert not engine._manager.output_router.result_handlers
    assert ask(client, "gated").choices[0].message.content


def test_a_step_that_fails_ends_its_answers_and_no_others(server, client, expected):
    batches = server.service.engine.batches
    choose = batches.choose

    def failing(*args):
        batches.choose = choose
        raise RuntimeError("no memory, say")

    batches.choose = failing
    with pytest.raises(openai.InternalServerError, match="no memory, say"):
        ask(client, "gated")
    assert ask(client, "gated").choices[0].message.content == expected("gated", "What is blue?")[0]
    batches.choose = failing
    status = server.service.engine._manager.background_thread_status
    ended = status.mark_as_stopped
    status.mark_as_stopped = lambda: (time.sleep(0.5), ended())  # its thread takes a while to end
    with pytest.raises(openai.APIError, match="no memory, say"):
        list(ask(client, "gated", stream=True))
    assert ask(client, "low").choices[0].message.content == expected("low", "What is blue?")[0]


def test_logits_that_are_no_numbers_end_their_answer_alone(server, client, expected):
    batches = server.service.engine.batches
    choose = batches.choose

    def spoiled(found, logits):
        seeds = [None if one is None else one.drawing.sampling.seed for one in found]
        hit = [i for i, seed in enumerate(seeds) if seed == 99]
        logits[hit] = torch.nan
        return choose(found, logits)

    batches.choose = spoiled
    try:
        with ThreadPoolExecutor(4) as pool:
            others = [pool.submit(ask, client, "gated") for _ in range(3)]
            with pytest.raises(openai.InternalServerError, match="not finite"):
                ask(client, "gated", seed=99)
            for other in others:
                assert other.result().choices[0].message.content == expected(
                    "gated", "What is blue?"
                )[0]
    finally:
        batches.choose = choose


def test_more_answers_than_are_written_at_once_are_told_to_wait(server, client):
    with slowed(server):
        waiting = threading.Thread(target=lambda: ask(client, "base", n=14, max_tokens=60))
        waiting.start()
        until(lambda: server.service.engine._reserved == 14)
        with pytest.raises(openai.RateLimitError, match="16 answers at once"):
            ask(client, "gated", n=3)
        assert ask(client, "gated", n=2, max_tokens=1).choices
        waiting.join()
