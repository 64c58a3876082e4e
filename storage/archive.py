"""Backups on a disk: sets of encrypted parts with a signed-off list of them, over one pool of photos that all sets share.

    <folder>/photos/<gallery>/<identity>/<sample>    sealed photos as the photo store holds them, each copied once
    <folder>/sets/<set id>/<part>                    documents, encrypted by chunks under the set's own key
    <folder>/sets/<set id>/STATE.json                how far an unfinished set has come
    <folder>/sets/<set id>/MANIFEST.json             what the set holds; written last, so a set without one does not count

A part is a random salt and chunks of AES-256-GCM. Its key comes from the set's key, the salt and the part's name; a chunk's
nonce is its number and whether it is the last: no chunk can be changed, moved, left out or cut off.
"""

import fcntl
import hashlib
import hmac
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Annotated, Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

MANIFEST: Final = "MANIFEST.json"
STATE: Final = "STATE.json"
KEY_BYTES: Final = 32

_MAGIC: Final = b"IDEMPART1\n"
_SALT_BYTES: Final = 32
_TAG_BYTES: Final = 16
#: Plain bytes of a chunk: a part is read and written with so much in memory.
CHUNK_BYTES: Final = 1 << 20
#: A part's list of chunks is counted in eleven bytes, which nothing fills.
_NONCE_COUNTER_BYTES: Final = 11
_DOCUMENT_LIMIT: Final = 17 * 1024 * 1024
#: A manifest tells some hundred bytes of each part; what is longer is not read.
_MANIFEST_LIMIT: Final = 64 * 1024 * 1024
_LENGTH_BYTES: Final = 4
_MAC_CHARACTERS: Final = 66

_SET: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_PART: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
_SEGMENT: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_PHOTO: Final = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT}){{0,7}}")


class BackupBroken(Exception):
    """What lies in a backup's folder is not what was written there; the message names it."""


class BackupBusy(Exception):
    """Somebody else is writing to the folder."""


class BackupMissing(LookupError):
    """The folder holds no backup of that name, or none at all."""


class Part(BaseModel):
    """One file of a set. collection: whose documents; documents, size (bytes), sha256: of the file as it lies there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=_PART)]
    collection: str
    documents: Annotated[int, Field(ge=0)]
    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """What a finished set holds.

    key: the set's key, sealed by whoever can open it again. parts: the documents, by collection and in order; photos: the lists
    of the photos that they name. facts: what the maker wants to know at a restore, without having read the parts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")

    format: Annotated[int, Field(ge=1, le=1)] = 1
    id: str
    made_at: AwareDatetime
    key: bytes
    parts: tuple[Part, ...]
    photos: tuple[Part, ...]
    facts: dict[str, str | int | None]

    @property
    def documents(self) -> int:
        """How many documents the set holds."""
        return sum(part.documents for part in self.parts)

    def parts_of(self, collection: str) -> list[Part]:
        """The parts of one collection, in order."""
        return [part for part in self.parts if part.collection == collection]


class PhotoRow(NamedTuple):
    """One photo of a set: its key, its bytes' count and SHA-256."""

    key: str
    size: int
    sha256: str


