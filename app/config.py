"""Settings, from the environment or `.env`; nothing else in the product reads the environment."""

import re
import secrets
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

#: A key-encryption key is 32 bytes of entropy, in base64 or hex; anything shorter in text is a pass-phrase.
KEK_MINIMUM_CHARACTERS = 43
DISTINCT_CHARACTERS = 8
#: Every format of photos that can be read.
PHOTO_FORMATS = ("jpeg", "png", "webp", "heic", "avif", "jpeg2000")
WEAK_SECRETS = frozenset(
    {"changeme", "change-me", "secret", "password", "admin", "minioadmin", "idem", "test", "default"}
)


#: A host name, an IPv4 address or an IPv6 address in brackets, and perhaps a port.
_ENDPOINT = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.-]+(?::[0-9]{1,5})?")


class PlaceRefused(Exception):
    """A folder or bucket of the settings belongs to another store, or may belong to one."""


class UnsafeProduction(ValueError):
    """A setting that production must not start with."""


def _is_weak(secret: str, *, minimum: int) -> bool:
    lowered = secret.lower()
    return (
        len(secret) < minimum or len(set(secret)) < DISTINCT_CHARACTERS or any(word in lowered for word in WEAK_SECRETS)
    )


def _expanded(path: Path) -> Path:
    return path.expanduser()


def _is_origins(text: str) -> str:
    for origin in text.replace(",", " ").split():
        if _ORIGIN.fullmatch(origin) is None:
            message = f"{origin} is no origin: write https://host or https://host:port; there is no wildcard"
            raise ValueError(message)
    return text


def _is_endpoint(text: str) -> str:
    if text and _ENDPOINT.fullmatch(text) is None:
        message = "write HOST or HOST:PORT, without http:// and without a path; MINIO_SECURE says whether TLS is used"
        raise ValueError(message)
    return text


def _is_bucket(text: str) -> str:
    if text and _BUCKET.fullmatch(text) is None:
        message = "a bucket's name has 3 to 63 lower-case letters, digits, dots and hyphens"
        raise ValueError(message)
    return text


def _begins(text: str, schemes: tuple[str, ...]) -> str:
    if text and text.partition("://")[0] not in schemes:
        message = f"an address begins with {' or '.join(f'{scheme}://' for scheme in schemes)}"
        raise ValueError(message)
    return text


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _photo_formats(text: str) -> str:
    unknown = set(_words(text)) - set(PHOTO_FORMATS)
    if unknown or not _words(text):
        message = f"a list of formats out of {', '.join(PHOTO_FORMATS)}"
        raise ValueError(message)
    return text


LocalPath = Annotated[Path, AfterValidator(_expanded)]
#: Kinds of requests that are counted together: logins, face requests, erasures, other changes, other reads.
RateClass = Literal["login", "face", "erase", "write", "read"]
Rate = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,6}/(second|minute|hour)$")]
#: Per caller, or per address where there is none yet. In development nobody should meet them but a test that means to.
PRODUCTION_RATES: dict[RateClass, str] = {
    "login": "60/minute", "face": "600/minute", "erase": "60/hour", "write": "600/minute", "read": "3000/minute",
}  # fmt: skip
DEVELOPMENT_RATE = "6000/minute"


