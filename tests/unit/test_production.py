"""What production must not start with."""

import hashlib

import pytest

from app.config import Settings, UnsafeProduction
from app.main import create_app

KEY = hashlib.sha256(b"as good as random").hexdigest()
SAFE = {
    "environment": "production",
    "mongodb_uri": "mongodb://db.example/?replicaSet=rs0",
    "redis_url": "redis://queue.example/0",
    "key_encryption_key": KEY,
    "face_model": "opencv_zoo",
}
STORE = {"photo_store": "minio", "minio_endpoint": "s3.example", "minio_access_key": "idem"}


def settings(**changed: object) -> Settings:
    return Settings(_env_file=None, **(SAFE | changed))


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_production_starts_with_what_is_safe() -> None:
    assert settings().is_production
    assert settings(**STORE, minio_secret_key=KEY).is_production


@pytest.mark.parametrize(
    "weak",
    [
        "",
        "12345678",
        "changeme",
        "changeme" * 8,
        "a" * 64,
        "abab" * 16,
        "idem-" + KEY,
        KEY[:30],
    ],
    ids=["none", "eight bytes", "a default", "a default repeated", "one letter", "two letters", "our name", "short"],
)
def test_h99_production_does_not_start_with_a_missing_or_weak_key(weak: str) -> None:
    with pytest.raises(ValueError, match="KEY_ENCRYPTION_KEY"):
        settings(key_encryption_key=weak)


@pytest.mark.parametrize("weak", ["", "minioadmin", "minioadmin" * 3, "12345678"])
def test_h99_production_does_not_start_with_the_photo_stores_default_secret(weak: str) -> None:
    with pytest.raises(ValueError, match="MINIO_SECRET_KEY"):
        settings(**STORE, minio_secret_key=weak)


@pytest.mark.parametrize("missing", ["mongodb_uri", "redis_url"])
def test_h99_production_does_not_start_with_the_servers_of_a_trial(missing: str) -> None:
    with pytest.raises(ValueError, match=missing.upper()):
        settings(**{missing: ""})


def test_h99_every_fault_is_told_at_once_and_no_secret_with_it() -> None:
    with pytest.raises(ValueError) as refusal:
        settings(key_encryption_key="changeme-4711", mongodb_uri="", face_model="auto")
    said = str(refusal.value)
    assert all(name in said for name in ("KEY_ENCRYPTION_KEY", "MONGODB_URI", "FACE_MODEL"))
    assert "changeme-4711" not in said
    assert issubclass(UnsafeProduction, ValueError)


def test_h99_production_has_no_debug_mode_and_hides_its_pages_unless_asked() -> None:
    app = create_app(settings(log_level="debug"))
    assert not app.debug
    assert (app.docs_url, app.redoc_url, app.openapi_url) == (None, None, None)
    asked = create_app(settings(docs_enabled=True))
    assert {"/docs", "/openapi.json"} <= {getattr(route, "path", "") for route in asked.routes}


def test_development_may_be_as_it_is() -> None:
    assert not Settings(_env_file=None).is_production
