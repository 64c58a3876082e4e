"""An append-only place outside the database: what is kept here can be added to, and never changed.

It holds what must still speak when the database itself was changed or set back: signed tree heads, the ledger of erasures. Names
look like `heads/2026-11-21/000000000042-key.json`.
"""

import asyncio
import base64
import fcntl
import hashlib
import io
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Protocol, TypeVar
from xml.etree.ElementTree import ParseError

import urllib3
from minio import Minio
from minio.commonconfig import COMPLIANCE
from minio.datatypes import Object
from minio.error import MinioException, S3Error
from minio.retention import Retention
from urllib3.exceptions import HTTPError

#: One to eight segments; none begins with a dot, so `..` cannot be named.
_SEGMENT: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_NAME: Final = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT}){{0,7}}")
_PREFIX: Final = re.compile(rf"(?:{_SEGMENT}/){{0,7}}(?:{_SEGMENT})?")

#: Nobody waits for evidence but background work, and it comes again.
_DEADLINE_SECONDS: Final = 10.0
_NO_LOCK: Final = frozenset({"ObjectLockConfigurationNotFoundError", "NotImplemented", "MethodNotAllowed"})

_Result = TypeVar("_Result")


class EvidenceUnavailable(OSError):
    """The place cannot be reached, is too slow, full, or broken."""


class EvidenceExists(Exception):
    """Other bytes lie under that name already."""


class EvidenceNotFound(LookupError):
    """Nothing lies under that name."""


class EvidenceStore(Protocol):
    """Bytes under names, written once.

    Every method raises ValueError for a name of another shape, EvidenceUnavailable on a fault.
    """

    async def append(self, name: str, data: bytes) -> None:
        """Keep `data` (not empty) under `name`; durable when it returns.

        The same bytes again are fine: after EvidenceUnavailable, ask again. Raises EvidenceExists when other bytes lie there.
        """

    async def read(self, name: str) -> bytes:
        """What was first kept under `name`. Raises EvidenceNotFound."""

    async def names(self, prefix: str = "") -> list[str]:
        """Every name that starts with `prefix`, sorted."""

    async def close(self) -> None:
        """Let go of threads and connections; calls still queued are cancelled."""


