"""The pages: signing in, judging, deciding disputed items, the owner's dashboard. Every write is the store's."""

from __future__ import annotations

import hmac
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import yaml
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles

from rlhf_fast.feedback import assignment, criteria, exchange, quality
from rlhf_fast.feedback.app.hostile import shown
from rlhf_fast.feedback.app.security import COOKIE, LOGIN_SECONDS, Access, Guard, Logins, Rates
from rlhf_fast.feedback.assignment import Judgement, Task
from rlhf_fast.feedback.criteria import Criterion
from rlhf_fast.feedback.errors import FeedbackError, NotYours, Removed
from rlhf_fast.feedback.progress import progress
from rlhf_fast.feedback.store import Person, Store, mark_of

_HERE = Path(__file__).parent


class _Refused(Exception):
    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


def texts(language: str = "en") -> dict[str, Any]:
    """The words of the pages: of texts/ by name, or of another file by its path; English where it has none."""
    english: dict[str, Any] = yaml.safe_load((_HERE / "texts" / "en.yaml").read_text(encoding="utf-8"))
    file = Path(language) if language.endswith((".yaml", ".yml")) else _HERE / "texts" / f"{language}.yaml"
    if not file.is_file():
        raise FeedbackError(
            f"language: there is no file {file}; translate {_HERE / 'texts' / 'en.yaml'} and name the copy"
        )
    return english | (yaml.safe_load(file.read_text(encoding="utf-8")) or {})


