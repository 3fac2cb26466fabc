"""Conversations, preferences and problems from records, in the formats in which they are published.

A message is a dict as OpenAI's chat API and the templates of chat models take it: `role` (one of ROLES), `content` (a
text; empty with calls only), and where they are given `name`, `reasoning_content`, `tool_call_id`, `tool_calls`
({"type": "function", "function": {"name", "arguments"}}, the arguments a dict wherever they are one, as most templates
want them), `train` (whether it is learnt, see `learnt`), and what else a template may read. Nulls are left out, since
tables fill them in.

Refused are conversations that no served model would be in: an answer without a question before it, two of the same side
in a row, a result without its call, a call that goes on without its result. Where system messages stand is left to the
template, and so are messages after the last answer.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from gpt_jax.data.records import OnBroken, Record, RecordError, fail
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.chat_template import ROLES

Format = Literal["text", "chat", "completion", "preference", "problem"]
Message = dict[str, Any]

SIGNS: tuple[tuple[Format, tuple[str, ...]], ...] = (
    ("preference", ("chosen", "rejected")),
    ("chat", ("messages",)),
    ("chat", ("conversations",)),
    ("chat", ("instruction", "output")),
    ("completion", ("prompt", "completion")),
    ("text", ("text",)),
)
"""The fields that say which format a record has. One with none of them but a `prompt` or a `question` is a problem."""

ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Names that roles have in ShareGPT's format and its relatives."""

FOLLOWS = {"": "user", "user": "assistant", "assistant": "user", "tool": "assistant"}
"""The role after each, system messages and the results of calls apart; after nothing, the first."""

TURN = re.compile(r"\n\n(Human|Assistant):")  # In the transcripts of Anthropic's HH.


class Conversation(NamedTuple):
    """Messages with an answer to learn."""

    messages: tuple[Message, ...]
    tools: list[dict[str, Any]] | None  # In OpenAI's shape.


class Preference(NamedTuple):
    """A better and a worse way to go on with a conversation. Both begin with an answer."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: list[dict[str, Any]] | None


class Problem(NamedTuple):
    """A conversation to be answered, and what a reward of the answer needs."""

    prompt: tuple[Message, ...]
    fields: dict[str, Any]  # All other fields of the record that are not null, such as `answer`.
    tools: list[dict[str, Any]] | None


Content = Conversation | Preference | Problem
"""What a record holds. In each, the tuples are messages."""


def format_of(record: Record) -> tuple[Format, str]:
    """The format of a record, and the fields that say so.

    Raises UserError, listing the fields and the formats, when they say none or several.
    """
    names = [name for name, value in record.value.items() if value is not None]
    found = {kind: fields for kind, fields in reversed(SIGNS) if all(field in names for field in fields)}
    if "preference" in found:
        found.pop("chat", None)  # The prompt of the preference, or its better answer once more.
    if not found and (asked := next((field for field in ("prompt", "question") if field in names), None)):
        return "problem", asked
    if len(found) == 1:
        [(kind, fields)] = found.items()
        return kind, ", ".join(fields)
    says = f"may be {' or '.join(sorted(found))}" if found else "is of no known format"
    formats = "; ".join(f"{kind} has {' and '.join(fields)}" for kind, fields in SIGNS)
    raise UserError(
        f"{record.where} {says}, by its fields {', '.join(names) or '(none)'}; choose one with --format: {formats}; "
        "problem has prompt or question"
    )


def learnt(message: Message) -> bool:
    """Whether a message is learnt: as its `train` says, and without it, when it is the assistant's."""
    train: bool = message.get("train", message["role"] == "assistant")
    return train


def parsed(records: Iterable[Record], kind: Format, on_broken: OnBroken = fail) -> Iterator[tuple[Record, Content]]:
    """Each record with what it holds in the format `kind`, which is not text. on_broken: see `records`."""
    for record in records:
        try:
            content = PARSERS[kind](record.value)
        except RecordError as e:
            on_broken(RecordError(e.reason, f"{record.where}: {e}"))
        else:
            yield record, content


