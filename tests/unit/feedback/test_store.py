"""The store: people, limits, forms of the tables, backup."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from pathlib import Path

import pytest

sa = pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")

from alembic import command  # noqa: E402
from alembic.autogenerate import compare_metadata  # noqa: E402
from alembic.config import Config  # noqa: E402
from alembic.runtime.migration import MigrationContext  # noqa: E402

from rlhf_fast.feedback import assignment as a  # noqa: E402
from rlhf_fast.feedback import tables as t  # noqa: E402
from rlhf_fast.feedback.criteria import DEFAULT, read_criteria  # noqa: E402
from rlhf_fast.feedback.errors import FeedbackError  # noqa: E402
from rlhf_fast.feedback.store import Plan, Store, mark_of  # noqa: E402


def test_only_the_hash_of_a_token_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "votes.db")
    token = store.invite("Ann", "senior")
    person = store.join(token)
    assert (person.name, person.role) == ("Ann", "senior") and store.person(person.id, mark_of(token)) == person
    assert store.person_of("other") is None and store.person_of("\ud800") is None
    with pytest.raises(FeedbackError, match="not valid"):
        store.join("other")
    new = store.renew(person.id)
    assert store.person_of(token) is None and store.person_of(new) == person
    assert store.person(person.id, mark_of(token)) is None and store.person(person.id, mark_of(new)) == person
    store.close()
    files = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert token.encode() not in files and new.encode() not in files


def test_every_form_leads_to_the_present_one_with_its_data(tmp_path: Path) -> None:
    store = Store(tmp_path / "new.db")
    with store.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), t.metadata) == []
        plain = sa.create_engine("sqlite://")
        t.metadata.create_all(plain)
        both = [sa.inspect(connection), sa.inspect(plain)]
        for table in t.metadata.tables:  # which Alembic does not compare on SQLite
            migrated, made = ({tuple(u["column_names"]) for u in x.get_unique_constraints(table)} for x in both)
            assert migrated == made, table
    old = tmp_path / "old.db"
    config = Config()
    config.set_main_option("script_location", "rlhf_fast:feedback/migrations")
    with sa.create_engine(f"sqlite:///{old}").begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "first")
        values = {"name": "Ann", "role": "owner", "pseudonym": "annotator-1", "invited": 0.0}
        connection.execute(t.person.insert().values(**values))
    assert [person.name for person in Store(old).people()] == ["Ann"]
    with Store(old).read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), t.metadata) == []


def test_a_store_of_a_later_version_is_refused(tmp_path: Path) -> None:
    Store(tmp_path / "votes.db").close()
    with sqlite3.connect(tmp_path / "votes.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'of_the_future'")
    connection.close()
    with pytest.raises(FeedbackError, match=r"'of_the_future' is of a later rlhf-fast"):
        Store(tmp_path / "votes.db")


@pytest.mark.parametrize("votes", ["keep", "remove"])
def test_one_person_s_data_is_exported_and_removed(votes: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "votes.db")
    store.add_prompt("q", ["one", "two"])
    token = store.invite("Ann")
    person = store.join(token)
    task = a.next_task(store, person)
    assert task is not None
    a.submit(store, person, task.id, a.Judgement(1, True, True, comment="I am Ann", better_answer="mine"))
    found = store.export_person(person.id)
    assert found["person"]["name"] == "Ann" and found["votes"][0]["comment"] == "I am Ann"
    assert "token_hash" not in found["person"]
    store.remove_person(person.id, votes)
    after = store.export_person(person.id)
    assert "Ann" not in str(after) and "mine" not in str(after) and store.person(person.id, mark_of(token)) is None
    assert after["person"]["pseudonym"] != found["person"]["pseudonym"]
    assert len(after["votes"]) == (votes == "keep")
    with store.read() as connection:
        assert connection.execute(sa.select(t.pair.c.taken)).scalar_one() == (votes == "keep")


def test_the_last_owner_stays(tmp_path: Path) -> None:
    store = Store(tmp_path / "votes.db")
    owner = store.join(store.invite("Ann", "owner"))
    with pytest.raises(FeedbackError, match="last owner"):
        store.remove_person(owner.id)


def test_a_backup_is_whole_and_overwrites_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "votes.db")
    store.invite("Ann")
    store.backup(tmp_path / "copy.db")
    assert [person.name for person in Store(tmp_path / "copy.db").people()] == ["Ann"]
    with pytest.raises(FeedbackError, match="exists; name a new file"):
        store.backup(tmp_path / "copy.db")


def test_one_wait_for_the_disk_serves_all_that_was_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "votes.db")
    store.add_prompt("q", ["one", "two"])
    person = store.join(store.invite("Ann"))
    log, all_have = (tmp_path / "votes.db-wal").stat().st_ino, store._committed + 8
    waits: list[int] = []

    def fsync(file: int) -> None:
        assert os.fstat(file).st_ino == log
        waits.append(store._committed)
        end = time.monotonic() + 60
        while store._committed < all_have and time.monotonic() < end:
            time.sleep(0.001)

    monkeypatch.setattr(os, "fsync", fsync)
    threads = [threading.Thread(target=store.set_setting, args=(f"name {i}", i)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(waits) <= 2 and waits[-1] == all_have
    task = a.next_task(store, person)  # a lease is given anew if a power cut takes it
    assert task is not None and waits[-1] == all_have
    a.submit(store, person, task.id, a.Judgement(0, True, True))
    assert waits[-1] == all_have + 2


def test_what_is_there_already_is_added_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "votes.db")
    pairs = store.add_prompt("q", ["one", "two", "two", "three"])
    assert len(pairs) == 3 and store.add_prompt("q", ["two", "one"]) == [pairs[0]]


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "votes.db")
    for values, words in (
        ({"responses": ["one"]}, "1 different came"),
        ({"responses": ["one", "x" * 100_001]}, "at most 100000"),
        ({"responses": ["one", None]}, "NoneType came; expected text"),
        ({"kind": "gold"}, "needs its answer"),
        ({"kind": "gold", "gold": 2}, "gold: 2 came"),
        ({"priority": float("inf")}, "priority"),
    ):
        with pytest.raises(FeedbackError, match=words):
            store.add_prompt(**{"prompt": "q", "responses": ["one", "two"], **values})  # type: ignore[arg-type]
    with pytest.raises(FeedbackError, match="role: 'boss' came"):
        store.invite("Ann", "boss")
    with pytest.raises(FeedbackError, match="mysql came"):
        Store("mysql://host/name")
    for plan, words in (
        ({"judgements": 0}, "judgements"),
        ({"random_share": 0.0}, "keep some"),
        ({"lease": 0}, "lease"),
    ):
        with pytest.raises(FeedbackError, match=words):
            Plan(**plan)


def test_criteria_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "criteria.yaml"
    file.write_text("- {name: tone, description: Warm, examples: [a], scale: [L, M, R, S]}\n")
    (tone,) = read_criteria(file)
    assert (tone.title, tone.examples, tone.scale) == ("Tone", ("a",), ("L", "M", "R", "S"))
    assert tone.values == [-2, -1, 1, 2] and DEFAULT[0].values == [-1, 0, 1]
    assert [one.name for one in DEFAULT] == ["helpfulness", "harmlessness", "honesty", "style_fit"]
    for text, words in (
        ("- {name: Tone!}", "small letters"),
        ("- {name: a, weight: 1}", "unknown key 'weight'"),
        ("- {name: a}\n- {name: a}", "named twice"),
        ("- &x {name: a}\n- *x", "alias"),
        ("- {name: a, scale: 9}", "scale of a should be a list of texts"),
        ("- {name: a, scale: [one]}", "scale of a has 1 labels; expected 2 to 7"),
        ("- {name: a, scale: [one, one]}", "a label twice"),
        ("{}", "a list of 1"),
        ("[", "not readable as YAML"),
    ):
        file.write_text(text)
        with pytest.raises(FeedbackError, match=words):
            read_criteria(file)
