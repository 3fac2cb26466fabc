"""Answers that keep to a grammar: JSON, JSON of a schema, a regular expression, or a grammar in Lark's notation.

The library llguidance says which tokens may come next, in some ten to some hundred microseconds. Wherever the grammar
leaves no choice, a text is cut into tokens as the tokenizer cuts it.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from gpt_jax.errors import UserError
from gpt_jax.sample.constraint import Constraint
from gpt_jax.serve import trial
from gpt_jax.tokenizer.tokenizer import Tokenizer, encode_on

MOST_BYTES = 2**16
"""Of a schema."""

WHITESPACE = " |\n( {0,40}|\t{0,20})"
"""Between the parts of JSON, besides nothing: a space, or a new line with its indentation. Models that may write any
amount of it are known not to stop."""


class Grammar:
    """What an answer may be. A call returns the constraint of one answer, for `sample.generate.Row`."""

    def __init__(self, matcher: LLMatcher, n_tokens: int) -> None:
        self.matcher, self.n_tokens = matcher, n_tokens

    def __call__(self) -> Constraint:
        return Matching(self.matcher.deep_copy(), self.n_tokens)


class Matching:
    """An answer so far, as a constraint."""

    def __init__(self, matcher: LLMatcher, n_tokens: int) -> None:
        self.matcher, self.n_words = matcher, -(-n_tokens // 32)

    def allowed(self) -> np.ndarray:
        """See Constraint. Any of the tokenizer's stop ids may come where the text may end."""
        mask = self.matcher.compute_bitmask()
        self._check()
        return np.frombuffer(mask, np.dtype("<u4"))[: self.n_words]  # llguidance may add an empty one.

    def take(self, token: int) -> None:
        """See Constraint."""
        self.matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self.matcher.is_error():
            raise UserError(
                f"the answer's grammar takes too long to follow, or has no way on: {error_of(self.matcher)}"
            )


class Grammars:
    """The grammars of texts in the tokens of a tokenizer. Threads may use it at the same time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @functools.cached_property
    def vocabulary(self) -> LLTokenizer:
        """The tokens, arranged to find those that a grammar allows; that takes some tenths of a second."""
        terms = Terms(self.tokenizer)
        terms.vocabulary = LLTokenizer(TokenizerWrapper(terms), eos_token=sorted(self.tokenizer.stop_ids))
        return terms.vocabulary

    def compiled(self, grammar: str) -> Grammar:
        """A grammar in terms of llguidance.

        Raises UserError when it is invalid or not supported, and when it takes more than about two seconds or a
        gigabyte. Starts a process for a grammar that is new, and should be called in a thread.
        """
        try_out(grammar, self.tokenizer.vocab_size if "<[" in grammar else 0)  # Where it names tokens by number.
        matcher = trial.matcher(self.vocabulary, grammar)
        if matcher.is_error():
            raise UserError(error_of(matcher))
        return Grammar(matcher, self.tokenizer.vocab_size)

    def of_response(self, response_format: Mapping[str, Any]) -> Grammar | None:
        """The grammar of OpenAI's `response_format`; None for "text".

        A schema is held to, whether it is called strict or not. An answer that is cut by its greatest length is not
        whole, and its finish_reason is "length". Raises UserError for what is no response format, and as `compiled`.
        """
        kind = response_format.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            return self.compiled(json_grammar({"type": "object"}))
        if kind != "json_schema":
            raise UserError(f"response_format has the type {kind!r:.60}; it may be text, json_object or json_schema")
        described = response_format.get("json_schema")
        schema = described.get("schema") if isinstance(described, Mapping) else None
        if not isinstance(schema, Mapping):
            raise UserError("response_format has no json_schema with a schema, which is a JSON object")
        try:
            return self.compiled(json_grammar(schema))
        except UserError as e:
            raise UserError(f"response_format has a schema that cannot be used: {e}") from None


class Terms:
    """A tokenizer in the terms of llguidance. Tokens that end a text are no part of it."""

    vocabulary: LLTokenizer  # What llguidance makes of it.

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens = list(tokenizer.token_bytes)
        self.special_token_ids = sorted({*tokenizer.special_tokens.values(), *tokenizer.stop_ids})
        self.eos_token_id, self.bos_token_id = tokenizer.end_of_text, tokenizer.begin_of_text

    def __call__(self, text: str) -> list[int]:
        """The tokens of a part of an answer, which have to spell it exactly."""
        ids: list[int] = encode_on(self.tokenizer, text).tolist()
        if b"".join(self.tokens[i] for i in ids) == text.encode():
            return ids
        return self.vocabulary.greedy_tokenize(text)


def json_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of JSON of a schema. Raises UserError as `as_json` does, and for a schema that nests too deeply."""
    try:
        return LLMatcher.grammar_from_json_schema(as_json(schema), overrides={"whitespace_pattern": WHITESPACE})
    except ValueError as e:
        raise UserError(one_line(str(e))) from None


def as_json(value: Any) -> str:
    """A schema as JSON. Raises UserError when it is none, or too large."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        n = len(text.encode())
    except (ValueError, RecursionError) as e:
        raise UserError(f"it is no JSON: {e}") from None
    if n > MOST_BYTES:
        raise UserError(f"it has {n:,} bytes, and {MOST_BYTES:,} is the limit")
    return text


def regex_grammar(pattern: str) -> str:
    """The grammar of a regular expression, of which the whole answer is a match."""
    return LLMatcher.grammar_from_regex(pattern)


def lark_grammar(text: str) -> str:
    """A grammar in Lark's notation, with llguidance's additions."""
    return LLMatcher.grammar_from_lark(text)


@functools.lru_cache(maxsize=256)
def try_out(grammar: str, n_vocab: int) -> None:
    """Compiles a grammar in a process of its own; raises UserError when that cannot be done."""
    if len(grammar.encode()) > 2 * MOST_BYTES:  # Those of tools have several schemas.
        raise UserError(f"it has more than {2 * MOST_BYTES:,} bytes")
    command = [sys.executable, "-P", str(Path(trial.__file__)), str(n_vocab)]
    tried = subprocess.run(command, input=grammar.encode(), capture_output=True)
    if tried.returncode < 0:
        raise UserError(f"it takes more than {trial.SECONDS} s or {trial.BYTES >> 20} MiB to compile; make it simpler")
    if tried.returncode:
        raise RuntimeError(tried.stderr.decode(errors="replace"))
    if tried.stdout:
        raise UserError(one_line(tried.stdout.decode()))


def error_of(matcher: LLMatcher) -> str:
    """What is wrong with a matcher, in one line."""
    return one_line(matcher.get_error())


def one_line(message: str) -> str:
    """The beginning of a message of llguidance, without the state that it appends."""
    return " ".join(message.partition("<non-verbose/>")[0].split())[:300]
