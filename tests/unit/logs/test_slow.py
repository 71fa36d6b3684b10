"""What takes long is named while it does; what is quick is not."""

from __future__ import annotations

import logging

import pytest
from helpers.wait import until

from inferq.workers.logs import slow
from inferq.workers.logs.slow import warn_if_slow

logger = logging.getLogger(__name__)


def test_what_takes_long_is_named_while_it_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slow, "SLOW_S", 0.01)
    with warn_if_slow(logger, "m", "reading it"):
        until(lambda: "model m: reading it has taken 0.01 s so far, and goes on" in caplog.text)


def test_what_is_quick_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    with warn_if_slow(logger, "m", "reading it"):
        pass
    assert not caplog.records
