"""How published tokenizers split a text before they encode its parts, and whether a long text may be cut."""

import re
from collections.abc import Mapping
from typing import Any

# How text is split before BPE, by the names in GGUF files. Each regular expression is from the models' own
# tokenizer.json; GPT-2's is built into the library, too.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_NAMES = ("gpt-2", "default")
SINGLE_DIGITS_NAMES = ("smollm", "starcoder", "refact", "command-r", "codeshell")  # As GPT-2, with digits split off.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2),
    "tekken": TEKKEN,  # Mistral's since Nemo.
}

_LOCAL_NORMALIZERS = ("NFC", "NFD", "Lowercase", "BertNormalizer", "Prepend")  # Those that change no white space.
_SPLITTERS = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
_ACROSS_A_CUT = re.compile(r"\S |\n[^\W_]")  # See `gpt_jax.tokenizer.tokenizer.last_cut`.


def may_be_cut(rules: Mapping[str, Any], knows_spaces: bool) -> bool:
    """True when a text that is cut at `last_cut` is surely encoded as the whole is, part by part.

    rules: the content of a tokenizer.json, every default spelled out. knows_spaces: whether spaces and newlines are
    encoded without the unknown token. Each step must be one that is known to look no further than the cut, and either
    the splitting separates the text there, or no token of the vocabulary reaches over it. False for every other
    tokenizer, such as unigram models without splitting, whose best path through a text is that through all of it.
    """
    added = [token for token in rules["added_tokens"] if not token["special"]]  # Those that are looked for in a text.
    if any(
        token["lstrip"] or token["rstrip"] or token["single_word"] or _ACROSS_A_CUT.search(_spaced(token["content"]))
        for token in added
    ):
        return False
    normalizers, steps = _steps(rules["normalizer"], "normalizers"), _steps(rules["pre_tokenizer"], "pretokenizers")
    no_spaces = [step for step in normalizers if step.get("pattern") == {"String": " "} and step["content"] == "▁"]
    if any(step["type"] not in _LOCAL_NORMALIZERS and step not in no_spaces for step in normalizers):
        return False
    splits = False
    for step in steps:
        kind, pattern = step["type"], step.get("pattern", {})
        if kind == "Split" and pattern == {"String": " "} and no_spaces:
            continue  # Gemma's, which finds no space.
        if kind == "Split":
            known = pattern.get("Regex") in (GPT2, *PATTERNS.values())
            if not (known and step["behavior"] == "Isolated" and not step["invert"]):
                return False
        elif kind not in (*_SPLITTERS, "ByteLevel", "Digits", "Metaspace"):
            return False
        splits = splits or kind in ("Split", *_SPLITTERS) or (kind == "ByteLevel" and step["use_regex"])
    model = rules["model"]
    if splits:
        return True
    if model["type"] != "BPE" or model["ignore_merges"] or not knows_spaces:
        return False
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        return False
    letters = {"Ġ": " ", "Ċ": "\n"} if any(step["type"] == "ByteLevel" for step in steps) else {"▁": " "}
    whole = {token["content"] for token in rules["added_tokens"]}
    tokens = (_spaced(token, letters) for token in model["vocab"] if token not in whole)
    return not any(map(_ACROSS_A_CUT.search, tokens))


def _spaced(token: str, letters: Mapping[str, str] = {"▁": " "}) -> str:
    """A token with the spaces and newlines for which other signs stand in it."""
    for letter, meaning in letters.items():
        token = token.replace(letter, meaning)
    return token.replace("<0x0A>", "\n")


def _steps(rule: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of others."""
    if rule is None:
        return []
    if rule["type"] == "Sequence":
        return [step for part in rule[name] for step in _steps(part, name)]
    return [rule]
