"""What a process refuses to start with."""

import pytest
from pydantic import SecretStr

from app.config import Settings, UnsafeProduction, random_secret
from app.documents.accounts import mark_for_development
from app.domain.callers import Role
from app.runtime import Runtime, open_runtime
from app.use_cases.keep_users import UserFields, ensure_user
from tests.fakes import FakeEngine


async def test_another_key_encryption_key_than_the_stores_is_named(runtime: Runtime, settings: Settings) -> None:
    del runtime  # it has sealed the store's signing key
    other = settings.model_copy(update={"key_encryption_key": SecretStr(random_secret())})
    with pytest.raises(ValueError, match="KEY_ENCRYPTION_KEY is not the key"):
        async with open_runtime(other, FakeEngine()):
            pass


async def test_production_does_not_start_beside_a_development_stacks_users(
    runtime: Runtime, settings: Settings
) -> None:
    await ensure_user(runtime, UserFields("admin", (Role.ADMIN,), None), "a password in a file")
    await mark_for_development(["ADMIN"])
    production = settings.model_copy(update={"environment": "production"})
    with pytest.raises(UnsafeProduction, match="admin"):
        async with open_runtime(production, FakeEngine()):
            pass
