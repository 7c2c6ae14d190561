"""Fills the metrics from what the coordinator tells the driver."""

import contextlib
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from deploy.metrics.families import (
    LEARNER_METRICS,
    MISMATCH_BY_ACTOR,
    MISMATCH_MAX_BY_ACTOR,
    PERCENTILES,
    Families,
)

Snapshot = Mapping[str, Any]
Record = Mapping[str, Any]


class Exporter:
    """Keeps the metrics up to date; what it holds does not grow with the run.

    Args:
        steps: of the run.
    """

    def __init__(self, registry: CollectorRegistry, steps: int) -> None:
        self._families = Families(registry)
        self._families.steps_planned.set(steps)
        self._totals: dict[tuple[str, ...], float] = {}
        self._actors: set[str] = set()

    def update(self, snapshot: Snapshot) -> None:
        """Takes a snapshot with the records since the one before.

        Raises:
            KeyError: the snapshot lacks something; a value that is not known is left out, never made up.
        """
        families = self._families
        families.step.set(snapshot["step"])
        for state, count in snapshot["tickets"].items():
            families.tickets.labels(state).set(count)
        self._stages(snapshot)
        for reason, count in snapshot["drops"].items():
            self._raise("drops", families.drops, count, reason)
        for cause, seconds in snapshot["learner_waits_s"].items():
            self._raise("waits", families.waiting, seconds, "learner", cause)
        self._raise("held", families.waiting, snapshot["generation_held_s"], "generation", "learner")
        self._raise("truncated", families.truncated, snapshot["truncated"])
        self._raise("tokens", families.generated_tokens, snapshot["generated_tokens"])
        for stage, count in snapshot["retries"].items():
            self._raise("retries", families.retries, count, stage)
        for stage, count in snapshot["restarts"].items():
            self._raise("restarts", families.restarts, count, stage)
        self._actors_of(snapshot)
        for record in snapshot["records"]:
            self._take(record)

    def _actors_of(self, snapshot: Snapshot) -> None:
        """A process that takes the place of another has a name of its own: series of those that are gone go, too."""
        families = self._families
        there = {m["name"]: m["step"] for m in snapshot["members"] if m["stage"] == "generation"}
        for name in self._actors - there.keys():
            for gauge in (families.version_lag, families.actor_mismatch):
                _forget(gauge, name)
        self._actors = set(there)
        for name, step in there.items():
            families.version_lag.labels(name).set(snapshot["step"] - step)

    def _stages(self, snapshot: Snapshot) -> None:
        families = self._families
        for stage, rollouts in snapshot["rollouts"].items():
            self._raise("rollouts", families.rollouts, rollouts, stage)
        # A stage without tickets is not in the snapshot, and its depth is 0, not what it last was.
        depths = {"generation": 0, "grading": 0, "journal": 0, "ready": 0, **snapshot["stages"]}
        for stage, depth in {**depths, "learner": snapshot["granted"]}.items():
            families.queue.labels(stage).set(depth)
        places: dict[str, int] = {}
        for member in snapshot["members"]:
            places[member["stage"]] = places.get(member["stage"], 0) + member["capacity"]
        for stage, busy in snapshot["busy"].items():
            families.busy.labels(stage).set(busy)
            families.places.labels(stage).set(places.get(stage, 0))

    def _take(self, record: Record) -> None:
        match record["kind"]:
            case "step":
                self._take_step(record)
            case "load":
                self._take_load(record)
            case "published":
                self._families.publish.observe(record["publish_s"])
            case "evaluation":
                self._families.accuracy.labels(record["name"]).set(record["accuracy"])
            case "failed_call":
                self._families.failed_calls.labels(record["stage"]).inc()
            case "checkpoint":
                self._take_checkpoint(record)

    def _take_step(self, record: Record) -> None:
        families = self._families
        families.last_step.set(record["time_s"])
        families.reward.set(record["reward_mean"])
        families.reward_deviation.set(record["reward_standard_deviation"])
        families.trained_tokens.inc(record["response_tokens"])
        for age, count in record["staleness_counts"].items():
            for _ in range(count):
                families.staleness.observe(float(age))
        spent = {"train": record["train_s"], "wait": record["wait_s"], "publish": record["last_publish_s"]}
        for activity, seconds in spent.items():
            families.learner_seconds.labels(activity).inc(seconds)
        families.utilization.set(record["train_s"] / max(sum(spent.values()), 1e-9))
        for name, value in record["metrics"].items():
            self._learner_metric(name, float("nan") if value is None else value)

    def _learner_metric(self, name: str, value: float) -> None:
        if name in LEARNER_METRICS:
            self._families.learner[name].set(value)
        elif name in PERCENTILES:
            self._families.ratio_percentiles.labels(PERCENTILES[name]).set(value)
        elif name.startswith(MISMATCH_BY_ACTOR):
            # Its tokens may come to the learner after it has gone.
            if (actor := name.removeprefix(MISMATCH_BY_ACTOR)) in self._actors:
                self._families.actor_mismatch.labels(actor).set(value)
        elif name.startswith(MISMATCH_MAX_BY_ACTOR):
            return  # the largest of all actors is exported, and metrics.jsonl has each
        else:
            self._families.objective.labels(name).set(value)

    def _take_load(self, record: Record) -> None:
        self._families.pause.observe(record["pause_s"])
        self._families.fetch.observe(record["fetch_s"])
        self._families.weight_bytes.inc(record["moved_bytes"])

    def _take_checkpoint(self, record: Record) -> None:
        if not record.get("removed"):
            self._families.checkpoints.inc()
            self._families.last_checkpoint.set(record["time_s"])

    def _raise(self, name: str, counter: Counter, total: float, *labels: str) -> None:
        """Raises a counter to a total that the coordinator keeps; a total that fell began anew in a new process."""
        key = (name, *labels)
        before = self._totals.get(key, 0)
        series = counter.labels(*labels) if labels else counter
        series.inc(total - before if total >= before else total)
        self._totals[key] = total


def _forget(gauge: Gauge, *labels: str) -> None:
    """Removes a series, if it is there."""
    with contextlib.suppress(KeyError):
        gauge.remove(*labels)
