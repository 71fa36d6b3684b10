"""What docs/ takes from the code is what the code says now."""

from __future__ import annotations

import re

import pytest
from helpers import reference

from inferq.shared import errors
from inferq.shared.settings import ENV_PREFIX, Settings


@pytest.mark.parametrize("page", reference.PARTS)
def test_what_is_generated_of_a_page_is_up_to_date(page: str) -> None:
    text = (reference.DOCS / page).read_text()
    assert reference.with_parts(page, text) == text, "make docs writes it anew"


def test_a_part_without_a_place_on_its_page_is_refused() -> None:
    with pytest.raises(ValueError, match=r"settings\.md has no place for"):
        reference.with_parts("settings.md", "# Every setting\n")


def test_every_setting_says_what_it_is() -> None:
    told = reference.descriptions()
    assert told.keys() == Settings.model_fields.keys()
    assert all(text.endswith(".") for text in told.values()), told


def test_every_command_and_option_says_what_it_does() -> None:
    silent = []
    for name, command, context in reference.commands():
        if not command.help:
            silent.append(name)
        for parameter in command.get_params(context):
            record = parameter.get_help_record(context)
            if parameter.param_type_name == "option" and not (record and record[1]):
                silent.append(f"{name} {parameter.name}")
    assert silent == []


def test_every_variable_that_the_code_names_is_among_the_settings() -> None:
    code = [
        path.read_text()
        for root in ("producer", "shared", "workers")
        for path in (reference.ROOT / root).rglob("*.py")
    ]
    named = set(re.findall(r"INFERQ_[A-Z_]+", "\n".join(code))) - {ENV_PREFIX}
    told = set(re.findall(r"^\| `(INFERQ_[A-Z_]+)`", _page("settings.md"), re.MULTILINE))
    of_settings = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    assert len(named) > 20
    assert told == named | of_settings


def test_every_error_has_a_row_that_says_whether_to_try_again() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| ([^|]+) \| (never|yes|later|no)\b",
        _page("errors.md"),
        re.MULTILINE,
    )
    told = {(name, code) for name, code, _, _ in rows}
    assert told == {(cls.__name__, code) for code, cls in errors.BY_CODE.items() if code != "error"}


def _page(name: str) -> str:
    return (reference.DOCS / name).read_text()
