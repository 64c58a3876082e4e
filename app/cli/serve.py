"""`idem serve`: the HTTP API in production's shape."""

import socket
from typing import Annotated

import typer
import uvicorn
from starlette.types import ASGIApp
from uvicorn.supervisors import Multiprocess

from app.api.envelope import HEADER_BYTES
from app.api.wire import Connection
from app.cli.settings import read_settings
from app.cli.waiting import WaitOption, wait_for_mongo
from app.config import Settings

#: Idle connections are kept a little longer than nginx keeps its own, so that nginx closes first.
KEEP_ALIVE_SECONDS = 75
#: A worker process that is busy with faces answers its supervisor late; that is no reason to kill it.
SILENCE_SECONDS = 60
BACKLOG = 1024


def serve(
    fd: Annotated[int | None, typer.Option("--fd", hidden=True, help="Serve on this inherited socket.")] = None,
    wait: WaitOption = 0,
) -> None:
    """Run the HTTP API on API_HOST:API_PORT with WORKERS processes."""
    settings = read_settings()
    config = configuration(settings)
    if fd is not None or settings.workers == 1:
        config.load_app()  # the long imports, while MongoDB may still be starting
        wait_for_mongo(settings.mongodb_uri, seconds=wait)
        uvicorn.Server(config).run(sockets=None if fd is None else [socket.socket(fileno=fd)])
    else:
        wait_for_mongo(settings.mongodb_uri, seconds=wait)
        Multiprocess(config, sockets=[config.bind_socket()]).run()


def configuration(
    settings: Settings, *, app: ASGIApp | None = None, connection: type[Connection] = Connection
) -> uvicorn.Config:
    """How the server runs. app: another one than the API; connection: another patience."""
    return uvicorn.Config(
        app or "app.main:create_app",
        factory=app is None,
        host=settings.api_host,
        port=settings.api_port,
        workers=settings.workers,
        http=connection,
        ws="none",
        h11_max_incomplete_event_size=HEADER_BYTES,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=settings.shutdown_grace_seconds,
        timeout_worker_healthcheck=SILENCE_SECONDS,
        proxy_headers=True,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        server_header=False,
        access_log=False,
        log_level=settings.log_level,
    )
