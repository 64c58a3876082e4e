"""What a caller may do and see."""

from app.domain.callers import Caller, Role


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
