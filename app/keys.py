"""Keys: one secret from the operator wraps the keys of each gallery, which wrap a data key per identity.

    key-encryption key (KEY_ENCRYPTION_KEY or _FILE; former ones in KEY_ENCRYPTION_KEY_PREVIOUS)
      -> root secret          one for the store: what keyed hashes come from
      -> gallery's root       what its lookups and the turning of its vectors come from; never changes
      -> gallery's key        in generations, of which the newest wraps; the older ones go when nothing needs them
           -> data key        wrapped in the identity's document; destroying it erases the person everywhere

Whatever can be rotated names, in what it wrapped, which key that was: so several are in use at once, and nothing stands
still meanwhile. What hashes are made of is wrapped like the rest, and not derived from what rotates.

Sealing is AES-256-GCM with a fresh 96-bit nonce; `bound` names whose data it is, of what kind, so that a sealed
value moved to another place does not open. Values that are looked up by are kept as HMAC-SHA256.
"""

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import BaseModel, ConfigDict

KEY_BYTES = 32
NONCE_BYTES = 12
#: First bytes of a sealed value, of one that names its key-encryption key, and of a data key that names its generation.
SEALED_VERSION, MASTER_VERSION, WRAPPED_VERSION = b"\x01", b"\x02", b"\x03"
KEY_ID_BYTES = 8
GENERATION_BYTES = 4
#: Bytes of a tag. Four are enough to be few false ones, which the caller sorts out; more would only fill the index.
TAG_BYTES = 4


class SealBroken(Exception):
    """A sealed value does not open: another key, another place, or changed bytes."""


class UnknownKey(SealBroken):
    """It names a key that is not known here: destroyed, or made since the gallery was read."""


class WrappedKeys(BaseModel):
    """A gallery's keys as its document holds them, under the key-encryption key.

    generations: by number, as text because they are names of fields. sealing: the generation that wraps new data keys.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64")

    root: bytes
    generations: dict[str, bytes]
    sealing: int

    @property
    def numbers(self) -> list[int]:
        """The generations that there are, rising."""
        return sorted(map(int, self.generations))


def _seal(key: bytes, plain: bytes, bound: bytes) -> bytes:
    nonce = os.urandom(NONCE_BYTES)
    return SEALED_VERSION + nonce + AESGCM(key).encrypt(nonce, plain, bound)


def _open(key: bytes, sealed: bytes, bound: bytes) -> bytes:
    if sealed[:1] != SEALED_VERSION:
        message = "a sealed value of an unknown version"
        raise SealBroken(message)
    nonce, text = sealed[1 : 1 + NONCE_BYTES], sealed[1 + NONCE_BYTES :]
    try:
        return AESGCM(key).decrypt(nonce, text, bound)
    except (InvalidTag, ValueError) as error:
        message = "a sealed value does not open with this key in this place"
        raise SealBroken(message) from error


def _derive(key: bytes, purpose: str) -> bytes:
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=b"idem/1/" + purpose.encode()).derive(key)


def _bytes_of(secret: str) -> bytes:
    """The secret's 32 bytes when it is base64 of them; else its text, to be stretched by HKDF."""
    try:
        decoded = base64.b64decode(
            secret + "=" * (-len(secret) % 4), altchars=b"-_" if {"-", "_"} & set(secret) else None
        )
    except (binascii.Error, ValueError):
        return secret.encode()
    return decoded if len(decoded) == KEY_BYTES else secret.encode()


@dataclass(frozen=True, slots=True)
class DataKey:
    """One identity's key: seals its templates, photos and attributes."""

    key: bytes

    @classmethod
    def fresh(cls) -> "DataKey":
        """A new one, to be wrapped before anything that it sealed is stored."""
        return cls(os.urandom(KEY_BYTES))

    def seal(self, plain: bytes, bound: bytes) -> bytes:
        """Encrypt and authenticate `plain`, tied to `bound`."""
        return _seal(self.key, plain, bound)

    def open(self, sealed: bytes, bound: bytes) -> bytes:
        """The plain bytes. Raises SealBroken."""
        return _open(self.key, sealed, bound)


