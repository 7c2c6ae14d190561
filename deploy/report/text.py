"""How numbers, times and the model's text are written on the page."""

import math
import unicodedata
from datetime import UTC, datetime

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
NBSP = "\N{NO-BREAK SPACE}"
"""Between a number and its unit."""
LONGEST_TEXT = 4000
"""Characters of a prompt or response that the page shows."""


def number(value: float | int | None, digits: int = 3) -> str:
    """At most `digits` significant digits, integers up to a million in full, a dash for nothing.

    For example 0.6436 -> 0.644, 1920 -> 1,920, 4.2e-07 -> 4.2e-07.
    """
    if value is None or not math.isfinite(value):
        return DASH
    if value == round(value) and abs(value) < 1e6:
        return f"{round(value):,}".replace("-", MINUS)
    text = f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.2e}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def percent(value: float | None) -> str:
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:.1f}{NBSP}%"


def duration(seconds: float | None) -> str:
    """For example 7.2 s, 2 min 7 s, 3 h 5 min, 2 d 4 h."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.2g}{NBSP}s" if seconds < 10 else f"{seconds:.0f}{NBSP}s"
    if seconds < 3600:
        big, small, size, unit = "min", "s", 60, 1
    elif seconds < 86400:
        big, small, size, unit = "h", "min", 3600, 60
    else:
        big, small, size, unit = "d", "h", 86400, 3600
    whole = round(seconds / unit) * unit
    return f"{whole // size} {big} {whole % size // unit} {small}".replace(" ", NBSP)


def moment(seconds: float | None) -> str:
    """A time since the epoch, in UTC to the minute."""
    return DASH if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def visible(text: str, longest: int = LONGEST_TEXT) -> str:
    """The text of a model as it may stand on a page, before escaping.

    Control characters, which HTML forbids, and those that reorder or hide text become visible escapes; a text that is
    too long loses its middle.
    """
    if len(text) > longest:
        head, tail = longest * 3 // 4, longest // 4
        left_out = f"{len(text) - head - tail:,}"
        text = f"{text[:head]}\n[… {left_out} characters left out, samples.parquet has them …]\n{text[-tail:]}"
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else _escape(c) for c in text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
