"""The metrics say what the coordinator told, and no more."""

import gc
import tracemalloc
from collections.abc import Iterable

import pytest
from prometheus_client import CollectorRegistry

from actors.recorder import Recorder
from deploy.metrics.exporter import Exporter
from deploy.metrics.history import readings
from tests.metrics.snapshots import record, snapshot


def exported(*snapshots: dict[str, object]) -> dict[str, float]:
    """Every series, as `name{labels}`."""
    registry = CollectorRegistry()
    exporter = Exporter(registry, steps=100)
    for one in snapshots:
        exporter.update(one)
    return {f"{name}{{{labels}}}": value for name, labels, value in readings(registry)}


def records(steps: Iterable[int], **metrics: float) -> list[dict[str, object]]:
    recorder = Recorder(None, lambda: 500.0)
    for step in steps:
        record(recorder, step, **metrics)
    return recorder.after(-1)


def test_the_numbers_of_a_snapshot_are_those_of_the_run() -> None:
    found = exported(snapshot(3, records=records([1, 2, 3])))
    expected = {
        "distrl_step{}": 3,
        "distrl_steps_planned{}": 100,
        "distrl_rollouts_total{stage=grading}": 12,
        "distrl_truncated_rollouts_total{}": 3,
        "distrl_generated_tokens_total{}": 120,
        "distrl_trained_tokens_total{}": 3 * 40,
        "distrl_tickets{state=committed}": 6,
        "distrl_queue_depth{stage=generation}": 3,
        "distrl_queue_depth{stage=grading}": 0,
        "distrl_queue_depth{stage=learner}": 2,
        "distrl_busy_places{stage=generation}": 12,
        "distrl_places{stage=generation}": 32,
        "distrl_reward_mean{}": 0.5,
        "distrl_reward_standard_deviation{}": 0.25,
        "distrl_version_lag_steps{actor=generation-0}": 0,
        "distrl_version_lag_steps{actor=generation-1}": 2,
        "distrl_waiting_seconds_total{cause=generation,stage=learner}": 1.5,
        "distrl_waiting_seconds_total{cause=learner,stage=generation}": 4,
        "distrl_learner_seconds_total{activity=train}": 18,
        "distrl_learner_utilization_ratio{}": 6 / 8,
        "distrl_dropped_tickets_total{reason=grading_failed}": 1,
        "distrl_staleness_steps_count{}": 6,
        "distrl_staleness_steps_sum{}": 3,
        "distrl_weight_update_pause_seconds_count{}": 3,
        "distrl_weight_update_bytes_total{}": 1500,
        "distrl_weight_publish_seconds_count{}": 3,
        "distrl_weight_publish_seconds_sum{}": 1.5,
        "distrl_kl_reference_nats{}": 0.02,
        "distrl_logp_mismatch_mean_nats{}": 0.001,
        "distrl_logp_mismatch_max_nats{}": 0.01,
        "distrl_actor_logp_mismatch_nats{actor=generation-0}": 0.001,
        "distrl_retries_total{stage=generation}": 0,
        "distrl_retries_total{stage=grading}": 6,
        "distrl_restarts_total{stage=generation}": 1,
        "distrl_restarts_total{stage=learner}": 0,
        "distrl_effective_sample_size_ratio{}": 0.75,
        "distrl_objective{metric=at_bound_policy}": 0.125,
        "distrl_last_step_timestamp_seconds{}": 500,
    }
    assert {name: found.get(name) for name in expected} == pytest.approx(expected)
    assert found["distrl_weight_update_pause_seconds_sum{}"] == pytest.approx(0.06)


def test_what_was_not_measured_has_no_series() -> None:
    found = exported(snapshot(0))
    assert [
        name for name in found if "reward" in name or "kl_" in name or "timestamp" in name or "entropy" in name
    ] == []


def test_counters_go_on_when_the_coordinator_begins_anew() -> None:
    # 12 rollouts, then a new coordinator that has counted 4: 16 were sampled in all.
    found = exported(snapshot(3), snapshot(1))
    assert found["distrl_rollouts_total{stage=generation}"] == 16


def test_a_failed_call_is_counted_under_its_stage() -> None:
    recorder = Recorder(None, lambda: 500.0)
    recorder.failed_call("grading", "ticket 7 in grading: it broke")
    recorder.event("checkpoint", "step 4")
    recorder.event("checkpoint", "step 2 removed", removed=True)
    found = exported(snapshot(records=recorder.after(-1)))
    assert found["distrl_failed_calls_total{stage=grading}"] == 1
    assert found["distrl_checkpoints_total{}"] == 1


def test_a_process_that_is_replaced_leaves_no_series_behind() -> None:
    """Each successor has a name of its own: generation-0, generation-0.1, generation-0.2 and so on."""

    def with_actor(name: str) -> dict[str, object]:
        member = {"stage": "generation", "name": name, "capacity": 1, "busy": 0, "version": 1, "step": 1}
        measured = {f"logp_mismatch_mean.{name}": 0.25, "logp_mismatch_mean.generation-9": 0.5}
        return snapshot(2, members=[member], records=records([1], **measured))

    found = exported(*(with_actor(name) for name in ("generation-0", "generation-0.1", "generation-0.2")))
    by_actor = {name: value for name, value in found.items() if "{actor=" in name}
    # generation-9 is gone when its tokens are compared.
    assert by_actor == {
        "distrl_version_lag_steps{actor=generation-0.2}": 1,
        "distrl_actor_logp_mismatch_nats{actor=generation-0.2}": 0.25,
    }


def test_a_day_of_training_leaves_memory_and_the_number_of_series_as_they_are() -> None:
    """86,400 s of steps that take forty seconds each, over ever new prompts, actors that fail, and drops."""
    registry = CollectorRegistry()
    exporter = Exporter(registry, steps=8640)

    def train(steps: Iterable[int]) -> int:
        recorder = Recorder(None, lambda: 500.0)
        for step in steps:
            record(recorder, step)
            recorder.failed_call("grading", f"ticket {step} of prompt-{step} in grading: it broke")
            exporter.update(snapshot(step, records=recorder.after(-1), drops={"grading_failed": step}))
            recorder = Recorder(None, lambda: 500.0)
        return len(readings(registry))

    tracemalloc.start()
    series_early = train(range(1, 217))
    gc.collect()
    early, _ = tracemalloc.get_traced_memory()
    series_late = train(range(217, 2161))
    gc.collect()
    late, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert series_late == series_early < 200
    # One float per step, kept in a list, would be 32 bytes a step; other threads of the process make some noise.
    assert late - early < 1944 * 25
