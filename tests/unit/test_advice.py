"""What a person reads where a field does not fit."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from app.api.clients import ClientRoles
from app.api.shapes import Moment, PlainText
from app.domain.attributes import BirthDate, ExternalRef, FullName
from app.domain.text import Reason
from app.errors import Advice


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (ClientRoles, ["officer"]),
        (Moment, "2026-11-30"),
        (PlainText, " a"),
        (BirthDate, "1990"),
        (ExternalRef, "\ue000"),
        (ExternalRef, "x" * 600),
        (FullName, "\u202eevil"),
        (FullName, "\u3164"),
        (Reason, "\u0007"),
        (Reason, " "),
    ],
)
def test_a_finding_is_a_sentence_without_the_names_of_the_code(kind: Callable[..., Any], value: object) -> None:
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(kind).validate_python(value)
    for finding in refused.value.errors():
        message = Advice.of_finding("field", finding).message
        assert message[0].isupper()
        assert "Value error" not in message
        assert "Role." not in message


def test_the_roles_are_named_as_callers_send_them() -> None:
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(ClientRoles).validate_python(["officer"])
    message = Advice.of_finding("roles", refused.value.errors()[0]).message
    assert message == "Input should be 'relying_app' or 'enroller'"