class Archive:
    """A folder of backups. Blocking."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._sets = self.folder / "sets"
        self._photos = self.folder / "photos"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only one who writes to the folder, on this host; it is made (0700) where it is missing. Raises BackupBusy."""
        for path in (self.folder, self._sets, self._photos):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of a killed one's
            except BlockingIOError:
                message = f"another process is writing to {self.folder}"
                raise BackupBusy(message) from None
            yield

    def finished(self) -> list[str]:
        """The ids of the finished sets, the oldest first: they are ordered by time."""
        return sorted(name for name in self._names() if (self._sets / name / MANIFEST).is_file())

    def unfinished(self) -> list[str]:
        """The ids of the sets that an interruption left without a manifest, the oldest first."""
        return sorted(name for name in self._names() if not (self._sets / name / MANIFEST).is_file())

    def begin(self, set_id: str) -> None:
        """Make the folder of a new set."""
        self._set(set_id).mkdir(mode=0o700, exist_ok=True)
        _sync_folder(self._sets)

    def drop(self, set_id: str) -> None:
        """Remove a set: first what makes it count."""
        folder = self._set(set_id)
        with suppress(FileNotFoundError):
            (folder / MANIFEST).unlink()
            _sync_folder(folder)
        shutil.rmtree(folder, ignore_errors=True)

    def drop_empty(self, set_id: str) -> bool:
        """Remove the folder of a set if it is empty. Returns False if it is not empty, and stays."""
        try:
            self._set(set_id).rmdir()
        except OSError:
            return False
        return True

    def write_state(self, set_id: str, text: str) -> None:
        """Keep how far an unfinished set has come."""
        _write_durably(self._set(set_id) / STATE, text.encode())

    def read_state(self, set_id: str) -> bytes | None:
        """What `write_state` kept; None when there is nothing."""
        try:
            return (self._set(set_id) / STATE).read_bytes()
        except FileNotFoundError:
            return None

    def finish(self, manifest: Manifest, key: bytes) -> None:
        """Write the manifest, authenticated under the set's key: from now on the set counts."""
        body = manifest.model_dump_json().encode()
        _write_durably(self._set(manifest.id) / MANIFEST, body + _mac(key, manifest.id, body))
        with suppress(FileNotFoundError):
            (self._set(manifest.id) / STATE).unlink()

    def unproved(self, set_id: str) -> Manifest:
        """A set's manifest as it stands there: only to find the key to `prove` it by. Raises BackupMissing, BackupBroken."""
        return self._manifest(set_id)[0]

    def prove(self, set_id: str, key: bytes) -> Manifest:
        """A set's manifest, authenticated under its key. Raises BackupMissing, BackupBroken."""
        manifest, body, mac = self._manifest(set_id)
        if not hmac.compare_digest(_mac(key, set_id, body), mac):
            message = f"{MANIFEST} of {set_id} was changed"
            raise BackupBroken(message)
        return manifest

    def _manifest(self, set_id: str) -> tuple[Manifest, bytes, bytes]:
        path = self._set(set_id) / MANIFEST
        try:
            with path.open("rb") as file:
                text = file.read(_MANIFEST_LIMIT)
        except FileNotFoundError:
            message = f"{self.folder} holds no finished backup {set_id}"
            raise BackupMissing(message) from None
        body, mac = text[:-_MAC_CHARACTERS], text[-_MAC_CHARACTERS:]
        try:
            manifest = Manifest.model_validate_json(body)
        except ValidationError as error:
            message = f"{MANIFEST} of {set_id} is not what was written"
            raise BackupBroken(message) from error
        if manifest.id != set_id:
            message = f"{MANIFEST} of {set_id} is that of {manifest.id:.60}"
            raise BackupBroken(message)
        return manifest, body, mac

    def write_part(self, set_id: str, key: bytes, name: str, collection: str) -> "PartWriter":
        """A new part, in place of one that an interruption left half written."""
        return PartWriter(self._set(set_id) / name, _part_key(key, set_id), name, collection)

    def read_part(self, set_id: str, key: bytes, part: Part) -> Iterator[bytes]:
        """A part's documents, each as its BSON bytes. Raises BackupBroken, at the latest at the end."""
        documents = 0
        for document in _documents(self._plain(set_id, key, part), part):
            documents += 1
            yield document
        if documents != part.documents:
            message = f"{part.name} holds {documents} documents, not {part.documents}"
            raise BackupBroken(message)

    def _plain(self, set_id: str, key: bytes, part: Part) -> Iterator[bytes]:
        """The plain chunks of a part; the file's digest is checked along the way."""
        digest, size = hashlib.sha256(), 0

        def broken(reason: str) -> BackupBroken:
            return BackupBroken(f"{part.name} of {set_id} {reason}")

        try:
            file = (self._set(set_id) / part.name).open("rb")
        except OSError as error:
            raise broken(f"cannot be read: {error.strerror}") from error
        with file:
            head = _read(file, len(_MAGIC) + _SALT_BYTES, broken)
            digest.update(head)
            size += len(head)
            if len(head) < len(_MAGIC) + _SALT_BYTES or not head.startswith(_MAGIC):
                raise broken("does not begin like a part")
            cipher = AESGCM(_chunk_key(_part_key(key, set_id), head[len(_MAGIC) :], part.name))
            number, block = 0, _read(file, CHUNK_BYTES + _TAG_BYTES, broken)
            while True:
                following = _read(file, CHUNK_BYTES + _TAG_BYTES, broken)
                digest.update(block)
                size += len(block)
                try:
                    plain = cipher.decrypt(_nonce(number, is_last=not following), block, part.name.encode())
                except (InvalidTag, ValueError) as error:
                    raise broken(f"does not open at chunk {number}") from error
                if not following and (size != part.size or digest.hexdigest() != part.sha256):
                    raise broken("is not the file that was written")
                yield plain
                if not following:
                    return
                number, block = number + 1, following

    def keep_photo(self, key: str, data: bytes) -> PhotoRow:
        """Keep a photo under its key, durably, in place of what lay there."""
        path = self._photo(key)
        for folder in [*reversed(path.parent.relative_to(self._photos).parents), path.parent.relative_to(self._photos)]:
            (self._photos / folder).mkdir(mode=0o700, exist_ok=True)
        _write_durably(path, data)
        return PhotoRow(key, len(data), hashlib.sha256(data).hexdigest())

    def photo(self, key: str) -> PhotoRow | None:
        """What lies there under a key; None when nothing does."""
        try:
            with self._photo(key).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
                return PhotoRow(key, os.fstat(file.fileno()).st_size, digest.hexdigest())
        except FileNotFoundError:
            return None

    def size_of_photo(self, key: str) -> int | None:
        """How many bytes lie under a key; None when nothing does."""
        try:
            return self._photo(key).stat().st_size
        except FileNotFoundError:
            return None

    def read_photo(self, row: PhotoRow) -> bytes:
        """A photo's bytes. Raises BackupBroken when they are not those of the list, BackupMissing when there are none."""
        try:
            with self._photo(row.key).open("rb") as file:
                data = file.read(row.size + 1)
        except FileNotFoundError:
            message = f"photo {row.key} is not there"
            raise BackupMissing(message) from None
        if len(data) != row.size or hashlib.sha256(data).hexdigest() != row.sha256:
            message = f"photo {row.key} is not the one that was copied"
            raise BackupBroken(message)
        return data

    def drop_photos(self, prefix: str) -> bool:
        """Remove the photos below a folder of the pool, `gallery/identity`; False when there were none."""
        folder = self._photo(prefix)
        if not folder.is_dir():
            return False
        shutil.rmtree(folder)
        _sync_folder(folder.parent)
        return True

    def _names(self) -> list[str]:
        try:
            return [path.name for path in self._sets.iterdir() if _SET.fullmatch(path.name)]
        except FileNotFoundError:
            return []

    def _set(self, set_id: str) -> Path:
        if not _SET.fullmatch(set_id):
            message = f"{set_id:.60} is no backup's id"
            raise BackupMissing(message)
        return self._sets / set_id

    def _photo(self, key: str) -> Path:
        if not _PHOTO.fullmatch(key):
            message = f"{key:.60} is no photo's key"
            raise BackupBroken(message)
        return self._photos / key