@dataclass(frozen=True, slots=True)
class GalleryKey:
    """One gallery's keys, opened: wraps its identities' data keys, and hashes what is looked up by.

    generations: by number, shared by all of this process, and more come in as documents are read. sealing: the one that
    wraps. learn: bring in what a gallery's document holds by now.
    """

    gallery_id: str
    root: bytes
    generations: Mapping[int, bytes]
    sealing: int
    learn: Callable[[WrappedKeys], "GalleryKey"]

    def new_data_key(self, identity_id: str) -> tuple[DataKey, bytes]:
        """A fresh data key, and its wrapped form to be stored with the identity."""
        data_key = DataKey.fresh()
        return data_key, self.wrap(data_key, identity_id)

    def wrap(self, data_key: DataKey, identity_id: str) -> bytes:
        """A data key in the form that is stored with its identity."""
        sealed = _seal(self.generations[self.sealing], data_key.key, self._bound(identity_id))
        return WRAPPED_VERSION + self.sealing.to_bytes(GENERATION_BYTES, "big") + sealed

    def unwrap(self, wrapped: bytes, identity_id: str) -> DataKey:
        """The data key of an identity. Raises SealBroken; UnknownKey when its generation is not known here."""
        number = generation_of(wrapped)
        key = self.generations.get(number)
        if key is None:
            message = f"the gallery's key has no generation {number} here"
            raise UnknownKey(message)
        return DataKey(_open(key, wrapped[1 + GENERATION_BYTES :], self._bound(identity_id)))

    def lookup_hash(self, field: str, value: str) -> bytes:
        """What stands for a value in an index: equal for equal values of one gallery, telling nothing without the key."""
        return hmac.digest(_derive(self.root, f"lookup/{field}"), value.encode(), "sha256")

    def lookup_tags(self, field: str, values: Iterable[str]) -> list[bytes]:
        """What stands for each of several values, cut to TAG_BYTES, each once; sorted, so that no order tells of the values."""
        key = _derive(self.root, f"lookup/{field}")
        return sorted({hmac.digest(key, value.encode(), "sha256")[:TAG_BYTES] for value in values})

    def rotation(self, name: str, dimension: int) -> npt.NDArray[np.float64]:
        """The secret orthogonal matrix (d, d) of that name: `vectors @ matrix` keeps cosines, and hides the vectors.

        The same for the same key, name and dimension, on every host. It is not encryption: who knows about as many pairs of
        turned and unturned vectors as there are dimensions can work it out.
        """
        return _rotation(_derive(self.root, f"rotation/{name}"), dimension)

    def _bound(self, identity_id: str) -> bytes:
        return f"idem/1|data-key|{self.gallery_id}|{identity_id}".encode()


def generation_of(wrapped: bytes) -> int:
    """Which generation of its gallery's key wrapped a data key. Raises SealBroken."""
    if wrapped[:1] != WRAPPED_VERSION:
        message = "a wrapped key of an unknown version"
        raise SealBroken(message)
    return int.from_bytes(wrapped[1 : 1 + GENERATION_BYTES], "big")


@lru_cache(maxsize=16)
def _rotation(seed: bytes, dimension: int) -> npt.NDArray[np.float64]:
    """A matrix drawn evenly from all orthogonal ones: Q of a Gaussian matrix, R's diagonal positive (Mezzadri 2007)."""
    count = dimension * dimension + dimension * dimension % 2
    stream = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor().update(bytes(8 * count))
    uniform = ((np.frombuffer(stream, "<u8") >> np.uint64(11)) + 0.5) * 2.0**-53  # in (0, 1)
    first, second = uniform.reshape(2, -1)
    length = np.sqrt(-2 * np.log(first))  # Box-Muller
    gaussian = np.concatenate([length * np.cos(2 * np.pi * second), length * np.sin(2 * np.pi * second)])
    q, r = np.linalg.qr(gaussian[: dimension * dimension].reshape(dimension, dimension))
    matrix: npt.NDArray[np.float64] = q * np.sign(np.diag(r))
    matrix.setflags(write=False)
    return matrix


