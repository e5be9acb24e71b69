"""The whole way in a browser, from the invitation to a reward model; axe on every page, and the pictures.

By keyboard alone, with a draft that survives a reload, undo, a content warning and an item that is broken; two people
in conflict, and a senior who decides before the votes are shown.
"""

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
from rlhf_fast.config import RewardConfig
from rlhf_fast.data.records import read_comparisons
from rlhf_fast.feedback import quality
from rlhf_fast.feedback.app.security import Access
from rlhf_fast.feedback.app.server import application
from rlhf_fast.feedback.assignment import Judgement, next_task, submit
from rlhf_fast.feedback.store import Plan, Store
from rlhf_fast.trainers.reward import RewardTrainer

GOOD = "We will send a first draft by Monday."
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
    store.set_plan(Plan(judgements=2, gold_share=0.0, repeat_share=0.0, least_seconds=0.0))
    store.set_setting("warnings", {"quarrel": "people quarrel in it"})
    scale = ["Left, clearly", "Left", "Right", "Right, clearly"]
    tone = {"name": "tone", "title": "Tone", "description": "How it sounds.", "examples": ["Dear all,"], "scale": scale}
    store.set_setting("criteria", [{"name": "honesty", "title": "Honesty"}, tone])
    for i in range(22):
        answers = [f"{GOOD} ({i})", "Perhaps\u200b it could be done <b>soon</b>."]
        category = "quarrel" if i == 7 else "simple"
        store.add_prompt(f"When can you show a first draft of page {i}?", answers, category=category)
    app = application(store, Access("s" * 40), folder, rate=1000.0, burst=1000)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield store, f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def begin(page: Any, address: str, token: str) -> None:
    page.goto(f"{address}/join/{token}")
    for _ in range(2):  # the invitation, then the guidelines
        page.locator("button.main").focus()
        press(page, "Enter")


def press(page: Any, key: str) -> None:
    """A key that leads to another page."""
    with page.expect_navigation():
        page.keyboard.press(key)


def judge(page: Any, likes_good: bool = True, comment: str = "") -> None:
    left = str(page.locator("#left-head + .said").text_content())
    if page.locator(".hidden-item").count():
        page.keyboard.press("1")  # what is hidden is not answered
        assert (
            not page.locator("input[name=preference]:checked").count() and not page.locator("#left-head").is_visible()
        )
        page.keyboard.press("v")
        assert page.locator("#left-head").is_visible()
    for key in ("2" if left.startswith(GOOD) == likes_good else "6") + "qr":
        page.keyboard.press(key)
    if comment:
        page.keyboard.press("c")
        page.keyboard.type(comment)
        page.keyboard.press("Escape")
    press(page, "Enter")


def test_the_whole_way_from_the_invitation_to_a_reward_model(
    browser: Any, site: tuple[Store, str], tmp_path: Path, tiny_folder: Path
) -> None:
    store, address = site
    page = browser.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)

    begin(page, address, store.invite("Ann"))
    for count in range(20):
        judge(page)
        assert len(quality.counting_votes(store)) == count + 1
    assert "2 left for you; your pace" in str(page.locator(".progress").text_content())
    press(page, "u")
    assert len(quality.counting_votes(store)) == 19
    before = page.locator("input[name=preference]:checked").get_attribute("value")
    assert before in ("-2", "2")
    page.keyboard.press("5")
    page.keyboard.press("k")  # opens the criteria, at the first of them
    assert page.evaluate("document.activeElement.name") == "criterion honesty"
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.keyboard.press("c")
    page.keyboard.type("half a thought")
    sync_api.expect(page.locator("#status")).to_have_text("Draft saved")
    page.reload()
    assert page.locator("textarea[name=comment]").input_value() == "half a thought"
    assert page.locator("input[name=preference]:checked").get_attribute("value") == "1"
    assert page.locator("input[name='criterion tone']:checked").get_attribute("value") == "-2"
    page.keyboard.press("2" if before == "-2" else "6")
    press(page, "Enter")
    assert abs(quality.counting_votes(store)[-1]["criteria"]["tone"]) == 2
    page.keyboard.press("b")
    page.keyboard.type("cut off, q w e r")
    press(page, "Enter")
    assert quality.dashboard(store).reported == 1 and len(quality.counting_votes(store)) == 20

    begin(page, address, store.invite("Bob"))
    for _ in range(2):
        judge(page, likes_good=False, comment="by Bob")
    bob = store.people()[-1]
    while (task := next_task(store, bob)) is not None:  # the same by the store, which takes less time
        submit(store, bob, task.id, Judgement(-2 if task.left.startswith(GOOD) else 2, True, False, seconds=9.0))

    begin(page, address, store.invite("Cleo", "senior"))
    page.goto(f"{address}/senior")
    assert page.locator("main a").count() == 2
    page.locator("main a").first.focus()
    press(page, "Enter")
    assert "by Bob" not in page.content()
    judge(page)
    assert "by Bob" in page.content() and page.locator("main a").count() == 1

    begin(page, address, store.invite("Olga", "owner"))
    page.goto(f"{address}/owner")
    assert "41 / 42" in page.content()
    with page.expect_download() as found:
        page.click("a[download]")
    found.value.save_as(tmp_path / "comparisons.jsonl")
    rows = read_comparisons(tmp_path / "comparisons.jsonl")
    assert sum(row.chosen.startswith(GOOD) for row in rows) >= 20 and faults == []
    page.close()
    config = RewardConfig(max_steps=2, batch_size=4)
    RewardTrainer(tiny_folder, tmp_path / "comparisons.jsonl", tmp_path / "reward", config).train()
    assert (tmp_path / "reward" / "result.json").exists()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_shuts_people_out(browser: Any, site: tuple[Store, str], scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    store, address = site
    context = browser.new_context(color_scheme=scheme, viewport={"width": 1100, "height": 900}, bypass_csp=True)
    page = context.new_page()
    page.goto(f"{address}/join/{store.invite('Owner', 'owner')}")
    page.click("button.main")
    answers = [f"{GOOD} ({scheme})", "Perhaps\u200b it could be done <b>soon</b>."]
    store.add_prompt(f"When can you show a {scheme} first draft?", answers, category="simple")
    page.goto(address)  # now it is this person's
    pair = store.add_prompt(f"A quarrel in the {scheme}?", ["one", "two"], warning="people quarrel in it")[0]
    invitation = f"/join/{store.invite('Next')}"
    for path in (invitation, "/join/none", "/guidelines", "/", "/owner", "/senior", f"/senior/{pair}"):
        page.goto(address + path)
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        found = axe.Axe().run(page).response["violations"]
        assert [(one["id"], path) for one in found if one["impact"] in ("serious", "critical")] == []
    store.discard([pair])
    if os.environ.get("RLHF_FAST_PICTURES"):
        page.goto(address)
        for name, width in (("desktop", 1100), ("phone", 390)):
            page.set_viewport_size({"width": width, "height": 900})
            time.sleep(0.1)
            page.screenshot(path=PICTURES / f"annotate-{name}-{scheme}.png")
    context.close()
