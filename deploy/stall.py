"""Says who is waiting for whom when nothing happens any more."""

import time
from collections.abc import Mapping
from typing import Any

from distrl.messages import Whereabouts


class StallWatch:
    """Compares snapshots of the coordinator.

    Args:
        warning_s: seconds without progress after which, and again after each further such span, there is a warning.
    """

    def __init__(self, warning_s: float) -> None:
        self._warning_s = warning_s
        self._last: object = None
        self._since_s: float | None = None
        self._next_s = 0.0

    def look(
        self, snapshot: Mapping[str, Any], now_s: float, processes: Mapping[str, Whereabouts | None] | None = None
    ) -> str | None:
        """A warning that names stage, process and since when, or None.

        Progress is any rollout that finished a stage, and any step.

        Args:
            processes: where the processes of the run are, by name.
        """
        state = (snapshot["step"], snapshot["rollouts"], snapshot["tickets"])
        if state != self._last or self._since_s is None:
            self._last, self._since_s, self._next_s = state, now_s, now_s + self._warning_s
            return None
        if now_s < self._next_s:
            return None
        self._next_s = now_s + self._warning_s
        return f"no progress for {now_s - self._since_s:.0f} s: {where(snapshot, processes or {})}"


def where(snapshot: Mapping[str, Any], processes: Mapping[str, Whereabouts | None] | None = None) -> str:
    """Who is waited for, in words: the ticket that waits longest, else the evaluation, weights, or the learner.

    Args:
        snapshot: of the coordinator, or what `live.json` keeps of it.
    """
    known = processes or {}
    oldest = snapshot["oldest"]
    if oldest is not None:
        ticket = f"ticket {oldest['ticket']}"
        if oldest.get("calls"):
            return f"{ticket} {_in_stages(oldest['calls'], known)}"
        return f"{ticket} is in {oldest['stage']} for {oldest['since_s']:.0f} s"
    learner = snapshot.get("learner") or {}
    if snapshot["granted"] or not snapshot["learner_waiting"]:
        return _learner(learner, snapshot)
    if (publishing := snapshot.get("publishing")) is not None:
        return f"{_learner_name(learner)} publishes policy version {publishing['version']}{_since(publishing)}"
    if (evaluating := snapshot.get("evaluating")) is not None and evaluating["calls"]:
        problem = f"the evaluation {evaluating['name']!r} waits: its problem {evaluating['problem']}"
        return f"{problem} {_in_stages(evaluating['calls'], known)}"
    if loading := [m for m in snapshot.get("members") or () if m.get("loading")]:
        member = min(loading, key=lambda m: m["loading"][1])
        version, since_s = member["loading"]
        name = _process(member["name"], known)
        return f"{name} loads policy version {version} for {time.time() - since_s:.0f} s"
    there = {member["stage"] for member in snapshot.get("members") or ()}
    if empty := [stage for stage in snapshot.get("busy") or () if stage not in there]:
        return f"the learner waits, and no process of {', '.join(empty)} is there"
    return f"the learner waits, and no ticket is under way{_since(learner)}"


def _in_stages(calls: list[Mapping[str, Any]], processes: Mapping[str, Whereabouts | None]) -> str:
    """What has a ticket; grading and reference scoring may have it at the same time."""
    parts = []
    for call in calls:
        since = f"for {call['since_s']:.0f} s"
        if call["process"]:
            parts.append(f"is in {call['stage']} at {_process(call['process'], processes)} {since}")
        else:
            parts.append(f"waits for a place in {call['stage']} {since}")
    return " and ".join(parts)


def _process(name: str, processes: Mapping[str, Whereabouts | None]) -> str:
    found = processes.get(name)
    return name if found is None else f"{name} (process {found.pid} on {found.host})"


def _learner(learner: Mapping[str, Any], snapshot: Mapping[str, Any]) -> str:
    name = _learner_name(learner)
    if "does" in learner:
        return f"{name} {learner['does']}{_since(learner)}"
    if snapshot["granted"]:
        return f"{name} works on {snapshot['granted']} tickets"
    return f"{name} has not asked for a batch yet"


def _learner_name(learner: Mapping[str, Any]) -> str:
    found = learner.get("where")
    return "the learner" if found is None else f"the learner (process {found.pid} on {found.host})"


def _since(activity: Mapping[str, Any]) -> str:
    return "" if activity.get("since_s") is None else f", for {activity['since_s']:.0f} s"