class PartWriter:
    """Writes one part: documents in, then `close`. Nothing stands under its name before."""

    def __init__(self, path: Path, key: bytes, name: str, collection: str) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._name = name
        self._collection = collection
        salt = os.urandom(_SALT_BYTES)
        self._cipher = AESGCM(_chunk_key(key, salt, name))
        self._file = os.fdopen(os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
        self._digest = hashlib.sha256()
        self._waiting = bytearray()
        self._chunks = 0
        #: How many are in it so far.
        self.documents = 0
        self._size = 0
        self._write(_MAGIC + salt)

    @property
    def size(self) -> int:
        """Bytes so far, those that wait for their chunk included."""
        return self._size + len(self._waiting)

    def add(self, documents: Iterable[bytes]) -> None:
        """Append documents, each as its BSON bytes."""
        for document in documents:
            self._waiting += document
            self.documents += 1
        while len(self._waiting) > CHUNK_BYTES:  # the last chunk is written by `close`, and may be a full one
            self._seal(bytes(self._waiting[:CHUNK_BYTES]), is_last=False)
            del self._waiting[:CHUNK_BYTES]

    def close(self) -> Part:
        """Write the rest; the part is durable when this returns."""
        self._seal(bytes(self._waiting), is_last=True)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        _sync_folder(self._path.parent)
        return Part(
            name=self._name, collection=self._collection, documents=self.documents, size=self._size,
            sha256=self._digest.hexdigest(),
        )  # fmt: skip

    def abandon(self) -> None:
        """Leave nothing half written behind; nothing happens to a part that was closed."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _seal(self, plain: bytes, *, is_last: bool) -> None:
        self._write(self._cipher.encrypt(_nonce(self._chunks, is_last=is_last), plain, self._name.encode()))
        self._chunks += 1

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)


def _documents(chunks: Iterable[bytes], part: Part) -> Iterator[bytes]:
    """Cut a run of BSON documents at their lengths."""
    waiting = bytearray()
    for chunk in chunks:
        waiting += chunk
        at = 0
        while len(waiting) - at >= _LENGTH_BYTES:
            length = int.from_bytes(waiting[at : at + _LENGTH_BYTES], "little")
            if not _LENGTH_BYTES < length <= _DOCUMENT_LIMIT:
                message = f"{part.name} holds what is no document"
                raise BackupBroken(message)
            if len(waiting) - at < length:
                break
            yield bytes(waiting[at : at + length])
            at += length
        del waiting[:at]
    if waiting:
        message = f"{part.name} ends in the middle of a document"
        raise BackupBroken(message)


def _derived(key: bytes, salt: bytes, purpose: str) -> bytes:
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=b"idem/1/backup/" + purpose.encode()).derive(key)


def _part_key(key: bytes, set_id: str) -> bytes:
    return _derived(key, b"", f"parts/{set_id}")


def _chunk_key(key: bytes, salt: bytes, name: str) -> bytes:
    return _derived(key, salt, f"part/{name}")


def _mac(key: bytes, set_id: str, body: bytes) -> bytes:
    """In hexadecimal, behind a line's end: the last bytes of the file."""
    return b"\n" + hmac.digest(_derived(key, b"", f"manifest/{set_id}"), body, "sha256").hex().encode() + b"\n"


def _nonce(number: int, *, is_last: bool) -> bytes:
    return number.to_bytes(_NONCE_COUNTER_BYTES, "big") + bytes([is_last])


def _read(file: IO[bytes], size: int, broken: Callable[[str], BackupBroken]) -> bytes:
    try:
        return file.read(size)
    except OSError as error:
        raise broken(f"cannot be read: {error.strerror}") from error


def _write_durably(path: Path, data: bytes) -> None:
    """Written beside, fsynced, renamed into place: the old or the new bytes are there, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
