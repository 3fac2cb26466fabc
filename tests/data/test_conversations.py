"""What is to be learnt of a conversation is each answer and what ends it, or the conversation is refused."""

import functools
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from gpt_jax.data.conversations import CONTEXT, Example, examples
from gpt_jax.data.records import RecordError
from gpt_jax.interop.load import named_tokenizer
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.chat_template import TEMPLATE
from gpt_jax.tokenizer.export import export_tokenizer
from gpt_jax.tokenizer.hugging_face import HuggingFaceTokenizer
from gpt_jax.tokenizer.tokenizer import Tokenizer
from tests.llama_cpp import TEMPLATES
from tests.published import byte_level, random_texts

Messages = list[dict[str, Any]]

DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|eot|>", DEEPSEEK_END, "<|return|>", "<|call|>"),
    *("<|end_of_text|>", "<|eom_id|>", "<SPECIAL_12>", "</assistant>", "<turn|>", "[e~[", "<|assistant_end|>"),
    *("<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|>", "<|flush|>", "[EOS]", "<end_of_sentence>", "<|role_end|>"),
    *("<seed:eos>", "<|message_sep|>", "<sep>", "</s>", "<|endoftext|>"),
)
"""Names of the tokens that end turns, in the templates of llama.cpp."""

NAME = re.compile(r"<[|\uff5c]?[A-Za-z_/:][^<>\s{}'\"]*>|\[/?[A-Z_]{2,}\]|<\|[^<>|\s]*\|>|\[e~\[")
"""What looks like a special token in a template."""

