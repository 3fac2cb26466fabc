"""The chat page in a real browser: against a server that says what a test wants, and against the real one."""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt_jax.serve.gate import Rules
from gpt_jax.serve.http import PAGE
from gpt_jax.tokenizer.bytes import ByteTokenizer
from tests.packaged import downloaded_by_npm
from tests.serve.browser import Page, Scripted, model
from tests.serve.servers import Running, serving, tiny_engine

pytestmark = pytest.mark.browser


@pytest.fixture
def page(chromium: Any) -> Iterator[Page]:
    """The page of a new server: another address, and so an empty storage."""
    server = Scripted()
    with used(chromium, server) as page:
        yield page
    server.stop()


@contextlib.contextmanager
def used(driver: Any, server: Any) -> Iterator[Page]:
    """The page of a server, in English, light and wide; afterwards it had no errors."""
    page = Page(driver, server)
    page.command("Emulation.clearDeviceMetricsOverride")
    page.colours("light")
    page.language("en-US")
    page.open()
    yield page
    page.driver.get("about:blank")
    page.is_quiet()


def test_an_answer_is_shown_as_it_comes(page: Page) -> None:
    page.server.reply = "One two three."
    page.server.hold()
    page.send("Count")
    page.reads("#send", "Stop")
    assert page.text("#live") == "The answer begins."
    assert page.text("article.user .body") == "Count"
    page.server.give(1)
    page.reads("article.assistant .body", "One")
    page.server.give(1)
    page.reads("article.assistant .body", "One two")
    assert "three" not in page.text("article.assistant .body")
    assert page.text("#live") == "The answer begins."  # Who listens does not hear each token.
    page.server.give(1)
    page.reads("#send", "Send")
    assert page.bodies() == ["Count", "One two three."]
    assert "One two three." in page.text("#live")
    assert re.fullmatch(
        r"3 tokens · [\d,.]+ tokens/s · first after [\d.]+ s · prompt 12 \(8 cached\)", page.text(".stats")
    )
    [asked] = page.server.requests
    assert asked["messages"] == [{"role": "user", "content": "Count"}]
    assert (asked["model"], asked["stream"], asked["top_logprobs"]) == ("tiny", True, 5)


def test_a_stopped_answer_is_kept_and_the_conversation_goes_on(page: Page) -> None:
    page.server.reply = "One two three four."
    page.server.hold()
    for stop in (lambda: page.click("#send"), lambda: page.press("\ue00c")):  # The button, and Escape.
        page.send("Count")
        page.server.give(2)
        page.reads("li:last-child article.assistant .body", "One two")
        stop()
        page.reads("li:last-child .assistant .note", "Stopped.")
        page.reads("#send", "Send")
        page.server.give(2)
        assert page.server.gone.acquire(timeout=60)  # The server notices.
    assert page.bodies()[-1] == "One two"
    page.server.held = False
    assert page.ask("Go on") == "One two three four."
    assert page.server.requests[-1]["messages"][1] == {"role": "assistant", "content": "One two"}


def test_other_answers_are_kept_side_by_side(page: Page) -> None:
    page.server.reply = lambda asked: f"Answer {len(page.server.requests)}"
    page.ask("Question")
    for i in (2, 3):
        page.click("li:last-child [data-do=again]")
        page.reads("li:last-child .body", f"Answer {i}")
    page.until("return !running.size")
    page.reads(".acts", "")
    assert page.text("li:last-child [role=img]") == "3/3"
    page.click("li:last-child [data-by='-1']")
    assert page.bodies() == ["Question", "Answer 2"]
    assert page.focused() == "Previous version"
    page.ask("Why?")
    assert page.server.requests[-1]["messages"][1]["content"] == "Answer 2"
    page.open(page.script("return location.hash"))
    page.until("return shown.length === 4")
    assert page.bodies() == ["Question", "Answer 2", "Why?", "Answer 4"]
    page.click("li:nth-child(2) [data-by='1']")
    assert page.bodies() == ["Question", "Answer 3"]
    assert page.text("li:last-child [role=img]") == "3/3"
    assert all(asked["messages"][0]["content"] == "Question" for asked in page.server.requests)


def test_an_edited_message_begins_a_branch_and_the_old_one_is_kept(page: Page) -> None:
    page.server.reply = lambda asked: f"To {asked['messages'][-1]['content']}"
    page.ask("one")
    page.ask("two")
    page.click("li:nth-child(1) [data-do=edit]")
    area = page.find(".edit textarea")
    area.clear()
    area.send_keys("three\n")
    page.reads("li:last-child .body", "To three")
    assert page.bodies() == ["three", "To three"]
    assert page.server.requests[-1]["messages"] == [{"role": "user", "content": "three"}]
    page.until("return !running.size")
    page.click("li:nth-child(2) [data-do=edit]")  # An answer, too, can be what one would have liked to hear.
    area = page.find(".edit textarea")
    area.clear()
    area.send_keys("Better")
    page.click("[data-do=edit-done]")
    page.reads("li:nth-child(2) .body", "Better")
    assert len(page.server.requests) == 3
    page.ask("four")
    assert [m["content"] for m in page.server.requests[-1]["messages"]] == ["three", "Better", "four"]
    page.click("li:nth-child(1) [data-by='-1']")
    assert page.bodies() == ["one", "To one", "two", "To two"]
    page.click("li:nth-child(3) [data-do=edit]")
    page.find(".edit textarea").send_keys("never sent\ue00c")
    assert page.bodies()[2] == "two"


def test_a_reload_keeps_everything_even_in_the_middle_of_an_answer(page: Page) -> None:
    page.server.reply = "One two three."
    page.ask("Count")
    page.server.hold()
    page.send("Again")
    page.server.give(2)
    page.reads("li:last-child .body", "One two")
    page.script("for (const [id, {node}] of running) window.saved = save(chats.get(id), node)")
    page.until("return saved.then(() => true)")
    page.driver.refresh()
    page.until("return shown.length === 4 && document.querySelector('#about').textContent")
    assert page.bodies() == ["Count", "One two three.", "Again", "One two"]
    assert page.text("li:last-child .assistant .note") == "This was interrupted."
    assert page.text("#send") == "Send"
    page.server.held = False
    page.click("li:last-child [data-do=again]")
    page.reads("li:last-child .body", "One two three.")


