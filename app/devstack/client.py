"""A caller of the HTTP contract: what the demo and the benchmark know of the platform. Nothing inside is imported.

Answers are read into small models of the fields that are used; what else an answer holds is left alone.
"""

from collections.abc import Mapping
from typing import Final, Literal, Self

import httpx
import jwt
from pydantic import BaseModel, ConfigDict, ValidationError

TIMEOUT_SECONDS: Final = 60.0
READY_TIMEOUT_SECONDS: Final = 2.0


class CallFailed(RuntimeError):
    """The service answered something else than it should; says what was asked and what came."""

    def __init__(self, asked: str, status: int, said: str) -> None:
        super().__init__(f"{asked} answered {status}: {said}")
        self.status = status
        self.said = said


class Answer(BaseModel):
    """A part of the service's answer."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Account(Answer):
    """A person who logs in."""

    username: str
    password: str


class ClientAccount(Answer):
    """An application that logs in."""

    client_id: str
    client_secret: str


class DemoUsers(Answer):
    """One person per role."""

    officer: Account
    auditor: Account


class Credentials(Answer):
    """Everybody who can log in to a development stack; the content of `credentials.json`."""

    admin: Account
    users: DemoUsers
    client: ClientAccount


class ReadyStack(Answer):
    """Where a running stack is, and who may use it: the content of the ready-file.

    Production makes no accounts, so there the three are null.
    """

    url: str
    pid: int
    admin: Account | None
    users: DemoUsers | None
    client: ClientAccount | None
    mongo_uri: str
    redis_url: str
    data_dir: str

    def credentials(self) -> Credentials | None:
        """Its accounts together; None in production."""
        if self.admin is None or self.users is None or self.client is None:
            return None
        return Credentials(admin=self.admin, users=self.users, client=self.client)


class Dedup(Answer):
    """How the search for look-alikes went."""

    state: str
    verdict: str | None
    case_id: str | None


class Identity(Answer):
    """Somebody enrolled."""

    id: str
    status: str
    dedup: Dedup


class Verification(Answer):
    """The answer to "is this the person?"."""

    match: bool
    identity_id: str
    score: float | None
    threshold: float
    assertion: str | None


class Candidate(Answer):
    """Somebody whom a newcomer looks like."""

    identity: Identity
    score: float


class Case(Answer):
    """A suspected duplicate that waits for a decision."""

    id: str
    candidates: list[Candidate]


class Subject(Answer):
    """What an event is about."""

    id: str | None


class Event(Answer):
    """One line of the audit trail."""

    action: str
    outcome: str
    subject: Subject


class Claims(Answer):
    """What a verification's assertion says, once its signature holds."""

    iss: str
    sub: str
    aud: str
    exp: int
    gallery: str


class Check(Answer):
    """One part of the service, as `/ready` saw it. error: what failed; pack: the face model's."""

    status: str
    error: str | None = None
    pack: str | None = None


class Readiness(Answer):
    """What `/ready` says."""

    status: str
    checks: dict[str, Check]

    @property
    def serves(self) -> bool:
        """Whether requests are answered."""
        return self.status != "not_ready"


class _Token(Answer):
    access_token: str


class _Identities(Answer):
    items: list[Identity]


class _Events(Answer):
    items: list[Event]
    next_cursor: str | None