def application(
    store: Store,
    access: Access,
    folder: Path,
    language: str = "en",
    rate: float = 10.0,
    burst: int = 60,
    wanted: int = 0,
) -> Any:
    """The ASGI application over `store`; `folder` takes the backups, `rate` is of one person's requests a second.

    Once `wanted` pairs are judged, nobody is given more; 0: all are.
    """
    words, logins = texts(language), Logins(access.secret)
    engine = jinja2.Environment(loader=jinja2.FileSystemLoader(_HERE / "templates"), autoescape=True, auto_reload=False)
    engine.filters["shown"] = lambda text: shown(str(text))
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/static", StaticFiles(directory=_HERE / "static"))

    def page(name: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(engine.get_template(name).render(t=words, **values), status)

    def told(heading: str, said: str, status: int = 200, **values: Any) -> HTMLResponse:
        return page("words.html", status, heading=heading, words=said, **values)

    def cookie(request: Request) -> tuple[int, str, str]:
        known: tuple[int, str, str] | None = request.scope["login"]  # as the guard read it
        if known is None:
            raise _Refused(401, words["not_signed_in"])
        return known

    def signed_in(request: Request) -> tuple[Person, str] | None:
        known = request.scope["login"]
        person = store.person(*known[:2]) if known else None
        return (person, known[2]) if known and person else None

    def login(request: Request) -> tuple[Person, str]:
        found = signed_in(request)
        if found is None:
            raise _Refused(401, words["not_signed_in"])
        return found

    async def form_of(request: Request) -> dict[str, str]:
        """The fields of a form whose token is the login's own."""
        try:
            form = await request.form(max_files=0, max_fields=100)
            fields = {key: value for key, value in form.items() if isinstance(value, str)}
        except Exception as error:  # whatever the parser raises of a malformed body
            raise _Refused(400, "The form cannot be read.") from error
        if not request.url.path.startswith("/join") and not _same(fields.get("csrf", ""), cookie(request)[2]):
            raise _Refused(403, "This form is not of your login. Reload the page and send it again.")
        return fields

    def of_role(*roles: str) -> Callable[[Request], tuple[Person, str]]:
        def check(request: Request) -> tuple[Person, str]:
            person, token = login(request)
            if person.role not in roles:
                raise _Refused(403, "This page is for others.")
            return person, token

        return check

    anyone, seniors, owners = login, of_role("senior", "owner"), of_role("owner")

    @app.exception_handler(_Refused)
    def refused(request: Request, error: _Refused) -> Response:
        return told(words["error"], str(error), error.status)

    @app.exception_handler(FeedbackError)
    def wrong(request: Request, error: FeedbackError) -> Response:
        person, token = signed_in(request) or (None, "")
        status = 404 if isinstance(error, NotYours) else 401 if isinstance(error, Removed) else 409
        return told(words["error"], str(error), status, person=person, csrf=token)

    @app.get("/join/{token}")
    def invitation(token: str) -> Response:
        if store.person_of(token) is None:
            raise _Refused(404, words["not_signed_in"])
        action = f"/join/{token}"
        return told(words["join_title"], words["join_text"], action=action, button=words["join_button"])

    @app.post("/join/{token}")
    def join(token: str, form: Any = Depends(form_of)) -> Response:
        person = store.join(token)
        answer = RedirectResponse("/guidelines", 303)
        options: dict[str, Any] = {"httponly": True, "samesite": "lax", "secure": access.is_secure}
        answer.set_cookie(COOKIE, logins.cookie(person.id, mark_of(token)), max_age=LOGIN_SECONDS, path="/", **options)
        return answer

    @app.post("/leave")
    def leave(form: Any = Depends(form_of)) -> Response:
        answer = told(words["title"], words["not_signed_in"])
        answer.delete_cookie(COOKIE, path="/")
        return answer

    @app.get("/guidelines")
    def show_guidelines(who: Any = Depends(anyone)) -> Response:
        values = {"person": who[0], "csrf": who[1], "action": "/begin", "button": words["guidelines_button"]}
        return told(words["guidelines"], str(store.setting("guidelines") or words["guidelines_text"]), **values)

    @app.post("/begin")
    def begin(form: Any = Depends(form_of)) -> Response:
        return RedirectResponse("/", 303)

    def item(who: Any, task: Task, status: int = 200, senior: bool = False, **values: Any) -> Response:
        steps = [(i - 3, label, str(i + 1)) for i, label in enumerate(words["steps"])]
        draft = {key: _yes_no(value) for key, value in task.draft.items()}
        kept = store.settings()
        asked = [(one, _labels(one, words)) for one in criteria.in_force(kept.get("criteria"))]
        guidelines = kept.get("guidelines") or words["guidelines_text"]
        warning = task.warning or (kept.get("warnings") or {}).get(task.category, "")
        pace, left = None if senior else assignment.pace(store, who[0]), task.of - task.done
        minutes = None if pace is None else math.ceil(left * pace / 60)
        facts = {"warning": warning, "pace": pace, "left": left, "minutes": minutes}
        values = {"draft": draft, "problem": "", **facts, **values}
        return page(
            "judge.html", status, person=who[0], csrf=who[1], task=task, steps=steps, criteria=asked, senior=senior,
            guidelines=guidelines, shown_at=f"{time.time():.1f}", action="/senior" if senior else "/judge", **values,
        )  # fmt: skip

    def next_of(who: Any, status: int = 200, problem: str = "") -> Response:
        undo = {"action": "/undo", "button": words["undo"], "quiet": True}  # one Enter more must not undo
        found = progress(store) if wanted else None
        if found and found.is_enough(wanted):
            return told(words["title"], words["enough"], person=who[0], csrf=who[1], **undo)
        task = assignment.next_task(store, who[0])
        if task is None:
            return told(words["title"], words["all_done"], person=who[0], csrf=who[1], **undo)
        if found:
            task = replace(task, done=found.judged, of=max(wanted, found.judged + 1))
        return item(who, task, status, problem=problem)

    # The two that people wait for sign in by themselves: a dependency would cost a thread more.
    @app.get("/")
    def next_item(request: Request) -> Response:
        return next_of(login(request))

    @app.post("/judge")
    def judge(request: Request, form: Any = Depends(form_of)) -> Response:
        who = login(request)
        if not {"preference", "left_ok", "right_ok"} <= form.keys():
            return next_of(who, 422, words["missing"])
        assignment.submit(store, who[0], _number(form, "task"), _judgement(form))
        return RedirectResponse("/", 303)

    @app.post("/draft")
    def draft(who: Any = Depends(anyone), form: Any = Depends(form_of)) -> Response:
        assignment.save_draft(store, who[0], _number(form, "task"), _draft(form))
        return PlainTextResponse("saved")

    @app.post("/away")
    def away(who: Any = Depends(anyone), form: Any = Depends(form_of)) -> Response:
        act = {"skip": assignment.skip, "broken": assignment.broken, "report": assignment.report}.get(form.get("act"))
        if act is None:
            raise _Refused(400, "The form cannot be read.")
        act(store, who[0], _number(form, "task"), form.get("reason", ""))
        return RedirectResponse("/", 303)

    @app.post("/undo")
    def undo(who: Any = Depends(anyone), form: Any = Depends(form_of)) -> Response:
        assignment.undo(store, who[0])
        return RedirectResponse("/", 303)

    @app.get("/senior")
    def queue(who: Any = Depends(seniors)) -> Response:
        return page("senior.html", person=who[0], csrf=who[1], items=quality.disputed(store), others=[])

    @app.get("/senior/{pair}")
    def dispute(pair: int, who: Any = Depends(seniors)) -> Response:
        return item(who, assignment.adjudication(store, who[0], pair), senior=True)

    @app.post("/senior")
    def decide(who: Any = Depends(seniors), form: Any = Depends(form_of)) -> Response:
        if not {"preference", "left_ok", "right_ok"} <= form.keys():
            raise _Refused(422, words["missing"])
        number = assignment.submit(store, who[0], _number(form, "task"), _judgement(form))
        votes = quality.counting_votes(store)
        own = next(vote for vote in votes if vote["id"] == number)
        said = [vote for vote in votes if vote["pair"] == own["pair"] and vote["id"] != number]
        sign = -1 if own["swapped"] else 1  # in the sides that the senior saw
        others = [
            {"answer": words["steps"][sign * vote["preference"] + 3], "comment": vote["comment"]} for vote in said
        ]
        return page("senior.html", person=who[0], csrf=who[1], items=quality.disputed(store), others=others)

    @app.get("/owner")
    def dashboard(who: Any = Depends(owners)) -> Response:
        figures = quality.dashboard(store)
        disputed = quality.disputed(store, 1.0, figures.needs.name)[:10] if figures.needs else []
        return page("owner.html", person=who[0], csrf=who[1], d=figures, disputed=disputed)

    @app.post("/owner/invite")
    def invite(request: Request, who: Any = Depends(owners), form: Any = Depends(form_of)) -> Response:
        return link_page(request, who, store.invite(form.get("name", ""), form.get("role", "")))

    @app.post("/owner/renew")
    def renew(request: Request, who: Any = Depends(owners), form: Any = Depends(form_of)) -> Response:
        return link_page(request, who, store.renew(_number(form, "person")))

    @app.post("/owner/remove")
    def remove(who: Any = Depends(owners), form: Any = Depends(form_of)) -> Response:
        store.remove_person(_number(form, "person"), form.get("votes", ""))
        return RedirectResponse("/owner", 303)

    def link_page(request: Request, who: Any, token: str) -> Response:
        link = f"{(access.public or str(request.base_url)).rstrip('/')}/join/{token}"
        return told(words["invite"], words["invite_link"], person=who[0], csrf=who[1], link=link, back="/owner")

    @app.get("/owner/comparisons.jsonl")
    def export(who: Any = Depends(owners)) -> Response:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in exchange.comparisons(store))
        return PlainTextResponse(lines, media_type="application/x-ndjson")

    @app.post("/owner/backup")
    def backup(who: Any = Depends(owners), form: Any = Depends(form_of)) -> Response:
        target = folder / f"backup-{time.strftime('%Y%m%d-%H%M%S')}.db"
        store.backup(target)
        return told(words["backup"], f"{words['backup_done']} {target}", person=who[0], csrf=who[1], back="/owner")

    joins = Rates(0.5, 20)
    return Guard(app, access, Rates(rate, burst), joins, logins)


