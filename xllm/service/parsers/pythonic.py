"""Decides what a list of calls in Python's notation calls: [name(key=value, ...), ...]. Literals only; none is run."""

from __future__ import annotations

import ast
import math
import warnings
from typing import Any

from xllm.service.parsers import values
from xllm.service.parsers.blocks import Found
from xllm.service.parsers.parts import Tools

MAX_CHARS = 1 << 16  # of a body: what is parsed takes a hundred times its memory
NAMES = {"true": True, "false": False, "null": None}  # as models that know JSON like to write them


def calls(body: str, tools: Tools) -> tuple[list[Found], str] | None:
    """The body of a block."""
    if len(body) > MAX_CHARS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python would tell an author of code, with the text in it
            tree = ast.parse(body.strip(), mode="eval").body
        if not isinstance(tree, ast.List) or not tree.elts:
            return None
        return [_call(node) for node in tree.elts], ""
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _call(node: ast.expr) -> Found:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("no call with named arguments")
    arguments = {word.arg: _value(word.value) for word in node.keywords}
    if None in arguments or len(arguments) < len(node.keywords):
        raise ValueError("an argument without a name, or one that is there twice")
    return Found(_name(node.func), values.written(arguments))


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError("no name")


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | bool() | int() | None as value):
            return value
        case ast.Constant(value=float() as value) if math.isfinite(value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if value is not True:
            return -value
        case ast.Name(id=name) if name in NAMES:
            return NAMES[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=items) if None not in keys:
            names = [_value(key) for key in keys if key is not None]
            if all(isinstance(name, str) for name in names):
                return dict(zip(names, map(_value, items), strict=True))
    raise ValueError("no literal that JSON has")
