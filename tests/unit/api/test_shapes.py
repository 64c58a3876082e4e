"""Names of accounts that people read have one form."""

import pytest
from pydantic import TypeAdapter, ValidationError
from typer.testing import CliRunner

from app.api.shapes import PlainText
from app.cli.users import app

NAME = TypeAdapter[str](PlainText)


@pytest.mark.parametrize("name", ["a\nb", "zoe\u202e", "\u200bzoe", " zoe", "zoe ", "\x1b[2J", "a" + "\u0301" * 2000])
def test_a24_names_of_accounts_hide_nothing(name: str) -> None:
    with pytest.raises(ValidationError):
        NAME.validate_python(name)


def test_a24_a_name_has_one_form() -> None:
    assert NAME.validate_python("Zoe\u0308") == NAME.validate_python("Zo\u00eb") == "Zo\u00eb"


def test_a24_a_name_given_at_the_command_line_has_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONGODB_URI", "mongodb://127.0.0.1:1/")
    given = ["create", "zoe\u202e", "--role", "auditor", "--password-stdin"]
    answer = CliRunner().invoke(app, given, input="correct horse battery\n")
    assert (answer.exit_code, "The username cannot be used" in answer.output) == (1, True)