def _same(a: str, b: str) -> bool:
    return hmac.compare_digest(a.encode("utf-8", "replace"), b.encode())


def _number(form: dict[str, str], name: str) -> int:
    text = form.get(name, "")
    if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) < 16):
        raise FeedbackError(f"{name}: {text!r:.50} came; expected a whole number")
    return int(text)


def _seconds(form: dict[str, str]) -> float:
    """What the script measured; without it, since the page was made."""
    try:
        return max(0.0, float(form["seconds"]) if form.get("seconds") else time.time() - float(form["shown_at"]))
    except (KeyError, ValueError):
        return 0.0


def _draft(form: dict[str, str]) -> dict[str, Any]:
    kept: dict[str, Any] = {"comment": form.get("comment", ""), "better_answer": form.get("better_answer", "")}
    if "preference" in form:
        kept["preference"] = _number(form, "preference")
    for name in ("left_ok", "right_ok"):
        if form.get(name) in ("yes", "no"):
            kept[name] = form[name] == "yes"
    names = [key for key in form if key.startswith("criterion ")]
    kept["criteria"] = {name.removeprefix("criterion "): _number(form, name) for name in names}
    kept["seconds"] = _seconds(form)
    return kept


def _judgement(form: dict[str, str]) -> Judgement:
    given = _draft(form)
    if not {"preference", "left_ok", "right_ok"} <= given.keys():
        raise FeedbackError("left_ok and right_ok: expected yes or no")
    return Judgement(**given)


def _labels(one: Criterion, words: dict[str, Any]) -> list[tuple[int, str, str]]:
    texts = one.scale or (words["left_short"], words["same_short"], words["right_short"])
    return [(value, label, "") for value, label in zip(one.values, texts, strict=True)]


def _yes_no(value: Any) -> Any:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
