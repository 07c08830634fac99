"""Strict sections of a TOML file: reading, checking, and one-line messages about what is wrong.

Recipes and plans are read through here, so an unknown key or a wrong type reads the same wherever
it stands: file, key path, what was expected, what was found. Knows nothing about what the sections
mean.
"""

from __future__ import annotations

import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tamba.errors import UserError, nearest

S = TypeVar("S", bound="Section")


class Section(BaseModel):
    """Base of every table of a recipe or plan: unknown keys refused, no coercion, finite numbers,
    immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def read_toml(path: Path) -> tuple[str, dict[str, Any]]:
    """Text and parsed tables of a TOML file. Raises UserError when it is missing or not TOML."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = nearest_file(path)
        raise UserError(str(path), "no such file", near or "check the path") from None
    except IsADirectoryError:
        raise UserError(str(path), "is a folder", "name the TOML file in it") from None
    except PermissionError:
        raise UserError(str(path), "may not be read", "check its permissions") from None
    except UnicodeDecodeError:
        raise UserError(str(path), "is not UTF-8 text", "save it as UTF-8 TOML") from None
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(str(path), f"is not valid TOML: {error}", "correct that line") from None


def nearest_file(path: Path) -> str:
    """A hint naming the file beside a missing `path` whose name is closest; empty without one."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    hint = nearest(path.name, names)
    return hint if hint.startswith("did you mean") else ""


def validate(cls: type[S], data: Mapping[str, Any], where: str) -> S:
    """Check `data` against a section.

    Args:
        cls: the section that describes the data.
        data: tables as `tomllib` gives them (lists become tuples on the way in).
        where: the file or argument that messages begin with.

    Raises:
        UserError: the first thing that is wrong, with its key path and what was expected there.
    """
    try:
        return cls.model_validate(_frozen(data))
    except ValidationError as error:
        raise _explain(error, cls, where) from None


def dump_toml(data: Mapping[str, Any]) -> str:
    """TOML text of plain data: tables, arrays of tables, single-line values; no None."""
    lines: list[str] = []
    _dump_table(data, (), lines)
    return "\n".join(lines).strip() + "\n"


def toml_value(value: Any) -> str:
    """One value as TOML: text, number, truth value, or a list or table of such, on one line."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            # JSON strings are TOML basic strings, but for DEL, which only TOML wants escaped.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case Mapping():
            pairs = (f"{key} = {toml_value(item)}" for key, item in value.items())
            return "{ " + ", ".join(pairs) + " }"
        case Sequence():
            return "[" + ", ".join(toml_value(item) for item in value) + "]"
        case _:
            raise TypeError(f"no TOML form for {type(value).__name__}")


def _dump_table(data: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    tables: list[tuple[str, Any]] = []
    for key, value in data.items():
        if isinstance(value, Mapping) or _is_table_array(value):
            tables.append((key, value))
        elif value is not None:
            lines.append(f"{key} = {toml_value(value)}")
    for key, value in tables:
        name = ".".join((*path, key))
        if isinstance(value, Mapping):
            lines += ["", f"[{name}]"]
            _dump_table(value, (*path, key), lines)
        else:
            for item in value:
                lines += ["", f"[[{name}]]"]
                _dump_table(item, (*path, key), lines)


def _is_table_array(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def _frozen(value: Any) -> Any:
    """Lists become tuples: sections are immutable, and strict checks take no list for one."""
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return value


def _explain(error: ValidationError, cls: type[Section], where: str) -> UserError:
    # A misspelt key is also a missing one: name the unknown word, which is what has to be
    # corrected.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    keys, section = _walk(cls, first["loc"])
    place = where
    for key in keys:
        place += f"[{key}]" if isinstance(key, int) else ("." if place != where else ": ") + key
    match first["type"]:
        case "extra_forbidden":
            keys_known = list(section.model_fields) if section else []
            return UserError(place, "unknown key", nearest(str(keys[-1]), keys_known))
        case "missing":
            return UserError(place, "missing", "add this key")
        case "union_tag_not_found":
            kinds = first["ctx"]["discriminator"].strip("'")
            return UserError(f"{place}.{kinds}", "missing", "it says which kind this is")
        case "union_tag_invalid":
            context = first["ctx"]
            known = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
            tag = context["tag"]
            return UserError(
                f"{place}.{context['discriminator'].strip(chr(39))}",
                f"unknown kind {tag!r}",
                nearest(tag, known),
            )
        case "value_error":
            return UserError(place, first["msg"].removeprefix("Value error, "))
        case _:
            got = _shown(first["input"])
            problem = first["msg"].replace("Input should", "should").replace(" valid", "")
            problem = problem.replace("a integer", "a whole number").replace("a tuple", "a list")
            hint = ""
            if first["type"] == "literal_error" and isinstance(first["input"], str):
                allowed = [
                    w.strip("' ") for w in first["ctx"]["expected"].replace(" or ", ", ").split(",")
                ]
                near = nearest(first["input"], allowed)
                hint = near if near.startswith("did you mean") else ""
            return UserError(place, f"{problem}, got {got}", hint)


def _walk(
    cls: type[Section], loc: tuple[int | str, ...]
) -> tuple[list[int | str], type[Section] | None]:
    """The key path a person would write, and the section its last key belongs to.

    Pydantic puts the tag or name of a union's member into the path; those are not keys of the file.
    """
    keys: list[int | str] = []
    inside: list[Any] = [cls]
    owner: type[Section] | None = cls
    for step in loc:
        sections = [c for c in inside if isinstance(c, type) and issubclass(c, Section)]
        if isinstance(step, int):
            keys.append(step)
            continue
        holder = next((c for c in sections if step in c.model_fields), None)
        if holder is not None:
            keys.append(step)
            owner = holder
            inside = _members(holder.model_fields[step].annotation)
        elif tagged := [c for c in sections if len(sections) > 1 and _has_tag(c, step)]:
            inside, owner = list(tagged), tagged[0]
        elif step == loc[-1] and sections:
            keys.append(step)
            owner = sections[0]
        # Anything else names a member of a union of plain types and is no key.
    return keys, owner


def _members(annotation: Any) -> list[Any]:
    """Every plain class inside an annotation, through unions, tuples, optionals and Annotated."""
    origin = typing.get_origin(annotation)
    if origin is None:
        return [annotation]
    if origin in (typing.Union, types.UnionType, tuple, typing.Annotated):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return []


def _has_tag(cls: type[Section], tag: str) -> bool:
    return any(
        typing.get_origin(field.annotation) is typing.Literal
        and tag in typing.get_args(field.annotation)
        for field in cls.model_fields.values()
    )


def _shown(value: Any) -> str:
    text = (
        toml_value(value)
        if isinstance(value, str | int | float | list | tuple | dict)
        else str(value)
    )
    return text if len(text) <= 60 else text[:57] + "..."
