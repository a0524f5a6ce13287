"""Whether the fields of a dataclass hold what they are declared to hold. A file that they were read from may lie."""

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

INT64 = 1 << 63  # no number of steps, bytes or tokens is beyond


def check_field_types(instance: Any) -> None:
    """Raise ValueError for the first field whose value is not of its type: a class, a Literal, or a union of those."""
    for name, kind in get_type_hints(type(instance)).items():
        value = getattr(instance, name)
        if not _fits(value, kind):
            expected = kind.__name__ if isinstance(kind, type) else kind
            size = " of 64 bits" if type(value) is int else ""
            raise ValueError(f"{name} must be {expected}{size}. Got {value!r:.50}.")


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if type(value) is bool:
        return kind is bool
    if type(value) is int:
        return kind in (int, float) and -INT64 <= value < INT64
    return isinstance(value, kind)
