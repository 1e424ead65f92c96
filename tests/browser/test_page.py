"""The page in headless Chromium: checked tokens, receipt, the lie and its rejection, a key. `make test-browser`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright
from tests.helpers import make_model
from tests.server.harness import Running, start_server

from veriattn.server.auth import new_key

pytestmark = pytest.mark.browser

expect.set_options(timeout=30_000)  # a slow machine is no failure
SCREENSHOTS = Path(os.environ.get("SCREENSHOTS", "build/screenshots"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "tiny"
    make_model(path, vocab_size=260)
    return path


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start_server(model, tmp_path_factory.mktemp("demo"), "", "--demo")
    yield running
    assert running.stop() == 0


@pytest.fixture
def page() -> Iterator[Page]:
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.fail("there is no Chromium: apt-get install chromium, or set CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1200, "height": 800})
        problems: list[str] = []
        opened.on("pageerror", lambda e: problems.append(str(e)))
        opened.on(
            "request", lambda r: None if "127.0.0.1" in r.url else problems.append(f"leaves the machine: {r.url}")
        )
        yield opened
        browser.close()
        assert problems == []


def shot(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def ask(page: Page, text: str, tokens: int = 20) -> None:
    page.fill("#prompt", text)
    page.fill("#max-tokens", str(tokens))
    page.click("#send")


def test_tokens_receipt_and_state(server: Running, page: Page) -> None:
    page.goto(server.url)
    expect(page.locator("#badge-ready")).to_have_text("ready")
    expect(page.locator("#badge-canary")).to_have_text("tamper canary caught")
    expect(page.locator("#tee")).to_contain_text("none")
    expect(page.locator("#nonce")).to_have_text("fresh, echoed")
    expect(page.locator("#model")).to_have_text("tiny")
    shot(page, "start")
    ask(page, "hello")
    receipt = page.locator("#receipt")
    expect(receipt).to_contain_text("verified, 2^-")
    expect(receipt.locator(".ok")).to_have_count(4)  # result, our request, what we received, our nonce
    expect(receipt.locator(".no")).to_have_count(0)
    tokens = int(page.inner_text("#tokens"))
    assert page.locator(".tok").count() == tokens + page.locator("#empty .tok").count()
    assert page.locator(".tok.unchecked").count() == 0
    assert "ms" in page.inner_text("#lag")
    shot(page, "answer")


def test_the_lie_is_shown_with_layer_and_operation(server: Running, page: Page) -> None:
    page.goto(server.url)
    page.check("#lie")
    ask(page, "hello", 200)
    card = page.locator(".rejection")
    expect(card).to_contain_text("Rejected: the prover was caught")
    expect(card).to_contain_text("mismatch")
    values = card.locator("dd").all_inner_texts()
    assert values[0] in ("freivalds_mismatch", "attention_mismatch")
    assert values[1].isdigit()
    assert values[2] in ("qkv", "attention", "o", "gate_up", "down")
    assert not page.is_checked("#lie")
    shot(page, "rejection")
    expect(page.locator("#badge-ready")).to_have_text("ready")
    ask(page, "again")
    expect(page.locator("#receipt")).to_contain_text("verified, 2^-")


def test_what_a_model_writes_is_text_and_never_markup(server: Running, page: Page) -> None:
    page.goto(server.url)
    ask(page, "<img src=x onerror=alert(1)><b>bold</b>", 4)
    expect(page.locator("#receipt")).to_contain_text("verified")
    assert page.locator("#messages img, #messages b").count() == 0
    assert "<img src=x" in page.inner_text(".message.user")


def test_narrow_and_dark(server: Running, page: Page) -> None:
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 380, "height": 800})
    page.goto(server.url)
    ask(page, "hello", 8)
    expect(page.locator("#receipt")).to_contain_text("verified")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    shot(page, "narrow-dark")


def test_a_key_is_asked_for_and_no_switch_without_demo(model: Path, tmp_path: Path, page: Page) -> None:
    key, digest = new_key()
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[key]]\nid = "a"\nsha256 = "{digest}"\n')
    server = start_server(model, tmp_path / "run", f"keys_file = {json.dumps(str(keys))}\n")
    page.goto(server.url)
    expect(page.locator("#api-key")).to_be_visible()
    page.fill("#api-key", key)
    page.dispatch_event("#api-key", "change")
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.locator("#lie-label")).to_be_hidden()
    ask(page, "hello", 8)
    expect(page.locator("#receipt")).to_contain_text("verified")
    assert server.stop() == 0
