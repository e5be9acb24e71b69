"""Plots take a second a page, and every trainer leaves one: only tests/pages and the verbs draw them."""

import pytest

from rlhf_fast.pages import plots


@pytest.fixture(autouse=True)
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "available", lambda: False)
