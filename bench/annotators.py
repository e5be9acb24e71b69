"""Simulated annotators on a real server that is killed as they work: `python -m bench.annotators`

Each keeps one connection to `rlhf-fast annotate`, asks for a page, thinks, and sends its form; where no answer comes it
sends the same form again, as a reload in a browser does. The server is killed by SIGKILL at drawn numbers of
judgements and started anew. Afterwards the store is held against what the server had acknowledged.

They are signed in from the start, by cookies that the folder's secret signs: fifty people behind one address would
have to wait for the limit on sign-ins.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import sqlalchemy as sa
import torch
from tqdm import tqdm

from bench import harness
from rlhf_fast.feedback import tables as t
from rlhf_fast.feedback.app.security import COOKIE, Logins, read_secret
from rlhf_fast.feedback.store import Store, mark_of, plan_of
from tests import postgres

VERB = "import sys; from rlhf_fast.cli import main; sys.exit(main(sys.argv[1:]))"
TEXT = "It depends on what you need: the first way is shorter, the second is easier to change later on. " * 6
PATIENCE = 120.0  # seconds that a server may take to start, and to give any answer at all
PAUSE = 0.2  # seconds until a request that failed is sent again


@dataclass(frozen=True)
class Load:
    annotators: int = 50
    judgements: int = 5000
    each: int = 4  # people who judge a pair
    kills: int = 3
    think: float = 0.2  # seconds, on average, between a page and its answer; 0: none
    seed: int = 0


@dataclass
class Times:
    """Seconds of every submit and of every next page, and whether each was answered at the first attempt."""

    submit: list[float] = field(default_factory=list)
    page: list[float] = field(default_factory=list)
    at_once: list[bool] = field(default_factory=list)


@dataclass
class Run:
    load: Load
    seconds: float = 0.0
    down: float = 0.0  # of them without a server
    times: Times = field(default_factory=Times)
    acknowledged: dict[int, tuple[int, int]] = field(default_factory=dict)  # by task: person, preference as shown
    sent_again: int = 0
    limited: int = 0  # answers that said to wait, by the limit on one person's requests
    server_seconds: float = 0.0  # of a processor, without the starts
    client_seconds: float = 0.0


class Server:
    """`rlhf-fast annotate` in a process of its own, always on the same port."""

    def __init__(self, folder: Path, url: str, each: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.words = [sys.executable, "-c", VERB, "annotate", "--out", str(folder), "--port", str(self.port)]
        self.words += ["--annotate.judgements", str(each)]
        self.url, self.log, self.seconds = url, folder / "server.log", 0.0
        self._before = 0.0
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        more = ["--store", self.url] if self.url else []
        with self.log.open("a") as log:
            self.process = subprocess.Popen([*self.words, *more], stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        if not self.process.stdout.readline().startswith("Judging at"):
            raise SystemExit(f"the server did not start; {self.log} says:\n{self.log.read_text()}")
        self._before = processor_seconds(self.process.pid)

    def kill(self) -> None:
        if self.process is not None:
            self.seconds += processor_seconds(self.process.pid) - self._before
            self.process.kill()
            self.process.communicate()
            self.process = None


def processor_seconds(process: int) -> float:
    """What a process has used so far, in all its threads."""
    values = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


class Connection:
    """As little of HTTP/1.1 as the clients need, on one connection: the processor is left to the server."""

    def __init__(self, port: int, cookie: str) -> None:
        self.port = port
        self._head = f"Host: 127.0.0.1:{port}\r\nCookie: {COOKIE}={cookie}\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """(status, body); an error of the connection closes it."""
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self.port)
            reader, writer = self._streams
            form = "Content-Type: application/x-www-form-urlencoded\r\n" if body else ""
            head = f"{method} {path} HTTP/1.1\r\n{self._head}{form}Content-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"\r\ncontent-length: (\d+)", answer)
            return int(answer[9:12]), await reader.readexactly(int(length[1]) if length else 0)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Crowd:
    """The annotators, and who kills the server."""

    def __init__(self, server: Server, cookies: dict[int, str], load: Load) -> None:
        self.server, self.cookies, self.run = server, cookies, Run(load)
        draw = random.Random(load.seed)
        self.kills = sorted(draw.sample(range(load.judgements // 10, load.judgements * 9 // 10), load.kills))
        self.delays = [draw.uniform(0.0, 0.02) for _ in self.kills]
        self.reached = asyncio.Event()
        expected = round(load.judgements * 1.05)  # with the silent repeats
        self.bar = tqdm(total=expected, unit=" judgements", mininterval=1.0, disable=load.judgements < 1000)

    async def work(self) -> Run:
        start, used = time.monotonic(), time.process_time()
        killer = asyncio.create_task(self._kill())
        people = [asyncio.create_task(self._annotate(person)) for person in self.cookies]
        try:
            await asyncio.gather(*people)
            await killer
        finally:
            for one in (killer, *people):
                one.cancel()
            self.bar.close()
        self.run.seconds, self.run.client_seconds = time.monotonic() - start, time.process_time() - used
        return self.run

    async def _kill(self) -> None:
        for place, delay in zip(self.kills, self.delays, strict=True):
            while len(self.run.acknowledged) < place:
                self.reached.clear()
                await self.reached.wait()
            await asyncio.sleep(delay)
            self.server.kill()
            start = time.monotonic()
            await asyncio.to_thread(self.server.start)
            self.run.down += time.monotonic() - start

    async def _annotate(self, person: int) -> None:
        draw, run = random.Random(f"{self.run.load.seed} {person}"), self.run
        connection = Connection(self.server.port, self.cookies[person])
        await asyncio.sleep(draw.uniform(0.0, 2 * run.load.think))  # they do not come all at once
        page, *_ = await self._answer(connection, "GET", "/", 200)
        while match := re.search(rb'name="task" value="(\d+)"', page):
            token = re.search(rb'name="csrf" value="(\w+)"', page)
            assert token is not None, "a page with a task, without a token"
            task, preference = int(match[1]), draw.randint(-3, 3)
            await asyncio.sleep(draw.uniform(0.5, 1.5) * run.load.think)
            form = {"csrf": token[1].decode(), "task": task, "preference": preference, "seconds": 9}
            body = urlencode({**form, "left_ok": "yes", "right_ok": "no", "criterion honesty": draw.randint(-1, 1)})
            _, submit, first = await self._answer(connection, "POST", "/judge", 303, body.encode())
            run.acknowledged[task] = person, preference
            self.bar.update()
            self.reached.set()
            page, next_page, second = await self._answer(connection, "GET", "/", 200)
            run.times.submit.append(submit)
            run.times.page.append(next_page)
            run.times.at_once.append(first and second)
        connection.close()

    async def _answer(
        self, connection: Connection, method: str, path: str, expected: int, body: bytes = b""
    ) -> tuple[bytes, float, bool]:
        """(body, seconds since it was first sent, whether that was enough)"""
        start, attempts = time.monotonic(), 0
        while time.monotonic() - start < PATIENCE:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                attempts += 1
                status, said = await connection.ask(method, path, body)
                if status == expected:
                    self.run.sent_again += attempts - 1
                    return said, time.monotonic() - start, attempts == 1
                if status != 429:
                    words = re.sub(rb"<[^>]+>|\s+", b" ", said).decode()[-300:]
                    raise SystemExit(f"{method} {path}: {status} came, expected {expected}: {words}")
                self.run.limited += 1
            await asyncio.sleep(PAUSE)
        raise SystemExit(f"{method} {path}: no answer within {PATIENCE:.0f} s")


def filled(folder: Path, url: str, load: Load) -> dict[int, str]:
    """A store with people and pairs for the load; returns the login cookie of each person."""
    store = Store(url or folder / "votes.db")
    if store.people():
        raise SystemExit("--url: this database holds people already; give an empty one, for it is filled and judged")
    for number in range(load.judgements // load.each):
        store.add_prompt(
            f"Which way, {number}?", [f"One. {TEXT}", f"Two. {TEXT}"], category=f"kind {number % 4}", flush=False
        )
    logins, cookies = Logins(read_secret(folder, "127.0.0.1")), dict[int, str]()
    for number in range(load.annotators):
        token = store.invite(f"person {number}")
        person = store.join(token)
        cookies[person.id] = logins.cookie(person.id, mark_of(token))
    store.close()
    return cookies


def faults(store: Store, acknowledged: dict[int, tuple[int, int]]) -> list[str]:
    """What is wrong with the votes of a store whose people have finished; empty if nothing is."""
    with store.read() as connection:
        wanted = plan_of(connection).judgements
        votes = connection.execute(sa.select(t.vote).where(t.vote.c.undone.is_(None))).all()
        pairs = connection.execute(sa.select(t.pair).where(t.pair.c.kind == "normal", t.pair.c.state == "open")).all()
    found, by_task = [], {vote.assignment: vote for vote in votes}
    for task, (person, preference) in acknowledged.items():
        vote = by_task.get(task)
        if vote is None:
            found.append(f"task {task}: acknowledged, and not in the store")
        elif (vote.person, vote.preference) != (person, -preference if vote.swapped else preference):
            found.append(f"task {task}: another vote is in the store than was acknowledged")
    found += [f"task {n}: {count} votes" for n, count in Counter(v.assignment for v in votes).items() if count > 1]
    found += [f"task {n}: in the store, and never acknowledged" for n in by_task.keys() - acknowledged.keys()]
    people = Counter((vote.pair, vote.person, vote.kind) for vote in votes)
    found += [f"pair, person, kind {which}: judged {count} times" for which, count in people.items() if count > 1]
    judged = Counter(vote.pair for vote in votes if vote.kind == "normal")
    for pair in pairs:
        if judged[pair.id] != wanted or pair.taken != wanted:
            found.append(f"pair {pair.id}: {judged[pair.id]} judgements and {pair.taken} places taken, wanted {wanted}")
    return found


def measured(folder: Path, url: str, load: Load) -> tuple[Run, list[str]]:
    """Let a load work on a new store; returns what it did, and the faults of the store afterwards."""
    cookies = filled(folder, url, load)
    server = Server(folder, url, load.each)
    try:
        server.start()
        run = asyncio.run(_work(server, cookies, load))
    finally:
        server.kill()
    run.server_seconds = server.seconds
    store = Store(url or folder / "votes.db")
    try:
        return run, faults(store, run.acknowledged)
    finally:
        store.close()


async def _work(server: Server, cookies: dict[int, str], load: Load) -> Run:
    return await Crowd(server, cookies, load).work()


def record(run: Run, database: str, busy: Sequence[float]) -> dict[str, Any]:
    """The figures of a run, as they are written."""
    submit, page = np.array(run.times.submit), np.array(run.times.page)
    at_once, judged = np.array(run.times.at_once), len(run.acknowledged)

    def quantiles(values: np.ndarray) -> list[float]:
        return [round(1000 * float(q), 1) for q in np.quantile(values, (0.5, 0.99))]

    return {
        "op": f"annotators, {database}, {'with' if run.load.think else 'without'} pauses",
        "annotators": run.load.annotators, "judgements": judged, "each": run.load.each, "kills": run.load.kills,
        "think": run.load.think, "seconds": round(run.seconds, 2), "down": round(run.down, 2),
        "rate": round(judged / (run.seconds - run.down), 1), "rate_with_restarts": round(judged / run.seconds, 1),
        "submit_ms": quantiles(submit[at_once]), "page_ms": quantiles(page[at_once]),
        "both_ms": quantiles((submit + page)[at_once]), "both_ms_with_restarts": quantiles(submit + page),
        "sent_again": run.sent_again, "limited": run.limited,
        "server_ms": round(1000 * run.server_seconds / judged, 2),
        "clients_ms": round(1000 * run.client_seconds / judged, 2),
        "cores": os.cpu_count(), "load": [round(value, 2) for value in busy],
        **harness.environment(torch.device("cpu")),
    }  # fmt: skip


def told(r: dict[str, Any]) -> str:
    def ms(name: str) -> str:
        return "{:.1f} ms, p99 {:.1f} ms".format(*r[name])

    return f"""{r["op"]}: {r["judgements"]} judgements by {r["annotators"]} in {r["seconds"]:.1f} s, {r["kills"]} kills
  {r["rate"]:.1f} judgements/s while the server ran; {r["rate_with_restarts"]:.1f} with {r["down"]:.1f} s of restarts
  submit: median {ms("submit_ms")}; next page: {ms("page_ms")}
  both: median {ms("both_ms")}; with restarts {ms("both_ms_with_restarts")}
  processor time a judgement: server {r["server_ms"]:.2f} ms, clients {r["clients_ms"]:.2f} ms, on {r["cores"]} cores
  {r["sent_again"]} requests sent again, {r["limited"]} of them as the limit of one person's requests was reached
  load of the machine before and after (of the last minute): {r["load"][0]} and {r["load"][1]}"""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.annotators", description=__doc__)
    where = parser.add_mutually_exclusive_group()  # without either: SQLite, in a folder for the run
    where.add_argument("--url", default="", help="an empty PostgreSQL database")
    where.add_argument("--postgres", action="store_true", help="PostgreSQL, in a server for the run")
    for name, value in vars(Load()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, default=harness.ROOT / "bench" / "results" / "annotators.jsonl")
    given = vars(parser.parse_args(words))
    url, out, own = given.pop("url"), given.pop("out"), given.pop("postgres")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="annotators-"))
        url = stack.enter_context(postgres.cluster(fsync=True)).database() if own else url
        before = os.getloadavg()[0]
        run, wrong = measured(Path(folder), url, Load(**given))
        found = record(run, "PostgreSQL" if url else "SQLite", (before, os.getloadavg()[0]))
    print(told(found))
    for words_ in wrong[:20]:
        print(f"  WRONG: {words_}")
    if wrong:
        return 1
    print(f"  nothing acknowledged lost, nothing twice, every pair judged by {run.load.each}, nobody twice")
    harness.write_records([found], out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
