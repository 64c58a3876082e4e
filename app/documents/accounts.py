"""Callers as they are stored: users with their logins, client applications, and the keys that sign tokens."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import ClassVar, Self, TypeVar

from beanie import Document
from pydantic import Field
from pymongo import ASCENDING, DESCENDING, IndexModel
from pymongo.asynchronous.client_session import AsyncClientSession

from app.documents.base import Stored, now
from app.domain.callers import Caller, Role, former_username_key, may_see, username_key
from app.errors import NotFound


class User(Stored):
    """A person who logs in.

    galleries: ids. username_key: the name as it is compared, unique. access_version: access tokens of
    another one are refused, refreshing brings a new one; rises with the roles. session_version: whole logins of another one are
    refused; rises when the password changes or the user is disabled. sealed_totp: the secret of the second factor (see
    `totp_bound`), asked for at a login once it was confirmed; totp_step: the newest time step whose code was used.
    """

    username: str
    username_key: str
    password_hash: str
    roles: list[Role]
    galleries: list[str] | None = None
    disabled: bool = False
    access_version: int = 1
    session_version: int = 1
    sealed_totp: bytes | None = None
    totp_confirmed: bool = False
    totp_step: int = -1
    #: Written by whoever relies on this document staying as it is, so that a change of it conflicts.
    touch: int = 0
    #: Its password lies in a file of a development stack; production refuses to start beside it.
    for_development: bool = False
    created_at: datetime = Field(default_factory=now)
    updated_at: datetime = Field(default_factory=now)

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "users"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("username_key", ASCENDING)], unique=True, name="username"),
            IndexModel([("created_at", DESCENDING), ("_id", DESCENDING)], name="newest"),
        ]

    @property
    def backoff_name(self) -> str:
        """By what failed logins of this user are counted, in whatever spelling they were tried."""
        return f"user:{username_key(self.username)}"

    @classmethod
    async def named(cls, username: str, session: AsyncClientSession | None = None) -> Self | None:
        """The user of this name: of this spelling, if two that were made before December 2026 differ in it only."""
        former = former_username_key(username)
        keys = {"$in": list({username_key(username), former})}
        found = await cls.find({"username_key": keys}, session=session).to_list()
        return next((user for user in found if user.username_key == former), next(iter(found), None))

    def may(self, role: Role, gallery_id: str) -> bool:
        """Whether this user has the role in that gallery at present."""
        return role in self.roles and not self.disabled and may_see(self.galleries, gallery_id)


class Client(Stored):
    """An application that calls on its own behalf; its id is its OAuth `client_id`.

    galleries: ids. secret_hash: keyed hash of 256 random bits, which need no slow hashing. former_hash: the secret before it,
    good until `former_until`. audiences: whom its assertions may address, as far as they are its own (see
    `AudienceClaim`). access_version: as a user's; rises with the roles, and
    with a secret that takes effect at once.
    """

    name: str
    secret_hash: bytes
    former_hash: bytes | None = None
    former_until: datetime | None = None
    roles: list[Role]
    galleries: list[str] | None = None
    audiences: list[str] = Field(default_factory=list)
    access_version: int = 1
    created_at: datetime = Field(default_factory=now)
    updated_at: datetime = Field(default_factory=now)

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "clients"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("created_at", DESCENDING), ("_id", DESCENDING)], name="newest"),
        ]


class Login(Stored):
    """One login of a person: the family of its refresh tokens, and of the access tokens that came with them.

    Its id is the `sid` of those access tokens. session_version: the user's at the time. ends_at: nothing is refreshed
    after it. A missing login is a revoked one, so it is kept for as long as its last access token may live.
    """

    user_id: str
    session_version: int
    created_at: datetime
    ends_at: datetime
    purge_at: datetime
    revoked_at: datetime | None = None

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "logins"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("purge_at", ASCENDING)], expireAfterSeconds=0, name="purge"),
            IndexModel([("user_id", ASCENDING)], name="user"),
        ]


class RefreshToken(Document):
    """One refresh token of a login, known by its SHA-256 only; good for one use before `expires_at`.

    A used one stays until its login is purged: presented again, it tells that somebody holds a copy.
    """

    id: bytes  # type: ignore[assignment] # Beanie types it for ObjectId
    login_id: str
    expires_at: datetime
    purge_at: datetime
    used_at: datetime | None = None

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "refresh_tokens"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("purge_at", ASCENDING)], expireAfterSeconds=0, name="purge"),
            IndexModel([("login_id", ASCENDING)], name="login"),
        ]


class RevokedToken(Stored):
    """The `jti` of a client's access token that was revoked before it expired."""

    purge_at: datetime

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "revoked_tokens"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("purge_at", ASCENDING)], expireAfterSeconds=0, name="purge"),
        ]