LLAMA_2 = """{% if messages[0].role == 'system' %}
{% set system, turns = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n', messages[1:] %}
{% else %}{% set system, turns = '', messages %}{% endif %}
{% for message in turns %}
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{% if message.role == 'user' %}
{{ bos_token + '[INST] ' + ((system if loop.first else '') + message.content).strip() + ' [/INST]' }}
{%- else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"""
GEMMA_3 = """{{ bos_token }}{% set first = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{% for message in (messages[1:] if messages[0].role == 'system' else messages) %}
{{ '<start_of_turn>' + message.role.replace('assistant', 'model') + '\\n' + (first if loop.first else '') }}
{{- message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
CHATML = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def conversations(n: int, names: Sequence[str], seed: int = 0) -> list[Messages]:
    """n conversations of texts of all sorts, empty ones, names of special tokens, and white space at either end."""
    rng, texts = random.Random(seed), random_texts()

    def content() -> str:
        text = rng.choice(["", "Hello.", rng.choice(texts), "".join(rng.choices(texts, k=3))])
        if rng.random() < 0.3:
            text = rng.choice([" ", "\n", "", "  \n"]) + text + rng.choice([" ", "\n", "", "\n\n\t"])
        return text + rng.choice(list(names)) + rng.choice(["", " x"]) if rng.random() < 0.2 else text

    def conversation() -> Messages:
        roles = ["system"] * (rng.random() < 0.3) + ["user", "assistant"] * rng.randrange(1, 4)
        return [{"role": role, "content": content()} for role in roles + ["user"] * (rng.random() < 0.1)]

    return [conversation() for _ in range(n)]


def learnt_runs(example: Example) -> list[tuple[int, int]]:
    """First token and end of each run of learnt tokens, by the mask alone."""
    pairs = zip([False, *example.learnt], [*example.learnt, False], strict=True)
    edges = [i for i, (before, after) in enumerate(pairs) if before != after]
    return list(zip(edges[::2], edges[1::2], strict=True))


def text_of(tokenizer: Tokenizer, tokens: list[int], start: int, end: int) -> str:
    """What the tokens from `start` to `end` add to the text of those before."""
    before = tokens[max(0, start - CONTEXT) : start]
    return tokenizer.decode(before + tokens[start:end])[len(tokenizer.decode(before)) :]


def check(tokenizer: Tokenizer, messages: Messages) -> set[tuple[str, str]] | None:
    """Asserts what a conversation must become. Returns what the template writes around the contents of answers within
    what is learnt; None for a conversation that is refused."""
    refusal = ""
    try:
        made = examples(tokenizer, messages)
    except RecordError as e:
        refusal = str(e)
    if refusal:
        assert re.match(r"message \d+: ", refusal)
        assert "\n" not in refusal
        return None
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    runs = [(example, run) for example in made for run in learnt_runs(example)]
    assert len(runs) == len(answers)
    around = set()
    for i, (example, (start, end)) in zip(answers, runs, strict=True):
        tokens, learnt = example.tokens, text_of(tokenizer, example.tokens, start, end)
        assert example.learnt[end - 1]
        assert (start, end) in example.answers
        asked = tokenizer.encode_chat(messages[:i])
        assert tokens[: len(asked)] == asked
        assert len(asked) <= start
        stops = [n for n in range(len(asked), end) if tokens[n] in tokenizer.stop_ids]
        assert stops == [end - 1]  # It is where sampling would end.
        name = tokenizer.decode([tokens[end - 1]])
        assert learnt.endswith(name)
        content = messages[i]["content"]
        assert content in learnt
        if content.strip():
            before, _, after = learnt.removesuffix(name).partition(content)
            around.add((before, after + name))
    return around


def of_template(template: str, names: Sequence[str], bos: str = "<s>", eos: str = "</s>") -> HuggingFaceTokenizer:
    """Byte-level BPE with these special tokens and more, and a template."""
    definition = json.loads((byte_level() / "tokenizer.json").read_bytes())
    known = {token["content"] for token in definition["added_tokens"]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    more = sorted({*names, bos, eos} - known)
    definition["added_tokens"] += [{"id": 600 + i, "content": name, **flags} for i, name in enumerate(more)]
    ids = {token["content"]: token["id"] for token in definition["added_tokens"]}
    settings = {"bos_token": bos, "eos_token": eos, "chat_template": template}
    stop_ids = [ids[name] for name in ENDS if name in names or name == eos]
    return HuggingFaceTokenizer(json.dumps(definition).encode(), {**settings, "stop_ids": stop_ids})


def named(name: str, vocabularies: Path, smollm2: Path) -> Tokenizer:
    """The tokenizer of a model, or one like it, with its chat template."""

    def vocabulary(file: str, template: str) -> Tokenizer:
        tokenizer = named_tokenizer(str(vocabularies / f"ggml-vocab-{file}.gguf"))
        assert tokenizer is not None
        return tokenizer.with_chat_template(template)

    def published(file: str) -> str:
        return (vocabularies / "templates" / f"{file}.jinja").read_text()

    match name:
        case "SmolLM2":
            tokenizer = named_tokenizer(str(smollm2))
            assert tokenizer is not None
            return tokenizer
        case "Llama 2":
            return vocabulary("llama-spm", LLAMA_2)
        case "Mistral":
            return vocabulary("llama-spm", MISTRAL)
        case "Mistral Nemo":
            return of_template(published("mistralai-Mistral-Nemo-Instruct-2407"), ["[INST]", "[/INST]"])
        case "Llama 3":
            return vocabulary("llama-bpe", published("meta-llama-Llama-3.2-3B-Instruct"))
        case "Qwen2.5":
            return vocabulary("qwen2", published("Qwen-Qwen2.5-7B-Instruct"))
        case "Qwen3":
            return vocabulary("qwen2", published("Qwen-Qwen3-0.6B"))
        case "Gemma 3":
            return of_template(GEMMA_3, ["<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>")
        case "ChatML":
            return of_template(CHATML, ["<|im_start|>", "<|im_end|>"])
    assert name == "ours"
    return ByteTokenizer().with_chat_template(TEMPLATE)


AROUND = {
    "SmolLM2": {("", "<|im_end|>")},
    "Llama 2": {(" ", " </s>")},
    "Mistral": {(" ", "</s>")},
    "Mistral Nemo": {("", "</s>")},
    "Llama 3": {("", "<|eot_id|>")},
    "Qwen2.5": {("", "<|im_end|>")},
    "Qwen3": {("<think>\n\n</think>\n\n", "<|im_end|>")},
    "Gemma 3": {("", "<end_of_turn>")},
    "ChatML": {("", "<|im_end|>")},
    "ours": {("", "<|end|>")},
}
"""What is learnt before and after the content of an answer."""


@pytest.mark.parametrize("name", AROUND)
def test_each_answer_is_learnt_with_its_end_and_nothing_else(
    name: str, llama_cpp_vocabularies: Path, smollm2_gguf: Path
) -> None:
    tokenizer = named(name, llama_cpp_vocabularies, smollm2_gguf)
    found, refused = set(), 0
    for messages in conversations(500, list(tokenizer.special_tokens)[:40]):
        around = check(tokenizer, messages)
        if around is None and all(m["content"] == m["content"].strip() for m in messages):
            # SmolLM2's vocabulary lacks some bytes, and Qwen's normalises texts. Mistral's template takes no system.
            lossy = any(tokenizer.decode(tokenizer.encode(m["content"])) != m["content"] for m in messages)
            assert lossy or (name == "Mistral" and messages[0]["role"] == "system")
        found |= around or set()
        refused += around is None
    assert found == AROUND[name]
    assert refused < (5 if name in ("ours", "ChatML", "Mistral Nemo") else 350)


def chatml(template: str = CHATML) -> Tokenizer:
    return of_template(template, ["<|im_start|>", "<|im_end|>"])


ASKED: Messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "one"}]
TWICE: Messages = [*ASKED, {"role": "user", "content": "r"}, {"role": "assistant", "content": "two"}]


def learnt_texts(tokenizer: Tokenizer, messages: Messages) -> list[str]:
    """What is learnt of a conversation, run by run."""
    made = examples(tokenizer, messages)
    return [text_of(tokenizer, example.tokens, *run) for example in made for run in learnt_runs(example)]


def test_an_answer_may_be_left_out() -> None:
    tokenizer = chatml()
    assert learnt_texts(tokenizer, TWICE) == ["one<|im_end|>", "two<|im_end|>"]
    first, second = ([{**m, **({"train": i == k} if i % 2 else {})} for i, m in enumerate(TWICE)] for k in (1, 3))
    assert learnt_texts(tokenizer, first) == ["one<|im_end|>"]
    assert learnt_texts(tokenizer, second) == ["two<|im_end|>"]
    # What follows the last answer that is learnt is left out, and so is what nobody answered.
    assert tokenizer.decode(examples(tokenizer, first)[0].tokens).endswith("one<|im_end|>")
    assert examples(tokenizer, [*TWICE, {"role": "user", "content": "s"}]) == examples(tokenizer, TWICE)
    for messages in ([ASKED[0]], [{**m, "train": False} for m in TWICE]):
        with pytest.raises(RecordError, match="there is no answer to learn"):
            examples(tokenizer, messages)


def test_what_a_template_leaves_out_of_its_marks_is_not_learnt() -> None:
    """Here, the header, of which a part is within the answer, since the template does not ask with it."""
    marked = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{{ 'say\n' }}{% generation %}{{ m.content }}{% endgeneration %}{% else %}
{{ m.content }}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
    tokenizer = chatml(marked)
    assert learnt_texts(tokenizer, TWICE) == ["one<|im_end|>", "two<|im_end|>"]
    [example] = examples(tokenizer, ASKED)
    assert tokenizer.decode(example.tokens).endswith("assistant\nsay\none<|im_end|>")
    twice = marked.replace(
        "{{ m.content }}{% endgen", "{{ m.content[0] }}{% endgeneration %}{% generation %}x{% endgen"
    )
    for wrong in (twice, marked.replace("{% endgeneration %}", "{% endgeneration %} and so on")):
        with pytest.raises(
            RecordError, match=r"message 2: the template (does not mark this answer as one part|changes)"
        ):
            examples(chatml(wrong), ASKED)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            CHATML.replace("m.content", "m.content | upper").replace("message.content", "message.content | upper"),
            "changes",
        ),
        (CHATML.replace("+ message.content", "+ message.content | trim"), "leaves out white space around what"),
        (CHATML.replace("<|im_end|>", "<|im_start|>"), "ends this answer with no token that ends a turn"),
        (
            CHATML.replace("'<|im_end|>\\n' }}", "'<|im_end|>\\n' + message.role }}"),
            "writes text of this answer after the",
        ),
        (CHATML.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\nWell: "), "otherwise than it asks for it"),
        (CHATML.replace("{% for", "{% if messages | length > 1 %}{{ raise_exception('No') }}{% endif %}{% for"), "No"),
    ],
    ids=["changes", "trims", "no end", "after the end", "asks otherwise", "raises"],
)
def test_what_a_template_does_to_an_answer_is_named(template: str, reason: str) -> None:
    messages = [ASKED[0], {"role": "assistant", "content": " One\n"}]
    assert learnt_texts(chatml(), messages) == [" One\n<|im_end|>"]
    with pytest.raises(RecordError, match=rf"^message 2: .*{reason}"):
        examples(chatml(template), messages)


def test_what_a_template_leaves_out_of_an_answer_is_not_lost_in_silence() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": ["1", {"b": 2}]}}}
    calls: Messages = [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    thinks: Messages = [ASKED[0], {"role": "assistant", "content": "one", "reasoning_content": "\nhm "}]
    for messages, what in ((calls, "a call"), (thinks, "the thoughts")):
        with pytest.raises(RecordError, match=f"message 2: the template leaves out {what} of this answer"):
            examples(chatml(), messages)
    called = "message.content + (message.tool_calls{} if message.tool_calls else '') +"
    some = CHATML.replace("message.content +", called.format("[0].function.name"))
    with pytest.raises(RecordError, match="leaves out a call"):  # Its arguments.
        examples(chatml(some), calls)
    every = CHATML.replace("message.content +", called.format(" | tojson"))
    assert '"arguments": {"a": ["1", {"b": 2}]}' in learnt_texts(chatml(every), calls)[0]
    thought = CHATML.replace("message.content +", "('<think>' + message.reasoning_content + '</think>' if")
    thought = thought.replace("'</think>' if", "'</think>' if message.reasoning_content else '') + message.content +")
    assert learnt_texts(chatml(thought), thinks) == ["<think>\nhm </think>one<|im_end|>"]


def test_tools_and_calls_are_written_and_learnt() -> None:
    tools = [{"type": "function", "function": {"name": "add<|end|>", "parameters": {"a": "int"}}}]
    call = {"type": "function", "function": {"name": "add<|end|>", "arguments": {"a": "<|end|>é"}}}
    messages: Messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    tokenizer = ByteTokenizer().with_chat_template(TEMPLATE)
    [example] = examples(tokenizer, messages, tools)
    text = tokenizer.decode(example.tokens)
    assert text.startswith("<|system|>Be brief.\n\nTools:\n<tools>\n" + json.dumps(tools[0], ensure_ascii=False))
    written = '<tool_call>\n{"name": "add<|end|>", "arguments": {"a": "<|end|>é"}}\n</tool_call><|end|>'
    assert learnt_texts_with(tokenizer, messages, tools) == [written, "Two.<|end|>"]
    assert "<|user|><tool_response>\n2\n</tool_response><|end|><|assistant|>Two." in text
    assert tokenizer.chat.prompt(messages[:2], tools) == example.tokens[: example.answers[0][0]]
    control = [t for t in example.tokens if t in tokenizer.special_tokens.values()]
    assert tokenizer.decode(control) == (
        "<|system|><|end|><|user|><|end|><|assistant|><|end|><|user|><|end|><|assistant|><|end|>"
    )


def learnt_texts_with(tokenizer: Tokenizer, messages: Messages, tools: list[Any]) -> list[str]:
    [example] = examples(tokenizer, messages, tools)
    return [text_of(tokenizer, example.tokens, *run) for run in learnt_runs(example)]


@functools.cache
def plain_conversations() -> list[Messages]:
    """Conversations without white space at the ends, and so accepted by templates that take it off."""
    made = conversations(300, ["<|im_end|>", "</s>", "[INST]"])
    return [
        [{**m, "content": m["content"].strip() or "x"} for m in messages if m["role"] != "system"] for messages in made
    ]


THINKS, NO_END, NEEDS_TOOLS = "otherwise than it asks for it", "no token that ends a turn", "refuses this conversation"
REFUSALS = {
    **dict.fromkeys(
        (
            *("Apriel-1.6-15b-Thinker-fixed", "Cohere2MoE", "CohereForAI-c4ai-command-r7b-12-2024-tool_use"),
            *("GLM-4.7-Flash", "MiniMax-M2", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "Qwen-QwQ-32B", "Spark2.5"),
            *("deepseek-ai-DeepSeek-V3.2", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "llama-cpp-deepseek-r1"),
            *("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "google-gemma-4-31B-it-interleaved", "google-gemma-4-31B-it"),
        ),
        THINKS,
    ),
    **dict.fromkeys(("Apertus-8B-Instruct", "GLM-4.6", "Kimi-K3", "llama-cpp-rwkv-world", "tencent-Hy3"), NO_END),
    **dict.fromkeys(
        (
            *("CohereForAI-c4ai-command-r-plus-tool_use", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use"),
            *("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "fireworks-ai-llama-3-firefunction-v2"),
        ),
        NEEDS_TOOLS,
    ),
}
"""Why templates refuse every conversation here: some ask for thoughts, which no answer has; some end an answer with
the beginning of the next question only, or with a token made of parts; some take no conversation without tools."""


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_published_models(name: str, llama_cpp_vocabularies: Path) -> None:
    template = (llama_cpp_vocabularies / "templates" / f"{name}.jinja").read_text()
    names = {*NAME.findall(template)} - {"<think>", "</think>", "<tool_call>", "</tool_call>"}
    tokenizer = of_template(template, sorted(names), eos=next((end for end in ENDS if end in template), "</s>"))
    reasons = Counter[str]()
    for messages in [*plain_conversations()[:60], *conversations(60, ["<|im_end|>", "</s>", "[INST]"])]:
        if check(tokenizer, messages) is None:
            with pytest.raises(RecordError) as caught:
                examples(tokenizer, messages)
            reasons[caught.value.reason] += 1
    if why := REFUSALS.get(name):
        assert all(why in reason for reason in reasons)
        assert reasons.total() == 120
    else:
        assert reasons.total() < 60 + 1, reasons


@pytest.mark.parity
@pytest.mark.parametrize("name", ["ours", "LFM2.5-8B-A1B", "poolside-Laguna-XS.2", "poolside-Laguna-S-2.1"])
def test_marks_of_templates_mean_what_they_mean_to_transformers(
    name: str, llama_cpp_vocabularies: Path, tmp_path: Path
) -> None:
    """transformers' mask of what {% generation %} marks, but for headers, which we leave out, and what follows the end
    of the conversation."""
    transformers = pytest.importorskip("transformers")
    tokenizer: Tokenizer
    if name == "ours":
        tokenizer = ByteTokenizer().with_chat_template(TEMPLATE)
    else:
        template = (llama_cpp_vocabularies / "templates" / f"{name}.jinja").read_text()
        names = sorted({*NAME.findall(template)} - {"<think>", "</think>", "<tool_call>", "</tool_call>"})
        tokenizer = of_template(template, names, eos=next((end for end in ENDS if end in template), "</s>"))
    export_tokenizer(tokenizer, tmp_path, 1024)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in conversations(60, ["x"]):
        messages = [{**m, "content": m["content"].strip() or "x"} for m in messages]
        while messages[-1]["role"] == "user":
            messages.pop()
        try:
            [example] = examples(tokenizer, messages)
        except RecordError:
            continue
        expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        n, mask = len(example.tokens), [bool(x) for x in expected["assistant_masks"]]
        assert expected["input_ids"][:n] == example.tokens
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i, (_, end) in zip(answers, example.answers, strict=True):
            asked = len(tokenizer.encode_chat(messages[:i]))
            assert example.learnt[asked:end] == mask[asked:end]
        assert sum(example.learnt) <= sum(mask)
