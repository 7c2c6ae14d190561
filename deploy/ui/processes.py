"""The page of the processes: a map of who runs where and how they do, and what the ledger says of the tickets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploy.live import STALE_S
from deploy.process_table import read_processes
from deploy.report.tables import Rows
from deploy.report.text import DASH, duration, number
from deploy.run_dir import RunDir
from deploy.run_state import RunState
from distrl.ledger_reader import LedgerReader

Health = Literal["healthy", "warning", "bad", "plain"]
IDLE_S = 60.0
"""Seconds without any progress from which on a run that goes on is worth a warning."""
_ORDER = ("driver", "coordinator", "learner", "policy-store", "journal")
"""Whose cards come first; the pools follow by name."""
_STATES: Mapping[str, tuple[Health, str]] = {
    "starting": ("warning", "is starting"),
    "waiting": ("bad", "has ended, is replaced"),
    "draining": ("plain", "drains, then ends"),
}


@dataclass(frozen=True, slots=True)
class Card:
    """One process."""

    name: str
    health: Health
    does: str
    facts: str


@dataclass(frozen=True, slots=True)
class Node:
    """The processes of one machine, or of one pod."""

    title: str
    cards: tuple[Card, ...]


def health_of(state: RunState, live: Mapping[str, Any] | None, now_s: float) -> tuple[Health, str]:
    """How the run as a whole does, in a sentence."""
    if state == RunState.DIED:
        return "bad", "The driver's process is gone without a word; distrl resume goes on from the last checkpoint."
    if live is None or state not in (RunState.RUNNING, RunState.CREATED):
        return "plain", f"The run is {state}: no process of it is there."
    silent = now_s - live["time_s"]
    if silent > STALE_S:
        return "bad", f"The driver has not heard from the coordinator for {duration(silent)}; see distrl doctor --run."
    idle = now_s - live["progress_s"]
    if idle > IDLE_S:
        return "warning", f"Nothing has moved for {duration(idle)}; distrl doctor --run says who waits for whom."
    return "healthy", f"Something moved {duration(max(0.0, idle))} ago."


def process_map(run_dir: RunDir, live: Mapping[str, Any], now_s: float) -> tuple[Node, ...]:
    """Every process of a run that goes on, by the node it is on."""
    rows = read_processes(run_dir)
    members = {m["name"]: m for m in live["members"] or ()}
    # The driver does not say its node; coordinator and journal are beside it.
    beside = next((r["node"] for r in rows if r["stage"] == "coordinator" and "node" in r), "")
    by_node: dict[tuple[str, str], list[Card]] = {}
    for row in sorted(rows, key=_place):
        card = _card(row, members.get(row["name"]), live, now_s)
        node = row.get("node", beside if row["stage"] == "driver" else "")
        by_node.setdefault((node, row.get("host", "")), []).append(card)
    several = len({node for node, _ in by_node if node}) > 1
    return tuple(Node(_title(node, host, several=several), tuple(cards)) for (node, host), cards in by_node.items())


def _place(row: Mapping[str, Any]) -> tuple[int, str, str]:
    stage = row["stage"]
    return (_ORDER.index(stage) if stage in _ORDER else len(_ORDER)), stage, row["name"]


def _title(node: str, host: str, *, several: bool) -> str:
    if not host:
        return "no machine yet"
    return f"{host}, Ray node {node[:8]}" if several else host


def _card(row: Mapping[str, Any], member: Mapping[str, Any] | None, live: Mapping[str, Any], now_s: float) -> Card:
    health, does = _STATES.get(row["state"], ("healthy", _does(row["stage"], member, live)))
    if row["stage"] in ("driver", "coordinator") and now_s - live["time_s"] > STALE_S:
        health, does = "bad", f"silent for {duration(now_s - live['time_s'])}"
    facts = [f"process {row['pid']}"] if "pid" in row else []
    if member is not None and member["stage"] == "generation":
        facts.append(f"version {number(member['version'])}, {number(live['step'] - member['step'])} steps behind")
    if row.get("restarts"):
        facts.append("replaced once" if row["restarts"] == 1 else f"replaced {number(row['restarts'])} times")
        health = "warning" if health == "healthy" else health
    return Card(row["name"], health, does, "; ".join(facts))


def _does(stage: str, member: Mapping[str, Any] | None, live: Mapping[str, Any]) -> str:
    if stage == "learner":
        granted = f"works on {number(live['granted'])} tickets"
        return "waits for a batch" if live["learner_waiting"] else granted if live["granted"] else "has no batch"
    if stage in ("driver", "coordinator"):
        return f"answers, step {number(live['step'])}"
    if member is None:
        return "is up"
    if member["busy"]:
        return f"{number(member['busy'])} of {number(member['capacity'])} places taken"
    return "held back: the learner must catch up" if live["generation_held"] and stage == "generation" else "idle"


def stage_rows(live: Mapping[str, Any]) -> Rows:
    stages = live["stages"] or {}
    return Rows(("Stage", "Tickets"), tuple((name, number(count)) for name, count in stages.items()))


def ledger_rows(run_dir: RunDir) -> Rows | None:
    """What the ledger says of the run, whether it goes on or is over; None before there is one.

    Raises:
        LedgerError: it cannot be read.
    """
    if not run_dir.ledger.is_file():
        return None
    with LedgerReader(run_dir.ledger) as ledger:
        counts, drops, checkpoints = ledger.counts(), ledger.drops(), ledger.checkpoints()
        rows = [("Tickets ever issued", number(sum(counts.values())))]
        rows += [(f"… {state}", number(count)) for state, count in counts.items()]
        rows += [(f"… dropped: {reason}", number(count)) for reason, count in sorted(drops.items())]
        rows += [
            ("Last trained step", number(ledger.trained_step())),
            ("Oldest data trained, steps", number(ledger.max_staleness())),
            ("Policy versions", number(len(ledger.versions()))),
            ("Newest published version", number(ledger.last_published())),
            ("Last checkpoint", _checkpoint(checkpoints)),
            ("Owners so far", number(ledger.epoch())),
        ]
    return Rows(("Ledger", "Value"), tuple(rows))


def _checkpoint(checkpoints: Sequence[Any]) -> str:
    return f"{Path(checkpoints[-1].path).name}, version {number(checkpoints[-1].version)}" if checkpoints else DASH
