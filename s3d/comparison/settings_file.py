"""Settings of a run from JSON: every mistake is named with its place in the file."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from s3d.run_settings import RunSettings


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `json.loads(object_pairs_hook=...)`; ValueError for a name that would hide another."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{', '.join(twice)}: given twice in one object")
    return found


def check_names(given: Mapping[str, Any], accepted: Collection[str], place: str) -> None:
    """ValueError, with its place, for an entry that nobody knows."""
    for name in given:
        if name not in accepted:
            raise ValueError(f"{_join(place, name)}: no such setting; accepted: {', '.join(accepted)}")


def object_at(value: Any, place: str) -> dict[str, Any]:
    """`value`, which must be an object of JSON."""
    if not isinstance(value, dict):
        raise ValueError(f"{place}: must be an object, got {value!r}")
    return value


def entry(given: Mapping[str, Any], name: str, place: str, default: Any = dataclasses.MISSING) -> Any:
    """An entry of an object; ValueError if it is missing and there is no default."""
    if name in given:
        return given[name]
    if default is dataclasses.MISSING:
        raise ValueError(f"{_join(place, name)}: is missing")
    return default


def settings_of(
    given: Mapping[str, Any], settings: type[RunSettings], without: Collection[str], place: str
) -> dict[str, Any]:
    """Values for fields of a class of settings, of the types that it has.

    Args:
        given: names and JSON values.
        settings: the class.
        without: fields that are not to be given.
        place: of the object in the file.
    Raises:
        ValueError: there is no such field, or its value is of another type.
    """
    hints = get_type_hints(settings)
    accepted = [field.name for field in dataclasses.fields(settings) if field.name not in without]
    check_names(given, accepted, place)
    return {name: _typed(value, hints[name], _join(place, name)) for name, value in given.items()}


def _typed(value: Any, hint: Any, place: str) -> Any:
    found, converted = _convert(value, hint)
    if not found:
        raise ValueError(f"{place}: must be {_described(hint)}, got {value!r}")
    return converted


def _convert(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether a JSON value is of a type, and what it is then."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        options = (_convert(value, option) for option in arguments)
        return next((option for option in options if option[0]), (False, None))
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments), value
    if origin is tuple:
        if not isinstance(value, list):
            return False, None
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        parts = [_convert(part, kind) for part, kind in zip(value, kinds)]
        return len(value) == len(kinds) and all(found for found, _ in parts), tuple(part for _, part in parts)
    if hint is type(None):
        return value is None, None
    if hint is Path:
        return isinstance(value, str), Path(value) if isinstance(value, str) else None
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number, float(value) if number else None
    return type(value) is hint, value


def _described(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_described, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list of {_described(arguments[0])}"
        return f"a list of {len(arguments)} times {_described(arguments[0])}"
    names = {type(None): "null", Path: "a path", str: "a text", bool: "true or false"}
    return names.get(hint) or {int: "a whole number", float: "a number"}[hint]


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
