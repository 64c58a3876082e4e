"""Which store owns a folder or a bucket.

Each place carries a mark: a small file or object that names the store that owns the place. The mark is written once.
A store asks for the mark before it writes or deletes anything there.

A place without a mark is free when it is empty, or when everything in it belongs to galleries that the store knows.
Any other place is refused. A photo store that the store has marked before is not free when it is empty: it may be the mount
point of a share that is not mounted. See docs/adr/0035.
"""

import errno
import io
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, Protocol, TypeVar
from xml.etree.ElementTree import ParseError

from minio import Minio
from minio.error import MinioException, S3Error
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError
from urllib3.exceptions import HTTPError

#: Hidden, so that it is neither the key of a photo nor the id of a gallery.
MARK: Final = ".idem-store"
_MARK_LIMIT: Final = 4096
#: Another process writes an empty mark within this time. After it, the process has died, and the mark counts as missing.
_FILLED_SECONDS: Final = 1.0
_PAUSE_SECONDS: Final = 0.05
#: A fresh ext4 file system has this folder.
_IGNORED: Final = frozenset({"lost+found"})
#: How many unknown names a message shows.
_SHOWN: Final = 3
#: A look at a bucket ends after this many unknown names.
_COUNTED: Final = 1000

Result = TypeVar("Result")
#: ours: the mark names this store. foreign: the mark names another store. free: no mark, and this store may write one.
#: unmarked: no mark, and unknown content. emptied: this store marked it before, and now it is empty. absent: there is no such
#: folder or bucket. away: the place does not answer.
State = Literal["ours", "foreign", "free", "unmarked", "emptied", "absent", "away"]


class NotOurs(OSError):
    """The place belongs to another store, or its owner is not known: nothing may be written or deleted there."""