class KeyRing:
    """The operator's key-encryption keys and what is done with them; opened gallery keys are kept in memory."""

    def __init__(self, secret: str, previous: Sequence[str] = ()) -> None:
        """secret: KEY_ENCRYPTION_KEY's text; previous: of those that opened before it. Raises ValueError without a secret.

        Keyed hashes are there once `adopt_root` has been called.
        """
        if not secret:
            message = "KEY_ENCRYPTION_KEY (or KEY_ENCRYPTION_KEY_FILE) is not set"
            raise ValueError(message)
        self._wrapping: dict[str, bytes] = {}
        for text in (secret, *previous):
            root = _bytes_of(text)
            name = hashlib.sha256(_derive(root, "id")).hexdigest()[: 2 * KEY_ID_BYTES]
            self._wrapping[name] = _derive(root, "wrap")
        #: Names the newest key in what it wrapped, and tells nothing else of it.
        self.key_id = next(iter(self._wrapping))
        self._root: bytes | None = None
        self._roots: dict[str, bytes] = {}
        self._generations: dict[str, dict[int, bytes]] = {}

    @property
    def key_ids(self) -> list[str]:
        """The names of all keys that open here, the newest first."""
        return list(self._wrapping)

    def adopt_root(self, root: bytes) -> None:
        """Make keyed hashes from the store's root secret from now on. root: 32 bytes."""
        self._root = root

    def new_gallery_keys(self, gallery_id: str) -> WrappedKeys:
        """A new gallery's keys, to be stored with it."""
        root = self.seal_with_master(os.urandom(KEY_BYTES), gallery_root_bound(gallery_id))
        return WrappedKeys(root=root, generations={"1": self.new_generation(gallery_id)}, sealing=1)

    def new_generation(self, gallery_id: str) -> bytes:
        """One more generation of a gallery's key, to be stored with it."""
        return self.seal_with_master(os.urandom(KEY_BYTES), gallery_key_bound(gallery_id))

    def gallery_key(self, gallery_id: str, wrapped: WrappedKeys) -> GalleryKey:
        """The gallery's keys. Raises SealBroken when they were sealed under none of the key-encryption keys.

        Generations that are older than all in the document were destroyed, and are forgotten here too.
        """
        generations = self._generations.setdefault(gallery_id, {})
        for number, sealed in wrapped.generations.items():
            if int(number) not in generations:
                generations[int(number)] = self.open_with_master(sealed, gallery_key_bound(gallery_id))
        for gone in [known for known in list(generations) if known < wrapped.numbers[0]]:
            generations.pop(gone, None)  # several threads may be here at once
        root = self._roots.get(gallery_id)
        if root is None:
            root = self._roots[gallery_id] = self.open_with_master(wrapped.root, gallery_root_bound(gallery_id))
        return GalleryKey(gallery_id, root, generations, wrapped.sealing, partial(self.gallery_key, gallery_id))

    def seal_with_master(self, plain: bytes, bound: bytes) -> bytes:
        """Seal under the newest key-encryption key itself: gallery keys, private signing keys.

        Where the sealed value is stored belongs into `app.documents.master_sealed`, or it is lost at the next rotation.
        """
        return MASTER_VERSION + bytes.fromhex(self.key_id) + _seal(self._wrapping[self.key_id], plain, bound)

    def open_with_master(self, sealed: bytes, bound: bytes) -> bytes:
        """Open what `seal_with_master` sealed, here or in another process. Raises SealBroken."""
        name = master_key_of(sealed)
        key = self._wrapping.get(name)
        if key is None:
            message = f"sealed under the key-encryption key {name}, which is not known here"
            raise UnknownKey(message)
        return _open(key, sealed[1 + KEY_ID_BYTES :], bound)

    def keyed_hash(self, label: str, value: bytes) -> bytes:
        """HMAC-SHA256 under a key of its own for each label, the same for the life of the store; 32 bytes."""
        if self._root is None:
            message = "the store's root secret is not open yet"
            raise RuntimeError(message)
        return hmac.digest(_derive(self._root, label), value, "sha256")


def master_key_of(sealed: bytes) -> str:
    """The name of the key-encryption key that sealed a value. Raises SealBroken."""
    if sealed[:1] != MASTER_VERSION:
        message = "a value that no key-encryption key has sealed"
        raise SealBroken(message)
    return sealed[1 : 1 + KEY_ID_BYTES].hex()


def gallery_key_bound(gallery_id: str) -> bytes:
    """What a gallery's wrapped key is bound to."""
    return f"idem/1|gallery-key|{gallery_id}".encode()


def gallery_root_bound(gallery_id: str) -> bytes:
    """What a gallery's wrapped root is bound to."""
    return f"idem/1|gallery-root|{gallery_id}".encode()
