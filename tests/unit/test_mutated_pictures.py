"""Thousands of mutated pictures of each format: none crashes the reader, or costs it much.

`python -m tests.support.picture_fuzz heic 10000` reads more of them.
"""

import json
import subprocess
import sys

import pytest

from app.domain.photo import FORMATS
from tests.support.picture_fuzz import mutated, seeds

COUNT = 2000
MOST_MIB, MOST_SECONDS = 300, 2


@pytest.mark.parametrize("kind", FORMATS)
def test_mutated_pictures_are_read_or_refused_and_cost_little(kind: str) -> None:
    """In a process of its own, whose peak of memory is theirs. Processor time, because the machine may be busy."""
    command = [sys.executable, "-m", "tests.support.picture_fuzz", kind, str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    cost = json.loads(done.stdout)
    assert sum(cost["outcomes"].values()) == COUNT
    # Mutations that leave no whole picture, or change none, would show nothing.
    assert all(cost["outcomes"][outcome] > COUNT // 50 for outcome in ("read", "undecodable-image"))
    assert cost["mib"] < MOST_MIB
    assert cost["slowest_processor_seconds"] < MOST_SECONDS


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_pictures_are_mutated_each_time(kind: str) -> None:
    (chosen,) = (one for one in FORMATS if one == kind)
    first = list(mutated(chosen, 50))
    assert first == list(mutated(chosen, 50))
    assert len({*first} - {*seeds(chosen)}) > 25
