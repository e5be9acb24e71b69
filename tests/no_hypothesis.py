"""In place of hypothesis where that is not installed, as in an environment of torch and pytest alone: property tests
are skipped, all others run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def given(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return pytest.mark.skip(reason="hypothesis is not installed")


def settings(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return lambda test: test


class _Anything:
    """A strategy, and what makes strategies."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return self


strategies: Any = _Anything()
assume = note = HealthCheck = strategies
