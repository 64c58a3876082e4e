"""Roles and galleries that an admin may give to an account.

Admins see and give galleries by name. Accounts store their ids, so a later gallery of the same name is not included.
"""

from collections.abc import Collection, Sequence

from pymongo.asynchronous.client_session import AsyncClientSession

from app.documents.galleries import Gallery
from app.domain.callers import Caller, Role
from app.errors import Advice, Forbidden, Validation


def check_roles(roles: Sequence[Role], possible: Collection[Role]) -> None:
    """Raises Validation unless these are one or more different roles, all of them possible for the account."""
    if not roles or len(set(roles)) != len(roles):
        raise _unfit("roles", "One or more different roles are needed.")
    if not set(roles) <= set(possible):
        raise _unfit("clients-only" if Role.OFFICER in possible else "users-only", _possible(possible))


async def granted(giver: Caller | None, names: Sequence[str] | None, session: AsyncClientSession) -> list[str] | None:
    """The ids of the galleries that the account is to be bound to. None means all galleries.

    giver: None is the system, which may give all galleries. Raises Forbidden for galleries that the giver does not have, even
    if they do not exist. Raises Validation for names that no gallery has.
    """
    if names is None:
        if giver is not None and giver.galleries is not None:
            raise _not_yours()
        return None
    wanted = list(dict.fromkeys(names))
    ids = await Gallery.ids_by_name(wanted, session)
    if giver is not None and giver.galleries is not None and not giver.may_keep([ids.get(name, "") for name in wanted]):
        raise _not_yours()
    unknown = [name for name in wanted if name not in ids]
    if unknown:
        raise Validation(
            "There is no gallery of this name. Make the gallery first.",
            errors=tuple(Advice("galleries", "unknown", f"There is no gallery {name!r}.") for name in unknown),
        )
    return [ids[name] for name in wanted]


async def shown(galleries: Sequence[str] | None, session: AsyncClientSession | None = None) -> tuple[str, ...] | None:
    """The names of an account's galleries. None means all galleries."""
    return None if galleries is None else named(galleries, await Gallery.names_by_id(galleries, session))


def named(galleries: Sequence[str], names: dict[str, str]) -> tuple[str, ...]:
    """The names of these galleries, in their order. Deleted galleries are left out."""
    return tuple(names[id_] for id_ in galleries if id_ in names)


def _possible(roles: Collection[Role]) -> str:
    listed = " or ".join(f"`{role}`" for role in sorted(roles))
    return f"An account of this kind has the role {listed}."


def _unfit(code: str, message: str) -> Validation:
    return Validation(message, errors=(Advice("roles", code, message),))


def _not_yours() -> Forbidden:
    message = "You can give your own galleries only."
    return Forbidden(message, errors=(Advice("galleries", "not-yours", message),))
