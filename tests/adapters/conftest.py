"""Fixtures for the adapters."""

from __future__ import annotations

import pytest

from tests.adapters.fake_engine import FakeEngine


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine()
