"""`numba-atomflow serve`: OpenAI's protocol, by bare requests and by the clients that people have."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from numba_atomflow import Engine, SamplingParams

pytest.importorskip("starlette", reason="pip install 'numba-atomflow[serve]'")
pytest.importorskip("uvicorn", reason="pip install 'numba-atomflow[serve]'")

from live_server import NAME, Live, events, live_server

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(tiny_checkpoint, backend="cpu", threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine: Engine) -> dict[str, Any]:
    """Greedy replies of 12 tokens, before the server has the engine."""
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    scored = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=2)
    return {
        "logprobs": engine.chat(MESSAGES, scored).finish().logprobs,
        "chat": engine.chat(MESSAGES, params).finish().text,
        "text": engine.generate("Once", params).finish().text,
        "other": engine.generate("Twice", params).finish().text,
    }


@pytest.fixture(scope="module")
def live(engine: Engine, expected: dict[str, Any]) -> Iterator[Live]:
    with live_server(engine) as live:
        yield live


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, "temperature": 0, "max_tokens": 12, "ignore_eos": True} | fields


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Once", "temperature": 0, "max_tokens": 12, "ignore_eos": True} | fields


# --- replies ---------------------------------------------------------------------------------------------------------


def test_a_chat_gets_the_engines_reply(live: Live, expected: dict[str, Any]) -> None:
    answer = live.post("/v1/chat/completions", chat(model=NAME))
    assert answer.status == 200
    (choice,) = answer.body["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected["chat"], "refusal": None}
    assert choice["finish_reason"] == "length"
    usage = answer.body["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12


def test_a_draft_model_changes_no_reply(tiny_checkpoint: Path, expected: dict[str, Any]) -> None:
    with Engine.load(tiny_checkpoint, "cpu", threads=1, draft=tiny_checkpoint) as engine, live_server(engine) as live:
        for _ in range(2):
            answer = live.post("/v1/chat/completions", chat()).body
            assert answer["choices"][0]["message"]["content"] == expected["chat"]
            other = live.post("/v1/completions", completion()).body
            assert expected["text"].endswith(other["choices"][0]["text"])


def test_a_stream_has_the_same_text_and_then_the_usage(live: Live, expected: dict[str, Any]) -> None:
    body = chat(stream=True, stream_options={"include_usage": True})
    answer = live.post("/v1/chat/completions", body)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    *chunks, usage, done = events(answer.body)
    assert done == "[DONE]"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 12)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected["chat"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_completion_continues_texts_and_token_ids(live: Live, expected: dict[str, Any]) -> None:
    ids = live.post("/tokenize", {"prompt": "Once"}).body["tokens"]
    for prompt in ("Once", ids, [ids]):
        answer = live.post("/v1/completions", completion(prompt=prompt))
        assert answer.body["choices"][0]["text"] == expected["text"]
    answer = live.post("/v1/completions", completion(prompt=["Once", "Twice"], echo=True))
    texts = [(choice["index"], choice["text"]) for choice in answer.body["choices"]]
    assert texts == [(0, "Once" + expected["text"]), (1, "Twice" + expected["other"])]
    assert answer.body["usage"]["completion_tokens"] == 24


def test_a_streamed_completion_numbers_its_prompts(live: Live, expected: dict[str, Any]) -> None:
    answer = live.post("/v1/completions", completion(prompt=["Once", "Twice"], stream=True, echo=True))
    texts = {0: "", 1: ""}
    for chunk in events(answer.body)[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "Once" + expected["text"], 1: "Twice" + expected["other"]}


def test_a_stop_string_and_the_context_end_a_reply(live: Live, engine: Engine, expected: dict[str, Any]) -> None:
    stop = expected["text"][3:5]
    answer = live.post("/v1/completions", completion(stop=stop))
    assert answer.body["choices"][0]["text"] == expected["text"].partition(stop)[0]
    assert answer.body["choices"][0]["finish_reason"] == "stop"
    answer = live.post("/v1/completions", completion(prompt="x" * (engine.max_seq_len - 3), max_tokens=100))
    assert answer.body["choices"][0]["finish_reason"] == "length"
    assert answer.body["usage"]["completion_tokens"] == 4


def test_a_seed_repeats_a_reply(live: Live) -> None:
    def reply(seed: int) -> str:
        body = completion(temperature=1, seed=seed, top_k=50, min_p=0.01, repetition_penalty=1.1, top_p=0.95)
        return str(live.post("/v1/completions", body).body["choices"][0]["text"])

    assert reply(-7) == reply(-7) != reply(8)


def test_what_the_kv_cache_holds_is_not_computed_again(live: Live) -> None:
    first = live.post("/v1/completions", completion(prompt="a new beginning"))
    again = live.post("/v1/completions", completion(prompt="a new beginning"))
    tokens = again.body["usage"]["prompt_tokens"]
    assert first.body["usage"]["prompt_tokens_details"]["cached_tokens"] < tokens - 1
    assert again.body["usage"]["prompt_tokens_details"]["cached_tokens"] == tokens - 1


def test_text_and_tokens_are_the_models(live: Live, engine: Engine) -> None:
    tokens = live.post("/tokenize", {"prompt": "Hello"}).body
    assert tokens == {"tokens": engine.text.encode("Hello"), "count": 5, "max_model_len": engine.max_seq_len}
    assert live.post("/detokenize", {"tokens": tokens["tokens"]}).body == {"prompt": "Hello"}
    assert live.post("/tokenize", {"messages": MESSAGES}).body["tokens"] == engine.text.encode_chat(MESSAGES)


def test_models_health_and_metrics(live: Live) -> None:
    assert live.get("/health").body == {"status": "ok"}
    (model,) = live.get("/v1/models").body["data"]
    assert (model["id"], live.get("/v1/models/tiny").body) == (NAME, model)
    before = live.metric("atomflow_generated_tokens_total")
    live.post("/v1/completions", completion())
    assert live.metric("atomflow_generated_tokens_total") == before + 12
    assert live.metric("atomflow_waiting_requests") == 0


# --- log-probabilities ------------------------------------------------------------------------------------------------


def test_a_chats_logprobs_are_the_engines(live: Live, expected: dict[str, Any]) -> None:
    body = chat(logprobs=True, top_logprobs=2)
    content = live.post("/v1/chat/completions", body).body["choices"][0]["logprobs"]["content"]
    assert [item["logprob"] for item in content] == [item.logprob for item in expected["logprobs"]]
    assert [len(item["top_logprobs"]) for item in content] == [2] * 12
    for item in content:  # greedy
        assert item["top_logprobs"][0] == {key: item[key] for key in ("token", "logprob", "bytes")}
    assert bytes(byte for item in content for byte in item["bytes"]).decode(errors="replace") == expected["chat"]
    streamed = events(live.post("/v1/chat/completions", body | {"stream": True}).body)[:-1]
    parts = [chunk["choices"][0]["logprobs"] for chunk in streamed]
    again = [item for part in parts if part for item in part["content"]]
    assert [item["token"] for item in again] == [item["token"] for item in content]
    logprobs = [item["logprob"] for item in content]
    assert [item["logprob"] for item in again] == pytest.approx(logprobs, abs=1e-4)  # a prefix hit: other last bits
    assert live.post("/v1/chat/completions", chat(top_logprobs=2)).status == 400


def test_an_echoed_prompt_is_scored(live: Live, engine: Engine) -> None:
    ids = live.post("/tokenize", {"prompt": "Once upon"}).body["tokens"]
    body = completion(prompt=[ids], echo=True, logprobs=1, max_tokens=1)
    (choice,) = live.post("/v1/completions", body).body["choices"]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(ids) + 1
    assert "".join(logprobs["tokens"][:-1]) == "Once upon"
    assert logprobs["text_offset"] == list(range(len(ids) + 1))
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    columns = [logprobs[key][1:] for key in ("tokens", "token_logprobs", "top_logprobs")]
    for token, logprob, top in zip(*columns, strict=True):
        assert top[token] == logprob <= max(top.values())
    only = live.post("/v1/completions", body | {"max_tokens": 0}).body
    assert only["choices"][0]["text"] == "Once upon"
    assert only["choices"][0]["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:-1]
    assert only["usage"]["completion_tokens"] == 0
    streamed = events(live.post("/v1/completions", body | {"stream": True}).body)[:-1]
    parts = [chunk["choices"][0]["logprobs"] for chunk in streamed]
    assert [value for part in parts if part for value in part["token_logprobs"]] == logprobs["token_logprobs"]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"n": 2}, 400, "n is not supported by this server; leave it out or give 1."),
        ({"presence_penalty": 0.5}, 400, "presence_penalty is not supported"),
        ({"logit_bias": {"5": 10}}, 400, "logit_bias is not supported"),
        ({"frobnicate": 1}, 400, "Unrecognized request argument supplied: 'frobnicate'."),
        ({"temperature": 3}, 400, "temperature is 3"),
        ({"temperature": "hot"}, 400, "temperature is 'hot'; it must be a valid number."),
        ({"max_tokens": -1}, 400, "max_tokens is -1"),
        ({"stop": [1]}, 400, "stop.0 is 1; it must be a valid string."),
        ({"stop": [""]}, 400, "stop holds an empty string"),
        ({"stop": ["a"] * 65}, 400, "stop holds 65 texts; give at most 64."),
        ({"stop": "a" * 1025}, 400, "stop holds a text of 1025 characters; give at most 1024."),
        ({"stop": ["a", "b" * 1025]}, 400, "stop holds a text of 1025 characters; give at most 1024."),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type is 'xml'; it must be one of 'text', "),
        ({"response_format": {}}, 400, "The field response_format.type is missing."),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options is for streams"),
        ({"model": "gpt-4o"}, 404, "The model 'gpt-4o' does not exist here"),
        ({"messages": []}, 400, "The chat has no messages"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, 400, "unknown role 'wizard'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "of type 'image_url'"),
        ({"messages": "Hello"}, 400, "messages is 'Hello'"),
        (
            {"messages": [{"role": "user", "content": "x" * 600}]},
            400,
            "tokens, but the context of this server holds 512; shorten the messages.",
        ),
        ({"chat_template_kwargs": {"messages": 1}}, 400, "reserved"),
    ],
)
def test_what_is_wrong_is_said_in_openais_shape(live: Live, fields: dict[str, Any], status: int, words: str) -> None:
    answer = live.post("/v1/chat/completions", chat(**fields))
    assert answer.status == status, answer.body
    error = answer.body["error"]
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert error["message"].endswith(".")


def test_neutral_values_and_hints_are_accepted(live: Live, expected: dict[str, Any]) -> None:
    body = chat(
        n=1, presence_penalty=0, frequency_penalty=0.0, logit_bias={}, user="me", metadata={"a": "b"}, seed=None
    )
    answer = live.post("/v1/chat/completions", body)
    assert answer.body["choices"][0]["message"]["content"] == expected["chat"]


def test_messages_may_have_parts_and_a_developer(live: Live) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    same = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    answers = [live.post("/v1/chat/completions", chat(messages=given)) for given in (messages, same)]
    assert answers[0].body["choices"] == answers[1].body["choices"]


# --- clients ---------------------------------------------------------------------------------------------------------


def test_openais_client(live: Live, expected: dict[str, Any]) -> None:
    openai = pytest.importorskip("openai", reason="pip install openai")
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [NAME]
        fields: dict[str, Any] = {"model": NAME, "temperature": 0, "extra_body": {"ignore_eos": True}}
        reply = client.chat.completions.create(messages=MESSAGES, max_completion_tokens=12, **fields)
        assert reply.choices[0].message.content == expected["chat"]
        stream = client.chat.completions.create(
            messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True}, **fields
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected["chat"]
        assert chunks[-1].usage.completion_tokens == 12
        stop = expected["chat"][4:6]
        with client.chat.completions.stream(messages=MESSAGES, max_tokens=12, stop=stop, **fields) as helper:
            whole = expected["chat"].partition(stop)[0]
            assert helper.get_final_completion().choices[0].message.content == whole
        reply = client.completions.create(prompt="Once", max_tokens=12, **fields)
        assert reply.choices[0].text == expected["text"]
        with pytest.raises(openai.NotFoundError, match="does not exist here"):
            client.chat.completions.create(messages=MESSAGES, model="gpt-4o")
        with pytest.raises(openai.BadRequestError, match="n is not supported"):
            client.chat.completions.create(messages=MESSAGES, model=NAME, n=2)


def test_langchains_client(live: Live, expected: dict[str, Any]) -> None:
    langchain_openai = pytest.importorskip("langchain_openai", reason="pip install langchain-openai")
    model = langchain_openai.ChatOpenAI(
        model=NAME, base_url=f"{live.url}/v1", api_key="none", temperature=0, max_tokens=12, max_retries=0,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert model.invoke("Hello").content == expected["chat"]
    assert "".join(str(chunk.content) for chunk in model.stream("Hello")) == expected["chat"]
