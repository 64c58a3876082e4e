"""What differs between two states of a thing, for the events that record the change."""

from collections.abc import Mapping

#: What a changed field may be in an event. Lists contain names, in the order of the alphabet where the order means nothing.
FieldValue = str | int | float | bool | list[str] | None
#: {field: {"old": ..., "new": ...}}
Changes = dict[str, dict[str, FieldValue]]


def changes(before: Mapping[str, FieldValue], after: Mapping[str, FieldValue]) -> Changes:
    """The fields that differ, each with its old and its new value. A field that one side lacks is null there."""
    names = sorted({*before, *after})
    pairs = {name: {"old": before.get(name), "new": after.get(name)} for name in names}
    return {name: pair for name, pair in pairs.items() if pair["old"] != pair["new"]}
