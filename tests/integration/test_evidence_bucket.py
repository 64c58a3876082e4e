"""What a bucket for evidence must be when a process starts that serves."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from minio import Minio
from pydantic import SecretStr

from app.config import Settings, UnsafeProduction
from app.devstack.servers import free_port
from app.runtime import Runtime, open_runtime
from tests.fakes import FakeEngine
from tests.support.logs import captured_logs
from tests.support.services import Server


@pytest.fixture
def bucketed(settings: Settings, s3_server: Server) -> Settings:
    """Settings with a bucket that is not there yet."""
    return settings.model_copy(
        update={
            "evidence_bucket": f"evidence-{uuid.uuid4()}",
            "minio_endpoint": f"127.0.0.1:{s3_server.port}",
            "minio_access_key": "a-key",
            "minio_secret_key": SecretStr("a-secret-key"),
            "minio_secure": False,
        }
    )


@asynccontextmanager
async def serving(settings: Settings, environment: str = "development") -> AsyncIterator[Runtime]:
    """A process that serves."""
    changed = settings.model_copy(update={"environment": environment})
    async with open_runtime(changed, FakeEngine(), keep_up=True) as opened:
        yield opened


def without_a_lock(settings: Settings) -> None:
    """Have the bucket there, made by somebody who did not know."""
    plain = Minio(settings.minio_endpoint, "a-key", "a-secret-key", secure=False, region=settings.minio_region)
    plain.make_bucket(settings.evidence_bucket)


async def test_h99_production_does_not_start_with_evidence_in_a_bucket_without_lock(bucketed: Settings) -> None:
    without_a_lock(bucketed)
    with pytest.raises(UnsafeProduction, match="no object lock"):
        async with serving(bucketed, "production"):
            pass
    with captured_logs() as logged:
        async with serving(bucketed) as runtime:
            await runtime.evidence.append("heads/x", b"x")
    (told,) = [line for line in logged if line["event"] == "evidence_bucket_unlocked"]
    assert (told["log_level"], told["bucket"]) == ("critical", bucketed.evidence_bucket)


async def test_a_bucket_that_is_made_at_the_start_has_its_lock(bucketed: Settings) -> None:
    with captured_logs() as logged:
        async with serving(bucketed, "production") as runtime:
            await runtime.evidence.append("heads/x", b"x")
    assert not [line for line in logged if line["event"] == "evidence_bucket_unlocked"]


async def test_a_server_that_is_away_at_the_start_holds_nobody_up(bucketed: Settings) -> None:
    away = bucketed.model_copy(update={"minio_endpoint": f"127.0.0.1:{free_port()}"})
    async with serving(away, "production") as runtime:
        assert runtime.settings.is_production
