"""The judging page in a browser: by keyboard alone, a draft that survives a reload, undo, axe, and the pictures."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
sync_api = pytest.importorskip("playwright.sync_api")
uvicorn = pytest.importorskip("uvicorn")
CHROMIUM = "/usr/bin/chromium"
if not os.path.exists(CHROMIUM):
    pytest.skip("needs Chromium", allow_module_level=True)

# ruff: noqa: E402
from rlhf_fast.feedback import quality
from rlhf_fast.feedback.app.security import Access
from rlhf_fast.feedback.app.server import application
from rlhf_fast.feedback.store import Plan, Store

PICTURES = Path(__file__).resolve().parents[3] / "docs" / "pictures"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, str]]:
    folder = tmp_path_factory.mktemp("votes")
    store = Store(folder / "votes.db")
    store.set_plan(Plan(judgements=4, gold_share=0.0, repeat_share=0.0, least_seconds=0.0))
    for i in range(22):
        answers = [f"We will send a first draft by Monday. ({i})", "Perhaps\u200b it could be done <b>soon</b>."]
        store.add_prompt(f"When can you show a first draft of page {i}?", answers, category="simple")
    app = application(store, Access("s" * 40), folder, rate=1000.0, burst=1000)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield store, f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def test_twenty_judgements_by_keyboard_with_undo_and_a_draft_that_stays(browser: Any, site: tuple[Store, str]) -> None:
    store, address = site
    page = browser.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    page.goto(f"{address}/join/{store.invite('Ann')}")
    for _ in range(2):  # the invitation, then the guidelines
        page.locator("button.main").focus()
        with page.expect_navigation():
            page.keyboard.press("Enter")
    for count in range(20):
        for key in "2qr":
            page.keyboard.press(key)
        with page.expect_navigation():
            page.keyboard.press("Enter")
        assert len(quality.counting_votes(store)) == count + 1
    with page.expect_navigation():
        page.keyboard.press("u")
    assert len(quality.counting_votes(store)) == 19
    assert page.locator("input[name=preference]:checked").get_attribute("value") == "-2"
    page.keyboard.press("5")
    page.keyboard.press("c")
    page.keyboard.type("half a thought")
    sync_api.expect(page.locator("#status")).to_have_text("Draft saved")
    page.reload()
    assert page.locator("textarea[name=comment]").input_value() == "half a thought"
    assert page.locator("input[name=preference]:checked").get_attribute("value") == "1"
    assert faults == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_shuts_people_out(browser: Any, site: tuple[Store, str], scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    store, address = site
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1100, "height": 900}, bypass_csp=True)
    page = context.new_page()
    page.goto(f"{address}/join/{store.invite('Owner', 'owner')}")
    page.click("button.main")
    for path in ("/guidelines", "/", "/owner", "/senior"):
        page.goto(address + path)
        found = axe.Axe().run(page).response["violations"]
        assert [(one["id"], path) for one in found if one["impact"] in ("serious", "critical")] == []
    if os.environ.get("RLHF_FAST_PICTURES"):
        page.goto(address)
        for name, width in (("desktop", 1100), ("phone", 390)):
            page.set_viewport_size({"width": width, "height": 900})
            time.sleep(0.1)
            page.screenshot(path=PICTURES / f"annotate-{name}-{scheme}.png")
    context.close()
