"""What the docs say of tests is true: each that is named is there."""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from pathlib import Path

import pytest

from inferq.shared.settings import Settings
from inferq.workers.commands.worker import worker
from inferq.workers.flower.access import VARIABLE
from inferq.workers.models.config import ModelConfig
from inferq.workers.models.registry import ENGINES

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
#: All that is written for readers. CHANGELOG.md is a list of what was.
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted(DOCS.glob("*.md")),
]
MAX_CHARS = 120
MAX_README_LINES = 120
_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


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


def prose(page: Path) -> str:
    """`page` without its blocks of code."""
    return _FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """What a link may name of `page`: its headings, as forges write them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = base = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        again = 0
        while anchor in found:
            again += 1
            anchor = f"{base}-{again}"
        found.add(anchor)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert ROOT in target.parents, link
        assert not anchor or anchor in anchors(target), link


def test_what_the_code_names_of_the_docs_is_there() -> None:
    files = [
        path
        for root in ("producer", "shared", "workers", "tests", "deploy")
        for path in (ROOT / root).rglob("*")
        if path.suffix in {".py", ".acl", ".html", ".lua", ".conf", ".sh"}
    ]
    text = "\n".join(path.read_text() for path in [*files, ROOT / "docker-compose.yml"])
    named = set(re.findall(r"\bdocs/(\w[\w-]*\.md)", text))
    assert {"models.md", "metrics.md"} <= named
    assert named - {page.name for page in DOCS.glob("*.md")} == set()


def test_every_page_is_in_the_index() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)", (DOCS / "README.md").read_text()))
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} - linked == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_a_page_is_too_long_but_rows_of_tables(page: Path) -> None:
    lines = enumerate(page.read_text().splitlines(), 1)
    long = [n for n, line in lines if len(line) > MAX_CHARS and not line.startswith("|")]
    assert long == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_and_toml_of_a_page_can_be_parsed(page: Path) -> None:
    for indent, language, block in _FENCED.findall(page.read_text()):
        text = textwrap.dedent(block) if indent else block
        if language == "python":
            compile(text, page.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        elif language == "toml":
            tomllib.loads(text)


def test_the_rooms_of_the_architecture_are_those_of_the_code() -> None:
    text = (DOCS / "architecture.md").read_text()
    _, _, table = text.partition("## The rooms")
    told = re.findall(r"^\| `([\w.]+)/?` ", table.partition("\n## ")[0], re.MULTILINE)
    workers = ROOT / "workers" / "inferq" / "workers"
    rooms = {path.name for path in workers.iterdir() if (path / "__init__.py").exists()}
    modules = {path.name for path in workers.glob("*.py")} - {"__init__.py"}
    assert set(told) == rooms | modules
    # They stand in the order of the contract: each imports only what stands below it.
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = [each["layers"] for each in contracts["contracts"] if each["type"] == "layers"]
    order = [name.strip() for layer in layers for name in layer.split("|")]
    names = [name.removesuffix(".py") for name in told]
    level = {name: n for n, layer in enumerate(layers) for name in map(str.strip, layer.split("|"))}
    assert set(order) == set(names)
    assert [level[name] for name in names] == sorted(level[name] for name in names)


def test_the_modules_that_the_architecture_names_are_there() -> None:
    text = (DOCS / "architecture.md").read_text()
    named = set(re.findall(r"`((?:[\w]+/)+\w+\.(?:py|lua))`", text))
    roots = [ROOT, *(ROOT / side / "inferq" for side in ("producer", "shared", "workers"))]
    roots.append(ROOT / "workers" / "inferq" / "workers")
    assert len(named) > 25
    assert {name for name in named if not any((root / name).exists() for root in roots)} == set()


def test_what_is_said_of_security_names_settings_and_options_that_there_are() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    settings = {f"INFERQ_{name.upper()}" for name in Settings.model_fields} | {VARIABLE}
    assert set(re.findall(r"INFERQ_\w+", text)) - settings == set()
    options = {name for parameter in worker.params for name in parameter.opts}
    assert set(re.findall(r"`(--[\w-]+)`", text)) - options == set()
    users = (ROOT / "deploy" / "redis" / "users.acl").read_text()
    for user in ("producer", "canceller", "watcher", "worker"):
        assert f"user {user} " in users
