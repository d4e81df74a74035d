"""Expressions over axes, for `where` and `let`: arithmetic, comparisons, and/or/not, a few functions.

The text is parsed by Python's own parser and walked node by node; nothing is ever evaluated as
code, and only what stands in the tables below means anything. `lambda` is an axis like another.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from raymerge.cluster.grid_points import Value

_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda left, right: left in right,
    ast.NotIn: lambda left, right: left not in right,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": abs,
    "len": len,
    "max": max,
    "min": min,
    "round": round,
    "sqrt": math.sqrt,
    "log": math.log,
    "exp": math.exp,
}
_CONSTANTS: Mapping[str, Any] = {"true": True, "false": False, "null": None}
#: A text in quotes, or a name with or without "$".
_TOKEN = re.compile(r"(?P<text>'[^']*'|\"[^\"]*\")|\$?(?P<name>[A-Za-z_]\w*)|\$\{(?P<braced>[A-Za-z_]\w*)\}")
_PREFIX = "axis_"
_MOST_CHARACTERS = 2000
_LARGEST_EXPONENT = 64


class Expression:
    """A parsed expression."""

    def __init__(self, text: str, names: Collection[str]) -> None:
        """Parse an expression.

        Args:
            text: as the file has it; axes stand with or without "$".
            names: what may stand in it besides functions.

        Raises:
            ValueError: with half a sentence ("uses the unknown name 'lamda'").
            LookupError: with the unknown name alone.
        """
        self.text = text
        self.names: set[str] = set()
        """The axes that it uses."""
        if len(text) > _MOST_CHARACTERS:
            raise ValueError(f"is longer than {_MOST_CHARACTERS} characters")

        def mark(found: re.Match[str]) -> str:
            name = found["name"] or found["braced"]
            is_marked = name is not None and (name in names or "$" in found[0])
            return f"{_PREFIX}{name}" if is_marked else found[0]

        try:
            self._tree = ast.parse(_TOKEN.sub(mark, text.strip()), mode="eval").body
        except (SyntaxError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply"
            raise ValueError(f"is {text!r}, which is no expression: {reason}") from None
        self._check(self._tree, names)

    def evaluate(self, values: Mapping[str, Value]) -> Any:
        """Return the value of the expression.

        Raises:
            ValueError: with half a sentence, if the values do not go together.
        """
        try:
            return self._value(self._tree, values)
        except (TypeError, ArithmeticError, LookupError, ValueError, RecursionError) as error:
            used = ", ".join(f"{name} = {values[name]!r}" for name in sorted(self.names) if name in values)
            raise ValueError(f"is {self.text!r}, which fails for {used}: {error}") from None

    def _check(self, node: ast.expr, names: Collection[str]) -> None:
        """Refuse what has no meaning here, before any point is made."""
        for each in ast.walk(node):
            if isinstance(each, ast.Name):
                name = each.id.removeprefix(_PREFIX)
                if each.id.startswith(_PREFIX) and name in names:
                    self.names.add(name)
                elif each.id not in _FUNCTIONS and each.id not in _CONSTANTS:
                    raise LookupError(name)
            elif isinstance(each, ast.Call):
                if not isinstance(each.func, ast.Name) or each.func.id not in _FUNCTIONS or each.keywords:
                    raise ValueError(f"is {self.text!r}; the functions are {', '.join(_FUNCTIONS)}")
            elif isinstance(each, ast.Constant):
                if not isinstance(each.value, str | int | float | bool | None):
                    raise ValueError(f"is {self.text!r}; a value is a number, a text, true, false or null")
            elif not isinstance(each, _ALLOWED):
                raise ValueError(
                    f"is {self.text!r}; it may hold axes, numbers, texts, lists, + - * / // % **, comparisons, `in`, "
                    "and, or, not, if-else"
                )

    def _value(self, node: ast.expr, values: Mapping[str, Value]) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            name = node.id.removeprefix(_PREFIX)
            return values[name] if node.id.startswith(_PREFIX) else _CONSTANTS[node.id]
        if isinstance(node, ast.BoolOp):
            return self._bool_op(node, values)
        if isinstance(node, ast.UnaryOp):
            value = self._value(node.operand, values)
            return not value if isinstance(node.op, ast.Not) else _number(value) * _SIGN[type(node.op)]
        if isinstance(node, ast.BinOp):
            left, right = _number(self._value(node.left, values)), _number(self._value(node.right, values))
            if isinstance(node.op, ast.Pow) and abs(right) > _LARGEST_EXPONENT:
                raise ValueError(f"an exponent is at most {_LARGEST_EXPONENT}")
            return _tidy(_BINARY[type(node.op)](left, right))
        if isinstance(node, ast.Compare):
            return self._compare(node, values)
        if isinstance(node, ast.IfExp):
            return self._value(node.body if self._value(node.test, values) else node.orelse, values)
        if isinstance(node, ast.List | ast.Tuple):
            return [self._value(each, values) for each in node.elts]
        if isinstance(node, ast.Subscript):
            return self._value(node.value, values)[self._value(node.slice, values)]
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        return _FUNCTIONS[node.func.id](*(self._value(each, values) for each in node.args))

    def _bool_op(self, node: ast.BoolOp, values: Mapping[str, Value]) -> Any:
        is_and = isinstance(node.op, ast.And)
        value: Any = None
        for each in node.values:
            value = self._value(each, values)
            if bool(value) != is_and:
                break
        return value

    def _compare(self, node: ast.Compare, values: Mapping[str, Value]) -> bool:
        left = self._value(node.left, values)
        for kind, each in zip(node.ops, node.comparators, strict=True):
            right = self._value(each, values)
            if not _COMPARE[type(kind)](left, right):
                return False
            left = right
        return True


_SIGN = {ast.USub: -1, ast.UAdd: 1}
_ALLOWED = (
    ast.BoolOp,
    ast.And,
    ast.Or,
    ast.UnaryOp,
    ast.Not,
    ast.USub,
    ast.UAdd,
    ast.BinOp,
    *_BINARY,
    ast.Compare,
    *_COMPARE,
    ast.IfExp,
    ast.List,
    ast.Tuple,
    ast.Subscript,
    ast.Load,
)


def _tidy(value: Any) -> Any:
    """Return a float to 15 digits: 1 - 0.9 is 0.1, as its author means it, not 0.09999999999999998."""
    return float(f"{value:.15g}") if isinstance(value, float) else value


def _number(value: Any) -> Any:
    """Refuse arithmetic on texts and lists: "a" * 10**9 would fill the memory."""
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    if isinstance(value, int) and value.bit_length() > 4096:
        raise ValueError("a number is too large")
    return value