class SigningKey(Stored):
    """An Ed25519 key that signs access tokens and assertions; its id is the `kid`, its RFC 7638 thumbprint.

    generation: 1 for the first, unique, so that processes which start together agree on one. The highest whose
    `signs_from` is over signs; all verify. verifies_until: None while no newer one is there; after it the key is gone.
    sealed_private: the 32 private bytes (see `signing_key_bound`).
    """

    generation: int
    public: bytes
    sealed_private: bytes
    signs_from: datetime = datetime(1970, 1, 1, tzinfo=UTC)
    verifies_until: datetime | None = None
    created_at: datetime = Field(default_factory=now)

    class Settings(Stored.Settings):
        """Collection and indexes."""

        name = "signing_keys"
        indexes: ClassVar[list[IndexModel]] = [
            IndexModel([("generation", ASCENDING)], unique=True, name="generation"),
            IndexModel([("verifies_until", ASCENDING)], expireAfterSeconds=0, name="purge"),
        ]


def signing_key_bound(key_id: str) -> bytes:
    """What `SigningKey.sealed_private` is bound to."""
    return f"idem/1|signing-key|{key_id}".encode()


def totp_bound(user_id: str) -> bytes:
    """What `User.sealed_totp` is bound to."""
    return f"idem/1|totp|{user_id}".encode()


Account = TypeVar("Account", User, Client)


def kept_by(caller: Caller | None) -> dict[str, object]:
    """The filter of accounts that a caller may see and keep: those bound to galleries of theirs (`Caller.may_keep`)."""
    if caller is None or caller.galleries is None:
        return {}
    beyond = {"$elemMatch": {"$nin": list(caller.galleries)}}
    return {"galleries": {"$ne": None, "$not": beyond}}


async def kept_account(
    kind: type[Account], account_id: str, caller: Caller | None, session: AsyncClientSession | None = None
) -> Account:
    """The user or client application of this id, where the caller may keep it. Raises NotFound."""
    account = await kind.find_one({"_id": account_id, **kept_by(caller)}, session=session)
    if account is None:
        message = f"There is no such {kind.__name__.lower()}."
        raise NotFound(message)
    return account


async def bound_to(kind: type[Account], gallery_id: str, session: AsyncClientSession) -> list[Account]:
    """The users or client applications that are bound to this gallery."""
    return await kind.find({"galleries": gallery_id}, session=session).sort("_id").to_list()


async def mark_for_development(usernames: Sequence[str]) -> None:
    """Remember that these users' passwords are known to a development stack."""
    keys = [key for name in usernames for key in (username_key(name), former_username_key(name))]
    await User.get_pymongo_collection().update_many(
        {"username_key": {"$in": keys}}, {"$set": {"for_development": True}}
    )


async def development_users() -> list[str]:
    """The enabled users whose passwords a development stack knows."""
    found = User.find({"for_development": True, "disabled": False})
    return sorted([user.username for user in await found.to_list()])


ACCOUNT_DOCUMENTS: tuple[type[Document], ...] = (User, Client, Login, RefreshToken, RevokedToken, SigningKey)