def chat(record: Mapping[str, Any]) -> Conversation:
    """A conversation of `messages` (OpenAI), `conversations` (ShareGPT), or `instruction`, `input`, `output` (Alpaca).

    A `system` prompt and `tools`, also as JSON, may stand beside. Alpaca's instruction and input are joined by a
    newline, and its `history` of [question, answer] comes before, as LLaMA-Factory does. Raises RecordError.
    """
    if any(record.get(label) is False for label in ("label", "kto_tag")):
        raise RecordError("an answer labelled bad", "its label says that the answer is bad, which is not to be learnt")
    field = next((name for name in ("messages", "conversations") if record.get(name) is not None), None)
    if field:
        messages = _messages(record[field], field)
    elif "output" in record:
        messages = [*_alpaca_prompt(record), _text("assistant", record["output"], "output")]
    else:
        raise RecordError("no messages", "it has neither messages nor conversations nor an output")
    return _conversation(record, messages)


def completion(record: Mapping[str, Any]) -> Conversation:
    """A conversation of `prompt` and `completion`, each a text or messages, of which the completion alone is learnt.

    Raises RecordError.
    """
    prompt = [
        {"train": False, **message} if message["role"] == "assistant" else message
        for message in _messages(record.get("prompt"), "prompt", "user")
    ]
    return _conversation(record, [*prompt, *_messages(record.get("completion"), "completion", "assistant")])


def preference(record: Mapping[str, Any]) -> Preference:
    """The preference of `chosen` over `rejected`, each a text, a message, or messages.

    They go on with the conversation in `prompt`, `conversations` or Alpaca's fields, or are whole conversations, whose
    beginning, as far as they share it, is the prompt. Texts may be transcripts as those of HH. Raises RecordError.
    """
    _check_text_only(record)
    field = next((name for name in ("prompt", "conversations") if record.get(name) is not None), None)
    prompt = _messages(record[field], field, "user") if field else []
    if not field and "instruction" in record:
        prompt = _alpaca_prompt(record)
    chosen, rejected = (_messages(record.get(name), name, "assistant") for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise RecordError("chosen equals rejected", "chosen and rejected are the same")
    if "assistant" not in (chosen[0]["role"], rejected[0]["role"]):
        shared = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))]
        if any(message not in shared for message in prompt):
            raise RecordError("different prompts", "the prompt is not what chosen and rejected begin with")
        prompt, chosen, rejected = shared, chosen[len(shared) :], rejected[len(shared) :]
    prompt = [*_system(record), *prompt]
    if not prompt:
        raise RecordError("no messages", "it has no prompt, and chosen and rejected do not begin with the same one")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[0]["role"] != "assistant":
            raise RecordError("different prompts", f"{name} does not go on with an answer where the other does")
        _check_order([*prompt, *answer], f"the prompt and {name}")
    return Preference(tuple(prompt), tuple(chosen), tuple(rejected), _tools(record))


def problem(record: Mapping[str, Any]) -> Problem:
    """The problem in `prompt`, a text or messages, or `question`. Raises RecordError."""
    field = "question" if record.get("prompt") is None else "prompt"
    _check_text_only(record)
    prompt = [*_system(record), *_messages(record.get(field), field, "user")]
    _check_order(prompt, field)
    if prompt[-1]["role"] not in ("user", "tool"):
        raise RecordError("no question", f"{field} ends with a message of the {prompt[-1]['role']}, not of the user")
    used = (field, "system", "tools")
    fields = {name: value for name, value in record.items() if name not in used and value is not None}
    _check_json(fields, "the record")
    return Problem(tuple(prompt), fields, _tools(record))


PARSERS: dict[str, Callable[[Mapping[str, Any]], Content]] = {
    "chat": chat,
    "completion": completion,
    "preference": preference,
    "problem": problem,
}


def _conversation(record: Mapping[str, Any], messages: Sequence[Message]) -> Conversation:
    _check_text_only(record)
    messages = [*_system(record), *messages]
    _check_order(messages, "the conversation")
    if not any(learnt(message) for message in messages):
        raise RecordError("no answer to learn", "it has no answer that is to be learnt")
    return Conversation(tuple(messages), _tools(record))


