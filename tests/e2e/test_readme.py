"""The commands that the README and the docs show, run as they stand against a running service.

A shell block is run when the HTML comment `<!-- test -->` stands right before it. The blocks of a page run in order in one
shell, with IDEM (the stack's address), CREDENTIALS (its credentials.json) and DATA (its folder) in the environment.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.builders import REPOSITORY
from tests.support.stacks import RunningStack

_BLOCK = re.compile(r"<!-- test -->\s*\n```(?:bash|sh|console)\n(.*?)```", re.DOTALL)
RUNS_WITHIN_SECONDS = 120


def pages() -> list[Path]:
    """The README and the docs."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def commands(page: Path) -> str:
    """All marked blocks of a page, in order."""
    return "\n".join(_BLOCK.findall(page.read_text(encoding="utf-8")))


def with_commands() -> list[Path]:
    """The pages that have such blocks; the README must be one of them."""
    return [page for page in pages() if page.name == "README.md" or commands(page)]


@pytest.mark.parametrize("page", with_commands(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_the_commands_of_the_page_do_what_it_says(
    stack: RunningStack, stack_environment: dict[str, str], tmp_path: Path, page: Path
) -> None:
    script = commands(page)
    assert script, f"{page.name} shows no tested command"
    # As on the page: commands are given in the checkout, whose environment is the one that runs this test.
    (tmp_path / ".venv").symlink_to(sys.prefix)
    places = {"CREDENTIALS": str(stack.data_dir / "credentials.json"), "DATA": str(stack.data_dir)}
    environment = stack_environment | {"IDEM": stack.ready.url} | places
    done = subprocess.run(
        ["bash", "-eu", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUNS_WITHIN_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "urn:idem:problem/" not in done.stdout, done.stdout