class Mark(BaseModel):
    """What the mark says."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    store: str = Field(min_length=1, max_length=100)
    marked_at: AwareDatetime
    note: str = "This place belongs to the Idem store named above. Do not copy, change or delete this mark."


@dataclass(slots=True)
class Owner:
    """The store that this process works for.

    galleries: the ids of all galleries that the store has or had. folders: its own folders, which may lie inside each other,
    each with the names that the store itself writes there. places: the names of the guards whose places the store has marked.
    reads_foreign: a place of another store is read, and never written, instead of refused.
    """

    id: str
    galleries: set[str] = field(default_factory=set)
    folders: Mapping[Path, AbstractSet[str]] = field(default_factory=dict)
    places: set[str] = field(default_factory=set)
    reads_foreign: bool = False

    def own_names(self, root: Path) -> set[str]:
        """The names right below `root` that the store writes, or that lead to another folder of the store."""
        nested = {
            path.relative_to(root).parts[0] for path in self.folders if path != root and path.is_relative_to(root)
        }
        return nested.union(self.folders.get(root, ()))


@dataclass(frozen=True, slots=True)
class Standing:
    """What is known of a place. unknown: some of the names there that do not belong to the store."""

    setting: str
    where: str
    state: State
    store: str | None = None
    marked_at: datetime | None = None
    unknown: tuple[str, ...] = ()
    trouble: str | None = None

    @property
    def is_refused(self) -> bool:
        """Whether a process must not start with it."""
        return self.state in {"foreign", "unmarked"}

    @property
    def sentence(self) -> str:
        """What an operator has to know, and what to do."""
        named = f"{self.setting} {self.where}"
        if self.state == "foreign":
            since = "" if self.marked_at is None else f" since {self.marked_at:%Y-%m-%d}"
            return (
                f"{named} belongs to another store ({self.store}{since}): name another place for this store; if the other "
                "store is gone for good, take its place over with `idem stores adopt`; to read it in a restore drill, set "
                "FOREIGN_STORES=read"
            )
        if self.state == "unmarked":
            more = len(self.unknown) - _SHOWN
            shown = ", ".join(ascii(name) for name in self.unknown[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
            return (
                f"{named} has no mark of a store, and contains names that this database does not know ({shown}): name an "
                "empty place, or take this one over with `idem stores adopt`, which deletes nothing in it"
            )
        if self.state == "emptied":
            return (
                f"{named} was marked by this store before, and is empty now: if it is a share, mount it; if its content is gone "
                "for good, take the empty place into use with `idem stores adopt`"
            )
        return f"{named} cannot be used: {self.trouble or self.state}"


class Place(Protocol):
    """A folder or a bucket. Every method may block, and raises OSError when the place does not answer.

    setting: the name of the setting that names it. is_costly: whether a look at its mark takes a round trip.
    """

    setting: str
    where: str
    is_costly: bool

    def exists(self) -> bool:
        """Whether there is such a folder or bucket."""

    def make(self) -> None:
        """Make it if it is missing."""

    def make_marked(self, mark: Mark) -> None:
        """Make it with this mark. If another process or thread was quicker, leave it as it is."""

    def is_marked_unreadably(self) -> bool:
        """Whether a mark was begun there and never completed. `mark` gives None for it."""

    def mark(self) -> Mark | None:
        """Its mark; None without one."""

    def put_mark(self, mark: Mark) -> None:
        """Write the mark if there is none. An existing mark stays as it is."""

    def replace_mark(self, mark: Mark) -> None:
        """Write the mark. Replaces an existing mark."""

    def own_names(self, owner: Owner) -> set[str]:
        """Names right below it that are no galleries but belong to the owner: names that it writes, and its other places."""

    def unknown(self, owner: Owner) -> list[str]:
        """Some of the names right below it that are neither galleries of the owner nor `own_names`."""


class Guard:
    """Lets one process write to a place only while its store owns the place. Blocking; safe from any thread."""

    def __init__(self, place: Place, owner: Owner, *, is_remembered: bool = False) -> None:
        """is_remembered: its content cannot be made again. If the store has marked it before, it is never filled while empty."""
        self.place = place
        self.owner = owner
        #: What the owner remembers of a place that it has marked.
        self.name = f"{place.setting} {place.where}"
        self._is_remembered = is_remembered
        self._is_confirmed = False

    def look(self) -> Standing:
        """What is known of the place. Writes nothing."""
        place = self.place
        try:
            if (mark := place.mark()) is not None:
                return self._marked(mark)
            if not place.exists():
                return Standing(place.setting, place.where, "absent")
            unknown = tuple(place.unknown(self.owner))
            state: State = "unmarked" if unknown else "emptied" if self._is_emptied() else "free"
            # Another thread or process may have made and marked the place since the first look at its mark.
            if (mark := place.mark()) is not None:
                return self._marked(mark)
        except OSError as error:
            return Standing(place.setting, place.where, "away", trouble=str(error))
        return Standing(place.setting, place.where, state, unknown=unknown)

    def _marked(self, mark: Mark) -> Standing:
        state: State = "ours" if mark.store == self.owner.id else "foreign"
        return Standing(self.place.setting, self.place.where, state, mark.store, mark.marked_at)

    def _is_emptied(self) -> bool:
        """Whether a place without a mark and unknown content has no gallery either, although the store has marked it before."""
        is_remembered = self._is_remembered and self.name in self.owner.places
        if not is_remembered or self.place.is_marked_unreadably():
            return False
        return not self.place.unknown(replace(self.owner, galleries=set()))

    def claim(self, *, make: bool = False) -> Standing:
        """Look at the place, and mark it if it is free. make: also make and mark it if it is missing."""
        standing = self.look()
        if standing.state == "free" or (make and standing.state == "absent"):
            write = self.place.put_mark if standing.state == "free" else self.place.make_marked
            try:
                write(_fresh(self.owner))
            except OSError as error:
                return Standing(standing.setting, standing.where, "away", trouble=str(error))
            standing = self.look()  # another store may have marked it first
        self._is_confirmed = standing.state == "ours"
        if self._is_confirmed and self._is_remembered:
            self.owner.places.add(self.name)
        return standing

    def require(self) -> None:
        """Return if this store owns the place. Marks it if it is free or missing. Raises NotOurs; OSError without an answer."""
        if self._is_confirmed and self.place.is_costly:
            return
        standing = self.claim(make=True)
        if standing.state == "ours":
            return
        if standing.is_refused:
            raise NotOurs(errno.EPERM, standing.sentence)
        raise OSError(errno.EIO, standing.sentence)

    def forget(self) -> None:
        """Make the next `require` look again."""
        self._is_confirmed = False

    def adopt(self) -> Standing:
        """Take the place over for this store, also from another owner. Raises OSError."""
        self.place.make()
        self.place.replace_mark(_fresh(self.owner))
        return self.claim()


def _fresh(owner: Owner) -> Mark:
    return Mark(store=owner.id, marked_at=datetime.now(UTC))


def _read(data: bytes) -> Mark:
    """Read a mark. A mark that cannot be read counts as one of another store."""
    try:
        return Mark.model_validate_json(data)
    except ValidationError:
        return Mark(store="its mark cannot be read", marked_at=datetime.fromtimestamp(0, UTC))


def unknown_names(names: Iterable[str], known: set[str]) -> list[str]:
    """Visible names that are not known, sorted; at most _COUNTED."""
    found: list[str] = []
    for name in names:
        if not name.startswith(".") and name not in _IGNORED and name not in known:
            found.append(name)
            if len(found) == _COUNTED:
                break
    return sorted(found)


class FolderPlace:
    """A folder. The mark is a file in it."""

    is_costly = False

    def __init__(self, setting: str, root: Path) -> None:
        self.setting = setting
        self._root = root.absolute()
        self.where = str(self._root)
        self._mark = self._root / MARK

    def exists(self) -> bool:
        """See Place."""
        return self._root.is_dir()

    def make(self) -> None:
        """See Place."""
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def make_marked(self, mark: Mark) -> None:
        """See Place. The folder appears with its mark. So a process that dies leaves no empty folder."""
        self._root.parent.mkdir(parents=True, exist_ok=True)
        hidden = FolderPlace(self.setting, self._root.parent / f".{self._root.name}.{secrets.token_hex(8)}.tmp")
        try:
            hidden.make()
            hidden.put_mark(mark)
            Path(hidden.where).rename(self._root)
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise
        finally:
            shutil.rmtree(hidden.where, ignore_errors=True)

    def is_marked_unreadably(self) -> bool:
        """See Place."""
        return self._data() == b""

    def mark(self) -> Mark | None:
        """See Place. Waits for a mark that is still empty."""
        deadline = time.monotonic() + _FILLED_SECONDS
        while (data := self._data()) == b"" and time.monotonic() < deadline:
            time.sleep(_PAUSE_SECONDS)
        return _read(data) if data else None

    def put_mark(self, mark: Mark) -> None:
        """See Place. Writes a temporary file and links it to the mark's name, so the mark is never incomplete.

        On a file system without hard links, the mark is empty for a moment.
        """
        temporary = self._written_beside(mark)
        try:
            if not self._created(temporary, mark) and self.mark() is None:
                temporary.replace(self._mark)  # the process that created the empty mark has died
        finally:
            temporary.unlink(missing_ok=True)
        self._sync()

    def replace_mark(self, mark: Mark) -> None:
        """See Place."""
        self._written_beside(mark).replace(self._mark)
        self._sync()

    def unknown(self, owner: Owner) -> list[str]:
        """See Place."""
        with os.scandir(self._root) as entries:
            return unknown_names((entry.name for entry in entries), owner.galleries | self.own_names(owner))

    def own_names(self, owner: Owner) -> set[str]:
        """See Place."""
        return owner.own_names(self._root)

    def _written_beside(self, mark: Mark) -> Path:
        temporary = self._root / f"{MARK}.{secrets.token_hex(8)}.tmp"
        self._write(temporary, mark)
        return temporary

    def _data(self) -> bytes | None:
        """The bytes of the mark's file. None without a file. Empty if it has only zeros, as after a power cut."""
        try:
            descriptor = os.open(self._mark, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        try:
            return os.read(descriptor, _MARK_LIMIT).strip(b"\0")
        finally:
            os.close(descriptor)

    def _created(self, temporary: Path, mark: Mark) -> bool:
        """Create the mark's file from the temporary one. False if there is one already."""
        try:
            os.link(temporary, self._mark)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}:
                raise
            with suppress(FileExistsError):
                self._write(self._mark, mark)
                return True
            return False
        return True

    def _write(self, path: Path, mark: Mark) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(mark.model_dump_json(indent=1).encode())
            file.flush()
            os.fsync(descriptor)

    def _sync(self) -> None:
        descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def ensure_bucket(client: Minio, name: str, *, object_lock: bool = False) -> None:
    """Make the bucket if it is missing. Another process may make it at the same moment."""
    if client.bucket_exists(name):
        return
    try:
        client.make_bucket(name, object_lock=object_lock)
    except S3Error as problem:
        if problem.code not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
            raise


