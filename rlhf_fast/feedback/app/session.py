"""Ask people until enough is judged: the page is served on this machine, and the terminal shows how far they are."""

from __future__ import annotations

import errno
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn

from rlhf_fast.feedback.app.security import Access, read_secret
from rlhf_fast.feedback.app.server import application
from rlhf_fast.feedback.errors import FeedbackError
from rlhf_fast.feedback.progress import Progress, progress
from rlhf_fast.feedback.store import Store
from rlhf_fast.runs.terminal import progress_bar

HOST = "127.0.0.1"
GRACE = 5.0  # seconds from enough to the end, in which the last judgement can still be undone
POLL = 0.25  # seconds


def ask(store: Store, folder: Path, wanted: int, port: int, say: Callable[[str], None]) -> Progress:
    """Serve the page until `wanted` pairs are judged, or no pair is left; returns how far people came.

    Args:
        store: the pairs, each to be judged once.
        folder: takes the secret that signs logins, and backups.
        wanted: judged pairs that are enough.
        port: where to listen; 0: where it was the last time, so that a tunnel still leads there, or anywhere.
        say: is given the sign-in link, and what a person has to know.

    Raises:
        KeyboardInterrupt: after Ctrl-C, with what was kept.
        FeedbackError: the port is taken.
    """
    found = progress(store)
    if found.is_enough(wanted):  # it was, before an interruption
        return found
    listening = listen(HOST, port) if port else _listen_again(int(store.setting("port", 0)))
    own = listening.getsockname()[1]
    store.set_setting("port", own)
    app = application(store, Access(read_secret(folder, HOST), HOST), folder, wanted=wanted)
    quiet = uvicorn.Config(app, log_level="warning", access_log=False, proxy_headers=False, timeout_graceful_shutdown=3)
    server = uvicorn.Server(quiet)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    say(f"{wanted} pairs are to be judged. Open this link in a browser on this machine:")
    say(f"  {sign_in_link(store, f'http://{HOST}:{own}')}")
    say(f"From another machine: ssh -L {own}:{HOST}:{own} {socket.gethostname()}, then the same link there.")
    say("Every judgement is kept at once. Ctrl-C stops, and the same command goes on; a smaller --pairs ends sooner.")
    try:
        return _watch(store, wanted, thread)
    except KeyboardInterrupt as error:
        kept = progress(store).judged
        words = f"{folder}: {kept} of {wanted} pairs are judged and kept; the same command goes on from there"
        raise KeyboardInterrupt(words) from error
    finally:
        server.should_exit = True
        thread.join(10)


def _watch(store: Store, wanted: int, server: threading.Thread) -> Progress:
    """Show how far people are, until it has been enough for a while."""
    since: float | None = None  # when it became enough
    with progress_bar(wanted, "judged", "pair", min(wanted, progress(store).judged)) as bar:
        bar.bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        while since is None or time.monotonic() - since < GRACE:
            time.sleep(POLL)
            found = progress(store)
            bar.set_postfix_str(pace(found, wanted), refresh=sys.stderr.isatty())
            bar.update(min(found.judged, wanted) - bar.n)
            if not found.is_enough(wanted):
                since = None
            elif since is None:
                since = time.monotonic()
                bar.refresh()
            if not server.is_alive():
                raise RuntimeError("the page's server has ended; the same command starts it again, nothing is lost")
    return progress(store)


def pace(found: Progress, wanted: int) -> str:
    """Words for the pace so far, by the time that people looked at the page, and the time left at that pace."""
    parts = [f"{found.equal} about equal"] if found.equal else []
    if found.judged:
        left = max(0, wanted - found.judged) * found.seconds
        parts.append(f"{found.seconds:.0f} s a pair")
        parts.append(f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left")
    return ", ".join(parts)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at `port`, or at a free one for 0.

    Raises:
        FeedbackError: the port is taken.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise FeedbackError(f"port: {port} is in use; choose another, or 0 for a free one") from error
    listening.listen(128)
    return listening


def _listen_again(port: int) -> socket.socket:
    try:
        return listen(HOST, port)
    except FeedbackError:
        return listen(HOST, 0)


def sign_in_link(store: Store, address: str) -> str:
    """A new link for the owner; the one before no longer opens anything."""
    owner = next((one for one in store.people() if one.role == "owner"), None)
    token = store.renew(owner.id) if owner else store.invite("owner", "owner")
    return f"{address}/join/{token}"
