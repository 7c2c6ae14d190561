"""Who was dropped, drawn again and waited for, by length and difficulty: dropping favors short and easy answers."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from sqlite3 import Row

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Share:
    """The tickets of one kind."""

    trained: int
    dropped: Mapping[str, int]
    """By reason."""
    waited_s: float
    """Seconds that the learner waited for one of them."""
    redrawn: int
    """How often one of them was drawn again because it was late."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Tickets by mean response length and by difficulty.

    What a dropped ticket's response would have been is not known if it was never sampled: it then counts with the mean
    of the other tickets of its prompt, and as `unknown` where there are none. One that was drawn again counts with the
    responses of its last draw, which was in time: long answers count as shorter than those that were aborted.
    """

    by_length: Mapping[str, Share]
    """Tokens per response, in powers of two."""
    by_difficulty: Mapping[str, Share]
    """Mean reward of the prompt's rollouts, in fifths of the range of all prompts; the first is the hardest."""


def selection(tickets: Sequence[Row], waits: Iterable[Row]) -> Selection:
    """Sorts tickets and waits.

    Args:
        tickets: rows of the ledger's table of tickets; those neither trained nor dropped count for their waits only.
        waits: rows of its table of waits.
    """
    lengths = _with_prompt_means(
        tickets,
        {t["ticket_id"]: t["response_tokens"] / t["rollouts"] for t in tickets if t["rollouts"]},
    )
    rewards = _with_prompt_means(
        tickets, {t["ticket_id"]: t["reward_mean"] for t in tickets if t["reward_mean"] is not None}
    )
    waited: dict[int, float] = defaultdict(float)
    for wait in waits:
        waited[wait["ticket_id"]] += wait["waited_s"]
    low, high = min(rewards.values(), default=0.0), max(rewards.values(), default=0.0)
    return Selection(
        _shares(tickets, waited, {i: _length_bucket(n) for i, n in lengths.items()}),
        _shares(tickets, waited, {i: _fifth(r, low, high) for i, r in rewards.items()}),
    )


def _with_prompt_means(tickets: Sequence[Row], own: dict[int, float]) -> dict[int, float]:
    """The ticket's own value, else the mean of its prompt's other tickets."""
    of_prompt: dict[str, list[float]] = defaultdict(list)
    for ticket in tickets:
        if ticket["ticket_id"] in own:
            of_prompt[ticket["prompt_id"]].append(own[ticket["ticket_id"]])
    found = dict(own)
    for ticket in tickets:
        others = of_prompt.get(ticket["prompt_id"])
        if ticket["ticket_id"] not in own and others:
            found[ticket["ticket_id"]] = sum(others) / len(others)
    return found


def _length_bucket(tokens: float) -> str:
    low = 2 ** max(0, math.floor(math.log2(max(tokens, 1.0))))
    return f"{low}-{2 * low - 1}"


def _fifth(reward: float, low: float, high: float) -> str:
    if high == low:
        return f"{low:g}"
    index = min(4, int(5 * (reward - low) / (high - low)))
    width = (high - low) / 5
    return f"{low + index * width:.3g} to {low + (index + 1) * width:.3g}"


def _shares(tickets: Sequence[Row], waited: Mapping[int, float], bucket: Mapping[int, str]) -> dict[str, Share]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for ticket in tickets:
        groups[bucket.get(ticket["ticket_id"], UNKNOWN)].append(ticket)
    shares = {}
    for name in sorted(groups, key=_numerically):
        dropped: dict[str, int] = defaultdict(int)
        for ticket in groups[name]:
            if ticket["state"] == "dropped":
                dropped[ticket["drop_reason"]] += 1
        trained = sum(t["state"] in ("trained", "committed") for t in groups[name])
        seconds = sum(waited.get(t["ticket_id"], 0.0) for t in groups[name])
        shares[name] = Share(trained, dict(dropped), seconds, sum(t["redraw"] for t in groups[name]))
    return shares


def _numerically(name: str) -> tuple[bool, float]:
    start = name.split("-")[0] if name[0].isdigit() else name
    try:
        return False, float(start.split(" ")[0])
    except ValueError:
        return True, 0.0
