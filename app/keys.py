"""Keys: one secret from the operator wraps a key per gallery, which wraps a data key per identity.

    key-encryption key (KEY_ENCRYPTION_KEY or _FILE)
      -> gallery key       wrapped in the gallery's document
           -> data key     wrapped in the identity's document; destroying it erases the person everywhere

Sealing is AES-256-GCM with a fresh 96-bit nonce; `bound` names whose data it is, of what kind, so that a sealed
value moved to another place does not open. Values that are looked up by are kept as HMAC-SHA256.
"""

import base64
import binascii
import hashlib
import hmac
import os
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32
NONCE_BYTES = 12
SEALED_VERSION = b"\x01"


class SealBroken(Exception):
    """A sealed value does not open: another key, another place, or changed bytes."""


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

    def seal(self, plain: bytes, bound: bytes) -> bytes:
        """Encrypt and authenticate `plain`, tied to `bound`."""
        return _seal(self.key, plain, bound)

    def open(self, sealed: bytes, bound: bytes) -> bytes:
        """The plain bytes. Raises SealBroken."""
        return _open(self.key, sealed, bound)


@dataclass(frozen=True, slots=True)
class GalleryKey:
    """One gallery's key: wraps its identities' data keys, and hashes what is looked up by."""

    gallery_id: str
    key: bytes

    def new_data_key(self, identity_id: str) -> tuple[DataKey, bytes]:
        """A fresh data key, and its wrapped form to be stored with the identity."""
        data_key = DataKey(os.urandom(KEY_BYTES))
        return data_key, _seal(self.key, data_key.key, self._bound(identity_id))

    def unwrap(self, wrapped: bytes, identity_id: str) -> DataKey:
        """The data key of an identity. Raises SealBroken."""
        return DataKey(_open(self.key, wrapped, self._bound(identity_id)))

    def lookup_hash(self, field: str, value: str) -> bytes:
        """What stands for a value in an index: equal for equal values of one gallery, telling nothing without the key."""
        return hmac.digest(_derive(self.key, f"lookup/{field}"), value.encode(), "sha256")

    def rotation(self, name: str, dimension: int) -> npt.NDArray[np.float64]:
        """The secret orthogonal matrix (d, d) of that name: `vectors @ matrix` keeps cosines, and hides the vectors.

        The same for the same key, name and dimension, on every host. It is not encryption: who knows about as many pairs of
        turned and unturned vectors as there are dimensions can work it out.
        """
        return _rotation(_derive(self.key, f"rotation/{name}"), dimension)

    def _bound(self, identity_id: str) -> bytes:
        return f"idem/1|data-key|{self.gallery_id}|{identity_id}".encode()


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
    """The operator's key-encryption key and what is done with it; unwrapped gallery keys are kept in memory."""

    def __init__(self, secret: str) -> None:
        """secret: KEY_ENCRYPTION_KEY's text. Raises ValueError when it is empty."""
        if not secret:
            message = "KEY_ENCRYPTION_KEY (or KEY_ENCRYPTION_KEY_FILE) is not set"
            raise ValueError(message)
        root = _bytes_of(secret)
        self._wrapping = _derive(root, "wrap")
        self._hashing = _derive(root, "hash")
        #: Names the key in what it wrapped, and tells nothing else of it.
        self.key_id = hashlib.sha256(_derive(root, "id")).hexdigest()[:16]
        self._galleries: dict[str, GalleryKey] = {}

    def new_gallery_key(self, gallery_id: str) -> bytes:
        """A fresh gallery key in its wrapped form, to be stored with the gallery."""
        return self.seal_with_master(os.urandom(KEY_BYTES), self._gallery_bound(gallery_id))

    def gallery_key(self, gallery_id: str, wrapped: bytes) -> GalleryKey:
        """The gallery's key. Raises SealBroken when the key-encryption key is another one."""
        known = self._galleries.get(gallery_id)
        if known is None:
            key = self.open_with_master(wrapped, self._gallery_bound(gallery_id))
            known = self._galleries[gallery_id] = GalleryKey(gallery_id, key)
        return known

    def seal_with_master(self, plain: bytes, bound: bytes) -> bytes:
        """Seal under the key-encryption key itself: gallery keys, private signing keys."""
        return _seal(self._wrapping, plain, bound)

    def open_with_master(self, sealed: bytes, bound: bytes) -> bytes:
        """Open what `seal_with_master` sealed. Raises SealBroken."""
        return _open(self._wrapping, sealed, bound)

    def keyed_hash(self, label: str, value: bytes) -> bytes:
        """HMAC-SHA256 under a key of its own for each label; 32 bytes."""
        return hmac.digest(_derive(self._hashing, label), value, "sha256")

    @staticmethod
    def _gallery_bound(gallery_id: str) -> bytes:
        return f"idem/1|gallery-key|{gallery_id}".encode()
