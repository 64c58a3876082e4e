"""`idem backup` and `idem restore` as they are, over an engine that reads names, in a process that can be made to die.

`python -m tests.support.backup_process backup|restore|check ARGUMENTS`; KILL_AT=`STAGE:N` ends it by SIGKILL at the Nth word
that it tells of that stage.
"""

import os
import signal
import sys
from types import SimpleNamespace
from typing import Any

from app import cli, runtime
from app.cli import backup
from app.config import Settings
from app.use_cases import restore
from tests.fakes import FakeEngine

KILL_AT = "KILL_AT"


def environment_of(settings: Settings) -> dict[str, str]:
    """The environment in which a command has these settings."""
    named = {
        "MONGODB_URI": settings.mongodb_uri,
        "MONGODB_DATABASE": settings.mongodb_database,
        "MONGODB_MIN_POOL_SIZE": "0",
        "REDIS_URL": settings.redis_url,
        "KEY_ENCRYPTION_KEY": settings.key_encryption_secret(),
        "STORAGE_PATH": str(settings.storage_path),
        "EVIDENCE_PATH": str(settings.evidence_path),
        "VECTOR_DB_PATH": str(settings.vector_db_path),
        "INDEX_CACHE_PATH": str(settings.index_cache_path),
    }
    return dict(os.environ) | named


class _Deadly:
    """The bars, which kill their process at the word that the environment names."""

    def __init__(self, told: Any) -> None:  # noqa: ANN401
        self._told = told
        stage, _, count = os.environ[KILL_AT].partition(":")
        self._stage, self._left = stage, int(count)

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._told(stage, done, total)
        if stage == self._stage:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Become the command that the command line names."""
    runtime.open_engine = lambda *_, **__: SimpleNamespace(  # type: ignore[assignment,attr-defined]
        engine=FakeEngine(), reason="it reads names"
    )
    restore.LEASE_SECONDS = 2  # type: ignore[misc] # a killed one's is waited for
    if KILL_AT in os.environ:
        run = backup._run
        backup._run = lambda data_dir, work, **named: run(  # type: ignore[assignment]
            data_dir, lambda settings, tell: work(settings, _Deadly(tell)), **named
        )
    sys.argv = ["idem", *sys.argv[1:]]
    cli.main()


if __name__ == "__main__":
    main()
