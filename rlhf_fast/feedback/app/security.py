"""Who may ask for what: signed login cookies, form tokens, rates, sizes, the Host header and the browser's policy.

No password exists. An invitation's token opens a login once it is posted; the cookie names the person and is signed
by a secret that is a file of mode 0600 beside the store, or the operator's own beyond loopback.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from itsdangerous import BadData, URLSafeTimedSerializer

from rlhf_fast.feedback.errors import FeedbackError

COOKIE = "rlhf_fast_login"
MOST_BODY = 512 * 1024  # bytes; the longest better answer, percent-encoded, fits
LOGIN_SECONDS = 14 * 86_400
MOST_KEYS = 10_000  # people and addresses whose rates are remembered
LEAST_SECRET = 32  # characters
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Access:
    """Where the server listens and by which names it may be called."""

    secret: str
    host: str = "127.0.0.1"
    public: str = ""  # https://judge.example.org: the address of the TLS proxy in front; empty: none is

    def __post_init__(self) -> None:
        if len(self.secret) < LEAST_SECRET:
            raise FeedbackError(f"secret: {len(self.secret)} characters came; expected at least {LEAST_SECRET}")
        if self.public:
            parts = urlsplit(self.public)
            if parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/"):
                raise FeedbackError(
                    f"proxy: {self.public!r} came; expected an address such as https://judge.example.org"
                )
        elif not is_loopback(self.host):
            raise FeedbackError(
                f"host: {self.host} is beyond this machine and nothing encrypts; put a TLS proxy before it and give "
                "its address as --proxy https://NAME"
            )

    @property
    def is_secure(self) -> bool:
        return bool(self.public)

    def is_host(self, header: str) -> bool:
        """Whether a Host header names this server, which a page of strangers with a rebound name does not."""
        try:
            name = urlsplit(f"//{header}").hostname or ""
        except ValueError:
            return False
        if self.public:
            return name == urlsplit(self.public).hostname
        return is_loopback(name) or name == self.host


def read_secret(folder: Path, host: str, file: str = "") -> str:
    """The secret that signs cookies: of `file`, of RLHF_FAST_ANNOTATE_SECRET, else on loopback one made in `folder`.

    Raises:
        FeedbackError: another host without one.
    """
    if file:
        return Path(file).read_text(encoding="utf-8").strip()
    if given := os.environ.get("RLHF_FAST_ANNOTATE_SECRET"):
        return given.strip()
    if not is_loopback(host):
        raise FeedbackError(
            f"host: {host} is beyond this machine, which needs a secret of {LEAST_SECRET} or more characters; set "
            "RLHF_FAST_ANNOTATE_SECRET, or --secret_file to a file that holds it"
        )
    own = folder / "secret"
    try:
        descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as made:
            made.write(secrets.token_urlsafe(48))
    except FileExistsError:
        pass
    return own.read_text(encoding="utf-8").strip()


class Logins:
    """Cookies and form tokens, both signed; a form token holds for one login alone.

    A cookie outlives a restart, as its secret does, and names the invitation that it came by: once the person is
    removed or has a new link, that invitation is no longer the store's and the cookie opens nothing.
    """

    def __init__(self, secret: str) -> None:
        self._cookies = URLSafeTimedSerializer(secret, salt="login")
        self._key = secret.encode()

    def cookie(self, person: int, mark: str) -> str:
        return str(self._cookies.dumps({"person": person, "mark": mark, "login": secrets.token_urlsafe(12)}))

    def read(self, cookie: str | None) -> tuple[int, str, str] | None:
        """(number of the person, mark of the invitation, form token), or None for no, a forged or an old cookie."""
        try:
            value = self._cookies.loads(cookie or "", max_age=LOGIN_SECONDS)
            form = hmac.digest(self._key, f"form {value['login']}".encode(), "sha256").hex()
            return int(value["person"]), str(value["mark"]), form
        except (BadData, KeyError, TypeError, ValueError):
            return None


class Rates:
    """Token buckets: `rate` a second, `burst` at once, by person or address."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate, self.burst = rate, burst
        self._filled: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def allows(self, key: str, now: float | None = None) -> bool:
        now = time.monotonic() if now is None else now
        with self._lock:
            left, then = self._filled.pop(key, (float(self.burst), now))
            left = min(float(self.burst), left + (now - then) * self.rate)
            self._filled[key] = (left - 1 if left >= 1 else left, now)
            if len(self._filled) > MOST_KEYS:  # the one that was quiet for longest
                self._filled.pop(next(iter(self._filled)))
        return left >= 1


class Guard:
    """Refuse a request by its Host, origin, size or rate before the application sees it; add the policy headers."""

    def __init__(self, app: Any, access: Access, rates: Rates, joins: Rates, logins: Logins) -> None:
        self.app, self.access, self.rates, self.joins, self.logins = app, access, rates, joins, logins
        self.own = [(key.encode(), value.encode()) for key, value in HEADERS.items()]
        if access.is_secure:
            self.own.append((b"strict-transport-security", b"max-age=31536000"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        refused = self._refused(scope, headers)
        body = b""
        if refused is None and scope["method"] not in ("GET", "HEAD"):
            while True:
                part = await receive()
                if part["type"] == "http.disconnect":
                    return
                body += part.get("body", b"")
                if len(body) > MOST_BODY:
                    refused = 413, "That is too long."
                    break
                if not part.get("more_body"):
                    break

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self.own]
            await send(message)

        if refused is not None:
            text = refused[1].encode()
            plain = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
            await with_headers({"type": "http.response.start", "status": refused[0], "headers": plain})
            await with_headers({"type": "http.response.body", "body": text})
            return
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> MutableMapping[str, Any]:
            return next(given, None) or await receive()

        await self.app(scope, again, with_headers)

    def _refused(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        if not self.access.is_host(headers.get("host", "")):
            return 400, "This server is not called by that name."
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > MOST_BODY:
            return 413, "That is too long."
        if scope["method"] == "POST" and headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403, "Another site may not send this."
        address = str((scope.get("client") or ("?",))[0])
        if self.access.public:  # the last entry is the proxy's own; what stands before it anyone can write
            address = headers.get("x-forwarded-for", address).rpartition(",")[2].strip()
        if scope["path"].startswith("/join") and not self.joins.allows(address):
            return 429, "Too many attempts. Please wait a minute."
        cookies = dict(part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";"))
        known = scope["login"] = self.logins.read(cookies.get(COOKIE))
        if not self.rates.allows(f"person {known[0]}" if known else f"address {address}"):
            return 429, "That was faster than people judge. Please wait a few seconds."
        return None
