"""Rewards over HTTP: what is sent, what is taken for an answer, when it is asked for again, and what is kept secret."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlhf_fast.config import LoRAConfig, PPOConfig
from rlhf_fast.data.records import read_prompts
from rlhf_fast.rewards import calls as reward_calls
from rlhf_fast.rewards import url as reward_url
from rlhf_fast.rewards.calls import RewardError
from rlhf_fast.rewards.model import resolve_reward
from rlhf_fast.rewards.url import RewardURL
from rlhf_fast.trainers.ppo.trainer import PPOTrainer

Answer = tuple[int, dict[str, str], bytes]


class Service:
    """A server in a thread; `answer(request)` says what it gives, and `requests` keeps what came."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.answer: Callable[[dict[str, Any]], Answer] = by_length
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append(request)
                service.headers.append(self.headers)
                status, headers, body = service.answer(request)
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    pass  # nobody is listening any more

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"


def by_length(request: dict[str, Any]) -> Answer:
    return good([float(len(response)) for response in request["responses"]])


def good(scores: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps({"scores": scores}).encode()


def always(*answer: Any) -> Callable[[dict[str, Any]], Answer]:
    return lambda request: answer


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Service()
    yield running
    running.server.shutdown()
    running.server.server_close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr(reward_calls.time, "sleep", waited.append)
    monkeypatch.delenv("RLHF_FAST_REWARD_TOKEN", raising=False)
    return waited


def test_prompts_responses_and_columns_are_sent_as_they_are_in_batches(service: Service) -> None:
    question = [{"role": "user", "content": "q"}]
    rows = [{"prompt": question, "answer": i, "responses": "a name taken"} for i in range(70)]
    texts = ["\x00 \ud800 ü", *("x" * i for i in range(1, 70))]
    found = resolve_reward(service.url, 0.6, 100)(read_prompts(rows), texts)
    assert found.scores == [float(len(text)) for text in texts]
    assert [len(request["responses"]) for request in service.requests] == [64, 6]
    assert [r for request in service.requests for r in request["responses"]] == texts
    assert [p for request in service.requests for p in request["prompts"]] == [row["prompt"] for row in rows]
    assert [a for request in service.requests for a in request["answer"]] == list(range(70))
    assert set(service.requests[0]) == {"prompts", "responses", "answer"}
    assert service.headers[0]["Content-Type"] == "application/json" and service.headers[0]["Authorization"] is None


def test_without_retries_a_service_that_fails_is_asked_once(service: Service, pauses: list[float]) -> None:
    service.answer = always(503, {}, b"busy")
    with pytest.raises(RuntimeError, match="503"):
        reward_url.RewardURL(service.url)(["p"], ["r"])
    assert len(service.requests) == 1 and pauses == []


def test_a_batch_of_consecutive_responses_is_asked_for_as_soon_as_they_have_ended(service: Service) -> None:
    texts = ["x" * i for i in range(10)]
    rows = [{"prompt": f"p{i}", "answer": i} for i in range(10)]
    scoring = resolve_reward(service.url, 0.6, 100, batch=4).start(read_prompts(rows))
    for i in (9, 4, 5, 7, 6):
        scoring.finished(i, texts[i])
    deadline = time.monotonic() + 30
    while not service.requests and time.monotonic() < deadline:
        threading.Event().wait(0.001)
    assert [request["responses"] for request in service.requests] == [texts[4:8]]
    for i in (0, 1, 2, 3, 8):
        scoring.finished(i, texts[i])
    assert scoring.result().scores == [float(i) for i in range(10)]
    assert sorted(request["answer"] for request in service.requests) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_null_is_no_score(service: Service) -> None:
    service.answer = always(*good([None, 2]))
    reward = resolve_reward([(1.0, service.url), (1.0, "rule:length:1")], 0.6, 100)
    found = reward(read_prompts([{"prompt": "p"}] * 2), ["a", "b"])
    assert found.scores == [1.0, 3.0] and found.means == {"127.0.0.1": 2.0, "length": 1.0}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (good([1.0]), r'returned 1 scores for 2 responses; expected {"scores": \[...\]} with 2 numbers'),
        (good([1.0, 2.0, 3.0]), "returned 3 scores for 2 responses"),
        (good([1.0, "2"]), "the score of response 1 is '2', expected a finite number"),
        (good([1.0, float("nan")]), "the score of response 1 is nan"),
        ((200, {}, b'{"scores": [1e999, 1]}'), "the score of response 0 is inf"),
        (good("12"), "has no list of scores"),
        ((200, {}, b"[1, 2]"), "has no list of scores"),
        ((200, {}, b"<html>\x1b[31m"), r"its answer b'<html>\\x1b\[31m' is not JSON; expected"),
        ((200, {}, b""), "its answer b'' is not JSON"),
        ((200, {}, b"[" * 100_000), "is not JSON"),
        ((200, {}, b"\xff\xfe"), "is not JSON"),
    ],
)
def test_a_wrong_answer_is_named_and_not_asked_for_again(
    service: Service, answer: Answer, message: str, pauses: list[float]
) -> None:
    service.answer = always(*answer)
    with pytest.raises(ValueError, match=message):
        resolve_reward(service.url, 0.6, 100, retries=3)(read_prompts([{"prompt": "p"}] * 2), ["a", "b"])
    assert len(service.requests) == 1 and pauses == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_request_that_is_refused_is_not_sent_again(service: Service, status: int, pauses: list[float]) -> None:
    service.answer = always(status, {}, b"no \x1b[2J such")
    with pytest.raises(RewardError, match=rf"{service.url}: refused with status {status} \('no \\x1b\[2J such'\); see"):
        RewardURL(service.url, retries=3)(["p"], ["a"])
    assert len(service.requests) == 1 and pauses == []


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_one_that_is_busy_or_broken_is_asked_again_and_the_others_are_not_sent_twice(
    service: Service, status: int, pauses: list[float]
) -> None:
    def flaky(request: dict[str, Any]) -> Answer:
        return (status, {}, b"later") if len(service.requests) in (2, 3) else by_length(request)

    service.answer = flaky
    assert RewardURL(service.url, retries=2)(["p"] * 70, ["ab"] * 70) == [2.0] * 70
    assert [len(request["responses"]) for request in service.requests] == [64, 6, 6, 6] and pauses == [1.0, 2.0]
    service.answer = always(status, {}, b"later")
    with pytest.raises(RewardError, match=rf"failed 3 times, at last with NoAnswer: status {status} \('later'\)"):
        RewardURL(service.url, retries=2)(["p"], ["a"])


