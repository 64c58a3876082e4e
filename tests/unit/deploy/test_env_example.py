"""`.env.example` tells every setting, with the default that it really has."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from app.config import Settings

REPOSITORY = Path(__file__).parents[3]
TEXT = (REPOSITORY / ".env.example").read_text(encoding="utf-8")
SETTINGS_PART, COMPOSE_PART = TEXT.split("# --- Only for docker compose")
DEFAULTS = dict(re.findall(r"^#([A-Z][A-Z0-9_]*)=(.*)$", SETTINGS_PART, re.MULTILINE))


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting from the machine that runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_every_setting_stands_there_once_and_nothing_else() -> None:
    assert list(DEFAULTS) == [name.upper() for name in Settings.model_fields]
    assert len(DEFAULTS) == len(re.findall(r"^#[A-Z][A-Z0-9_]*=", SETTINGS_PART, re.MULTILINE))


@pytest.mark.usefixtures("clean_environment")
@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_default_that_is_told_is_the_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    default, told = getattr(Settings(), name), DEFAULTS[name.upper()]
    if default is None:
        assert told == ""
    else:
        monkeypatch.setenv(name.upper(), told)
        assert getattr(Settings(), name) == default


def test_every_setting_is_explained_in_the_line_above() -> None:
    lines = SETTINGS_PART.splitlines()
    for above, line in pairwise(lines):
        if re.match(r"#[A-Z][A-Z0-9_]*=", line):
            assert re.match(r"# [^-]", above), line


@pytest.mark.usefixtures("clean_environment")
def test_a_copy_of_it_changes_nothing_in_development() -> None:
    Path(".env").write_text(SETTINGS_PART, encoding="utf-8")
    assert Settings() == Settings(_env_file=None)