NASTY = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 1">

![pixel](http://127.0.0.1:1/pixel.png) ![](data:image/png;base64,AAAA) [a](javascript:window.hacked=1)
[b](data:text/html,<script>window.hacked=1</script>) [c](JaVaScRiPt:window.hacked=1) [d](vbscript:x)
<javascript:hacked=1>
[e](java
script:window.hacked=1) [f](//evil.example/) [g](/relative) [good](https://example.org/?q="><script>x</script>)

| <b>x</b> | " onclick="window.hacked=1 |
|---|---|
| <svg onload=window.hacked=1> | `<iframe src=javascript:hacked=1>` |

```html" onmouseover="window.hacked=1
<script>window.hacked = 1</script>
```
<style>body { display: none }</style> <a href="javascript:window.hacked=1">z</a> {{constructor}} ${hacked=1}
"""


def test_no_text_becomes_markup(page: Page) -> None:
    page.server.reply = NASTY
    page.ask(NASTY)
    page.click("#tokens")
    page.until("return document.querySelectorAll('.tokens span').length > 20")
    page.click("#tokens")
    page.click("#set")
    page.find("[name=system]").send_keys(NASTY)
    page.click("#settings .main")
    title = page.find("#title")
    title.clear()
    title.send_keys("<img src=x onerror=hacked=1>\n")
    page.reads("#list a", "<img")
    page.find("#search").send_keys("<script>")
    page.reads("#nothing", "1 found")
    elements = "script, style, img, svg, iframe, object, embed, form, link, [onclick], [onerror], [onload]"
    found = "return document.querySelectorAll(`:is(#thread, #list) :is(${arguments[0]})`).length"
    assert page.script(found, elements) == 0
    assert page.script("return window.hacked ?? 0") == 0
    links = page.script("return [...document.querySelectorAll('.body a')].map((a) => [a.href, a.rel, a.target])")
    addresses = ["http://127.0.0.1:1/pixel.png", "https://example.org/?q="]
    assert links == [[address, "noopener noreferrer", "_blank"] for address in addresses]
    for text in ("<script>window.hacked = 1</script>", "[a](javascript:window.hacked=1)", '<img src=x onerror="window'):
        assert text in page.bodies()[1]
    assert "<svg onload" in page.text("td")


MARKDOWN = """# Title
Text *one* **two _three_** `a * b` ~~four~~ 2 * 3 * 4, snake_case_name, \\*plain\\*, **「中文」**很好。
Second line & &lt;tag&gt; https://example.org/a_b_(c). <https://example.com>

- a
- b
  - c
    1. d
    2. e

  still b

3. three
4. four
   ```python
   def f(x):
   \treturn "`x`"
   ```

> quoted
> - list
>> deeper

| l | c | r |
|:--|:-:|--:|
| 1 | `a` | a \\| b |

---
[link *here*](https://example.org "title") ![picture](https://example.org/x.png) [mail](mailto:a@b.c)
```
open <code>
"""

STRUCTURE = """
const tree = (node) => node.nodeType === 3 ? node.data : [node.localName, ...[...node.childNodes].map(tree)];
const body = document.createElement("div");
new MarkdownView(body).show({ content: arguments[0] });
return [...body.childNodes].map(tree);
"""


def structure(page: Page, text: str) -> Any:
    """A text's elements, as nested lists that begin with their names."""
    return page.script(STRUCTURE, text)


def test_markdown(page: Page) -> None:
    heading, text, bullets, numbers, quote, table, rule, links, code = structure(page, MARKDOWN)
    assert heading == ["h3", "Title"]
    assert text[:8] == [
        "p", "Text ", ["em", "one"], " ", ["strong", "two ", ["em", "three"]], " ", ["code", "a * b"], " "
    ]  # fmt: skip
    assert text[8:11] == [["del", "four"], " 2 * 3 * 4, snake_case_name, *plain*, ", ["strong", "「中文」"]]
    assert text[11] == "很好。\nSecond line & <tag> "
    assert text[12:] == [["a", "https://example.org/a_b_(c)"], ". ", ["a", "https://example.com"]]
    nested = ["ul", ["li", ["p", "c"], ["ol", ["li", ["p", "d"]], ["li", ["p", "e"]]]]]
    assert bullets == ["ul", ["li", ["p", "a"]], ["li", ["p", "b"], nested, ["p", "still b"]]]
    assert numbers[1] == ["li", ["p", "three"]]
    assert numbers[2][2][1][1] == ["span", "python"]
    assert numbers[2][2][2] == ["pre", ["code", 'def f(x):\n\treturn "`x`"']]
    assert quote == ["blockquote", ["p", "quoted"], ["ul", ["li", ["p", "list"]]], ["blockquote", ["p", "deeper"]]]
    assert table[1][1] == ["thead", ["tr", ["th", "l"], ["th", "c"], ["th", "r"]]]
    assert table[1][2] == ["tbody", ["tr", ["td", "1"], ["td", ["code", "a"]], ["td", "a | b"]]]
    assert rule == ["hr"]
    assert links == ["p", ["a", "link ", ["em", "here"]], " ", ["a", "picture"], " ", ["a", "mail"]]
    assert code[2] == ["pre", ["code", "open <code>\n"]]
    assert structure(page, "1986. was") == [["ol", ["li", ["p", "was"]]]]
    assert structure(page, "In\n1986. A year") == [["p", "In\n1986. A year"]]


def test_markdown_that_grows_equals_the_whole(page: Page) -> None:
    """However a text is cut in pieces, its elements in the end are those of the whole."""
    code = """
    let seed = 1;
    const random = (n) => { seed = (seed * 48271) % 2147483647; return seed % n; };
    const different = [];
    for (const text of arguments[0]) {
      const whole = document.createElement("div");
      new MarkdownView(whole).show({ content: text });
      for (let round = 0; round < 10; round++) {
        const body = document.createElement("div"), view = new MarkdownView(body);
        for (let end = 0; end < text.length;) {
          end = Math.min(text.length, end + 1 + random(round + 1));
          view.show({ content: text.slice(0, end) });
        }
        if (!body.isEqualNode(whole)) different.push([text, body.textContent]);
      }
    }
    return different;
    """
    parts = MARKDOWN.split("\n\n")
    mixed = ["\n\n".join(parts[i:] + parts[:i]) for i in range(len(parts))]
    joined = ["\n".join(parts[::-1]), MARKDOWN.replace("\n\n", "\n"), "- a\n\n- b\n\n\n-\n- c\n1. d\n\n2. e\n   \n   f"]
    assert page.script(code, [MARKDOWN, NASTY, *mixed, *joined]) == []


def test_no_text_takes_long_or_breaks_the_page(page: Page) -> None:
    """Each text is long enough that work of its square would outlast the driver's patience."""
    page.driver.set_script_timeout(30)
    code = """
    const body = document.createElement("div");
    document.querySelector("#empty").append(body);
    const [begin, end, n] = arguments;
    new MarkdownView(body).show({ content: begin.repeat(n) + end.repeat(n) });
    const height = body.offsetHeight; // Drawn, too: elements that nest too deep end the browser's process.
    body.remove();
    return height >= 0;
    """
    pieces = ["*", "**a ", "[", "![", "](", "`", "``a`", "<", "_a", "~~", "> ", "- ", "  - a\n", "| a ", "[](a 'b"]
    pieces += ["&amp", "\\", "*a_", "[a](b", "# ", "1. ", "```\n", " ", "\n", "https://", "|-|\n", "a\n\n", "- a\n\n"]
    for piece in pieces:
        assert page.script(code, piece, "", 40_000 // len(piece)), piece
    for begin, end in [("*a ", "b* "), ("[", "](https://a.b)"), ("**a _b ", "c_ d** "), ("~~a", "~~")]:
        assert page.script(code, begin, end, 10_000), begin


# What a token costs: counted in changes to the page, since times say nothing on a machine with other work.

OBSERVE = """
window.changes = { records: 0, nodes: 0, elsewhere: 0 };
new MutationObserver((records) => {
  for (const record of records) {
    changes.records += 1;
    changes.nodes += record.addedNodes.length;
    if (!document.querySelector("#thread > li:last-child").contains(record.target)) changes.elsewhere += 1;
  }
}).observe(document.querySelector("#scroll"),
  { subtree: true, childList: true, characterData: true, attributes: true });
"""


def conversation(n: int, content: str = "Some **text** with `code`, number") -> dict[str, Any]:
    """An exported conversation of n messages."""
    ids = [f"{i:08x}" for i in range(n)]
    messages = [
        {
            "id": ids[i],
            "parent": ids[i - 1] if i else "",
            "created": i,
            "role": ("user", "assistant")[i % 2],
            "content": f"{content} {i}",
            "finish": "stop",
        }
        for i in range(n)
    ]
    one = {"title": "Long", "created": 1, "updated": 2, "settings": {}, "chosen": {}, "messages": messages}
    return {"format": "gpt-jax-conversations", "version": 1, "conversations": [one]}


def bring_in(page: Page, data: Any) -> None:
    """Imports a file."""
    text = data if isinstance(data, str) else json.dumps(data)
    page.script(
        """
        const files = new DataTransfer();
        files.items.add(new File([arguments[0]], "in.json"));
        const input = document.querySelector("#file");
        input.files = files.files;
        input.dispatchEvent(new Event("change"));
        """,
        text,
    )


@pytest.mark.parametrize("mode", ["text", "tokens"])
def test_what_a_token_costs_depends_on_nothing_before_it(page: Page, mode: str) -> None:
    bring_in(page, conversation(500))
    page.click("#list a")
    page.until("return shown.length === 500")
    if mode == "tokens":
        page.click("#tokens")
    paragraphs = [f"- item {i} of *a list*\n- and more\n\nA paragraph that ends.\n" for i in range(60)]
    page.server.reply = "\n".join(paragraphs)
    page.server.hold()
    page.send("Go on")
    page.server.give(2)
    page.reads("li:last-child .body", "item")
    page.script(OBSERVE)
    counts = []
    for _ in range(3):
        before = page.script("return { ...changes, tokens: shown.at(-1).node.tokens.length }")
        for _ in range(100):
            page.server.give(1)
        page.until("return shown.at(-1).node.tokens.length === arguments[0]", before["tokens"] + 100)
        page.script("return new Promise(requestAnimationFrame)")
        after = page.script("return changes")
        counts.append({name: after[name] - before[name] for name in after})
    page.server.give(1000)
    page.reads("#send", "Send")
    for count in counts:
        assert 0 < count["records"] <= 100 * 8, counts
        assert count["nodes"] <= 100 * 8, counts
        assert count["elsewhere"] == 0, counts
    assert counts[2]["nodes"] <= 3 * counts[0]["nodes"] + 100, counts
    offscreen = "return getComputedStyle(document.querySelector('#thread > li')).contentVisibility"
    assert page.script(offscreen) == "auto"
    drawn = page.script("return document.querySelectorAll('.tokens').length")
    assert drawn == (1 if mode == "tokens" else 0)


def test_what_a_lost_server_leaves(page: Page) -> None:
    """An answer that breaks off is kept, a message that found no server is sent later, and nothing hangs."""
    port = page.server.server_address[1]
    page.server.reply = "One two three."
    page.server.hold()
    page.send("Count")
    page.server.give(2)
    page.reads("article.assistant .body", "One two")
    page.server.stop()
    page.reads(".assistant .note", "The connection was lost. What was written is kept.")
    page.reads("#send", "Send")
    page.reads("#server", "No connection to the server.")
    page.send("Are you there?")
    page.reads("li:last-child .assistant .note", "This is sent as soon as the server answers.")
    assert page.text("#send") == "Stop"
    page.server = Scripted(port)
    page.server.health = 503
    page.reads("#server", "The server is loading its model")
    page.server.models, page.server.reply, page.server.health = [model("newer")], "I am back.", 200
    page.reads("li:last-child .body", "I am back.")
    page.reads("#toast", "The server is back.")
    page.until("return !document.querySelector('#server').checkVisibility() && !running.size")
    [asked] = page.server.requests
    assert [m["content"] for m in asked["messages"]] == ["Count", "One two", "Are you there?"]
    page.reads("#about", "newer")
    page.click("li:nth-child(2) [data-do=again]")
    page.reads("li:nth-child(2) .body", "I am back.")
    assert page.text("li:nth-child(2) [role=img]") == "2/2"


def test_waiting_for_a_server_can_be_stopped_and_the_message_is_kept(page: Page) -> None:
    port = page.server.server_address[1]
    page.server.stop()
    page.send("Hello?")
    page.reads(".assistant .note", "This is sent as soon as the server answers.")
    page.click("#send")
    page.reads(".assistant .note", "Stopped.")
    page.server = Scripted(port)
    page.until("return document.querySelector('#server').hidden")
    page.driver.refresh()
    page.until("return shown.length === 2 && document.querySelector('#about').textContent")
    assert page.bodies() == ["Hello?", ""]
    assert page.server.requests == []
    page.click("li:last-child [data-do=again]")
    page.reads("li:last-child .body", "Hello there.")
    assert page.script("return document.querySelectorAll('[role=img]').length") == 0  # Silence is no version.


def problem(message: str, code: str | None = None) -> dict[str, Any]:
    """An error as the server tells it."""
    return {"message": message, "type": "invalid_request_error", "param": None, "code": code}


def test_a_busy_server_is_asked_again(page: Page) -> None:
    page.server.refusals = [(429, {"Retry-After": "1"}, problem("busy")), (503, {}, problem("loading"))]
    page.script("""
        window.notes = new Set();
        new MutationObserver(() => notes.add(document.querySelector(".assistant .note")?.textContent))
          .observe(document.querySelector("#thread"), { subtree: true, childList: true });
    """)
    page.send("Hello")
    page.reads("article.assistant .body", "Hello there.")
    notes = page.script("return [...notes]")
    assert "The server is busy. Trying again in 1 s." in notes
    assert "This is sent as soon as the server answers." in notes
    assert len(page.server.requests) == 3
    assert page.text(".assistant .note") == ""


def test_errors_are_told_and_can_be_mended(page: Page) -> None:
    page.server.refusals = [(400, {}, problem("temperature is too hot")), (500, {}, problem("the engine broke"))]
    for i, why in enumerate(["temperature is too hot", "the engine broke"]):
        page.send(f"Hello {i}")
        page.reads("li:last-child .assistant .note", f"The server could not answer: {why}")
        assert page.text("#send") == "Send"
    page.click("li:last-child [data-do=again]")
    page.reads("li:last-child .body", "Hello there.")
    # Templates want the sides in turns, so two questions without an answer between them are one.
    assert page.server.requests[-1]["messages"] == [{"role": "user", "content": "Hello 0\n\nHello 1"}]
    page.until("return !running.size")
    page.server.failure = problem("the device is gone")
    page.send("More")
    page.reads("li:last-child .assistant .note", "the device is gone")
    assert page.bodies()[-1] == "Hello there."


def test_a_conversation_longer_than_the_context_forgets_its_oldest_messages(page: Page) -> None:
    bring_in(page, conversation(40))
    page.click("#list a")
    page.until("return shown.length === 40")
    page.server.refusals = [(400, {}, problem("too long", "context_length_exceeded"))] * 2
    assert page.ask("Last") == "Hello there."
    page.reads("li:last-child .assistant .note", "the oldest 20 messages were left out")
    messages = page.server.requests[-1]["messages"]
    assert (messages[0]["role"], messages[-1]["content"], len(messages)) == ("user", "Last", 41 - 20)


def test_a_key_is_asked_for_and_kept_for_the_tab(page: Page) -> None:
    page.server.key = "secret"
    page.driver.refresh()
    page.find("#key input").send_keys("wrong\n")
    page.reads("#key small", "The key was not accepted.")
    page.find("#key input").send_keys("secret\n")
    page.reads("#about", "tiny")
    assert page.ask("Hello") == "Hello there."
    page.open()
    assert page.ask("Hello") == "Hello there."
    kept = page.script("return [JSON.stringify({...localStorage}), sessionStorage.getItem('gpt-jax-key')]")
    assert "secret" not in kept[0]
    assert kept[1] == "secret"
    page.server.key = "changed"
    page.send("Still?")
    page.find("#key")
    page.press("\ue00c")
    page.reads("li:last-child .assistant .note", "The key was not accepted.")
    page.click("li:last-child [data-do=again]")
    page.find("#key input").send_keys("changed\n")
    page.reads("li:last-child .body", "Hello there.")


def test_export_and_import(page: Page) -> None:
    page.server.reply = lambda asked: f"To {asked['messages'][-1]['content']} **你好**"
    page.ask("one")
    page.ask("two")
    page.click("li:nth-child(3) [data-do=edit]")
    page.find(".edit textarea").send_keys(" again\n")
    page.reads("li:last-child .body", "To two again")
    page.until("return !running.size")
    page.click("#set")
    page.find("[name=temperature]").send_keys("0.5")
    page.find("[name=system]").send_keys("Be brief.")
    page.click("#settings .main")
    page.open()
    page.ask("other")
    page.click("#export-all")
    file = downloaded(page)
    data = json.loads(file.read_text(encoding="utf-8"))
    assert sorted(one["title"] for one in data["conversations"]) == ["one", "other"]
    bring_in(page, file.read_text(encoding="utf-8"))
    page.reads("#toast", "Imported: 2")
    page.until("return document.querySelectorAll('#list a').length === 4")
    page.click("#export-all")
    again = json.loads(downloaded(page).read_text(encoding="utf-8"))
    for one in [*data["conversations"], *again["conversations"]]:
        del one["id"]
    by_title = [sorted(json.dumps(c, sort_keys=True) for c in d["conversations"]) for d in (data, again)]
    assert by_title[1] == sorted(by_title[0] * 2)
    page.click("#list li:nth-child(2) a")  # An imported one works as any other does.
    page.until("return current")
    before = page.bodies()
    page.ask("more")
    assert page.bodies()[: len(before)] == before


def downloaded(page: Page) -> Path:
    """The file that was downloaded, taken out of its folder."""
    folder: Path = page.driver.downloads
    end = time.monotonic() + 60
    while not (files := list(folder.glob("*.json"))) and time.monotonic() < end:
        time.sleep(0.05)
    return files[0].rename(folder / "taken")


def test_files_that_are_no_exports_change_nothing(page: Page) -> None:
    page.ask("mine")
    good = conversation(2)
    part = good["conversations"][0]
    first, second = part["messages"]

    def changed(**fields: Any) -> dict[str, Any]:
        return {**good, "conversations": [part, {**part, **fields}]}

    def message(**fields: Any) -> dict[str, Any]:
        return changed(messages=[{**first, **fields}, second])

    bad: list[tuple[Any, str]] = [
        ("{", "the file is not JSON"),
        ([], "the file is not an export of this page"),
        ({**good, "version": 2}, "the file is not an export of this page"),
        (changed(messages=None), "conversation 2 of the file has a wrong messages"),
        (changed(title=1), "wrong title"),
        (changed(settings={"temperature": "hot"}), "wrong settings"),
        (message(role="system"), "wrong role of a message"),
        (message(content=None), "wrong content of a message"),
        (message(parent=second["id"]), "wrong parent of a message"),
        (message(id="__proto__"), "wrong id of a message"),
        (message(id=second["id"]), "wrong id of a message"),
        (message(tokens=[["a", "b", []]]), "wrong token"),
    ]
    for data, why in bad:
        bring_in(page, data)
        page.reads("#toast", why)
        page.script("document.querySelector('#toast').replaceChildren()")
    page.open()
    page.until("return document.querySelectorAll('#list a').length === 1")
    assert page.text("#list") == "mine"


ARROW_LEFT, ARROW_RIGHT, END, HOME = "\ue012", "\ue014", "\ue010", "\ue011"
CONTROL, SHIFT, TAB, ENTER, ESCAPE = "\ue009", "\ue008", "\ue004", "\ue007", "\ue00c"


def test_tokens_show_their_probabilities_and_alternatives(page: Page) -> None:
    page.server.reply = "One two three 文字 five."
    page.server.alternatives = [(" second", -2.0), ("\n", -3.0)]
    page.ask("Count")
    page.click("#tokens")
    page.until("return document.querySelectorAll('.tokens span').length === 5")
    assert page.script("return document.querySelector('.tokens').textContent") == "One two three 文字 five."
    assert page.script("return document.querySelector('.tokens span').className") == "other"
    shades = "return [...document.querySelectorAll('.tokens span')].map((e) => getComputedStyle(e).backgroundColor)"
    assert len(set(page.script(shades))) == 2
    page.find(".tokens span:nth-child(2)").click()
    page.reads("#panel", "probability 77.9 % · log-probability -0.25")
    bars = page.script("return [...document.querySelectorAll('#panel li')].map((li) => li.innerText.split('\\n'))")
    assert bars == [["␣two", "77.9 %"], ["␣second", "13.5 %"], ["↵", "5 %"], ["all others", "3.6 %"]]
    wide = "return [...document.querySelectorAll('#panel li')].map((li) => Number(li.style.getPropertyValue('--p')))"
    assert page.script(wide) == pytest.approx([0.7788, 0.1353, 0.0498, 0.0361], abs=1e-4)
    page.press(ARROW_LEFT)
    page.reads("#panel", "log-probability -1.75")
    described = "return document.getElementById(document.activeElement.getAttribute('aria-describedby')).innerText"
    assert "␣other" in page.script(described)
    assert page.focused() == "One 17.4 %"
    page.press(END)
    assert page.focused() == "␣five. 77.9 %"
    page.press(ARROW_RIGHT)
    assert page.focused() == "␣five. 77.9 %"
    page.press(ARROW_LEFT)
    assert page.focused().startswith("␣文字")
    page.press(ESCAPE)
    assert page.script("return document.querySelector('#panel').hidden")
    page.server.hold()  # Also while the answer comes, and after a reload.
    page.send("Again")
    page.server.give(2)
    page.reads("li:last-child .tokens", "One two")
    page.server.give(3)
    page.until("return !running.size")
    page.driver.refresh()
    page.until("return document.querySelectorAll('.tokens span').length === 10")
    assert page.script("return document.querySelector('.tokens').textContent") == "One two three 文字 five."
    page.click("#tokens")
    assert page.bodies()[1] == "One two three 文字 five."


def test_a_model_of_texts_continues_them_and_branches_at_a_token(page: Page) -> None:
    page.server.models = [model("stories", chat=False), model("talker")]
    page.open()
    page.reads("#about", "continues texts")
    page.reads("#empty", "This model continues texts")
    page.server.reply = " there was a cat. **Not bold.**"
    page.server.alternatives = [(" dog.", -2.0)]
    assert page.ask("Once upon a time") == page.server.reply
    asked = page.server.requests[-1]
    assert (asked["prompt"], asked["logprobs"], asked["max_tokens"]) == ("Once upon a time", 5, 200)
    assert "messages" not in asked
    page.server.reply = " He sat."
    page.click("[data-do=continue]")
    page.reads("li:last-child .body", "**Not bold.** He sat.")
    assert page.server.requests[-1]["prompt"] == "Once upon a time there was a cat. **Not bold.**"
    page.until("return !running.size")
    assert page.text("[role=img]") == "2/2"
    page.click("#tokens")
    page.until("return document.querySelectorAll('.tokens span').length === 8")
    page.find(".tokens span:nth-child(5)").click()
    page.press(ENTER)
    assert page.focused() == "␣dog."
    page.press(ENTER)
    page.until("return shown.at(-1).node.content === ' there was a cat. dog. He sat.' && !running.size")
    assert page.server.requests[-1]["prompt"] == "Once upon a time there was a cat. dog."
    assert page.text("[role=img]") == "3/3"
    page.script("const s = document.querySelector('#model'); s.value = 'talker'; s.dispatchEvent(new Event('change'))")
    page.ask("And now?")
    assert page.server.requests[-1]["model"] == "talker"
    assert [m["role"] for m in page.server.requests[-1]["messages"]] == ["user", "assistant", "user"]


def test_settings_belong_to_a_conversation(page: Page) -> None:
    page.click("#set")
    for name, value in {"system": "Be brief.\nBe kind.", "temperature": "0.5", "seed": "7", "max_tokens": "9"}.items():
        page.find(f"[name={name}]").send_keys(value)
    page.find("[name=stop]").send_keys("END\n\\n\\n")
    page.find("[name=top_p]").send_keys("3")
    page.click("#settings .main")
    assert page.script("return document.querySelector('#settings').open")  # The browser says why: top_p is at most 1.
    page.find("[name=top_p]").clear()
    page.find("[name=alternatives]").send_keys("0")
    page.click("#settings .main")
    page.ask("Hello")
    asked = page.server.requests[-1]
    assert asked["messages"][0] == {"role": "system", "content": "Be brief.\nBe kind."}
    expected = {"temperature": 0.5, "seed": 7, "max_tokens": 9, "stop": ["END", "\n\n"]}
    assert {name: asked[name] for name in expected} == expected
    assert "top_p" not in asked
    assert "logprobs" not in asked
    page.server.finish = "length"
    page.ask("More")
    assert page.text("li:last-child .note") == "The answer ended at its longest length."
    page.press(CONTROL, "k")
    page.ask("Other")
    fields = {"model", "stream", "stream_options", "messages", "logprobs", "top_logprobs"}
    assert {*page.server.requests[-1]} == fields
    page.click("#list li:nth-child(2) a")
    page.until("return shown.length === 4")
    page.click("#set")
    assert page.script("return document.querySelector('[name=seed]').value") == "7"


def test_conversations_are_renamed_found_and_deleted_with_a_way_back(page: Page) -> None:
    page.server.reply = "A word about zebras."
    for name in ("first", "second", "third"):
        page.press(CONTROL, "k")
        page.ask(name)
    assert page.text("#list").split("\n") == ["third", "second", "first"]
    title = page.find("#title")
    title.clear()
    title.send_keys("renamed\n")
    page.reads("#list", "renamed")
    page.server.reply = "Nothing."
    page.click("#list li:nth-child(3) a")
    page.until("return current?.record.title === 'first'")
    page.ask("Do you know Lions?")
    for text, found in {"ZEBRA": 3, "lions": 1, "renamed": 1, "absent": 0}.items():
        page.find("#search").clear()
        page.find("#search").send_keys(text)
        page.reads("#nothing", f"{found} found")
        page.until("return document.querySelectorAll('#list a').length === arguments[0]", found)
    page.find("#search").send_keys("\ue003" * 6)
    page.until("return document.querySelectorAll('#list a').length === 3")
    page.click("#dots")
    page.click("#more [data-do=delete]")
    page.until("return document.querySelectorAll('#list a').length === 2")
    assert page.bodies() == []
    page.click("#toast button")
    page.until("return document.querySelectorAll('#list a').length === 3")
    page.until("return shown.length === 4")
    page.click("#dots")
    page.click("#more [data-do=delete]")
    page.until("return document.querySelectorAll('#list a').length === 2")
    page.script("window.purged = purge(Infinity)")
    page.until("return purged.then(() => true)")
    left = "return transact('readonly', (c, m, t) => Promise.all([c, m, t].map((s) => got(s.count()))))"
    assert page.script(left) == [2, 4, 2]
    page.open()
    page.until("return document.querySelectorAll('#list a').length === 2")


def test_two_tabs_do_not_harm_each_other(page: Page) -> None:
    page.server.reply = lambda asked: f"To {asked['messages'][-1]['content']}"
    page.ask("start")
    first, address = page.driver.current_window_handle, page.script("return location.hash")
    page.driver.switch_to.new_window("tab")
    try:
        page.open(address)
        second = page.driver.current_window_handle
        page.until("return shown.length === 2")
        page.ask("from the second")
        page.driver.switch_to.window(first)
        page.until("return shown.length === 4")
        assert page.bodies()[2:] == ["from the second", "To from the second"]
        page.click("li:nth-child(3) [data-do=edit]")
        page.find(".edit textarea").send_keys(" and first\n")
        page.reads("li:last-child .body", "To from the second and first")
        page.until("return !running.size")
        # A tab that has not heard of a change yet keeps it all the same.
        page.script("window.hear = channel.onmessage; channel.onmessage = null")
        page.driver.switch_to.window(second)
        page.find("#title").send_keys(" of both\n")
        page.ask("more")
        page.driver.switch_to.window(first)
        page.click("#set")
        page.find("[name=seed]").send_keys("3")
        page.click("#settings .main")
        page.script("channel.onmessage = window.hear")
        page.driver.switch_to.window(second)
        page.until("return current.record.settings.seed === 3")
        page.driver.refresh()
        page.until("return shown.length >= 4")
        contents = page.script("return [...current.nodes.values()].map((node) => node.content).sort()")
        assert contents == sorted(
            ["start", "To start", "from the second", "To from the second", "from the second and first",
             "To from the second and first", "more", "To more"]
        )  # fmt: skip
        kept = page.script("return [current.record.title, current.record.settings.seed]")
        assert kept == ["start of both", 3]
        page.click("#dots")
        page.click("#more [data-do=delete]")
        page.driver.switch_to.window(first)
        page.reads("#toast", "deleted in another tab")
        assert page.bodies() == []
        page.driver.switch_to.window(second)
        page.click("#toast button")
        page.driver.switch_to.window(first)
        page.until("return document.querySelectorAll('#list a').length === 1")
    finally:
        for handle in page.driver.window_handles:
            if handle != first:
                page.driver.switch_to.window(handle)
                page.driver.close()
        page.driver.switch_to.window(first)


def test_a_full_storage_is_told_and_loses_nothing(page: Page) -> None:
    page.ask("kept")
    page.script("""
        window.put = IDBObjectStore.prototype.put;
        IDBObjectStore.prototype.put = () => { throw new DOMException("no room", "QuotaExceededError"); };
    """)
    page.ask("not kept yet")
    page.reads("#toast", "The browser's storage is full")
    assert page.bodies()[2:] == ["not kept yet", "Hello there."]
    page.find("#title").send_keys(" and renamed\n")
    page.script("IDBObjectStore.prototype.put = window.put")
    page.ask("kept, too")
    page.until("return [...chats.values()].every((chat) => !chat.unsaved.size)")
    page.open(page.script("return location.hash"))
    page.until("return shown.length === 6")
    assert page.script("return current.record.title") == "kept and renamed"
    assert page.bodies()[2:5:2] == ["not kept yet", "kept, too"]


def test_a_browser_that_forbids_storage_can_chat(page: Page) -> None:
    code = "Object.defineProperty(window, 'indexedDB', { get() { throw new DOMException('no', 'SecurityError'); } });"
    script = page.command("Page.addScriptToEvaluateOnNewDocument", source=code)
    try:
        page.open()
        page.reads("#toast", "This browser lets the page keep nothing")
        page.ask("one")
        page.press(CONTROL, "k")
        page.ask("two")
        page.click("#list li:nth-child(2) a")
        page.until("return shown.length === 2")
        assert page.bodies() == ["one", "Hello there."]
    finally:
        page.command("Page.removeScriptToEvaluateOnNewDocument", **script)


def test_everything_can_be_done_by_keyboard(page: Page) -> None:
    page.press(TAB)
    page.script("document.activeElement.blur(); document.body.focus(); getSelection().removeAllRanges()")
    page.script("document.querySelector('.skip').focus()")
    page.press(ENTER)
    assert page.script("return document.activeElement.id") == "prompt"
    page.press("two")
    page.press(SHIFT, ENTER)
    page.press("lines" + ENTER)
    page.reads("article.assistant .body", "Hello there.")
    assert page.bodies()[0] == "two\nlines"
    page.until("return !running.size")
    reached = set()
    page.script("document.querySelector('.skip').focus()")
    for _ in range(60):
        page.press(TAB)
        reached.add(page.focused())
        outline = (
            "const s = getComputedStyle(document.activeElement); return s.outlineStyle !== 'none' && s.outlineWidth"
        )
        assert page.script(outline) or page.script("return document.activeElement.matches('#prompt, body')")
        if page.script("return document.activeElement === document.querySelector('#send')"):
            break
    assert reached >= {
        "New conversation\nCtrl K", "Search", "two", "Import", "Export all", "Colours", "Name of the conversation",
        "Tokens", "Settings", "More", "Messages", "Copy", "Edit", "Regenerate", "Message", "Send"
    }  # fmt: skip
    page.script("document.querySelector('#dots').focus()")
    page.press(ENTER)
    page.press(TAB)
    assert page.focused() == "Rename"
    page.press(ENTER)
    assert page.script("return document.activeElement.id") == "title"
    page.press("renamed" + ENTER)
    page.reads("#list", "renamed")
    page.script("document.querySelector('#set').focus()")
    page.press(ENTER)
    page.find("#settings")
    page.press(ESCAPE)
    assert not page.script("return document.querySelector('#settings').open")
    assert page.focused() == "Settings"
    page.press(CONTROL, "k")
    page.until("return !current")
    page.press("next" + ENTER)
    page.until("return shown.length === 2")


def test_chinese(page: Page) -> None:
    page.language("zh-CN")
    page.open()
    assert page.script("return document.documentElement.lang") == "zh-Hans"
    assert page.text("#send") == "发送"
    tables = page.script("return Object.values(WORDS).map((words) => Object.keys(words).sort().join())")
    assert tables[0] == tables[1]
    values = "return Object.values(WORDS).map((w) => Object.entries(w).map(([k, v]) => [k, v.match(/{\\w+}/g)].join()))"
    assert sorted(page.script(values)[0]) == sorted(page.script(values)[1])
    said = page.script("return document.body.innerText") + page.script(
        "return document.querySelector('form').innerText"
    )
    assert not re.findall(r"[A-Z][a-z]+", said.replace("Enter", "").replace("Shift", "").replace("Ctrl", ""))
    page.server.reply = "你好。 **「世界」**很大。"
    page.find("#prompt").click()
    page.command("Input.imeSetComposition", text="ni hao", selectionStart=6, selectionEnd=6)
    # Enter ends the composition. Chrome tells it as a key that the input method has taken.
    composing = "new KeyboardEvent('keydown', { key: 'Enter', isComposing: arguments[0], keyCode: arguments[1], %s })"
    for is_composing, code in ((True, 13), (False, 229)):
        event = composing % "bubbles: true, cancelable: true"
        page.script(f"document.querySelector('#prompt').dispatchEvent({event})", is_composing, code)
    assert page.server.requests == []
    assert page.script("return document.querySelector('#prompt').value") == "ni hao"
    page.command("Input.insertText", text="你好世界")
    assert page.script("return document.querySelector('#prompt').value") == "你好世界"
    page.press(ENTER)
    page.reads("article.assistant .body", "你好。 「世界」很大。")
    assert page.script("return document.querySelector('strong').textContent") == "「世界」"
    page.until("return !running.size")
    assert page.text("#list") == "你好世界"
    assert re.search(r"\d 个词元 · .*词元/秒 · 首个词元 .* 秒", page.text(".stats"))


def test_right_to_left_texts_and_code_keep_their_direction(page: Page) -> None:
    page.server.reply = "שלום עולם\n\n```\ncode\n```\n\nand English"
    page.ask("مرحبا")
    directions = "return [...document.querySelectorAll(arguments[0])].map((e) => getComputedStyle(e).direction)"
    assert page.script(directions, ".user .body") == ["rtl"]
    assert page.script(directions, ".assistant .body > *") == ["rtl", "ltr", "ltr"]


def test_a_narrow_screen_has_a_drawer(page: Page) -> None:
    page.server.reply = MARKDOWN + "\n\n" + "word" * 100
    page.ask("A question that is long enough to need more than one line on a narrow screen")
    page.resize(320, 640)
    page.open(page.script("return location.hash"))
    page.until("return shown.length === 2")
    for _ in range(2):
        assert page.script("return document.documentElement.scrollWidth") == 320
        assert page.script("return document.querySelector('#scroll').scrollWidth") <= 320
        page.click("#tokens")
        page.until("return document.querySelector('.tokens')") if _ == 0 else None
    assert not page.script("return document.querySelector('#side').checkVisibility({ visibilityProperty: true })")
    page.click("#drawer")
    page.until("return document.querySelector('#side').getBoundingClientRect().left === 0")
    assert page.focused().startswith("New conversation")
    page.press(ESCAPE)
    page.until("return document.querySelector('#side').getBoundingClientRect().right <= 0")
    assert page.focused() == "Conversations"
    page.click("#drawer")
    page.click("#list a")
    page.until("return document.querySelector('#side').getBoundingClientRect().right <= 0")


# The page's source, and what checkers say of it.


def test_the_page_makes_no_markup_of_strings_and_fetches_nothing_from_elsewhere() -> None:
    source = PAGE.read_text(encoding="utf-8")
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|setHTML|createContextualFragment|DOMParser|srcdoc|"
        r"\beval\b|new Function|setTimeout\(\s*[\"'`]|setInterval|importScripts|\bimport\(|javascript:|"
        r"\son\w+\s*=\s*[\"']|\sstyle\s*=\s*[\"']|@import|url\(|<base|<iframe|<img|postMessage\([^)]*\*|setAttribute\([\"']on"
    )
    assert re.findall(forbidden, source) == []
    assert re.findall(r"(?:https?:)?//[\w.-]+\.\w+", source.replace("http://www.w3.org/2000/svg", "")) == []
    assert re.findall("<link[^>]*?href=.{6}", source) == ['<link rel="icon" href="data:']
    assert (source.count("<script"), source.count("<style")) == (1, 1)
    assert max(map(len, source.splitlines())) <= 120


@pytest.fixture(scope="session")
def axe(pytestconfig: pytest.Config) -> str:
    """The source of axe-core, which checks accessibility: the file that the variable AXE_CORE names, or from npm."""
    if given := os.environ.get("AXE_CORE"):
        return Path(given).read_text(encoding="utf-8")
    folder = downloaded_by_npm(pytestconfig, "axe", "axe-core@4.14.1")
    return (folder / "axe.min.js").read_text(encoding="utf-8")


def test_axe_finds_nothing(page: Page, axe: str) -> None:
    page.server.models = [model("tiny"), model("other")]
    page.server.reply, page.server.alternatives = MARKDOWN, [(" a", -2.0), (" b", -3.0)]
    page.ask("Show me everything")
    page.ask("Once more")
    page.click("li:last-child [data-do=again]")
    page.until("return !running.size && shown.length === 4")
    page.driver.set_script_timeout(300)

    def check(state: str) -> None:
        if not page.script("return 'axe' in window"):
            page.command("Runtime.evaluate", expression=axe)
        found = page.driver.execute_async_script(
            """
            const done = arguments[0];
            axe.run({ resultTypes: ["violations"] }).then(({ violations }) =>
              done(violations.map(({ id, impact, nodes }) => [id, impact, nodes[0].html, nodes[0].failureSummary])));
            """
        )
        assert found == [], state

    for scheme in ("light", "dark"):
        page.colours(scheme)
        check(scheme)
        page.click("#tokens")
        page.find(".tokens span:nth-child(3)").click()
        page.find("#panel")
        check(f"{scheme}, tokens")
        page.click("#tokens")
        page.click("#set")
        check(f"{scheme}, settings")
        page.press(ESCAPE)
        page.resize(360)
        page.script("document.activeElement.blur()")
        check(f"{scheme}, narrow")
        page.click("#drawer")
        page.until("return document.querySelector('#side').getBoundingClientRect().left === 0")
        check(f"{scheme}, drawer")
        page.press(ESCAPE)
        page.command("Emulation.clearDeviceMetricsOverride")
    page.press(CONTROL, "k")
    page.until("return !current")
    check("empty")


# Against the real server.


def test_a_conversation_with_the_real_server(chromium: Any, server: Running) -> None:
    with used(chromium, server) as page:
        page.reads("#about", "tiny · context of 256 tokens")
        page.click("#set")
        for name, value in {"max_tokens": "12", "seed": "1", "temperature": "2", "alternatives": "20"}.items():
            page.find(f"[name={name}]").send_keys(value)
        page.click("#settings .main")
        page.send("Hello 你好 <b>")
        page.until("return shown.length === 2 && !running.size")
        node = page.script("return shown[1].node")
        body: dict[str, Any] = {"max_tokens": 12, "seed": 1, "temperature": 2.0, "logprobs": True, "top_logprobs": 20}
        asked = [{"role": "user", "content": "Hello 你好 <b>"}]
        expected = server.post("/v1/chat/completions", messages=asked, **body)
        [choice] = expected["choices"]
        assert node["content"] == choice["message"]["content"]
        assert node["stats"]["tokens"] == expected["usage"]["completion_tokens"]
        assert node["stats"]["prompt"] == expected["usage"]["prompt_tokens"]
        content = choice["logprobs"]["content"]
        assert [token[:2] for token in node["tokens"]] == [[one["token"], one["logprob"]] for one in content]
        assert [len(token[2]) for token in node["tokens"]] == [20] * len(content)
        page.click("#tokens")
        page.until("return document.querySelectorAll('.tokens span').length === arguments[0]", len(content))
        page.find(".tokens span").click()
        page.reads("#panel", f"log-probability {round(content[0]['logprob'], 3):g}")
        page.click("#tokens")
        page.click("#set")
        page.find("[name=temperature]").send_keys("\ue003" * 4 + "3")
        assert not page.script("return document.querySelector('[name=temperature]').validity.valid")
        page.press(ESCAPE)
        page.ask("And then?")
        page.ask("a" * 300)
        page.reads("li:last-child .assistant .note", "context_length")


def test_stopping_frees_the_real_server(chromium: Any, server: Running) -> None:
    """Afterwards the server has nothing left to do, which its fixture checks."""
    with used(chromium, server) as page:
        for _ in range(3):
            page.press(CONTROL, "k")
            page.until("return !current")
            page.send("Hello")
            page.until("return running.size || shown.length")
            page.press(ESCAPE)
            page.until("return !running.size && shown.length === 2")


def test_the_real_server_with_a_key_and_a_model_of_texts(chromium: Any) -> None:
    with serving(tiny_engine(), ByteTokenizer(), ("stories",), Rules(keys=("secret",))) as server:
        page = Page(chromium, server)
        page.driver.get(server.url)
        page.find("#key input").send_keys("secret\n")
        page.reads("#about", "continues texts")
        page.send("x" * 200)  # The longest answer of all has no room in the context.
        page.until("return shown.length === 2 && !running.size")
        assert page.script("return shown[1].node.finish") in ("stop", "length")
        page.click("#tokens")
        page.until("return document.querySelector('.tokens span')")
        assert page.script("return document.querySelectorAll('.tokens span').length === shown[1].node.tokens.length")
        page.driver.get("about:blank")
        page.is_quiet()
