"""Decides what the text of arguments is worth: strict JSON with its objects' values as they were written, and values of
tags, which the schema of the tool gives their types."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

REFERENCES = 8  # followed from one schema to the next
HALF = re.compile("[\ud800-\udfff]")  # of a pair: an escape can say it, UTF-8 has no bytes for it


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    return number if math.isfinite(number := float(digits)) else _refuse(digits)


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)


def parse(text: str, at: int = 0) -> tuple[Any, int]:
    """The JSON value at a place, white space skipped, and where it ends. Raises ValueError for what is none."""
    at = skip(text, at)
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        raise ValueError(f"no JSON at {at}") from None


def whole(text: str) -> Any:
    """The JSON value that all of the text is. Raises ValueError."""
    value, end = parse(text)
    if text[end:].strip():
        raise ValueError("text behind the value")
    return value


def skip(text: str, at: int) -> int:
    """The next place without white space."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def is_object(text: str) -> bool:
    try:
        return isinstance(whole(text), dict)
    except ValueError:
        return False


def members(text: str, at: int = 0) -> tuple[dict[str, str], int]:
    """The values of the object at a place as they are written, by key, and where it ends. Raises ValueError."""
    value, end = parse(text, at)
    if not isinstance(value, dict):
        raise ValueError("no object")
    found: dict[str, str] = {}
    at = skip(text, skip(text, at) + 1)
    while text[at] != "}":
        key, at = parse(text, at)
        at = skip(text, skip(text, at) + 1)  # behind the colon
        _, after = parse(text, at)
        if key in found:
            raise ValueError("a key appears twice")
        found[key] = text[at:after]
        at = skip(text, after)
        at = skip(text, at + 1) if text[at] == "," else at
    return found, end


def written(value: Any) -> str:
    """A value as JSON that can be sent. Raises ValueError for one that JSON does not have, or nobody could read."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError("too deep") from None
    return HALF.sub(lambda half: f"\\u{ord(half[0]):x}", text)


def sendable(value: Any) -> Any:
    """The same without halves of pairs, which a value, unlike its text, can't be sent with."""
    text = json.dumps(value, ensure_ascii=False)
    return json.loads(HALF.sub("\N{REPLACEMENT CHARACTER}", text)) if HALF.search(text) else value


def complete(text: str) -> dict[str, Any]:
    """The object that a text is, sendable; of one that breaks off, the members that are whole."""
    found: dict[str, Any] = {}
    at = skip(text, skip(text, 0) + 1)
    try:
        while at < len(text) and text[at] != "}":
            key, at = parse(text, at)
            value, end = parse(text, skip(text, at) + 1)
            at = skip(text, end)
            if at == len(text) and not isinstance(value, dict | list | str):
                break  # a number may have had more digits
            found[key] = value
            at = skip(text, at + 1) if text[at : at + 1] == "," else at
    except ValueError:
        pass
    return sendable(found)


def typed(text: str, name: str, schema: Mapping[str, Any]) -> Any:
    """The value of a parameter whose tag holds `text`: of the type that the tool's schema gives it, or else the text
    itself."""
    properties = schema.get("properties")
    types = _types(properties.get(name) if isinstance(properties, dict) else None, schema, REFERENCES)
    if types <= {"string"}:
        return text
    try:
        value = whole(text if text.strip() not in ("True", "False", "None") else _AS_JSON[text.strip()])
    except ValueError:
        return text
    return value if _TYPE_OF[type(value)] & types and not isinstance(value, str) else text


_AS_JSON = {"True": "true", "False": "false", "None": "null"}  # as Python's models like to write them
_TYPE_OF = {
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    str: {"string"},
    list: {"array"},
    dict: {"object"},
    type(None): {"null"},
}


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> set[str]:
    """Types that a schema allows, as far as it says so."""
    if not isinstance(schema, dict) or not depth:
        return set()
    if isinstance(reference := schema.get("$ref"), str):
        return _types(_resolve(reference, root), root, depth - 1)
    given = schema.get("type")
    if isinstance(given, str):
        return {given}
    if isinstance(given, list):
        return {name for name in given if isinstance(name, str)}
    if isinstance(values := schema.get("enum", [schema["const"]] if "const" in schema else None), list):
        return {name for value in values for name in _TYPE_OF.get(type(value), ())}
    choices = [choice for word in ("anyOf", "oneOf", "allOf") for choice in _list(schema.get(word))]
    return {name for choice in choices for name in _types(choice, root, depth - 1)}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _resolve(reference: str, root: Any) -> Any:
    """What a reference into the same schema names, or None."""
    if not reference.startswith("#/"):
        return None
    for step in reference[2:].split("/"):
        root = root.get(step) if isinstance(root, dict) else None
    return root
