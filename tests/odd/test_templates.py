"""Chat templates that are odd or hostile are rendered as in transformers or refused in one line; texts are encoded."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tokenizers")

from gpt_jax.errors import UserError
from gpt_jax.tokenizer import chat_template
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.tokenizer.tokenizer import Tokenizer
from tests.published import byte_level

MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": " {{ 7 * 7 }} é 🙂\n"},
]
ALL = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
NONE = "the tokenizer has no chat template"


def folder_with(template: Any, target: Path) -> Path:
    """The folder of a tokenizer with a chat template in its configuration or, given as bytes, in a file of its own."""
    shutil.copytree(byte_level(), target, dirs_exist_ok=True)
    config = json.loads((target / "tokenizer_config.json").read_text())
    if isinstance(template, bytes):
        (target / "chat_template.jinja").write_bytes(template)
        template = None
    (target / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return target


SAME: dict[str, Any] = {
    "all messages": ALL,
    "an empty template": "",
    "a list with a default": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": ALL}],
    "a dict with a default": {"default": ALL, "rag": "x"},
    "of a file": ALL.encode(),
    "of an empty file": b"",
    "of a file from Windows": b"{% if true %}\r\n" + ALL.encode() + b"\r\n{% endif %}\r\n",
    "of a file with a byte order mark": b"\xef\xbb\xbf" + ALL.encode(),
    "other scripts": "用户:{{ messages[1].content }} 助手:",
    "not escaped": "{{ messages[0].content }}{{ '<b>' }}",
    "a template in a message": "{{ messages[1].content }}",
    "trimmed blocks": "  {% for m in messages %}\n  {{ m.role }}\n  {% endfor %}\n",
    "white space control": "a {%- for m in messages -%} {{ m.role }} {%- endfor -%} b",
    "kept blocks": "{%+ if true %} x{% endif %}\n\n",
    "tojson": "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}",
    "tojson in ASCII": "{{ messages[1] | tojson(ensure_ascii=true) }}",
    "a namespace": "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}",
    "slices and filters": "{{ messages[1:] | map(attribute='role') | join(',') | upper }}{{ messages | length }}",
    "methods of Python": "{{ messages[0].content.split('<')[-1].rstrip('.') }}{{ messages[0].items() | list }}",
    "what is not defined": "{{ nothing }}{{ messages[0].nothing }}{{ enable_thinking is defined }}",
    "what is none": "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
    "names of tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}",
    "generation": "{% generation %}{{ messages[0].role }}{% endgeneration %}",
    "break and continue": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% break %}{% endfor %}",
    "an else of a loop": "{% for m in [] %}x{% else %}none{% endfor %}{{ loop is defined }}",
    "a macro": "{% macro f(m, e=':') %}{{ m.role }}{{ e }}{% endmacro %}{{ f(messages[0]) }}{{ f(messages[1], '') }}",
    "a call block": "{% macro f() %}[{{ caller() }}]{% endmacro %}{% call f() %}x{% endcall %}",
    "a recursive loop": "{% for m in [[1, [2]], 3] recursive %}{{ loop(m) if m is iterable else m }}{% endfor %}",
    "a long loop": "{% for i in range(5000) %}{% endfor %}x{{ '-' * 20 }}{{ [1] * 3 }}{{ 6 * 7 }}",
    "a long text and powers": "{{ ('-' * 200000) | length }}{{ 2 ** 10 }}",
    "the time": "{{ strftime_now('%%') }}",
    "a class by a format": "{{ '{0.__class__}'.format(1) }}",
    "a class by a filter": "{{ '' | attr('__class__') }}",
    "a comment": "{# {{ nothing.at.all }} #}x",
    "raw": "{% raw %}{{ x }}{% endraw %}",
    "special tokens of the template": "<|im_start|>{{ messages[0].role }}<|im_end|>",
}


@pytest.mark.parity
@pytest.mark.parametrize("template", SAME.values(), ids=SAME)
def test_it_is_rendered_as_in_transformers(template: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = folder_with(template, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert load_tokenizer(folder).encode_chat(MESSAGES) == expected


REFUSED: dict[str, tuple[Any, str]] = {
    "none": (None, NONE),
    "a number": (5, NONE),
    "true": (True, NONE),
    "an empty list": ([], NONE),
    "an empty dict": ({}, NONE),
    "a list without a default": ([{"name": "rag", "template": "x"}], NONE),
    "a dict without a default": ({"rag": "x"}, NONE),
    "a list of texts": (["x"], NONE),
    "entries without names": ([{"template": "x"}, {"name": 5, "template": "x"}, None], NONE),
    "a default that is none": ({"default": None}, NONE),
    "a default that is a number": ({"default": 5}, NONE),
    "a file that is no text": (b"\xff\xfe{\0", NONE),
    "a tag that does not end": ("{% for m in messages %}", "Unexpected end of template"),
    "a variable that does not end": ("{{ messages", "unexpected end of template"),
    "an unknown tag": ("{% nope %}", "unknown tag 'nope'"),
    "an unknown filter": ("{{ 1 | nope }}", "No filter named 'nope'"),
    "an include": ("{% include 'config.json' %}", "no loader for this environment"),
    "an import": ("{% import 'os' as os %}", "no loader for this environment"),
    "raise_exception": ("{{ raise_exception('Roles must\nalternate') }}", "Roles must alternate"),
    "an exception without words": ("{{ raise_exception('') }}", "TemplateError"),
    "a system message": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
        "System role not supported",
    ),
    "what is not there": ("{{ messages[7].content.x }}", "has no element 7"),
    "an attribute of nothing": ("{{ nothing.at.all }}", "'nothing' is undefined"),
    "types": ("{{ 1 + 'a' }}", "unsupported operand"),
    "division": ("{{ 1 / 0 }}", "division by zero"),
    "classes": ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
    "globals": ("{{ cycler.__init__.__globals__ }}", "is unsafe"),
    "a change of a message": (
        "{{ messages[0].update({'role': 'x'}) }}",
        "attribute 'update' of 'dict' object is unsafe",
    ),
    "a change of the messages": ("{% do messages.append(1) %}", "unknown tag 'do'"),
    "a huge range": ("{% for i in range(1000000000) %}{% endfor %}", "Range too big"),
    "loops in loops": (
        "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
        "rounds of",
    ),
    "a macro without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    "macros that double": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "rounds of its loops",
    ),
}


@pytest.mark.parametrize(("template", "told"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_in_one_line_and_texts_are_encoded(
    template: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "MAX_ROUNDS", 5000)
    tokenizer = load_tokenizer(folder_with(template, tmp_path))
    with pytest.raises(UserError, match=told) as caught:
        tokenizer.encode_chat(MESSAGES)
    assert "\n" not in str(caught.value)
    assert tokenizer.decode(tokenizer.encode("texts <|im_end|>")) == "texts <|im_end|>"


@pytest.mark.parametrize("template", [5, {"rag": "x"}, b"\xff\xfe{\0", ["x"]])
def test_a_template_that_cannot_be_used_is_told(
    template: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_tokenizer(folder_with(template, tmp_path))
    assert len(caplog.messages) == 1
    assert "chat" in caplog.messages[0]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (ALL, [], ""),
        ("{{ messages | length }}{% if add_generation_prompt %}>{% endif %}", [], "0>"),
        (ALL, [{"role": "tool", "content": "5"}], "tool: 5"),
        (ALL, [{"role": "developer", "content": "Be brief."}], "developer: Be brief."),
        (ALL, [{"role": "user", "content": ""}], "user: "),
        ("{{ messages[0].name }}", [{"role": "user", "content": "", "name": "A<|im_end|>"}], "A<|im_end|>"),
        ("{{ messages[0].n + 1 }}", [{"role": "user", "content": "", "n": 1}], "2"),
    ],
    ids=str,
)
def test_odd_conversations(template: str, messages: list[dict[str, Any]], expected: str, tmp_path: Path) -> None:
    tokenizer: Tokenizer = load_tokenizer(folder_with(template, tmp_path))
    assert tokenizer.decode(tokenizer.encode_chat(messages)) == expected


@pytest.mark.parametrize("make", [lambda: [{"role": "user", "content": "a\ud800"}], lambda: [{"role": "user"}]])
def test_conversations_that_are_no_text(make: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"half of a surrogate pair|content of type NoneType"):
        load_tokenizer(folder_with(ALL, tmp_path)).encode_chat(make())