def _check_text_only(record: Mapping[str, Any]) -> None:
    if other := [name for name in ("images", "videos", "audios") if record.get(name)]:
        raise RecordError("more than text", f"it has {other[0]} beside its text")


def _system(record: Mapping[str, Any]) -> list[Message]:
    """The message of the record's field `system`, if there is one."""
    return [_text("system", record["system"], "system")] if record.get("system") else []


def _alpaca_prompt(record: Mapping[str, Any]) -> list[Message]:
    """The messages of Alpaca's history, instruction and input."""
    if not isinstance(history := record.get("history") or [], list):
        raise RecordError("no messages", f"its history is of type {type(history).__name__}, not a list")
    messages = []
    for number, pair in enumerate(history, 1):
        where = f"part {number} of history"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RecordError("no messages", f"{where} is no pair of a question and an answer")
        messages += [_text("user", pair[0], where), _text("assistant", pair[1], where)]
    parts = [part for name in ("instruction", "input") if (part := record.get(name))]
    if not all(isinstance(part, str) for part in parts):
        raise RecordError("content of a wrong type", "its instruction or its input is no text")
    return [*messages, _text("user", "\n".join(parts), "instruction")]


def _messages(value: object, field: str, role: str = "") -> list[Message]:
    """The messages in a field: a list of them, a single one, or a text, which is a transcript or one of `role`."""
    if isinstance(value, str) and role:
        if not TURN.match(value):
            return [_text(role, value, field)]
        _, *turns = TURN.split(value)
        if role == "user" and not turns[-1].strip():
            turns = turns[:-2]  # It ends where the answer begins.
        sides = {"Human": "user", "Assistant": "assistant"}
        value = [{"role": sides[a], "content": b.strip()} for a, b in zip(turns[::2], turns[1::2], strict=True)]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        what = "is missing" if value is None else f"is of type {type(value).__name__}, not a list of messages"
        raise RecordError("no messages", f"{field} {what}")
    if not value:
        raise RecordError("no messages", f"{field} is an empty list")
    return [_message(message, f"message {number} of {field}") for number, message in enumerate(value, 1)]


def _text(role: str, content: object, where: str) -> Message:
    return _message({"role": role, "content": content}, where)


def _message(raw: object, where: str) -> Message:
    """A message as the module says, of one as published."""
    if not isinstance(raw, Mapping):
        raise RecordError("no messages", f"{where} is no object with a role and a content")
    fields = _given(raw)
    given, content = (
        fields.pop(name, fields.pop(other, None)) for name, other in (("role", "from"), ("content", "value"))
    )
    role = ALIASES.get(given, given) if isinstance(given, str) else given
    if role not in ROLES:
        raise RecordError("unknown role", f"{where} has the role {given!r:.60}; the roles are {', '.join(ROLES)}")
    if given == "function_call":
        calls, content = _from_json(content, where), None
        fields["tool_calls"] = calls if isinstance(calls, list) else [calls]
    elif isinstance(content, list | tuple):
        content = _join_parts(content, fields, where)
    for name in ("weight", "loss_weight"):  # OpenAI's fine-tuning, and LLaMA-Factory 1.
        if name in fields and (weight := fields.pop(name)) != fields.setdefault("train", weight == 1):
            raise RecordError("train is not true or false", f"{where} has a {name} of {weight!r:.60}, neither 0 nor 1")
    if not isinstance(fields.get("train", True), bool):
        raise RecordError("train is not true or false", f"{where} has a train of {fields['train']!r:.60}")
    if calls := fields.pop("tool_calls", None):
        if role != "assistant" or not isinstance(calls, list):
            raise RecordError("a call of a wrong shape", f"{where} has tool_calls that are not a list of an assistant")
        fields["tool_calls"] = [_call(call, where) for call in calls]
    if not isinstance(content, str | None):
        raise RecordError("content of a wrong type", f"{where} has a content of type {type(content).__name__}")
    if not calls and (content is None or (role in ("user", "assistant") and not content.strip())):
        raise RecordError("a message without content", f"{where} ({role}) has no content")
    message = {"role": role, "content": content or "", **fields}
    _check_json(message, where)
    return message


