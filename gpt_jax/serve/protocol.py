"""What clients send and get, as types: OpenAI's protocol, and the fields that llama.cpp and vLLM add to it.

A field that is not here is refused by its name, unless it is null. Fields that change nothing about an answer are taken
and passed over. The OpenAPI file is made of these types.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gpt_jax.sample.settings import MOST_ALTERNATIVES, MOST_BIASES, MOST_STOP_IDS, MOST_STOPS

MOST_CHOICES, MOST_PROMPTS, MOST_MESSAGES, MOST_TOOLS = 64, 256, 4096, 128
LONGEST_STOP = 1024

Token = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Asked(BaseModel):
    """A request, or a part of one."""

    # Fields that are not known are refused where they are read, by name: so a schema has none.
    model_config = ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, json_schema_extra={"additionalProperties": False}
    )


class Said(BaseModel):
    """An answer, or a part of one. What was not set is not sent."""


class StreamOptions(Asked):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Generation(Asked):
    """The fields that completions and chats have in common."""

    model: str | None = None
    """The name of a served model, see /v1/models; without it, the first of them."""
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31)
    """Draws from the k most probable tokens; 0 and -1: from all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Draws from tokens at least this many times as probable as the most probable one."""
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float = Field(1.0, ge=1e-6, le=1e6)
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]] = Field(
        {}, max_length=MOST_BIASES
    )
    """Numbers to add to the logits of tokens, by their ids."""
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: list[Token] = Field([], max_length=MOST_STOP_IDS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    """The same seed gives the same answer; without it, every answer is another one."""
    user: str | None = None
    """The user, and what follows, is taken, and changes nothing."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None


class CompletionRequest(Generation):
    """A text, or tokens, to go on with; or several."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[list[Token]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    max_tokens: int = Field(16, ge=0)
    """Tokens to generate at most. With echo, 0: the prompt is scored, and nothing is added."""
    echo: bool = False
    """The answer begins with the prompt, and, with `logprobs`, with the log-probabilities of its tokens."""
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    """The log-probabilities of tokens, and of so many of the most probable ones at their places."""
    best_of: Literal[1] | None = None


class ResponseFormat(Asked):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class ChatRequest(Generation):
    """A conversation whose next message is asked for."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """Tokens to generate at most; without it, as many as the context has room for."""
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def offers_tools(self) -> bool:
        """True when the model is shown tools."""
        return bool(self.tools) and self.tool_choice != "none"


class EmbeddingRequest(Asked):
    """Texts or tokens to embed: the mean of the last hidden states of a text's tokens, after the model's last norm."""

    model: str | None = None
    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[list[Token]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class TokenizeRequest(Asked):
    """A text, or a conversation, whose tokens are asked for."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1, max_length=MOST_MESSAGES)
    add_special_tokens: bool = True
    """Of a text: the token that begins every document comes first, if the tokenizer has one."""


class DetokenizeRequest(Asked):
    model: str | None = None
    tokens: list[Token]


class Problem(Said):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Said):
    error: Problem


class PromptDetails(Said):
    cached_tokens: int
    """Tokens of the prompts that had been read before."""


class Usage(Said):
    """Tokens. Those of a prompt count once, however many answers it has; those of answers are all that were drawn, with
    the one that ended the text, and those of a stop string."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class TopLogprob(Said):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Said):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(Said):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


FinishReason = Literal["stop", "length", "tool_calls"]


class CompletionChoice(Said):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(Said):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class FunctionCall(Said):
    name: str | None = None
    arguments: str


class ToolCall(Said):
    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ChatMessage(Said):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Said):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Said):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChunkChoice(Said):
    index: int
    delta: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(Said):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(Said):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    chat: bool
    """True when the model has a chat template."""
    context_length: int


class ModelList(Said):
    object: Literal["list"]
    data: list[ModelCard]


class Embedding(Said):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Said):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class Tokens(Said):
    tokens: list[int]
    count: int
    max_model_len: int


class Text(Said):
    prompt: str


class TokenizerInfo(Said):
    eos_token: str
    bos_token: str | None
    pad_token: str
    chat_template: str | None


class Health(Said):
    status: Literal["ok", "loading", "stopping", "failed"]
