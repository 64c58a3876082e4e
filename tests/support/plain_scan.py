"""A search for secrets that lie somewhere in the clear: whole, in part, or in an encoding that programs use."""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

#: This many bytes in a row of a photo or template are that photo or template.
WINDOW = 64
_WORD = 8
#: Aligned words of a haystack that lie whole in any window.
_WORDS_IN_WINDOW = WINDOW // _WORD - 1
_TABLE_BITS = 22
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
#: A file is read in pieces of this size that overlap by a window, so that memory stays small.
_PIECE = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Finding:
    """A secret that lies in the clear: which, in which place, at which byte of it."""

    secret: str
    place: str
    offset: int


class PlainScan:
    """Looks for some secrets, in raw bytes, base64 and hexadecimal; texts also in UTF-16, JSON escapes and other case."""

    def __init__(self, binaries: Mapping[str, bytes], texts: Mapping[str, str]) -> None:
        """binaries: found by any WINDOW bytes of theirs in a row. texts: found whole."""
        self._binaries = {name: form for secret, data in binaries.items() for name, form in _binary_forms(secret, data)}
        self._texts = {name: form for secret, text in texts.items() for name, form in _text_forms(secret, text)}
        self._table = _table_of(self._binaries.values())
        #: A longer form has an aligned word of the haystack in it wherever it lies; the few others are looked for one by one.
        self._short = {name: form for name, form in self._texts.items() if len(form) < 2 * _WORD - 1}
        self._long = {name: form for name, form in self._texts.items() if name not in self._short}
        self._long_table = _table_of(self._long.values())

    def files(self, folder: Path) -> list[Finding]:
        """What lies in the clear in a folder's files."""
        return [found for path in sorted(folder.rglob("*")) if path.is_file() for found in self.file(path)]

    def file(self, path: Path) -> list[Finding]:
        """What lies in the clear in one file, or in its name."""
        found = [*self.within(path.name.encode(), f"the name {path}")]
        with path.open("rb") as opened:
            first = 0
            while piece := opened.read(_PIECE):
                found += self.within(piece, str(path), first)
                if len(piece) < _PIECE:
                    break
                first += len(piece) - 4 * WINDOW
                opened.seek(first)
        return found

    def within(self, haystack: bytes, place: str, first: int = 0) -> Iterator[Finding]:
        """What lies in the clear in these bytes. first: where they stand in the whole."""
        lowered = haystack.lower()
        for name, form in self._short.items():
            at = lowered.find(form)
            if at >= 0:
                yield Finding(name, place, first + at)
        for name, at in (*self._long_texts(lowered), *self._windows(haystack)):
            yield Finding(name, place, first + at)

    def _long_texts(self, lowered: bytes) -> Iterator[tuple[str, int]]:
        """The first place of each long text."""
        words = np.frombuffer(lowered, "<u8", len(lowered) // _WORD)
        seen: set[str] = set()
        for start in np.flatnonzero(self._long_table[_slots(words)]):
            near = int(start) * _WORD
            for name, form in self._long.items():
                at = lowered.find(form, max(0, near - len(form)), near + len(form) + _WORD) if name not in seen else -1
                if at >= 0:
                    seen.add(name)
                    yield name, at

    def _windows(self, haystack: bytes) -> Iterator[tuple[str, int]]:
        """The first window of each binary secret. Each window holds `_WORDS_IN_WINDOW` aligned words of the haystack."""
        count = len(haystack) // _WORD
        words = np.frombuffer(haystack, "<u8", count)
        hits = self._table[_slots(words)].astype(np.int8)
        if count < _WORDS_IN_WINDOW or not hits.any():
            return
        runs = np.convolve(hits, np.ones(_WORDS_IN_WINDOW, np.int8), "valid") == _WORDS_IN_WINDOW
        seen: set[str] = set()
        for start in np.flatnonzero(runs):
            at = int(start) * _WORD
            window = haystack[at : at + _WORDS_IN_WINDOW * _WORD]
            if len(set(window)) <= 4:  # padding, which anybody's file may hold
                continue
            for name, form in self._binaries.items():
                if name not in seen and window in form:
                    seen.add(name)
                    yield name, at


def _table_of(forms: Iterable[bytes]) -> npt.NDArray[np.bool_]:
    """Which slots the words of these forms have."""
    table = np.zeros(1 << _TABLE_BITS, np.bool_)
    for form in forms:
        words = _all_words(form)
        # Eight equal bytes stand in every file.
        turned = (words << np.uint64(8)) | (words >> np.uint64(56))
        table[_slots(words[words != turned])] = True
    return table


def _binary_forms(name: str, data: bytes) -> Iterable[tuple[str, bytes]]:
    yield name, data
    yield f"{name} in hexadecimal", data.hex().encode()
    for shift in range(3):  # base64 of a text that began one or two bytes earlier
        yield f"{name} in base64, {shift}", base64.b64encode(bytes(shift) + data)[4 if shift else 0 :]


def _text_forms(name: str, text: str) -> Iterable[tuple[str, bytes]]:
    """Forms in lower case: the haystack is lowered too."""
    folded = text.lower()
    yield name, folded.encode()
    yield f"{name} in capitals", text.upper().encode().lower()  # bytes are lowered letter by letter of ASCII
    yield f"{name} in UTF-16", folded.encode("utf-16-le")
    yield f"{name} in JSON", json.dumps(folded)[1:-1].encode()
    yield f"{name} in hexadecimal", text.encode().hex().encode()
    for shift in range(3):
        # Without the first and last characters, which depend on the neighbours.
        body = base64.b64encode(bytes(shift) + text.encode())[4 if shift else 0 :]
        yield f"{name} in base64, {shift}", body[: len(body) // 4 * 4 - 4].lower()


def _all_words(data: bytes) -> npt.NDArray[np.uint64]:
    """The eight bytes from each place on."""
    return np.concatenate([
        np.frombuffer(data, "<u8", (len(data) - shift) // _WORD, shift)
        for shift in range(min(_WORD, len(data) - _WORD + 1))
    ]) if len(data) >= _WORD else np.empty(0, "<u8")  # fmt: skip


def _slots(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        slots: npt.NDArray[np.uint64] = (words * _SPREAD) >> np.uint64(64 - _TABLE_BITS)
    return slots
