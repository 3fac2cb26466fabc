"""Conversations to tokens, of which exactly those are to be learnt that the model has to write itself."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from gpt_jax.data.encoded import Document
from gpt_jax.data.records import RecordError
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.chat_template import CONTROL_TOKEN, LEARN, LEARNT, Chat, borders, control, split
from gpt_jax.tokenizer.tokenizer import Tokenizer

CONTEXT = 16  # Tokens before an answer that may decide how it is decoded, such as whether a space is before it.


PLACE = "\ufdd5"  # A content that no message has, nor anything else in a rendered text.
_MARK = re.compile(f"[{LEARN}{LEARNT}]")


class Example(NamedTuple):
    """A conversation up to its last answer that is learnt, or up to one answer where the template rewrites those before
    it."""

    tokens: list[int]
    learnt: list[bool]  # For each token.
    answers: list[tuple[int, int]]  # First token and end of each answer that is learnt.


def refused(reason: str, message: int) -> RecordError:
    """The error of a conversation of which nobody can tell exactly what is to be learnt. message: its index."""
    return RecordError(reason, f"message {message + 1}: {reason}")


@dataclass(frozen=True)
class _Answer:
    """A message of the assistant, in rendered text."""

    message: int  # Its index.
    before: str  # What the model reads before it writes.
    text: str  # What it writes: up to the token that ends its turn.
    unlearnt: str  # The beginning of that which {% generation %} leaves out.


def examples(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None = None,
    chat: Chat | None = None,
) -> list[Example]:
    """The examples of a conversation: one or, where the template rewrites what was before (as Qwen3 drops thoughts),
    one for each answer, as the model would see it when it is asked.

    An answer is what the template puts after the text that asks for it (the rendering with add_generation_prompt), up
    to the first token that ends a turn, and holds the message's content as it is. So the prompt that sampling makes of
    the messages before it is a prefix of the example, token by token. An answer with `"train": false` is not learnt.
    Messages after the last answer are left out. chat: None for that of the tokenizer. Raises RecordError when an answer
    is none of this, or nothing is to learn.
    """
    chat = chat or tokenizer.chat
    try:
        hidden, tools = chat.checked(messages), chat.hidden(tools)
    except UserError as e:
        raise RecordError("a template refuses it", str(e)) from e
    learnt = {i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train") is not False}
    if not learnt:
        raise RecordError("no answer to learn", "there is no answer to learn")
    requests = chat.requests(hidden, tools)
    answers = [_answer(tokenizer, chat, hidden, tools, requests, i) for i in sorted(learnt)]
    whole = answers[-1].before + answers[-1].text
    alike = all(whole.startswith(answer.before + answer.text) for answer in answers)
    return [_encoded(tokenizer, chat, requests, some) for some in ([answers] if alike else [[a] for a in answers])]


def _answer(
    tokenizer: Tokenizer, chat: Chat, messages: list[dict[str, Any]], tools: Any, requests: Mapping[int, str], i: int
) -> _Answer:
    """Message i as an answer. Raises RecordError."""

    def written(others: list[dict[str, Any]], content: str) -> str:
        return chat.render([*others, {**messages[i], "content": content}], tools, asks=False, marks=True)

    history, content = messages[:i], messages[i]["content"]
    try:
        before = request = requests[i] if i in requests else chat.render(history, tools, asks=True)
        marked = written(history, content)
        if not _MARK.sub("", marked).startswith(request):
            # Mistral's write the system prompt into the last question, and so nowhere once that is answered.
            history = [m for m in history if m["role"] not in ("system", "developer")]
            request, marked = chat.render(history, tools, asks=True), written(history, content)
        # Where the template puts its own white space beside the content, only another content in its place shows
        # whether it has left out some of this one's.
        trims = content != content.strip() and written(history, PLACE).replace(PLACE, content) != marked
    except UserError as e:
        raise refused(str(e), i) from e
    text = _MARK.sub("", marked)
    if not text.startswith(request):
        raise refused("the template writes this answer otherwise than it asks for it", i)
    stops = [control(j) for j, token in enumerate(chat.special_tokens.values()) if token in tokenizer.stop_ids]
    ends = [text.index(stop, len(request)) + len(stop) for stop in stops if stop in text[len(request) :]]
    if not ends:
        raise refused("the template ends this answer with no token that ends a turn", i)
    end = min(ends)
    answer = text[len(request) : end]
    if CONTROL_TOKEN.sub("", text[end:]).strip():
        raise refused("the template writes text of this answer after the token that ends it", i)
    if trims or content not in answer:
        what = "leaves out white space around" if content.strip() in answer else "changes"
        raise refused(f"the template {what} what this answer says", i)
    thoughts = messages[i].get("reasoning_content") or ""
    said = {"the thoughts": [thoughts.strip()], "a call": [*_texts(messages[i].get("tool_calls") or ())]}
    for what, texts in said.items():
        if any(not _is_in(text, answer) for text in texts):
            raise refused(f"the template leaves out {what} of this answer", i)
    first = _first_learnt(marked, len(request), end, i) if chat.marks else 0
    return _Answer(i, before, answer, answer[:first])


def _texts(calls: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The texts in calls of tools that an answer cannot do without: names of functions and arguments, and texts."""

    def within(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from value
            yield from within(list(value.values()))
        elif isinstance(value, list):
            for item in value:
                yield from within(item)

    for call in calls:
        function = call.get("function", call)
        yield from within([function.get("name"), function.get("arguments")])


def _is_in(text: str, answer: str) -> bool:
    """Whether an answer holds a text, as it is or as JSON writes it."""
    return any(form in answer for form in (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]))


