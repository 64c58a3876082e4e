"""What the product's source must not hold: ways to run what somebody sent, and ciphers of its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("app", "workers", "storage") for path in (ROOT / folder).rglob("*.py"))
#: Modules that run what they read, or read what runs.
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "commands", "telnetlib"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "np.load",
    "subprocess.getoutput",
}
#: Where encryption may be; signatures are not encryption.
CIPHERS = "cryptography.hazmat.primitives.ciphers"
MAY_ENCRYPT = {"app/keys.py", "storage/archive.py"}

#: Ways to read the host's clock. The platform's time is `documents.base.now()`.
HOST_CLOCKS = {
    "time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "datetime.datetime.now", "date.today",
}  # fmt: skip
#: The clock itself; rates counted without Redis (the package's own times); age of files that the same host dated.
MAY_ASK_THE_HOST = {
    "app/clock.py",
    "app/limits.py",
    "app/orphans.py",
    "storage/photos.py",
    "storage/evidence.py",
    "storage/ownership.py",
}


def modules_of(tree: ast.AST) -> Iterator[str]:
    """The names of everything that is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dangers_in(source: str) -> list[str]:
    """What in a file could run what somebody sent."""
    tree = ast.parse(source)
    found = [name for name in modules_of(tree) if name.partition(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found += [name for name in [ast.unparse(node.func)] if name in FORBIDDEN_CALLS]
            found += [
                "shell=True" for word in node.keywords if word.arg == "shell" and ast.unparse(word.value) != "False"
            ]
            found += [
                "pickle" for word in node.keywords if word.arg == "allow_pickle" and ast.unparse(word.value) != "False"
            ]
    return found


def test_nothing_evaluates_unpickles_or_starts_a_shell() -> None:
    found = {str(path): dangers for path in SOURCES if (dangers := dangers_in(path.read_text(encoding="utf-8")))}
    assert found == {}


def test_only_keys_and_archives_encrypt() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(name.startswith(CIPHERS) for name in modules_of(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert "app/keys.py" in found
    assert found <= MAY_ENCRYPT


def host_clocks_in(source: str) -> list[str]:
    """The places where a file reads the host's clock."""
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [name for name in calls if name in HOST_CLOCKS]


def test_only_the_clock_reads_the_hosts_clock() -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if host_clocks_in(path.read_text(encoding="utf-8")) and "devstack" not in path.parts and "cli" not in path.parts
    }
    assert found <= MAY_ASK_THE_HOST, "see docs/adr/0036-mongodbs-time.md"


@pytest.mark.parametrize("asking", ["time.time()", "datetime.now(UTC)", "datetime.datetime.now()", "time.time_ns()"])
def test_every_use_of_the_hosts_clock_is_found(asking: str) -> None:
    assert host_clocks_in(asking)


@pytest.mark.parametrize(
    "danger",
    [
        "import pickle", "from pickle import loads", "eval('1')", "import os\nos.system('x')",
        "import subprocess\nsubprocess.run('x', shell=True)", "import numpy as np\nnp.load(f, allow_pickle=True)",
    ],
)  # fmt: skip
def test_each_danger_would_be_seen(danger: str) -> None:
    assert dangers_in(danger)
