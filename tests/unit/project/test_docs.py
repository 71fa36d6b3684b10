"""What the docs say of tests is true: each that is named is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from inferq.shared.settings import Settings
from inferq.workers.commands.worker import worker
from inferq.workers.flower.access import VARIABLE
from inferq.workers.models.config import ModelConfig
from inferq.workers.models.registry import ENGINES

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def anchors(page: Path) -> set[str]:
    """What a link may name of `page`: its headings, as forges write them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_what_is_said_of_security_names_settings_and_options_that_there_are() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    settings = {f"INFERQ_{name.upper()}" for name in Settings.model_fields} | {VARIABLE}
    assert set(re.findall(r"INFERQ_\w+", text)) - settings == set()
    options = {name for parameter in worker.params for name in parameter.opts}
    assert set(re.findall(r"`(--[\w-]+)`", text)) - options == set()
    users = (ROOT / "deploy" / "redis" / "users.acl").read_text()
    for user in ("producer", "canceller", "watcher", "worker"):
        assert f"user {user} " in users
