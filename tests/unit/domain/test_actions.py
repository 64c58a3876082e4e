"""The list of actions holds exactly those that the source names."""

import ast
from collections.abc import Iterator
from pathlib import Path

from app.domain.actions import ACTIONS

ROOT = Path(__file__).parents[3]
#: What makes an Action, and which of its arguments is the name.
MAKERS = {"acting": 0, "by_system": 0, "unknown_callers": 1, "Strangers": 1, "Action": None, "replace": None}


def _named(tree: ast.Module) -> Iterator[str]:
    """The names of actions that a module uses."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in MAKERS:
            continue
        place = MAKERS[call.func.id]
        given = [] if place is None else call.args[place : place + 1]
        given += [keyword.value for keyword in call.keywords if keyword.arg == "name"]
        for value in given:
            for part in ast.walk(value):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


def test_every_action_of_the_source_is_listed_and_no_other() -> None:
    files = [path for folder in ("app", "workers") for path in (ROOT / folder).rglob("*.py")]
    named = {name for path in files for name in _named(ast.parse(path.read_text())) if "." in name}
    # The end of a name that begins with the kind of an account.
    named.discard(".update")
    assert named == ACTIONS
