"""Holds every test of this folder to what it may cost."""

from tests.cost import pytest_runtest_call  # noqa: F401