@pytest.mark.parametrize(
    ("said", "low", "high"),
    [("7", 7, 7), ("0", 1, 1), ("86400", 60, 60), (lambda: formatdate(time.time() + 20, usegmt=True), 17, 21),
     ("Thu, 01 Jan 1970 00:00:00 GMT", 1, 1), ("soon", 1, 1), ("9" * 5000, 60, 60), ("-5", 1, 1)],
)  # fmt: skip
def test_a_server_says_when_to_ask_again_up_to_a_minute(
    service: Service, said: Any, low: float, high: float, pauses: list[float]
) -> None:
    header = said if isinstance(said, str) else said()
    service.answer = lambda request: (429, {"Retry-After": header}, b"") if len(service.requests) == 1 else good([1])
    assert RewardURL(service.url, retries=1)(["p"], ["a"]) == [1]
    assert len(pauses) == 1 and low <= pauses[0] <= high


def test_a_server_that_does_not_answer_is_given_up(service: Service, pauses: list[float]) -> None:
    late = threading.Event()
    service.answer = lambda request: (late.wait(20), good([1.0]))[1]
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"failed 2 times, at last with NoAnswer: none within 0\.2 s; see"):
        RewardURL(service.url, timeout=0.2, retries=1)(["p"], ["a"])
    assert time.monotonic() - started < 5 and len(service.requests) == 2
    late.set()


