"""Clients that people use, as they come from PyPI and npm: each finds what it asks for, and is told what is refused."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import httpx
import pydantic
import pytest

from tests.commands import environment
from tests.packaged import npm_installed
from tests.serve.servers import CHAT, HELLO, TOOLS, Running

QUESTION: Any = HELLO
PROMPT = "Once upon a time"


def greedy(server: Running, **body: Any) -> str:
    """What a chat is answered, by plain HTTP."""
    answer = server.post("/v1/chat/completions", messages=HELLO, temperature=0, max_tokens=20, **body)
    return str(answer["choices"][0]["message"]["content"])


class TestOpenAI:
    """The package openai."""

    openai = pytest.importorskip("openai")

    @pytest.fixture
    def client(self, server: Running) -> Any:
        return self.openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def test_models(self, client: Any) -> None:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").context_length == 256

    def test_chats_and_completions(self, client: Any, server: Running) -> None:
        answer = client.chat.completions.create(
            model="tiny", messages=QUESTION, temperature=0, max_completion_tokens=20, logprobs=True, top_logprobs=2
        )
        assert answer.choices[0].message.content == greedy(server)
        assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens == 20
        assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
        assert answer.usage.prompt_tokens == len(CHAT.encode_chat(HELLO))
        text = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=1, echo=True
        )
        assert text.choices[0].text.startswith(PROMPT)
        assert len(text.choices[0].logprobs.tokens) == len(PROMPT) + 5

    def test_streams(self, client: Any, server: Running) -> None:
        stream = client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            temperature=0,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == greedy(server)
        assert chunks[-1].usage.completion_tokens == 20
        text = greedy(server)
        stop = text[8:10]  # An answer that is cut by its length is an error of this one.
        asked: dict[str, Any] = {
            "model": "tiny",
            "messages": QUESTION,
            "temperature": 0,
            "max_tokens": 20,
            "stop": stop,
        }
        with client.chat.completions.stream(**asked) as events:
            answer = events.get_final_completion()
        assert answer.choices[0].message.content == text[: text.index(stop)]

    def test_asynchronously(self, server: Running) -> None:
        async def ask() -> tuple[Any, str]:
            async with self.openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
                asked: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 20}
                answers = await asyncio.gather(*(client.chat.completions.create(**asked) for _ in range(6)))
                stream = await client.chat.completions.create(**asked, stream=True)
                return answers, "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        answers, streamed = asyncio.run(ask())
        assert {answer.choices[0].message.content for answer in answers} == {streamed} == {greedy(server)}

    def test_embeddings(self, client: Any, server: Running) -> None:
        found = client.embeddings.create(model="tiny", input=["one", "two"])  # Asks for base64, and decodes it.
        plain = server.post("/v1/embeddings", input=["one", "two"])
        assert [one.embedding for one in found.data] == [one["embedding"] for one in plain["data"]]

    def test_schemas_and_tools(self, roomy: Running) -> None:
        client = self.openai.OpenAI(base_url=f"{roomy.url}/v1", api_key="none", max_retries=0)

        class Person(pydantic.BaseModel):
            name: Literal["Ann", "Bob"]
            years: Literal[1, 2, 3]

        asked: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "seed": 1}
        answer = client.chat.completions.parse(**asked, response_format=Person)
        assert isinstance(answer.choices[0].message.parsed, Person)
        tools: Any = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
        [call] = client.chat.completions.create(**asked, **tools).choices[0].message.tool_calls
        assert call.function.name in ("weather", "clock")
        with client.chat.completions.stream(**asked, **tools) as events:
            [streamed] = events.get_final_completion().choices[0].message.tool_calls
        assert streamed.function.arguments == call.function.arguments

    def test_errors_are_its_errors(self, client: Any) -> None:
        with pytest.raises(self.openai.NotFoundError, match="there is no model 'other'"):
            client.chat.completions.create(model="other", messages=QUESTION)
        with pytest.raises(self.openai.BadRequestError, match="suffix is not supported") as raised:
            client.completions.create(model="tiny", prompt="a", suffix="b")
        assert raised.value.param == "suffix"


def test_langchain(server: Running) -> None:
    langchain = pytest.importorskip("langchain_openai")
    options: dict[str, Any] = {"base_url": f"{server.url}/v1", "api_key": "none", "model": "tiny", "temperature": 0}
    chat = langchain.ChatOpenAI(**options, max_tokens=20)
    assert chat.invoke(HELLO[0]["content"]).content == greedy(server)
    streamed = "".join(chunk.content for chunk in chat.stream(HELLO[0]["content"]))
    assert streamed == greedy(server)
    answers = chat.batch([HELLO[0]["content"]] * 3)
    assert [answer.usage_metadata["output_tokens"] for answer in answers] == [20] * 3
    vectors = langchain.OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key="none", model="tiny", check_embedding_ctx_length=False
    )
    assert len(vectors.embed_query("one")) == server.engine.model.config.d_model


def test_litellm(server: Running) -> None:
    litellm = pytest.importorskip("litellm")
    options: dict[str, Any] = {"api_base": f"{server.url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 20}
    answer = litellm.completion(model="openai/tiny", messages=HELLO, **options)
    assert answer.choices[0].message.content == greedy(server)
    assert answer.usage.completion_tokens == 20
    stream = litellm.completion(model="openai/tiny", messages=HELLO, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == greedy(server)
    text = litellm.text_completion(model="text-completion-openai/tiny", prompt=PROMPT, **options)
    assert (
        text.choices[0].text
        == server.post("/v1/completions", prompt=PROMPT, max_tokens=20, temperature=0)["choices"][0]["text"]
    )


def test_llm(server: Running, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    model = {"model_id": "mine", "model_name": "tiny", "api_base": f"{server.url}/v1", "api_key_name": "none"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))  # JSON is YAML.
    command = [sys.executable, "-m", "llm", "-m", "mine", "-o", "temperature", "0", "-o", "max_tokens", "20"]
    env = {**environment(), "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    for extra in ([], ["--no-stream"]):
        ran = subprocess.run([*command, *extra, HELLO[0]["content"]], env=env, capture_output=True, check=False)
        assert ran.stdout.decode().rstrip("\n") == greedy(server).rstrip("\n"), ran.stderr.decode()


SCRIPT = """
import OpenAI from "openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText, embed } from "ai";

