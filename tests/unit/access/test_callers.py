"""What a caller may do and see."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.access.grants import check_roles
from app.domain import callers
from app.domain.callers import CLIENT_ROLES, USER_ROLES, USERNAME_MAXIMUM, Caller, Role, subscriber, username_key
from app.errors import Validation


def caller(*roles: Role, galleries: tuple[str, ...] | None = None) -> Caller:
    """A person with these roles."""
    return Caller("u1", "user", "ann", frozenset(roles), galleries, "t1", "s1")


def test_an_admin_is_no_officer_unless_given_that_role_too() -> None:
    assert not caller(Role.ADMIN).has(Role.OFFICER)
    assert caller(Role.ADMIN, Role.OFFICER).has(Role.OFFICER)


def test_one_of_several_roles_is_enough() -> None:
    assert caller(Role.AUDITOR).has(Role.ADMIN, Role.AUDITOR)
    assert not caller(Role.AUDITOR).has()


def test_null_means_all_galleries_and_an_empty_list_none() -> None:
    assert caller(galleries=None).may_see("north")
    assert not caller(galleries=()).may_see("north")
    assert caller(galleries=("north",)).may_see("north")
    assert not caller(galleries=("north",)).may_see("nort")


def test_users_and_clients_have_roles_of_their_own() -> None:
    assert not USER_ROLES & CLIENT_ROLES
    assert set(Role) == USER_ROLES | CLIENT_ROLES
    check_roles((Role.OFFICER, Role.AUDITOR), USER_ROLES)
    check_roles((Role.RELYING_APP, Role.ENROLLER), CLIENT_ROLES)
    for roles, possible in (
        ((), USER_ROLES), ((Role.OFFICER, Role.OFFICER), USER_ROLES), ((Role.ENROLLER,), USER_ROLES),
        ((Role.OFFICER, Role.RELYING_APP), USER_ROLES), ((Role.OFFICER,), CLIENT_ROLES), ((Role.ADMIN,), CLIENT_ROLES),
        ((Role.RELYING_APP, Role.AUDITOR), CLIENT_ROLES),
    ):  # fmt: skip
        with pytest.raises(Validation):
            check_roles(roles, possible)


GALLERIES = st.none() | st.lists(st.sampled_from(["north", "south", "east"]), unique=True).map(tuple)


@given(GALLERIES, GALLERIES)
def test_nobody_keeps_an_account_that_may_see_more_than_they(
    own: tuple[str, ...] | None, others: tuple[str, ...] | None
) -> None:
    keeper, kept = caller(galleries=own), caller(galleries=others)
    sees_more = any(kept.may_see(name) and not keeper.may_see(name) for name in ("north", "south", "east", "new"))
    assert keeper.may_keep(others) == (not sees_more)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff::9"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("fe80::1%eth0", "fe80::2"),
        ("a unix socket", "a unix socket"),
    ],
)
def test_addresses_of_one_subscriber_are_the_same(one: str, other: str) -> None:
    assert subscriber(one) == subscriber(other)


@pytest.mark.parametrize(
    ("one", "other"), [("2001:db8:0:1::1", "2001:db8:0:2::1"), ("192.0.2.7", "192.0.2.8"), ("", "192.0.2.7")]
)
def test_addresses_of_two_subscribers_differ(one: str, other: str) -> None:
    assert subscriber(one) != subscriber(other)


@pytest.mark.parametrize("name", ["a" + "\u0301" * 300 + "\u0316" * 300, "A" * (USERNAME_MAXIMUM + 1)])
def test_h31_h57_a_name_that_is_nobody_s_for_its_length_is_compared_as_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(callers, "canonical")
    assert username_key(name) == name


def test_the_longest_name_is_compared_like_any_other() -> None:
    assert username_key("Ａ" * USERNAME_MAXIMUM) == "a" * USERNAME_MAXIMUM