class FolderEvidence:
    """Files below a folder (0700; files 0600), best on another disk than the database's. `chattr +a` on the folder suits it."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._thread = _Thread("evidence-files")

    async def append(self, name: str, data: bytes) -> None:
        """See EvidenceStore. What a crash left half written is completed when the same bytes come again."""
        path = self._root / _checked(name, data)
        await self._thread.run(lambda: self._append(path, data))

    async def read(self, name: str) -> bytes:
        """See EvidenceStore."""
        path = self._root / _checked(name)
        return await self._thread.run(lambda: self._read(path))

    async def names(self, prefix: str = "") -> list[str]:
        """See EvidenceStore."""
        _checked_prefix(prefix)
        return await self._thread.run(lambda: self._names(prefix))

    async def close(self) -> None:
        """See EvidenceStore."""
        self._thread.close()

    def _append(self, path: Path, data: bytes) -> None:
        try:
            self._make_folders(path.parent)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                # Two processes may bring the same evidence at once; who comes second finds all of it, or a torn beginning.
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                kept = os.pread(descriptor, len(data) + 1, 0)
                if not data.startswith(kept):
                    message = f"other bytes are kept under {path.relative_to(self._root).as_posix()}"
                    raise EvidenceExists(message)
                while len(kept) < len(data):
                    kept = data[: len(kept) + os.pwrite(descriptor, data[len(kept) :], len(kept))]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._sync_folders(path.parent)
        except OSError as problem:
            raise _unavailable(problem) from problem

    def _read(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as problem:
            raise EvidenceNotFound(path.relative_to(self._root).as_posix()) from problem
        except OSError as problem:
            raise _unavailable(problem) from problem

    def _names(self, prefix: str) -> list[str]:
        folder = self._root / prefix.rpartition("/")[0]
        try:
            if not folder.is_dir():
                return []
            found = (path.relative_to(self._root).as_posix() for path in folder.rglob("*") if path.is_file())
            return sorted(name for name in found if name.startswith(prefix) and _NAME.fullmatch(name))
        except OSError as problem:
            raise _unavailable(problem) from problem

    def _make_folders(self, folder: Path) -> None:
        for wanted in [*reversed(folder.parents), folder]:
            if not wanted.is_dir():
                wanted.mkdir(mode=0o700, exist_ok=True)

    def _sync_folders(self, folder: Path) -> None:
        """Make the entries of `folder` and of those above it durable: one of them may just have been made."""
        while True:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if folder == self._root:
                return
            folder = folder.parent


class BucketEvidence:
    """Objects of a bucket on a MinIO-compatible server. The bucket is made with object lock when it is missing.

    A lock keeps versions, not names: what counts is the first version of each, whatever was written or marked deleted over it.
    """

    def __init__(
        self,
        *,
        endpoint: str,
        access_key: str,
        secret_key: str,
        bucket: str,
        region: str,
        secure: bool,
        retention_days: int,
        timeout_seconds: float = 5.0,
    ) -> None:
        """retention_days: how long the server refuses to delete a version, where the bucket has object lock; 0: no period."""
        self._bucket = bucket
        self._retention = timedelta(days=retention_days)
        self._connections = urllib3.PoolManager(
            maxsize=1,
            timeout=urllib3.Timeout(connect=timeout_seconds, read=timeout_seconds),
            retries=urllib3.Retry(total=1, connect=0, read=0, backoff_factor=0),
        )
        self._client = Minio(
            endpoint,
            access_key=access_key,
            secret_key=secret_key,
            region=region,
            secure=secure,
            http_client=self._connections,
        )
        self._thread = _Thread("evidence-objects")
        self._is_locked: bool | None = None

    async def append(self, name: str, data: bytes) -> None:
        """See EvidenceStore."""
        _checked(name, data)
        await self._run(lambda: self._append(name, data))

    async def read(self, name: str) -> bytes:
        """See EvidenceStore."""
        _checked(name)
        kept = await self._run(lambda: self._first(name))
        if kept is None:
            raise EvidenceNotFound(name)
        return kept

    async def names(self, prefix: str = "") -> list[str]:
        """See EvidenceStore. A name whose versions are hidden by a delete marker is still there."""
        _checked_prefix(prefix)
        return await self._run(lambda: sorted({found for found, _ in self._versions(prefix) if _NAME.fullmatch(found)}))

    async def close(self) -> None:
        """See EvidenceStore."""
        self._thread.close()
        self._connections.clear()

    async def _run(self, call: Callable[[], _Result]) -> _Result:
        def bounded() -> _Result:
            try:
                return call()
            except (MinioException, HTTPError, OSError, ParseError, UnicodeDecodeError) as problem:
                raise _unavailable(problem) from problem

        return await self._thread.run(bounded)

    def _append(self, name: str, data: bytes) -> None:
        self._ensure_bucket()
        kept = self._first(name)
        if kept is None:
            self._put(name, data)
            kept = self._first(name)  # another process may have been a moment earlier
        if kept != data:
            message = f"other bytes are kept under {name}"
            raise EvidenceExists(message)

    def _put(self, name: str, data: bytes) -> None:
        retention = None
        if self._is_locked and self._retention:
            retention = Retention(mode=COMPLIANCE, retain_until_date=datetime.now(UTC) + self._retention)
        # A server takes nothing under a lock without a checksum of it.
        checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        self._client.put_object(
            self._bucket,
            name,
            io.BytesIO(data),
            len(data),
            content_type="application/json",
            metadata={"x-amz-sdk-checksum-algorithm": "SHA256", "x-amz-checksum-sha256": checksum},
            retention=retention,
        )

    def _first(self, name: str) -> bytes | None:
        """The oldest version's bytes; servers list versions of a name from the newest to the oldest."""
        versions = [version for found, version in self._versions(name) if found == name]
        if not versions:
            return None
        answer = self._client.get_object(self._bucket, name, version_id=versions[-1])
        try:
            return answer.read()
        finally:
            answer.close()
            answer.release_conn()

    def _versions(self, prefix: str) -> list[tuple[str, str | None]]:
        try:
            listed: list[Object] = list(
                self._client.list_objects(self._bucket, prefix, recursive=True, include_version=True)
            )
        except S3Error as problem:
            if problem.code == "NoSuchBucket":
                return []
            raise
        return [
            (found.object_name, found.version_id)
            for found in listed
            if found.object_name is not None and not found.is_delete_marker
        ]

    def _ensure_bucket(self) -> None:
        """Once a process: make the bucket where it is missing, and learn whether it locks its objects."""
        if self._is_locked is not None:
            return
        if not self._client.bucket_exists(self._bucket):
            try:
                self._client.make_bucket(self._bucket, object_lock=True)
            except S3Error as problem:
                if problem.code not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                    raise
        try:
            self._client.get_object_lock_config(self._bucket)
        except S3Error as problem:
            if problem.code not in _NO_LOCK:
                raise
            self._is_locked = False
        else:
            self._is_locked = True


class _Thread:
    """One thread for blocking calls, one after another, with a deadline that counts the wait for it too."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, call: Callable[[], _Result]) -> _Result:
        try:
            async with asyncio.timeout(_DEADLINE_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(self._pool, call)
        except TimeoutError as problem:
            message = "the evidence store did not answer in time"
            raise EvidenceUnavailable(message) from problem

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _checked(name: str, data: bytes = b"-") -> str:
    if not _NAME.fullmatch(name) or not data:
        message = "evidence has a name of one to eight segments of letters, digits, '.', '_' and '-', and is not empty"
        raise ValueError(message)
    return name


def _checked_prefix(prefix: str) -> None:
    if not _PREFIX.fullmatch(prefix):
        message = "a prefix is the beginning of a name"
        raise ValueError(message)


def _unavailable(problem: Exception) -> EvidenceUnavailable:
    return EvidenceUnavailable(f"the evidence store failed: {type(problem).__name__}: {problem}")
