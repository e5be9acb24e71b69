"""Runs as in tests/unit/trainers: without plots, and with their updates recorded."""

from tests.unit.trainers.conftest import updates, without_plots  # noqa: F401
