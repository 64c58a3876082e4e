"""nginx's configuration, where a running one on this machine could not be asked: callers by IPv6, and what TLS brings."""

import re
from ipaddress import IPv6Address
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from app.domain.callers import subscriber

CONFIGURATION = (Path(__file__).parents[3] / "deploy/nginx.conf").read_text(encoding="utf-8")
RULES = re.findall(
    r'"~(.+?)" (\S+);', CONFIGURATION.partition("map $remote_addr $idem_subscriber {")[2].partition("\n    }")[0]
)
#: Zeros often, so that each form of writing an address comes up; none in front, where no subscriber is.
GROUPS = st.tuples(st.integers(0x2000, 0x3FFF), *[st.sampled_from([0, 0, 1, 0xABCD])] * 7)


def counted_as(address: str) -> str:
    """What the map makes of an address: the first rule that fits gives the name."""
    for pattern, value in RULES:
        if found := re.search(pattern.replace("(?<", "(?P<"), address):
            return re.sub(r"\$(\w+)", lambda name: found[name[1]], value)
    return address


def written(groups: tuple[int, ...]) -> str:
    """As nginx writes it: the longest run of zeros as `::`."""
    return str(IPv6Address(":".join(f"{group:x}" for group in groups)))


def test_the_limits_of_an_address_are_those_of_its_subscriber() -> None:
    assert len(RULES) > 5
    zones = re.findall(r"limit_(?:conn|req)_zone (\S+) ", CONFIGURATION)
    assert zones == ["$idem_subscriber", "$idem_sender", "$idem_subscriber"]
    senders = CONFIGURATION.partition("map $request_method $idem_sender {")[2].partition("}")[0].split()
    assert senders == ["GET", '"";', "HEAD", '"";', "default", "$idem_subscriber;"]


@given(GROUPS, GROUPS)
def test_two_ipv6_addresses_are_one_caller_exactly_where_the_api_takes_them_for_one(
    one: tuple[int, ...], other: tuple[int, ...]
) -> None:
    neighbour = one[:4] + other[4:]
    for first, second in ((one, other), (one, neighbour)):
        a, b = written(first), written(second)
        assert (counted_as(a) == counted_as(b)) == (subscriber(a) == subscriber(b)), (a, b)


def test_ipv4_addresses_stand_for_themselves_also_inside_ipv6() -> None:
    assert counted_as("192.0.2.7") == counted_as("::ffff:192.0.2.7") == subscriber("::ffff:192.0.2.7") == "192.0.2.7"


def test_with_tls_every_answer_says_that_it_stays_so() -> None:
    """A location that adds headers of its own inherits none."""
    told = "add_header Strict-Transport-Security $idem_hsts always;"
    (most_seconds,) = re.findall(r'on "max-age=(\d+); includeSubDomains";', CONFIGURATION)
    assert int(most_seconds) >= 365 * 24 * 3600
    blocks = re.findall(r"\n        location [^{]+\{(.*?)\n        \}", CONFIGURATION, re.DOTALL)
    assert len(blocks) > 7
    assert all(told in block for block in blocks if "add_header" in block)
    outside = re.sub(r"\n        location [^{]+\{.*?\n        \}", "", CONFIGURATION, flags=re.DOTALL)
    assert outside.count(told) == 1