const baseURL = process.env.BASE_URL, question = process.env.QUESTION;
const client = new OpenAI({ baseURL, apiKey: "none" });
const asked = { model: "tiny", messages: [{ role: "user", content: question }], temperature: 0, max_tokens: 20 };
const whole = await client.chat.completions.create(asked);
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true }))
  streamed += chunk.choices[0]?.delta?.content ?? "";
const refused = await client.chat.completions.create({ ...asked, functions: [] }).catch((e) => [e.status, e.param]);
const { data } = await client.embeddings.create({ model: "tiny", input: "one" });

const provider = createOpenAICompatible({ name: "mine", baseURL, includeUsage: true });
const settings = { model: provider("tiny"), prompt: question, temperature: 0, maxOutputTokens: 20 };
const { text, usage } = await generateText(settings);
let parts = "";
for await (const part of streamText(settings).textStream) parts += part;
const { embedding } = await embed({ model: provider.embeddingModel("tiny"), value: "one" });
console.log(JSON.stringify({
  texts: [whole.choices[0].message.content, streamed, text, parts],
  tokens: [whole.usage.completion_tokens, usage.outputTokens],
  sizes: [data[0].embedding.length, embedding.length],
  refused,
}));
"""


def test_npm(server: Running, pytestconfig: pytest.Config) -> None:
    folder = npm_installed(pytestconfig, "clients", "openai@7.57.0", "ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92")
    script = folder / "clients.mjs"
    script.write_text(SCRIPT)
    env = {**os.environ, "BASE_URL": f"{server.url}/v1", "QUESTION": HELLO[0]["content"]}
    ran = subprocess.run(["node", script], env=env, capture_output=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr.decode()
    found = json.loads(ran.stdout)
    assert found["texts"] == [greedy(server)] * 4
    assert found["tokens"] == [20, 20]
    assert found["sizes"] == [server.engine.model.config.d_model] * 2
    assert found["refused"] == [400, "functions"]


def test_schemas_say_what_is_taken(server: Running) -> None:
    """The OpenAPI file, by which others make clients."""
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    asked = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "stream", "max_completion_tokens", "seed", "logit_bias"} <= asked.keys()
