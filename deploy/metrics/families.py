"""The Prometheus metrics of a run.

Names follow https://prometheus.io/docs/practices/naming/: base units in the name, counters end in `_total`. Labels are
stages, actors, states and reasons: things of which a run has a fixed number, never prompts, tickets or versions, so
that the number of series does not grow while it runs.
"""

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# The time at which a series began says nothing here and would double what Prometheus stores.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

LEARNER_METRICS = {
    "loss": ("loss", "Loss of the objective in the last step"),
    "ess": ("effective_sample_size_ratio", "Effective sample size of the sequence ratios, as a share of the batch"),
    "ratio_mean": ("importance_ratio_mean", "Mean token ratio policy / behavior of the last step"),
    "ratio_max": ("importance_ratio_max", "Largest token ratio policy / behavior of the last step"),
    "kl_behavior": ("kl_behavior_nats", "Mean log(behavior / policy) per token of the last step"),
    "kl_reference": ("kl_reference_nats", "Mean log(policy / reference) per token of the last step"),
    "entropy": ("entropy_nats", "Mean entropy of the policy per response token in the last step"),
    "logp_mismatch_mean": ("logp_mismatch_mean_nats", "Mean |recorded - recomputed log-probability| of checked tokens"),
    "logp_mismatch_max": ("logp_mismatch_max_nats", "Largest |recorded - recomputed log-probability|, last check"),
    "grad_norm": ("gradient_norm", "Norm of the gradient before clipping, last step"),
    "learning_rate": ("learning_rate", "Learning rate of the last step"),
}
"""Of the learner's metrics those with a metric of their own: their name there, and here with its help text."""

PERCENTILES = {"ratio_p01": "1", "ratio_p50": "50", "ratio_p99": "99"}
"""The learner's names of percentiles of the importance ratios; Prometheus keeps the label `quantile` for itself."""

MISMATCH_BY_ACTOR = "logp_mismatch_mean."
"""Begins the learner's name of the mean mismatch of one actor; the actor's name follows."""
MISMATCH_MAX_BY_ACTOR = "logp_mismatch_max."

AGES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32)
PAUSES_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60)


class LateGauge:
    """A gauge that exists once it has a value: the library's own would show a 0 that nobody measured."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self._arguments = (name, text)
        self._registry = registry
        self._gauge: Gauge | None = None

    def set(self, value: float) -> None:
        if self._gauge is None:
            self._gauge = Gauge(*self._arguments, registry=self._registry)
        self._gauge.set(value)


class Families:
    """One object per metric; a label's value appears when it is first seen."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def single(name: str, text: str) -> LateGauge:
            return LateGauge(f"distrl_{name}", text, registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"distrl_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"distrl_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"distrl_{name}", text, buckets=buckets, registry=registry)

        self.step = single("step", "Optimizer steps whose weights are published")
        self.steps_planned = single("steps_planned", "Optimizer steps of the run")
        self.last_step = single("last_step_timestamp_seconds", "When the last optimizer step was recorded")
        self.rollouts = counter("rollouts", "Rollouts that a stage has finished, evaluations included", "stage")
        self.truncated = counter("truncated_rollouts", "Rollouts cut at rollout.max_new_tokens")
        self.generated_tokens = counter("generated_tokens", "Response tokens sampled, evaluations included")
        self.trained_tokens = counter("trained_tokens", "Response tokens of trained rollouts")
        self.tickets = gauge("tickets", "Tickets of the ledger by state", "state")
        self.queue = gauge("queue_depth", "Tickets that are in a stage or wait for it", "stage")
        self.busy = gauge("busy_places", "Places of a stage that are taken", "stage")
        self.places = gauge("places", "Places of a stage: calls at a time, in generation responses", "stage")
        self.reward = single("reward_mean", "Mean reward of the last step's rollouts")
        self.reward_deviation = single("reward_standard_deviation", "Of the last step's mean rewards per ticket")
        self.accuracy = gauge(
            "heldout_accuracy_ratio", "Share of held-out problems solved, by evaluation", "evaluation"
        )
        self.staleness = histogram("staleness_steps", "Optimizer steps behind, of trained tickets", AGES)
        self.version_lag = gauge("version_lag_steps", "Optimizer steps that an actor's weights are behind", "actor")
        self.pause = histogram("weight_update_pause_seconds", "In which an actor sampled nothing to load", PAUSES_S)
        self.fetch = histogram("weight_update_fetch_seconds", "To fetch and verify weights while sampling", PAUSES_S)
        self.publish = histogram("weight_publish_seconds", "From the end of a step to its publication", PAUSES_S)
        self.weight_bytes = counter("weight_update_bytes", "Bytes of weights that actors fetched")
        self.waiting = counter(
            "waiting_seconds", "Time a stage had nothing to do, by what it waited for", "stage", "cause"
        )
        self.learner_seconds = counter("learner_seconds", "Time of the learner by activity", "activity")
        self.utilization = single("learner_utilization_ratio", "Share of the last step's time that was training")
        self.failed_calls = counter("failed_calls", "Calls that failed, whether they were made again or not", "stage")
        self.retries = counter("retries", "Calls of tickets that were made again after a failure", "stage")
        self.restarts = counter("restarts", "Processes of the run that were replaced", "stage")
        self.actor_mismatch = gauge(
            "actor_logp_mismatch_nats", "Mean |recorded - recomputed log-probability| of an actor's tokens", "actor"
        )
        self.drops = counter("dropped_tickets", "Tickets dropped, by reason", "reason")
        self.checkpoints = counter("checkpoints", "Checkpoints committed by this process")
        self.last_checkpoint = single("last_checkpoint_timestamp_seconds", "When a checkpoint was last committed")
        self.ratio_percentiles = gauge(
            "importance_ratio", "Percentiles of the token ratios of the last step", "percentile"
        )
        self.learner = {name: single(*there) for name, there in LEARNER_METRICS.items()}
        self.objective = gauge("objective", "Further metrics of the objective in the last step", "metric")