class Service:
    """The service at one address. Use as an async context manager; safe for many calls at once."""

    def __init__(self, url: str, *, connections: int = 16) -> None:
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        # No proxy of the environment: the stack is on this machine or named on purpose.
        self._http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS, limits=limits, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def readiness(self) -> "Readiness | None":
        """What `/ready` says; None while nobody answers."""
        try:
            answer = await self._http.get("/ready", timeout=READY_TIMEOUT_SECONDS)
            return Readiness.model_validate_json(answer.content)
        except (httpx.HTTPError, ValidationError):
            return None

    async def log_in(self, account: Account | ClientAccount) -> "Caller":
        """A caller with an access token. Raises CallFailed when the credentials do not hold."""
        if isinstance(account, Account):
            form = {"grant_type": "password", "username": account.username, "password": account.password}
        else:
            form = {
                "grant_type": "client_credentials",
                "client_id": account.client_id,
                "client_secret": account.client_secret,
            }
        answer = await self.call("POST", "/v1/auth/token", form=form, expected=(200,))
        return Caller(self, _Token.model_validate_json(answer).access_token)

    async def verified_claims(self, assertion: str, *, audience: str) -> Claims:
        """An assertion's claims, its signature checked with the service's published keys. Raises jwt.PyJWTError.

        The assertion was made just now. So its times are not compared with this host's clock, which may be wrong.
        """
        published = jwt.PyJWKSet.from_json((await self.call("GET", "/.well-known/jwks.json", expected=(200,))).decode())
        key = published[str(jwt.get_unverified_header(assertion).get("kid"))]
        claims = jwt.decode(
            assertion,
            key,
            algorithms=["EdDSA"],
            audience=audience,
            options={"require": ["exp", "sub"], "verify_exp": False, "verify_iat": False},
        )
        return Claims.model_validate(claims)

    async def call(
        self,
        method: str,
        path: str,
        *,
        expected: tuple[int, ...],
        token: str = "",
        form: Mapping[str, str] | None = None,
        photo: bytes | None = None,
        body: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
    ) -> bytes:
        """The body of one answer. Raises CallFailed on a status not `expected`, httpx.HTTPError without an answer."""
        response = await self._http.request(
            method,
            path,
            data=form,
            json=body,
            params=query,
            files=None if photo is None else {"photo": ("photo.jpg", photo, "image/jpeg")},
            headers={"Authorization": f"Bearer {token}"} if token else None,
        )
        if response.status_code not in expected:
            raise CallFailed(f"{method} {path}", response.status_code, response.text[:500])
        return response.content


class Caller:
    """Somebody who is logged in."""

    def __init__(self, service: Service, token: str) -> None:
        self._service = service
        self._token = token

    async def create_gallery(self, name: str) -> bool:
        """Whether the gallery is new; false when it was there."""
        try:
            await self._service.call("POST", "/v1/galleries", token=self._token, body={"name": name}, expected=(201,))
        except CallFailed as failure:
            if failure.status == httpx.codes.CONFLICT:
                return False
            raise
        return True

    async def has_identities(self) -> bool:
        """Whether anybody is enrolled in any gallery that the caller sees."""
        answer = await self._service.call(
            "GET", "/v1/identities", token=self._token, query={"limit": "1"}, expected=(200,)
        )
        return bool(_Identities.model_validate_json(answer).items)

    async def enrol(
        self, photo: bytes, *, gallery: str, external_ref: str, full_name: str, wait_seconds: int = 0
    ) -> Identity:
        """Enrol somebody by one photo; with `wait_seconds` (30 at most) the answer holds the verdict."""
        answer = await self._service.call(
            "POST",
            "/v1/identities",
            token=self._token,
            query={"wait": str(wait_seconds)} if wait_seconds else None,
            form={"gallery": gallery, "external_ref": external_ref, "full_name": full_name},
            photo=photo,
            expected=(201, 202),
        )
        return Identity.model_validate_json(answer)

    async def identity(self, identity_id: str) -> Identity:
        """One identity as it is now."""
        answer = await self._service.call("GET", f"/v1/identities/{identity_id}", token=self._token, expected=(200,))
        return Identity.model_validate_json(answer)

    async def case(self, case_id: str) -> Case:
        """One suspected duplicate with those whom it looks like."""
        answer = await self._service.call("GET", f"/v1/dedup/cases/{case_id}", token=self._token, expected=(200,))
        return Case.model_validate_json(answer)

    async def verify(self, photo: bytes, identity_id: str) -> Verification:
        """Ask whether a selfie shows this identity."""
        answer = await self._service.call(
            "POST",
            "/v1/verifications",
            token=self._token,
            form={"identity_id": identity_id},
            photo=photo,
            expected=(200,),
        )
        return Verification.model_validate_json(answer)

    async def detect(self, photo: bytes) -> None:
        """Have the faces of a photo found; what is found is left alone."""
        await self._service.call("POST", "/v1/faces/detect", token=self._token, photo=photo, expected=(200,))

    async def events(
        self, *, action: str, gallery: str, outcome: Literal["success", "denied", "failure"]
    ) -> list[Event]:
        """Every audit event of one kind in one gallery, newest first."""
        found: list[Event] = []
        query = {"action": action, "gallery": gallery, "outcome": outcome, "limit": "200"}
        while True:
            answer = await self._service.call(
                "GET", "/v1/audit/events", token=self._token, query=query, expected=(200,)
            )
            page = _Events.model_validate_json(answer)
            found += page.items
            if page.next_cursor is None:
                return found
            query = query | {"cursor": page.next_cursor}