def _join_parts(parts: Sequence[object], fields: dict[str, Any], where: str) -> str:
    """The texts of a content in parts, joined by newlines as `chat_template.checked` does. Reasoning and calls, which
    LLaMA-Factory 1 has among the parts, go into `fields`."""
    texts: dict[str, list[str]] = {"text": [], "reasoning": [], "tool_call": []}
    for part in map(_given, parts):
        kind, text = part.get("type"), part.get("text", part.get("value"))
        if not isinstance(kind, str) or kind not in texts or not isinstance(text, str):
            raise RecordError("content of a wrong type", f"{where} has a part of type {kind!r:.60}, not a text")
        texts[kind].append(text)
    if texts["reasoning"]:
        fields["reasoning_content"] = "\n".join(texts["reasoning"])
    if texts["tool_call"]:
        fields["tool_calls"] = [_from_json(text, where) for text in texts["tool_call"]]
    return "\n".join(texts["text"])


def _call(raw: object, where: str) -> dict[str, Any]:
    """A call in OpenAI's shape, of one in it or of its name and arguments. The arguments are a dict if they are one."""
    call = _given(raw)
    function = _given(call.pop("function", None)) or {n: call.pop(n) for n in ("name", "arguments") if n in call}
    if not isinstance(function.get("name"), str):
        raise RecordError("a call of a wrong shape", f"{where} has a call without the name of a function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
            arguments = value if isinstance(value, dict) else arguments
        except (ValueError, RecursionError):
            pass
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _tools(record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The functions in the record's field `tools`, a list or its JSON, in OpenAI's shape; None when there are none."""
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _from_json(tools, "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError("tools of a wrong type", "tools is not a list of functions")
    _check_json(tools, "tools")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _given(value: object) -> dict[str, Any]:
    """The fields of an object that are not null; none of what is no object."""
    return {name: field for name, field in value.items() if field is not None} if isinstance(value, Mapping) else {}


def _from_json(text: object, where: str) -> Any:
    try:
        return json.loads(text)  # type: ignore[arg-type]
    except (ValueError, TypeError, RecursionError) as e:
        raise RecordError("a call or tools that are not JSON", f"{where} holds what is not JSON ({e})") from None


def _check_json(value: object, where: str) -> None:
    """Raises RecordError for half surrogates, at any depth, and for what no template can write, such as dates."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RecordError("half of a surrogate pair", f"{where} has half of a surrogate pair") from None
    except (TypeError, ValueError, RecursionError) as e:
        raise RecordError("a value that is not JSON", f"{where} has a value that is not JSON ({e})") from None


def _check_order(messages: Sequence[Message], of: str) -> None:
    """Raises RecordError for roles in an order that the module's text rules out. of: what the messages are."""
    before, calls = "", list[dict[str, Any]]()  # The role before, and the calls that have no result yet.
    for number, message in enumerate(messages, 1):
        role, where = message["role"], f"message {number} of {of} ({message['role']})"
        if role in ("system", "developer"):
            continue
        if role == "tool":
            result_of = message.get("tool_call_id")
            ids = [call.get("id", result_of) for call in calls]
            if calls and result_of is not None and result_of not in ids:
                raise RecordError("a result without a call", f"{where} has a tool_call_id that no open call has")
            if not calls:
                raise RecordError("a result without a call", f"{where} is the result of no call")
            del calls[ids.index(result_of) if result_of is not None else 0]
        else:
            if before == "assistant" and calls:
                raise RecordError("a call without a result", f"{where} follows a call, not its result")
            if role != FOLLOWS[before]:
                place = f"follows a message of the {before}" if before else "comes before any of the user"
                raise RecordError("roles out of order", f"{where} {place}")
            calls = list(message.get("tool_calls", ()))
        before = role