class Settings(BaseSettings):
    """Every setting with its default; names are the environment's, in lower case."""

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True
    )

    environment: Literal["development", "production"] = "development"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    # HTTP
    api_host: str = "127.0.0.1"
    api_port: Annotated[int, Field(ge=0, le=65535)] = 8000
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    public_url: str = ""  # issuer of tokens where it is not the address that callers use
    docs_enabled: bool | None = None  # None: on in development, off in production
    forwarded_allow_ips: str = ""  # nobody's
    cors_origins: Annotated[str, AfterValidator(_is_origins)] = ""
    body_timeout_seconds: Annotated[float, Field(gt=0, le=300)] = 10
    bodies_memory_mib: Annotated[int, Field(ge=16, le=1_000_000)] = 320
    shutdown_grace_seconds: Annotated[int, Field(ge=1, le=300)] = 8
    metrics_enabled: bool | None = None  # None: on in development, off in production

    # MongoDB: the only truth
    mongodb_uri: Annotated[str, AfterValidator(partial(_begins, schemes=("mongodb", "mongodb+srv")))] = ""
    mongodb_database: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,38}$")] = "idem"
    mongodb_max_pool_size: Annotated[int, Field(ge=1, le=1000)] = 50
    mongodb_min_pool_size: Annotated[int, Field(ge=0, le=1000)] = 10
    # The driver waits in steps of 0.5 s for a server that is away: 2.5 would often end at 3.0, and not within it.
    mongodb_timeout_seconds: Annotated[float, Field(gt=0, le=3.5)] = 2.4

    # Redis: hints for the worker; may be lost whole
    redis_url: Annotated[str, AfterValidator(partial(_begins, schemes=("redis", "rediss", "unix")))] = ""
    queue_name: str = "idem:jobs"
    queue_timeout_seconds: Annotated[float, Field(gt=0, le=5)] = 0.5
    worker_max_jobs: Annotated[int, Field(ge=1, le=256)] = 8
    sweep_interval_seconds: Annotated[int, Field(ge=1, le=60)] = 5

    # Dependencies that are away
    boundary_failures: Annotated[int, Field(ge=1, le=1000)] = 5
    boundary_pause_seconds: Annotated[float, Field(gt=0, le=60)] = 1.0
    photo_timeout_seconds: Annotated[float, Field(gt=0, le=60)] = 10.0
    share_timeout_seconds: Annotated[float, Field(gt=0, le=60)] = 5.0

    # Places that carry the mark of another store
    foreign_stores: Literal["refuse", "read"] = "refuse"

    # Photos
    photo_store: Literal["local", "minio"] = "local"
    storage_path: LocalPath = Path(".data/photos")
    minio_endpoint: Annotated[str, AfterValidator(_is_endpoint)] = ""
    minio_access_key: str = ""
    minio_secret_key: SecretStr = SecretStr("")
    minio_bucket: Annotated[str, AfterValidator(_is_bucket)] = "idem-photos"
    minio_region: str = "us-east-1"
    minio_secure: bool = True

    # The index of vectors
    vector_db_path: LocalPath = Path(".data/index")
    index_cache_path: LocalPath = Path("~/.cache/idem/index")
    index_tail_rows: Annotated[int, Field(ge=100, le=10_000_000)] = 50_000
    index_memory_mib: Annotated[int, Field(ge=16, le=10_000_000)] = 8192
    index_device: Literal["cpu", "gpu"] = "cpu"
    index_shadow_every: Annotated[int, Field(ge=0, le=1_000_000_000)] = 1000  # 0: never
    index_purge_hours: Annotated[int, Field(ge=1, le=24 * 30)] = 24

    # Evidence: an append-only place outside the database
    evidence_path: LocalPath = Path(".data/evidence")
    evidence_bucket: Annotated[str, AfterValidator(_is_bucket)] = (
        ""  # of the S3 server of the photos; instead of the folder
    )
    evidence_retention_days: Annotated[int, Field(ge=0, le=36_500)] = 3650  # 0: no period

    # The audit log
    audit_head_seconds: Annotated[float, Field(ge=0.05, le=3600)] = 1
    audit_checkpoint_seconds: Annotated[float, Field(ge=0.05, le=3600)] = 60
    audit_personal_days: Annotated[int, Field(ge=1, le=36_500)] = 365

    # Face model
    model_dir: LocalPath = Path("~/.insightface/models")
    face_model: str = "auto"
    face_device: Literal["auto", "cpu", "cuda"] = "auto"
    compute_threads: Annotated[int, Field(ge=0, le=256)] = 0  # 0: as many as cores
    compute_queue: Annotated[int, Field(ge=1, le=100_000)] = 256

    # Limits on what comes in
    photo_formats: Annotated[str, AfterValidator(_photo_formats)] = ",".join(PHOTO_FORMATS)
    max_photo_bytes: Annotated[int, Field(ge=1024, le=100 * 1024 * 1024)] = 20 * 1024 * 1024
    max_photo_pixels: Annotated[int, Field(ge=4096, le=200_000_000)] = 25_000_000
    max_jpeg_pixels: Annotated[int, Field(ge=4096, le=200_000_000)] = 60_000_000
    max_photo_side: Annotated[int, Field(ge=64, le=65_535)] = 12_000
    max_json_bytes: Annotated[int, Field(ge=1024)] = 256 * 1024
    max_samples: Annotated[int, Field(ge=1, le=100)] = 20

    # Rates per caller; None: see PRODUCTION_RATES and DEVELOPMENT_RATE
    rate_login: Rate | None = None
    rate_face: Rate | None = None
    rate_erase: Rate | None = None
    rate_write: Rate | None = None
    rate_read: Rate | None = None

    # Trust
    key_encryption_key: SecretStr = SecretStr("")
    key_encryption_key_file: LocalPath | None = None
    key_encryption_key_previous: SecretStr = SecretStr("")  # several: separated by commas or white space
    key_encryption_key_previous_file: LocalPath | None = None
    erasure_sweep_minutes: Annotated[int, Field(ge=1, le=60)] = 5
    access_token_expire_minutes: Annotated[int, Field(ge=1, le=1440)] = 30
    refresh_token_sliding_hours: Annotated[int, Field(ge=1, le=720)] = 8
    refresh_token_absolute_hours: Annotated[int, Field(ge=1, le=8760)] = 24
    login_failures_before_wait: Annotated[int, Field(ge=1, le=1000)] = 5
    login_failures_before_wait_address: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    login_wait_seconds: Annotated[int, Field(ge=1, le=3600)] = 30
    login_wait_maximum_seconds: Annotated[int, Field(ge=1, le=86_400)] = 900
    password_pool: Annotated[int, Field(ge=1, le=64)] = 2
    password_queue: Annotated[int, Field(ge=0, le=10_000)] = 32
    client_secret_overlap_hours: Annotated[int, Field(ge=0, le=720)] = 24
    attempts_before_wait: Annotated[int, Field(ge=1, le=50)] = 5
    attempts_wait_seconds: Annotated[int, Field(ge=1, le=3600)] = 30
    attempts_before_reset: Annotated[int, Field(ge=2, le=1000)] = 50
    replay_window_hours: Annotated[int, Field(ge=1, le=168)] = 24
    challenge_seconds: Annotated[int, Field(ge=10, le=3600)] = 120
    probe_identities_per_hour: Annotated[int, Field(ge=1, le=10_000)] = 100
    unknown_names_per_hour: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    finds_per_identity_per_hour: Annotated[int, Field(ge=1, le=1_000_000)] = 60
    non_matches_alarm_per_hour: Annotated[int, Field(ge=1, le=100_000_000)] = 1000
    erasures_alarm_per_hour: Annotated[int, Field(ge=1, le=1_000_000)] = 20
    people_read_alarm_per_hour: Annotated[int, Field(ge=1, le=10_000)] = 500
    idempotency_hours: Annotated[int, Field(ge=1, le=168)] = 24

    @property
    def is_production(self) -> bool:
        """Whether unsafe defaults are refused."""
        return self.environment == "production"

    def rates(self) -> dict[RateClass, str]:
        """How often one caller may ask, by class of request: "60/minute"."""
        given: dict[RateClass, str | None] = {
            "login": self.rate_login, "face": self.rate_face, "erase": self.rate_erase,
            "write": self.rate_write, "read": self.rate_read,
        }  # fmt: skip
        return {
            kind: rate or (PRODUCTION_RATES[kind] if self.is_production else DEVELOPMENT_RATE)
            for kind, rate in given.items()
        }

    def index_copies_of(self, store_id: str) -> Path:
        """The folder of this host's index copies for a store. Below the default path, each store has its own folder."""
        is_default = "index_cache_path" not in self.model_fields_set
        return self.index_cache_path / store_id if is_default else self.index_cache_path

    @property
    def accepted_formats(self) -> frozenset[str]:
        """The formats of photos that are read."""
        return frozenset(_words(self.photo_formats))

    @property
    def allowed_origins(self) -> frozenset[str]:
        """Origins whose pages may read answers; none unless named."""
        return frozenset(self.cors_origins.replace(",", " ").split())

    @property
    def shows_metrics(self) -> bool:
        """Whether /metrics is served."""
        return not self.is_production if self.metrics_enabled is None else self.metrics_enabled

    @property
    def shows_docs(self) -> bool:
        """Whether /docs, /redoc and /openapi.json are served."""
        return not self.is_production if self.docs_enabled is None else self.docs_enabled

    @property
    def address_failures_before_wait(self) -> int:
        """Failed logins from one address before there is a wait."""
        if self.login_failures_before_wait_address is not None:
            return self.login_failures_before_wait_address
        # On a developer's machine everybody comes from one address, and many fail on purpose.
        return self.login_failures_before_wait if self.is_production else 100

    def key_encryption_secret(self) -> str:
        """The key-encryption key's text, from its file where one is named. Raises OSError when that cannot be read."""
        if self.key_encryption_key_file is not None:
            return self.key_encryption_key_file.read_text(encoding="utf-8").strip()
        return self.key_encryption_key.get_secret_value()

    def key_encryption_previous_secrets(self) -> list[str]:
        """The texts of the keys that still open, and seal nothing any more. Raises OSError when their file cannot be read."""
        texts = self.key_encryption_key_previous.get_secret_value()
        if self.key_encryption_key_previous_file is not None:
            texts = self.key_encryption_key_previous_file.read_text(encoding="utf-8")
        return texts.replace(",", " ").split()

    @model_validator(mode="after")
    def _names_the_s3_server(self) -> Self:
        needs = [
            name
            for name, is_met in (
                ("PHOTO_STORE=minio", self.photo_store == "minio"),
                ("EVIDENCE_BUCKET", bool(self.evidence_bucket)),
            )
            if is_met
        ]
        if needs and not self.minio_endpoint:
            message = f"MINIO_ENDPOINT is missing: {' and '.join(needs)} needs it"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _production_is_safe(self) -> Self:
        if not self.is_production:
            return self
        faults = []
        if not self.mongodb_uri:
            faults.append("MONGODB_URI is missing: an embedded MongoDB is for development only")
        if not self.redis_url:
            faults.append("REDIS_URL is missing: an embedded Redis is for development only")
        if _is_weak(self.key_encryption_secret(), minimum=KEK_MINIMUM_CHARACTERS):
            faults.append(
                "KEY_ENCRYPTION_KEY (or _FILE) is missing or weak: give 32 random bytes in base64 (openssl rand -base64 32)"
            )
        if self.photo_store == "minio" and _is_weak(self.minio_secret_key.get_secret_value(), minimum=16):
            faults.append("MINIO_SECRET_KEY is missing or weak")
        if self.face_model == "auto":
            faults.append("FACE_MODEL=auto is for development only: name the pack")
        if faults:
            raise UnsafeProduction("; ".join(faults))
        return self


def random_secret() -> str:
    """32 random bytes as URL-safe text: a key-encryption key, a development password."""
    return secrets.token_urlsafe(32)
