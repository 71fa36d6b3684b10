"""What the docs say of tests is true: each that is named is there."""

from __future__ import annotations

import re
from pathlib import Path

from inferq.workers.engines import ENGINES
from inferq.workers.model_config import ModelConfig

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_docs_name_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "guarantees.md").read_text()))
    files = list((ROOT / "tests").rglob("test_*.py"))
    known = {path.stem for path in files}
    for path in files:
        known |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    assert len(named) > 40
    assert named - known == set()


def test_each_promise_names_a_test() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text()
    promised, _, _ = text.partition("## Not promised")
    promises = re.split(r"^\d+\. \*\*", promised, flags=re.MULTILINE)[1:]
    assert len(promises) >= 10
    assert all("`test_" in promise for promise in promises)


def test_every_knob_is_in_the_docs_and_no_other() -> None:
    text, _, _ = (ROOT / "docs" / "models.md").read_text().partition("## Devices")
    rows = re.findall(r"^\| `\[?(\w+)", text, re.MULTILINE)
    # The fake engine is for tests, and says itself how it is told what to do.
    tables = set(ENGINES) - {"fake"}
    assert set(rows) == set(ModelConfig.model_fields) | tables