def _first_learnt(marked: str, start: int, end: int, i: int) -> int:
    """How many characters of an answer, which is from `start` to `end` without the marks, come before what the template
    marks to be learnt. What ends the turn need not be marked. Raises RecordError when something else is not marked."""
    places = list(accumulate(map(len, _MARK.split(marked))))
    spans = [span for span in zip(places[::2], places[1::2], strict=False) if span[0] < end and span[1] > start]
    rest = _MARK.sub("", marked)[spans[0][1] : end] if len(spans) == 1 else "text"
    if CONTROL_TOKEN.sub("", rest).strip():
        raise refused("the template does not mark this answer as one part that is to be learnt", i)
    return max(0, spans[0][0] - start)


def _encoded(tokenizer: Tokenizer, chat: Chat, requests: Mapping[int, str], answers: list[_Answer]) -> Example:
    """The example that ends with the last of the answers. Raises RecordError."""
    text = answers[-1].before + answers[-1].text
    starts_of_parts = borders({i: request for i, request in requests.items() if i <= answers[-1].message}, text)
    parts = chat.encode(split(text, starts_of_parts))
    starts = dict(zip([0, *starts_of_parts], accumulate(map(len, parts), initial=0), strict=False))
    tokens = [token for part in parts for token in part]
    stop_ids = tokenizer.stop_ids  # Made anew whenever it is asked for.
    learnt, found = [False] * len(tokens), []
    for answer in answers:
        start = starts[len(answer.before)]
        end = next(n for n in range(start, len(tokens)) if tokens[n] in stop_ids) + 1
        before = tokens[max(0, start - CONTEXT) : start]
        decoded = tokenizer.decode([*before, *tokens[start:end]])[len(tokenizer.decode(before)) :]
        if decoded != chat.shown(answer.text):
            raise refused("the tokens of this answer do not give its text again", answer.message)
        skipped = chat.encode(["", answer.unlearnt])[1] if answer.unlearnt else []
        if tokens[start : start + len(skipped)] != skipped:
            raise refused("a token is partly to be learnt, by the marks of the template", answer.message)
        start += len(skipped)
        learnt[start:end] = [True] * (end - start)
        found.append((start, end))
    return Example(tokens, learnt, found)


def documents(tokenizer: Tokenizer, chat: Chat, record: Mapping[str, Any]) -> tuple[list[Document], Counter[str]]:
    """The `examples` of a conversation, and what they count. Raises RecordError."""
    made = examples(tokenizer, record["messages"], record["tools"], chat)
    counts = Counter(conversations=1, examples=len(made)) + count_answers(tokenizer, made)
    return [Document(example.tokens, example.learnt) for example in made], counts


def count_answers(tokenizer: Tokenizer, made: Sequence[Example]) -> Counter[str]:
    """The answers that are learnt, and the bytes of their text, without the tokens that end turns."""
    answers = [example.tokens[start : end - 1] for example in made for start, end in example.answers]
    return Counter(answers=len(answers), bytes=sum(len(tokenizer.decode(answer).encode()) for answer in answers))