def test_an_answer_that_drips_is_given_up_and_one_without_end_too(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dripping:
        length = None

        def read1(self, size: int) -> bytes:
            clock[0] += 1.0
            return b" " * min(size, chunk[0])

    clock, chunk = [0.0], [1]
    monkeypatch.setattr(reward_url.time, "monotonic", lambda: clock[0])
    with pytest.raises(TimeoutError):
        RewardURL(service.url, timeout=5.0)._read(Dripping(), 5.0)  # type: ignore[arg-type]
    assert clock[0] < 10
    chunk[0] = 1 << 30
    with pytest.raises(RewardError, match="its answer has more than 1048576 bytes; expected scores"):
        RewardURL(service.url)._read(Dripping(), None)  # type: ignore[arg-type]


def test_a_huge_answer_is_not_read(service: Service) -> None:
    service.answer = always(200, {}, b" " * (2 << 20))
    with pytest.raises(RewardError, match="more than 1048576 bytes"):
        RewardURL(service.url, retries=3)(["p"], ["a"])
    assert len(service.requests) == 1


def test_where_nobody_listens_is_said() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score"
    with pytest.raises(
        RewardError, match=rf"reward {url}: failed 2 times, at last with .*refused; see that the service"
    ):
        RewardURL(url, retries=1)(["p"], ["a"])


def test_a_connection_that_breaks_is_tried_again(service: Service) -> None:
    def cut(request: dict[str, Any]) -> Answer:
        return (200, {"Content-Length": "5000"}, b"{") if len(service.requests) == 1 else by_length(request)

    service.answer = cut
    assert RewardURL(service.url, retries=1)(["p"], ["abc"]) == [3.0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(service: Service, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Service()
    monkeypatch.setenv("RLHF_FAST_REWARD_TOKEN", "secret")
    service.answer = always(status, {"Location": other.url + "\x1b"}, b"")
    with pytest.raises(RewardError, match=r"redirects to 'http://127.0.0.1:\d+/score.*'; give that address if you"):
        RewardURL(service.url, retries=3)(["p"], ["a"])
    assert other.requests == [] and len(service.requests) == 1
    other.server.shutdown()
    other.server.server_close()


# Secrets -------------------------------------------------------------------------------------------------------------


def test_the_token_is_sent_and_stands_nowhere(
    service: Service,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RLHF_FAST_REWARD_TOKEN", " s3cr3t-token\n")
    service.answer = lambda request: (503, {}, b"") if len(service.requests) == 1 else by_length(request)
    config = PPOConfig(
        steps=1, prompts_per_step=1, samples_per_prompt=2, minibatches=1, max_new_tokens=4, lora=LoRAConfig(r=2)
    )
    trainer = PPOTrainer(tiny_folder, f"1*{service.url}?key=k3y, 1*rule:json", [{"prompt": "q"}], tmp_path, config)
    trainer.train()
    assert [headers["Authorization"] for headers in service.headers] == ["Bearer s3cr3t-token"] * 2
    written = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    said = "".join(capsys.readouterr())
    assert b"s3cr3t" not in written and "s3cr3t" not in said and "k3y" not in said
    assert "503" in said and b"score/127.0.0.1" in written and "s3cr3t" not in repr(vars(trainer.reward))


def test_a_token_that_no_header_takes_is_refused_without_being_shown(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_FAST_REWARD_TOKEN", "s3cr3t\nX-Other: 1")
    with pytest.raises(RewardError, match="RLHF_FAST_REWARD_TOKEN: holds characters that a header cannot") as caught:
        RewardURL(service.url)(["p"], ["a"])
    assert "s3cr3t" not in str(caught.value) and service.requests == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://me:s3cr3t@host/score", "the URL of host holds credentials, which would be written into config.yaml"),
        ("https://s3cr3t@host/score", "put a token into the environment variable RLHF_FAST_REWARD_TOKEN"),
        ("http://", "names no host; expected http://HOST:PORT/PATH"),
        ("http:///score", "names no host"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_at_the_start(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        resolve_reward(url, 0.6, 100)
    assert "s3cr3t" not in str(caught.value)


def test_a_column_that_is_not_json_is_named(service: Service) -> None:
    records = read_prompts([{"prompt": "p", "when": object()}])
    with pytest.raises(ValueError, match=r"a column of the prompts is not JSON: .*type object"):
        resolve_reward(service.url, 0.6, 100)(records, ["a"])
    assert service.requests == []
