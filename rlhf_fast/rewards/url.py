"""A reward that is computed elsewhere and asked for over HTTP."""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

from rlhf_fast.rewards.calls import RewardError, with_retries

MAX_BYTES = 1 << 20  # of an answer
PER_REQUEST = 64  # responses


class RewardURL:
    """POSTs `{"prompts": [...], "responses": [...], "<column>": [...]}` as JSON and reads `{"scores": [...]}`.

    A prompt is text or a list of messages, as it is in its file; every column of the prompts goes along. A score is a
    number, or null for none. Called again when there is no connection, on 429 and on 5xx. With the environment variable
    RLHF_FAST_REWARD_TOKEN its value goes along as `Authorization: Bearer`; it is neither kept nor shown.

    Args:
        timeout: seconds for one request, None without a limit.
        retries: requests more when one fails.

    Raises:
        ValueError: no host, or credentials, which would stand in config.yaml.
    """

    def __init__(self, url: str, timeout: float | None = None, retries: int = 0) -> None:
        parts = urlsplit(url)
        if not parts.hostname:
            raise ValueError(f"reward: {url!r:.80} names no host; expected http://HOST:PORT/PATH")
        if parts.username is not None or parts.password is not None:
            raise ValueError(
                f"reward: the URL of {parts.hostname} holds credentials, which would be written into config.yaml; "
                "put a token into the environment variable RLHF_FAST_REWARD_TOKEN"
            )
        self.url, self.timeout, self.retries = url, timeout, retries
        self.name = parts.hostname
        self.shown = f"{parts.scheme}://{parts.netloc}{parts.path}"  # in messages: a query may hold a key
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self, prompts: list[Any], responses: list[str], **columns: list[Any]) -> list[Any]:
        scores: list[Any] = []
        for start in range(0, len(responses), PER_REQUEST):
            part = slice(start, start + PER_REQUEST)
            asked = {**columns, "prompts": prompts, "responses": responses}
            body = self._encode({name: values[part] for name, values in asked.items()})
            advice = "see that the service runs, or allow more by ppo.reward_timeout and ppo.reward_retries"
            answer = with_retries(lambda body=body: self._post(body), self.shown, self.retries, advice, on=NoAnswer)  # type: ignore[misc]
            scores += self._scores(answer, len(responses[part]))
        return scores

    def _encode(self, asked: dict[str, list[Any]]) -> bytes:
        try:
            return json.dumps(asked, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(f"reward {self.shown}: a column of the prompts is not JSON: {error}") from error

    def _post(self, body: bytes) -> bytes:
        """The body of a good answer.

        Raises:
            NoAnswer: an error that may pass.
            RewardError: one that will not.
        """
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json", **_authorization()})
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return self._read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                said = _excerpt(error)
                if error.code == 429 or error.code >= 500:
                    raise NoAnswer(f"status {error.code}{said}", _retry_after(error.headers)) from error
                if 300 <= error.code < 400:
                    to = str(error.headers.get("Location"))
                    raise RewardError(
                        f"reward {self.shown}: redirects to {to!r:.200}; give that address if you trust it"
                    ) from error
                raise RewardError(
                    f"reward {self.shown}: refused with status {error.code}{said}; see what it expects, and whether it "
                    "needs a token in RLHF_FAST_REWARD_TOKEN"
                ) from error
        except (OSError, http.client.HTTPException) as error:  # no connection, none any more, or too slow
            reason = getattr(error, "reason", error)
            late = isinstance(reason, TimeoutError)
            said = f"none within {self.timeout:g} s" if late else f"{type(reason).__name__}: {reason}"
            raise NoAnswer(said) from error

    def _read(self, response: http.client.HTTPResponse, deadline: float | None) -> bytes:
        body = b""
        while piece := response.read1(1 << 16):
            body += piece
            if len(body) > MAX_BYTES:
                raise RewardError(f"reward {self.shown}: its answer has more than {MAX_BYTES} bytes; expected scores")
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError
        if response.length:  # of what it had promised is left; read1 does not say so
            raise http.client.IncompleteRead(body, response.length)
        return body

    def _scores(self, answer: bytes, count: int) -> list[Any]:
        expected = f'expected {{"scores": [...]}} with {count} numbers'
        try:
            content = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"reward {self.shown}: its answer {answer[:80]!r} is not JSON; {expected}") from error
        scores = content.get("scores") if isinstance(content, dict) else None
        if not isinstance(scores, list):
            raise ValueError(f"reward {self.shown}: its answer {answer[:80]!r} has no list of scores; {expected}")
        if len(scores) != count:
            raise ValueError(f"reward {self.shown}: returned {len(scores)} scores for {count} responses; {expected}")
        return scores


class NoAnswer(Exception):
    """No answer now, but perhaps later: after `pause` seconds at the earliest."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A POST that is redirected becomes a GET, or sends prompts and token to somebody else."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _authorization() -> dict[str, str]:
    token = os.environ.get("RLHF_FAST_REWARD_TOKEN", "").strip()
    if not token:
        return {}
    if not (token.isascii() and token.isprintable()):
        raise RewardError("RLHF_FAST_REWARD_TOKEN: holds characters that a header cannot; expected printable ASCII")
    return {"Authorization": f"Bearer {token}"}


def _retry_after(headers: Message) -> float:
    """Seconds that a server asks to be left alone, 0.0 when it does not say."""
    said = str(headers.get("Retry-After", "")).strip()
    if said.isdecimal():
        return float(said[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _excerpt(error: urllib.error.HTTPError) -> str:
    """The beginning of what a server says to an error, with what a terminal would obey spelled out."""
    try:
        said = error.read(200)
    except (OSError, http.client.HTTPException):
        return ""
    return f" ({said.decode('utf-8', 'replace')!r})" if said else ""
