"""Takes the pictures of the chat page that the documents show, from a server that runs:

python -m gpt_jax serve --model path/to/SmolLM2-135M-Instruct
python -m tests.serve.screenshots http://127.0.0.1:8000 docs/images
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.serve.browser import Page, started

QUESTIONS = ("What is gravity? Answer in two sentences.", "Write a Python function that adds two numbers.")
SETTINGS = {"temperature": "0.5", "top_p": "0.9", "repetition_penalty": "1.1", "seed": "3"}


@dataclass
class Address:
    """A server that runs elsewhere."""

    url: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="where the server runs")
    parser.add_argument("out", type=Path, help="folder of the pictures")
    args = parser.parse_args()
    with TemporaryDirectory() as downloads, started(Path(downloads)) as driver:
        page = Page(driver, Address(args.url))
        page.resize(1280, 760)
        page.language("en-US")
        page.colours("light")
        page.open()
        page.seconds = 600
        page.click("#set")
        for name, value in SETTINGS.items():
            page.find(f"[name={name}]").send_keys(value)
        page.click("#settings .main")
        for question in QUESTIONS:
            page.ask(question)
        for name in ("light", "dark"):
            page.colours(name)
            picture(page, args.out / f"chat-{name}.png")
        page.colours("light")
        page.resize(360, 760)
        picture(page, args.out / "chat-narrow.png")
        page.resize(1280, 760)
        page.click("#tokens")
        page.script("document.querySelector('#scroll').scrollTop = 0")
        page.until("return document.querySelector('.tokens')")
        token = "return [...document.querySelectorAll('.tokens span')].find((e, i) => i > 8 && e.className === 'other')"
        page.script(f"({token.replace('return ', '() => ')})()?.focus()")
        picture(page, args.out / "chat-tokens.png")


def picture(page: Page, file: Path) -> None:
    """Keeps what the page shows, without the cursor and what only passes by."""
    page.script("document.querySelector('#toast').replaceChildren()")
    page.script("if (document.activeElement.id === 'prompt') document.activeElement.blur()")
    page.script("return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    file.parent.mkdir(parents=True, exist_ok=True)
    page.driver.save_screenshot(str(file))
    print(file, f"{file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
