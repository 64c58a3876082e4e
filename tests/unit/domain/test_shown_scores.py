"""What a caller may see of a score, and how usernames are compared."""

from hypothesis import given
from hypothesis import strategies as st

from app.domain.callers import Caller, Role, shown_score, username_key


def _caller(*roles: Role) -> Caller:
    return Caller("c1", "client", "bank", frozenset(roles), None, "t1")


@given(st.floats(-1, 1))
def test_h67_relying_apps_see_two_decimals_and_officers_all(score: float) -> None:
    assert shown_score(_caller(Role.OFFICER), score) == score
    assert shown_score(_caller(Role.RELYING_APP, Role.OFFICER), score) == score
    for caller in (_caller(Role.RELYING_APP), _caller(Role.ADMIN, Role.AUDITOR), None):
        assert shown_score(caller, score) == round(score, 2)


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_h67_a_higher_score_is_never_shown_lower(one: float, other: float) -> None:
    lower, higher = sorted((one, other))
    app = _caller(Role.RELYING_APP)
    assert shown_score(app, lower) <= shown_score(app, higher)


@given(st.text(max_size=30))
def test_a_username_key_stays_as_it_is(name: str) -> None:
    assert username_key(username_key(name)) == username_key(name)


def test_letter_case_and_width_do_not_tell_two_people_apart() -> None:
    assert username_key("ＡＮＮ") == username_key("ann") == username_key("Ann")
    assert username_key("ann") != username_key("anna")
