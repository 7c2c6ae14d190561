"""Writes addition.jsonl: fifty sums of two numbers below 100, always the same.

python examples/data/write_addition.py
"""

import json
from pathlib import Path

FILE = Path(__file__).with_name("addition.jsonl")


def lines() -> str:
    """The content of the file."""
    # 37 and 61 have no factor in common with 100: the pairs differ, and neither number grows with the line.
    pairs = [((37 * i + 11) % 100, (61 * i + 29) % 100) for i in range(50)]
    rows = [{"question": f"What is {a} + {b}? The answer is", "solution": str(a + b)} for a, b in pairs]
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    FILE.write_text(lines())
