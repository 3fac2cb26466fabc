"""A process that compiles a grammar to see whether it can be done, and how: `python trial.py N < GRAMMAR`.

A few hundred bytes of JSON schema can take hours, or all memory, for which llguidance has no limit, and nothing can end
a thread. This process is ended by the system when it has had enough of either. It prints what is wrong with the
grammar, if anything. N: the size of the vocabulary, if tokens are named by number.
"""

import sys
from contextlib import suppress

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

SECONDS, BYTES = 2, 2**30
"""Of the processor, and of memory."""


def matcher(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
    """The start of an answer. A grammar of which a step takes too long, or that takes too much memory as it goes on,
    some tenths of a second or 100 MB, fails at that step."""
    # Without lexemes that are computed for all tokens at once, which takes as long as the vocabulary is large.
    limits = LLParserLimits(max_lexer_states=50_000, precompute_large_lexemes=False, verbose_errors=False)
    return LLMatcher(vocabulary, grammar, log_level=0, limits=limits)


class Bytes:
    """The least vocabulary: bytes, and a token that ends a text."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)

    def __init__(self, n: int) -> None:
        self.tokens = [*(bytes([i]) for i in range(256)), b"<end>", *[b""] * max(0, n - 257)]

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of a text."""
        return list(text)


def main() -> None:
    """Prints an error, or nothing."""
    import resource  # Here, since Windows lacks it.

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    with suppress(ValueError, OSError):  # macOS knows no such limit.
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    vocabulary = LLTokenizer(TokenizerWrapper(Bytes(int(sys.argv[1]))))
    sys.stdout.buffer.write(matcher(vocabulary, sys.stdin.buffer.read().decode()).get_error().encode())


if __name__ == "__main__":
    main()