class BucketPlace:
    """A bucket of an S3 server. The mark is an object in it."""

    is_costly = True

    def __init__(self, setting: str, client: Minio, bucket: str, *, own_names: Iterable[str] = ()) -> None:
        """own_names: first parts of keys that something else of this store writes into the same bucket."""
        self.setting = setting
        self.where = bucket
        self._client = client
        self._bucket = bucket
        self._own_names = set(own_names)

    def own_names(self, owner: Owner) -> set[str]:
        """See Place."""
        del owner
        return self._own_names

    def exists(self) -> bool:
        """See Place."""
        return bool(_called(lambda: self._client.bucket_exists(self._bucket)))

    def make(self) -> None:
        """See Place."""
        _called(lambda: ensure_bucket(self._client, self._bucket))

    def make_marked(self, mark: Mark) -> None:
        """See Place."""
        self.make()
        self.put_mark(mark)

    def is_marked_unreadably(self) -> bool:
        """See Place. An object is complete, or it is not there."""
        return False

    def mark(self) -> Mark | None:
        """See Place."""

        def read() -> Mark | None:
            try:
                answer = self._client.get_object(self._bucket, MARK)
            except S3Error as problem:
                if problem.code in {"NoSuchKey", "NoSuchBucket"}:
                    return None
                raise
            try:
                return _read(answer.read(_MARK_LIMIT))
            finally:
                answer.close()
                answer.release_conn()

        return _called(read)

    def put_mark(self, mark: Mark) -> None:
        """See Place. A server that knows conditional writes refuses a second mark itself."""

        def put() -> None:
            data, headers = mark.model_dump_json(indent=1).encode(), {"Content-Type": "application/json"}
            try:
                # The client has no public way to give this header.
                self._client._put_object(self._bucket, MARK, data, headers={**headers, "If-None-Match": "*"})  # noqa: SLF001
            except S3Error as problem:
                if problem.code == "PreconditionFailed":
                    return
                if problem.code != "NotImplemented":
                    raise
                self._put(data)

        if self.mark() is None:
            _called(put)

    def replace_mark(self, mark: Mark) -> None:
        """See Place."""
        _called(lambda: self._put(mark.model_dump_json(indent=1).encode()))

    def unknown(self, owner: Owner) -> list[str]:
        """See Place."""

        def listed() -> list[str]:
            found = self._client.list_objects(self._bucket)  # gives only the first part of a deeper key
            names = ((one.object_name or "").rstrip("/") for one in found)
            return unknown_names(names, owner.galleries | self.own_names(owner))

        return _called(listed)

    def _put(self, data: bytes) -> None:
        self._client.put_object(self._bucket, MARK, io.BytesIO(data), len(data), content_type="application/json")


def _called(call: Callable[[], Result]) -> Result:
    """Run one S3 call. Raises OSError for every fault of client, network or server."""
    try:
        return call()
    except (MinioException, HTTPError, ParseError, UnicodeDecodeError) as problem:
        message = f"{type(problem).__name__}: {problem}"
        raise OSError(errno.EIO, message) from problem
