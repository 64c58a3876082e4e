"""The HTTP app: open the Runtime, then hand over to the routes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import structlog
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from app.api import (
    audit,
    auth,
    clients,
    dedup,
    faces,
    galleries,
    identities,
    operations,
    problems,
    proposals,
    samples,
    users,
)
from app.api.connections import raise_open_files
from app.api.draining import Drain, Draining
from app.api.edges import Edges
from app.api.envelope import Envelope
from app.api.room import Room
from app.config import Settings
from app.errors import HeadersTooLarge, RateLimited, RequestTimeout, TooManyPieces, Unreadable
from app.logs import configure_service_logging
from app.runtime import open_runtime

log = structlog.get_logger(__name__)

DESCRIPTION = """Enrol people by face, find those who enrol twice, authenticate a person by a selfie,
and prove afterwards who did what."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service; its Runtime is opened when it starts and closed when it stops."""
    known = settings or Settings()
    configure_service_logging(known.log_level)
    raise_open_files()
    drain = Drain(known.shutdown_grace_seconds)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_runtime(known, warm=True, keep_up=True) as runtime:
            app.state.runtime = runtime
            log.info("service_opened", pack=runtime.engine.card.pack, reason=runtime.engine_reason)
            with drain.on_signals():
                yield

    # FastAPI's own pages load their scripts from a CDN; these bring them along.
    make = FastAPIOffline if known.shows_docs else partial(FastAPI, openapi_url=None, docs_url=None, redoc_url=None)
    app: FastAPI = make(
        title="Idem",
        version=operations.VERSION,
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        # What any route may answer before it is asked.
        responses=problems.problems(Unreadable, TooManyPieces, RequestTimeout, RateLimited, HeadersTooLarge),
    )
    problems.install(app)
    for door in (auth, users, clients, galleries, identities, samples, proposals, faces, dedup, audit, operations):
        app.include_router(door.router)
    app.include_router(identities.imports)
    app.add_middleware(Draining, drain=drain)
    app.add_middleware(
        Envelope,
        body_limit=known.max_json_bytes,
        body_seconds=known.body_timeout_seconds,
        room=Room(known.bodies_memory_mib * 2**20),
        allowed_origins=known.allowed_origins,
    )
    app.add_middleware(Edges)
    return app


def __getattr__(name: str) -> FastAPI:
    """`uvicorn app.main:app`: the app is made when it is asked for, not when this file is imported."""
    if name == "app":
        return create_app()
    raise AttributeError(name)
