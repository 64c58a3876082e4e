"""Tokens that must not pass (and the one that must), read with nothing but a public key."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Mapping

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from app.access.tokens import TOKEN_CHARACTERS, claims_of, key_id_of
from app.errors import Unauthenticated

ISSUER = "https://idem.example"
KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key()
HEADER: Mapping[str, object] = {"alg": "EdDSA", "typ": "at+jwt", "kid": "k1"}


def said(**changes: object) -> dict[str, object]:
    """What a good token says, with changes; None leaves a claim out."""
    moment = int(time.time())
    claims: dict[str, object] = {
        "iss": ISSUER, "aud": "idem-api", "sub": "u1", "kind": "user", "iat": moment, "exp": moment + 600,
        "jti": "t1", "ver": 1, "sid": "s1",
    }  # fmt: skip
    return {name: value for name, value in (claims | changes).items() if value is not None}


def encoded(part: Mapping[str, object]) -> str:
    """A part of a compact JWT."""
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


def signed(claims: Mapping[str, object], header: Mapping[str, object] = HEADER, key: Ed25519PrivateKey = KEY) -> str:
    """A JWT put together by hand, so that no library refuses to write what must be refused on reading."""
    text = f"{encoded(header)}.{encoded(claims)}"
    return f"{text}.{base64.urlsafe_b64encode(key.sign(text.encode())).rstrip(b'=').decode()}"


def is_refused(token: str) -> bool:
    """Whether a token that came with a request is refused."""
    try:
        key_id_of(token)
        claims_of(token, PUBLIC, ISSUER, time.time())
    except Unauthenticated:
        return True
    return False


def test_a_genuine_token_is_read() -> None:
    token = signed(said())
    assert key_id_of(token) == "k1"
    claims = claims_of(token, PUBLIC, ISSUER, time.time())
    assert (claims.subject, claims.kind, claims.token_id, claims.session_id) == ("u1", "user", "t1", "s1")


@pytest.mark.parametrize("name", ["none", "None", "nOnE", "NONE", ""])
@pytest.mark.parametrize("signature", ["", "AA"])
def test_h46_a_token_without_a_signature_is_refused(name: str, signature: str) -> None:
    assert is_refused(f"{encoded({**HEADER, 'alg': name})}.{encoded(said())}.{signature}")


@pytest.mark.parametrize(
    "secret",
    [
        PUBLIC.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        PUBLIC.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        PUBLIC.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
        PUBLIC.public_bytes_raw(),
        jwt.algorithms.OKPAlgorithm.to_jwk(PUBLIC, as_dict=False).encode(),
        b"",
    ],
    ids=["pem", "der", "openssh", "raw", "jwk", "empty"],
)
def test_h47_the_public_key_is_no_hmac_secret(secret: bytes) -> None:
    text = f"{encoded({**HEADER, 'alg': 'HS256'})}.{encoded(said())}"
    mac = hmac.digest(secret, text.encode(), hashlib.sha256)
    assert is_refused(f"{text}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}")


def test_a_token_of_another_key_is_refused() -> None:
    assert is_refused(signed(said(), key=Ed25519PrivateKey.generate()))


@pytest.mark.parametrize("kid", [None, 7, ["k1"], {"k": 1}, "x" * 65536])
def test_h48_a_key_id_that_is_no_short_text_is_refused(kid: object) -> None:
    assert is_refused(signed(said(), {**HEADER, "kid": kid}))


@pytest.mark.parametrize("kid", ["../../dev/null", "' OR 1=1", ""])
def test_h48_a_key_id_is_taken_as_it_stands(kid: str) -> None:
    assert key_id_of(signed(said(), {**HEADER, "kid": kid})) == kid


@pytest.mark.parametrize(
    "extra", [{"crit": ["x"]}, {"crit": ["exp"]}, {"crit": []}, {"b64": False, "crit": ["b64"]}, {"typ": "JWT"},
              {"typ": "idem-assertion+jwt"}, {"typ": None}, {"typ": "AT+JWT "}, {"alg": "Ed448"}, {"alg": None}]
)  # fmt: skip
def test_h49_h51_a_header_that_is_not_ours_is_refused(extra: Mapping[str, object]) -> None:
    assert is_refused(signed(said(), {**HEADER, **extra}))


def test_h48_a_key_that_the_token_brings_along_is_not_looked_at() -> None:
    foreign = Ed25519PrivateKey.generate()
    jwk = json.loads(jwt.algorithms.OKPAlgorithm.to_jwk(foreign.public_key(), as_dict=False))
    header = {**HEADER, "jwk": jwk, "jku": "http://127.0.0.1:9/keys", "x5u": "http://127.0.0.1:9/cert"}
    assert is_refused(signed(said(), header, foreign))


@pytest.mark.parametrize(
    ("issued", "expires", "not_before"),
    [(-601, -1, None), (-4200, -3600, None), (60, 600, None), (0, 10**18, None), (0, 86_401, None), (0, 600, 60)],
    ids=["expired-1-s", "expired-1-h", "issued-in-future", "never-expires", "too-long", "not-yet"],
)
def test_h50_a_token_of_another_time_is_refused(issued: int, expires: int, not_before: int | None) -> None:
    moment = int(time.time())
    nbf = None if not_before is None else moment + not_before
    assert is_refused(signed(said(iat=moment + issued, exp=moment + expires, nbf=nbf)))


@pytest.mark.parametrize(
    "changes",
    [
        *({"exp": None}, {"exp": "9999999999"}, {"exp": True}, {"exp": 4e9}, {"iat": None}, {"iat": "1700000000"}),
        *(
            {"iss": None},
            {"iss": "https://evil.example"},
            {"aud": None},
            {"aud": "someone"},
            {"aud": ["idem-api", "x"]},
        ),
        *({"sub": None}, {"sub": 7}, {"jti": None}, {"jti": 7}, {"ver": None}, {"ver": "1"}, {"ver": True}),
        *({"kind": None}, {"kind": "admin"}, {"sid": 7}),
    ],
    ids=str,
)
def test_h50_h51_a_token_that_says_anything_else_is_refused(changes: dict[str, object]) -> None:
    assert is_refused(signed(said(**changes)))


def test_h52_a_token_of_more_than_8_kb_is_refused_before_it_is_decoded() -> None:
    assert is_refused(signed(said(scope="x" * TOKEN_CHARACTERS)))


@pytest.mark.parametrize(
    "spelling",
    [
        *(
            "{0}.{1}.{2}=",
            "{0}.{1}.{2}==",
            "{0}=.{1}.{2}",
            "{0}..{1}.{2}",
            "{0}.{1}..{2}",
            "{0}.{1}.{2}.",
            ".{0}.{1}.{2}",
        ),
        *("{0}.{1}.{2}\n", " {0}.{1}.{2}", "{0}.{1}", "{0}.{1}.", "{0}.{1}.{2}.e30.e30", "{0}.{1}.{2}/", "", ".", ".."),
    ],
)
def test_h52_another_spelling_of_a_genuine_token_is_refused(spelling: str) -> None:
    assert is_refused(spelling.format(*signed(said()).split(".")))


@pytest.mark.parametrize("part", [b"[]", b"null", b"{", b"\xff", b"[" * 2000, b'"x"'])
def test_h52_parts_that_are_no_objects_are_refused(part: bytes) -> None:
    raw = base64.urlsafe_b64encode(part).rstrip(b"=").decode()
    good = encoded(HEADER)
    text = f"{good}.{raw}"
    signature = base64.urlsafe_b64encode(KEY.sign(text.encode())).rstrip(b"=").decode()
    assert is_refused(f"{text}.{signature}")
    assert is_refused(f"{raw}.{encoded(said())}.{signature}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.integers(0, len(signed(said())) - 1), st.characters(codec="ascii", categories=["L", "N", "P"]))
def test_h46_h52_a_genuine_token_with_one_other_character_is_refused(place: int, other: str) -> None:
    token = signed(said())
    changed = token[:place] + other + token[place + 1 :]
    assert is_refused(changed) == (changed != token)


def test_h52_the_last_character_of_a_signature_has_one_spelling() -> None:
    token = signed(said())
    others = [token[:-1] + last for last in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"]
    assert [other for other in others if not is_refused(other)] == [token]


@given(st.text(max_size=200))
def test_h52_text_of_any_kind_is_refused_and_no_fault(text: str) -> None:
    assert is_refused(text)
    assert is_refused(f"{encoded(HEADER)}.{text}")


@given(st.dictionaries(st.sampled_from(["alg", "typ", "kid", "crit", "b64", "jwk", "zip", "enc", "cty"]), JSON))
def test_h46_h48_h49_a_header_of_any_kind_is_refused_or_ours(changes: dict[str, object]) -> None:
    header = {**HEADER, **changes}
    is_ours = header["alg"] == "EdDSA" and header["typ"] == "at+jwt" and isinstance(header["kid"], str)
    assert is_refused(signed(said(), header)) == (not is_ours or set(header) != set(HEADER))


@given(st.dictionaries(st.sampled_from(["iss", "aud", "sub", "kind", "exp", "iat", "nbf", "jti", "ver", "sid"]), JSON))
def test_h50_h51_claims_of_any_kind_are_refused_or_read_with_their_types(changes: dict[str, object]) -> None:
    token = signed(said() | changes)
    try:
        read = claims_of(token, PUBLIC, ISSUER, time.time())
    except Unauthenticated:
        return
    assert {type(read.subject), type(read.token_id)} == {str}
    assert {type(read.access_version), type(read.expires_at)} == {int}
    assert read.session_id is None or isinstance(read.session_id, str)
    assert read.kind in ("user", "client")
    assert time.time() < read.expires_at <= time.time() + 86_400 + 5
