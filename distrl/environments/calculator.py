"""Arithmetic on whole numbers and decimals, without evaluating code."""

import ast
import operator
from collections.abc import Callable
from decimal import Decimal, DivisionByZero, InvalidOperation, localcontext

MOST_CHARACTERS = 200
DIGITS = 50

_BINARY: dict[type[ast.operator], Callable[[Decimal, Decimal], Decimal]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str | None:
    """The value of an expression of + - * / // % and brackets, to 50 digits; None where it has none."""
    if len(expression) > MOST_CHARACTERS:
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        with localcontext() as context:
            context.prec = DIGITS
            value = _value(tree.body)
            return f"{value.normalize():f}" if value == value.to_integral_value() else str(value.normalize())
    except (SyntaxError, ValueError, DivisionByZero, InvalidOperation, ArithmeticError, RecursionError):
        return None


def _value(node: ast.expr) -> Decimal:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Decimal(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _BINARY:
            return _BINARY[type(operation)](_value(left), _value(right))
        case _:
            raise ValueError("no arithmetic")
