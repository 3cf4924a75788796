"""The web page in a browser, used as a person uses it: Chromium without a window, controlled by Playwright.

Needs `pip install playwright` and Debian's `chromium`. OPENBLIP2_SCREENS names a folder for screenshots.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_runs
from openblip2.apps.search import update_index
from openblip2.progress import Progress

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no chromium here")]
EVIL = "<img src=x onerror=\"document.title='run'\">"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server of tiny runs with an index, in its own process, as the command starts it."""
    root = tiny_runs.trained(tmp_path_factory.mktemp("browser"))
    update_index(root / "data", str(root / "stage1"), root / "index", Progress(quiet=True))
    with socket.create_server(("127.0.0.1", 0)) as line:
        port = line.getsockname()[1]
    command = [sys.executable, "-m", "openblip2", "serve", str(root / "stage2"), "--index", str(root / "index")]
    server = subprocess.Popen([*command, "--port", str(port), "--token", "secret"])
    yield f"http://127.0.0.1:{port}/", root / "data"
    server.terminate()
    assert server.wait(20) == 143


@pytest.fixture
def page(address: tuple[str, Path]) -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})  # a phone's screen
        page.set_default_timeout(60_000)
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        outside: list[str] = []
        page.on(
            "request",
            lambda one: outside.append(one.url) if not one.url.startswith((address[0], "blob:", "data:")) else 0,
        )
        for _ in range(120):
            try:
                page.goto(address[0])
                break
            except playwright.Error:
                time.sleep(0.5)
        yield page
        assert wrong == []
        assert outside == [], "nothing is fetched from elsewhere"
        browser.close()


def shoot(page: Any, name: str) -> None:
    if folder := os.environ.get("OPENBLIP2_SCREENS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def test_a_person_finds_everything(page: Any, address: tuple[str, Path]) -> None:
    expect = playwright.expect
    expect(page.locator("#about")).to_contain_text(
        "stage2: describes pictures, answers questions, compares texts, searches a folder"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    expect(page.get_by_role("button", name="Describe it")).to_be_disabled()
    page.set_input_files("#file", str(address[1] / "0.png"))

    page.get_by_role("button", name="Describe it").click()
    page.get_by_role("textbox", name="Token").fill("secret")  # the page asks for it once
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#caption")).not_to_be_empty()

    for question in ("what is it?", f"and {EVIL}?"):
        page.get_by_label("Your question").fill(question)
        page.keyboard.press("Enter")
        expect(page.get_by_label("Your question")).to_have_value("")
    expect(page.locator("#turns .q")).to_have_count(2)
    expect(page.locator("#turns .a").last).not_to_be_empty()
    expect(page.locator("#turns .q").last).to_have_text(f"Youand {EVIL}?")  # shown as text, never run
    expect(page.locator("#turns .a").last).to_contain_text("Model")
    page.get_by_role("button", name="What is in the picture?").click()  # an example question
    expect(page.locator("#turns .q")).to_have_count(3)
    expect(page.get_by_label("Your question")).to_have_value("")

    page.get_by_label("Texts, one per line").fill("a red dog\na blue bus")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#matches tbody tr")).to_have_count(2)
    expect(page.locator("#matches tbody tr").first).to_contain_text(re.compile(r"\d\.\d{3}\s*\d+\.\d %"))

    page.get_by_label("Show where the model looks").fill("a red dog")
    page.get_by_role("button", name="Show map").click()
    expect(page.get_by_alt_text("with a map of where the model looks")).to_be_visible()
    expect(page.locator("#legend")).to_contain_text("Brighter areas matter more to the model for “a red dog” (ITC)")
    assert "picture" in page.evaluate("document.querySelector('#attend').parentElement.id")
    shoot(page, "picture")

    page.get_by_label("What to look for").fill("a blue bus")
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#hits li")).to_have_count(12)
    shoot(page, "search")
    page.locator("#hits button").first.click()
    expect(page.locator("#turns .q")).to_have_count(0)  # a new picture starts a new dialogue
    expect(page.get_by_alt_text("The chosen picture")).to_be_visible()
    assert page.title() == "openblip2"


def test_it_can_be_used_by_keyboard(page: Any, address: tuple[str, Path]) -> None:
    playwright.expect(page.locator("#about")).to_contain_text("stage2")
    page.set_input_files("#file", str(address[1] / "0.png"))
    reached: set[str] = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"file", "describe", "question", "texts", "about-text", "by", "wanted", "alike"} <= reached


def test_what_is_wrong_is_said(page: Any, address: tuple[str, Path], tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"no picture")
    playwright.expect(page.locator("#about")).to_contain_text("stage2")
    page.set_input_files("#file", str(tmp_path / "no.png"))
    page.get_by_role("button", name="Describe it").click()
    page.get_by_role("textbox", name="Token").fill("wrong")
    page.get_by_role("button", name="Continue").click()
    playwright.expect(page.locator("#describing").get_by_role("alert")).to_contain_text("token")
    page.reload()
    page.evaluate("sessionStorage.setItem('token', 'secret')")
    page.reload()
    playwright.expect(page.locator("#about")).to_contain_text("stage2")
    page.set_input_files("#file", str(tmp_path / "no.png"))
    page.get_by_role("button", name="Describe it").click()
    problem = page.locator("#describing").get_by_role("alert")  # the message is beside the button
    playwright.expect(problem).to_contain_text("is not a picture")
    page.set_input_files("#file", str(address[1] / "0.png"))
    page.get_by_role("button", name="Describe it").click()
    playwright.expect(page.locator("#caption")).not_to_be_empty()
    playwright.expect(problem).to_be_hidden()
