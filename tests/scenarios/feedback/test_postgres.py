"""The store on a real PostgreSQL: the tests of places, leases, undo and kills, and what only a server can do to it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("psycopg")
pytest.importorskip("fastapi")

import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from rlhf_fast import cli
from rlhf_fast.data.records import read_comparisons
from rlhf_fast.feedback import assignment as a
from rlhf_fast.feedback import tables as t
from rlhf_fast.feedback.errors import FeedbackError
from rlhf_fast.feedback.store import Store
from tests import postgres
from tests.postgres import Cluster
from tests.unit.feedback import test_assignment as unit

if postgres.binaries() is None:
    pytest.skip("needs PostgreSQL's programs", allow_module_level=True)

OF_A_STORE = [
    value
    for name, value in vars(unit).items()
    if name.startswith("test_") and list(inspect.signature(value).parameters) == ["tmp_path"]
]


@pytest.fixture(scope="module")
def server() -> Iterator[Cluster]:
    with postgres.cluster() as made:
        yield made


@pytest.fixture
def place(server: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit, "place", functools.cache(lambda folder: server.schema()))


@pytest.mark.parametrize("test", OF_A_STORE, ids=lambda test: test.__name__)
def test_it_is_as_on_sqlite(test: Callable[[Path], None], place: None, tmp_path: Path) -> None:
    test(tmp_path)


def test_any_order_of_acts_keeps_the_places(place: None) -> None:
    few = settings(
        max_examples=3, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    run_state_machine_as_test(unit.Work, settings=few)


def test_places_hold_where_the_database_asks_for_another_isolation(
    server: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Under repeatable read, who waited for the lock would see the places as they were before."""
    setting = "default_transaction_isolation = 'repeatable read'"
    monkeypatch.setattr(unit, "place", functools.cache(lambda folder: server.database(setting=setting)))
    unit.test_two_people_at_once_never_get_the_same_last_place(tmp_path)


def test_a_crash_of_the_server_loses_nothing_that_was_acknowledged(
    place: None, server: Cluster, tmp_path: Path
) -> None:
    store, (person,) = unit.store_of(tmp_path, 5, 1, unit.plain(judgements=1))
    said = []
    while task := a.next_task(store, person):
        said.append(a.submit(store, person, task.id, unit.GOOD))
    server.crash()
    server.start()
    with store.read() as connection:  # by the same pool, whose connections are gone
        assert connection.execute(sa.select(t.vote.c.id).order_by(t.vote.c.id)).scalars().all() == said
    store.close()


def test_a_lease_alone_waits_for_no_disk(place: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, (person,) = unit.store_of(tmp_path, 1, 1, unit.plain())
    flushed: list[int] = []
    monkeypatch.setattr(store, "_flush", flushed.append)
    task = a.next_task(store, person)
    assert task is not None and flushed == []
    a.submit(store, person, task.id, unit.GOOD)
    assert len(flushed) == 1


def test_the_verb_takes_it_and_says_no_password(
    server: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import uvicorn

    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: [one.close() for one in sockets])
    (tmp_path / "answers.jsonl").write_text('{"prompt": "q", "responses": ["good", "bad"]}\n')
    url = server.schema()
    out = ["--out", str(tmp_path / "votes"), "--store", url]

    def refused(*words: str) -> str:
        assert cli.main(["annotate", *words]) != 0
        said = capsys.readouterr()
        return str(said.out + said.err)

    assert "holds no votes" in refused("export", *out[1:])
    engine = sa.create_engine(url.replace("postgresql", "postgresql+psycopg"))
    assert sa.inspect(engine).get_table_names() == []  # of a wrong name nothing is made
    engine.dispose()
    serve = ["annotate", *out, "--port", "0", "--annotate.judgements", "1"]
    assert cli.main([*serve, "--responses", str(tmp_path / "answers.jsonl")]) == 0
    assert cli.main(serve) == 0  # goes on
    assert not (tmp_path / "votes" / "votes.db").exists()
    store = Store(url)
    person = store.join(store.invite("Ann"))
    task = a.next_task(store, person)
    assert task is not None
    a.submit(store, person, task.id, a.Judgement(-2 if task.left == "good" else 2, True, False, seconds=9.0))
    with pytest.raises(FeedbackError, match="run pg_dump"):
        store.backup(tmp_path / "copy.db")
    store.close()
    assert cli.main(["annotate", "export", *out[1:]]) == cli.main(["annotate", "report", *out[1:]]) == 0
    assert [row.chosen for row in read_comparisons(tmp_path / "votes" / "comparisons.jsonl")] == ["good"]

    at = f"127.0.0.1:{server.port}"
    for wrong, words in (
        (f"postgresql://postgres:hush@{at}/postgres", "password authentication failed"),
        ("postgresql://postgres:hu/sh@127.0.0.1:x/postgres", "this URL cannot be read"),
        ("mysql://someone:hush@127.0.0.1/votes", "mysql came"),
    ):
        said = refused("export", str(tmp_path / "votes"), "--store", wrong, "--traceback")
        assert words in said and "hush" not in said and "sh@" not in said
    store = Store(f"postgresql://postgres:{server.password}@{at}/postgres?{url.rpartition('&')[2]}")
    assert len(store.people()) == 2 and server.password not in repr(store.engine.url)
    store.close()


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_in_another_encoding_is_refused(encoding: str, server: Cluster) -> None:
    with pytest.raises(FeedbackError, match=f"encoded in {encoding}; make one with ENCODING 'UTF8'"):
        Store(server.database(f"ENCODING '{encoding}' TEMPLATE template0"))


def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FeedbackError, match="cannot be opened"):
        Store(f"postgresql://postgres@/votes?host={tmp_path}")
