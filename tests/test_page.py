"""The page's script, run by node with a minimal document. `tests/test_browser.py` tests the page in a real browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import openblip2

FOLDER = Path(openblip2.__file__).parent / "apps" / "serve"
HTML = (FOLDER / "page.html").read_text(encoding="utf-8")
NODE = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="no node here")
def test_answers_errors_and_repeated_clicks() -> None:
    command = [str(NODE), str(Path(__file__).with_name("page.mjs")), str(FOLDER / "page.js")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "disabled_without_picture": True,
        "requests_of_two_clicks": 1,
        "waits": True,
        "aborted_by_another_picture": True,
        "waits_after_another_picture": False,
        "caption_under_b": "",
        "error": [False, "it went wrong"],
        "error_hidden_by_next_attempt": True,
        "caption": "a caption of b",
        "stopped": [True, False, True],
        "caption_after_stop": "",
    }


class Outline(HTMLParser):
    """The ids of the page, each with the ids of its ancestors."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.around: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        name = dict(attrs).get("id") or ""
        self.around[name] = list(self.open)
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(name)

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()


def test_the_page_has_what_the_script_uses() -> None:
    outline = Outline()
    outline.feed(HTML)
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    assert set(re.findall(r'\$\("([\w-]+)"\)', script)) <= outline.around.keys()
    # The map's button and legend are in the picture's section, so they are beside it on a phone too.
    assert "picture" in outline.around["attend"]
    assert "picture" in outline.around["legend"]


@pytest.mark.parametrize(
    "what", ["<strong>Limits.</strong>", "<strong>ITC</strong>", "<strong>ITM</strong>", "data-fills"]
)
def test_the_page_explains_itself(what: str) -> None:
    assert what in HTML
