"""What an account may be given: roles by its kind, and galleries by their names.

Admins give galleries by name, and see them by name. Accounts keep them by id: a later gallery of the same name is another one.
"""

from collections.abc import Collection, Sequence

from pymongo.asynchronous.client_session import AsyncClientSession

from app.documents.galleries import Gallery
from app.domain.callers import Caller, Role
from app.errors import Advice, Forbidden, Validation


def check_roles(roles: Sequence[Role], possible: Collection[Role]) -> None:
    """One or more different ones of the possible roles. Raises Validation."""
    if not roles or len(set(roles)) != len(roles):
        raise _unfit("roles", "One or more different roles are needed.")
    if not set(roles) <= set(possible):
        raise _unfit("clients-only" if Role.OFFICER in possible else "users-only", _possible(possible))


async def granted(giver: Caller | None, names: Sequence[str] | None, session: AsyncClientSession) -> list[str] | None:
    """The ids of the galleries that an account shall be bound to; None means all.

    giver: None is the system, which may give everything. Raises Forbidden for galleries that the giver does not have, whether
    they exist or not. Raises Validation for names that no gallery has.
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
    """The names of the galleries of an account; None means all."""
    return None if galleries is None else named(galleries, await Gallery.names_by_id(galleries, session))


def named(galleries: Sequence[str], names: dict[str, str]) -> tuple[str, ...]:
    """The names of these galleries, in their order. A gallery that is gone has none."""
    return tuple(names[id_] for id_ in galleries if id_ in names)


def _possible(roles: Collection[Role]) -> str:
    listed = " or ".join(f"`{role}`" for role in sorted(roles))
    return f"An account of this kind has the role {listed}."


def _unfit(code: str, message: str) -> Validation:
    return Validation(message, errors=(Advice("roles", code, message),))


def _not_yours() -> Forbidden:
    message = "You can give your own galleries only."
    return Forbidden(message, errors=(Advice("galleries", "not-yours", message),))
