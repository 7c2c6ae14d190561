"""Writes the Grafana dashboard, so that its panels stay a table that can be read.

python -m deploy.metrics.dashboard
"""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "grafana" / "distrl.json"

_RATE = "rate({}[$__rate_interval])"

# (row, [(panel, unit, [(query, legend)])]); units are Grafana's own names.
PANELS: tuple[tuple[str, tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...]], ...] = (
    (
        "Progress",
        (
            (
                "Steps",
                "short",
                (("distrl_step{$run}", "published"), ("distrl_steps_planned{$run}", "planned")),
            ),
            (
                "Reward",
                "short",
                (
                    ("distrl_reward_mean{$run}", "mean"),
                    ("distrl_reward_standard_deviation{$run}", "standard deviation over tickets"),
                ),
            ),
            ("Held-out accuracy", "percentunit", (("distrl_heldout_accuracy_ratio{$run}", "{{evaluation}}"),)),
            ("Rollouts per second", "short", ((_RATE.format("distrl_rollouts_total{$run}"), "{{stage}}"),)),
            (
                "Tokens per second",
                "short",
                (
                    (_RATE.format("distrl_generated_tokens_total{$run}"), "generated"),
                    (_RATE.format("distrl_trained_tokens_total{$run}"), "trained"),
                ),
            ),
            (
                "Truncated rollouts",
                "percentunit",
                (
                    (
                        _RATE.format("distrl_truncated_rollouts_total{$run}")
                        + " / ignoring(stage) "
                        + _RATE.format('distrl_rollouts_total{$run,stage="generation"}'),
                        "share",
                    ),
                ),
            ),
        ),
    ),
    (
        "Off-policy",
        (
            (
                "Staleness of trained tickets",
                "short",
                (
                    (f"histogram_quantile(0.5, {_RATE.format('distrl_staleness_steps_bucket{$run}')})", "median"),
                    (f"histogram_quantile(0.99, {_RATE.format('distrl_staleness_steps_bucket{$run}')})", "99 %"),
                ),
            ),
            ("Version lag", "short", (("distrl_version_lag_steps{$run}", "{{actor}}"),)),
            ("Effective sample size", "percentunit", (("distrl_effective_sample_size_ratio{$run}", "share"),)),
            (
                "Importance ratios",
                "short",
                (
                    ("distrl_importance_ratio{$run}", "percentile {{percentile}}"),
                    ("distrl_importance_ratio_mean{$run}", "mean"),
                    ("distrl_importance_ratio_max{$run}", "max"),
                ),
            ),
            (
                "KL",
                "short",
                (
                    ("distrl_kl_behavior_nats{$run}", "to the behavior policy"),
                    ("distrl_kl_reference_nats{$run}", "to the reference"),
                ),
            ),
            ("Entropy", "short", (("distrl_entropy_nats{$run}", "nats per token"),)),
            (
                "Mismatch of log-probabilities",
                "short",
                (
                    ("distrl_logp_mismatch_mean_nats{$run}", "mean, nats"),
                    ("distrl_logp_mismatch_max_nats{$run}", "max, nats"),
                    ("distrl_actor_logp_mismatch_nats{$run}", "{{actor}}, nats"),
                ),
            ),
            ("Gradient norm", "short", (("distrl_gradient_norm{$run}", "before clipping"),)),
            (
                "Loss and learning rate",
                "short",
                (("distrl_loss{$run}", "loss"), ("distrl_learning_rate{$run}", "learning rate")),
            ),
        ),
    ),
    (
        "Who waits for whom",
        (
            (
                "Learner's time",
                "percentunit",
                (
                    (_RATE.format("distrl_learner_seconds_total{$run}"), "{{activity}}"),
                    ("distrl_learner_utilization_ratio{$run}", "utilization of the last step"),
                ),
            ),
            (
                "Waiting",
                "percentunit",
                ((_RATE.format("distrl_waiting_seconds_total{$run}"), "{{stage}} for {{cause}}"),),
            ),
            ("Tickets in stages", "short", (("distrl_queue_depth{$run}", "{{stage}}"),)),
            (
                "Places taken",
                "percentunit",
                (("distrl_busy_places{$run} / distrl_places{$run}", "{{stage}}"),),
            ),
            (
                "Weight update",
                "s",
                (
                    (
                        f"histogram_quantile(0.99, {_RATE.format('distrl_weight_publish_seconds_bucket{$run}')})",
                        "publish, 99 %",
                    ),
                    (
                        f"histogram_quantile(0.99, {_RATE.format('distrl_weight_update_pause_seconds_bucket{$run}')})",
                        "pause, 99 %",
                    ),
                    (
                        f"histogram_quantile(0.99, {_RATE.format('distrl_weight_update_fetch_seconds_bucket{$run}')})",
                        "fetch, 99 %",
                    ),
                ),
            ),
        ),
    ),
    (
        "Accounting",
        (
            ("Tickets by state", "short", (("distrl_tickets{$run}", "{{state}}"),)),
            ("Checkpoints", "short", (("distrl_checkpoints_total{$run}", "committed"),)),
            ("Restarted processes", "short", (("increase(distrl_restarts_total{$run}[1h])", "{{stage}}"),)),
            ("Retries", "short", (("increase(distrl_retries_total{$run}[1h])", "{{stage}}"),)),
        ),
    ),
)

OCCASIONAL = (
    ("Dropped tickets", "short", (("increase(distrl_dropped_tickets_total{$run}[1h])", "{{reason}}"),)),
    ("Failed calls", "short", (("increase(distrl_failed_calls_total{$run}[1h])", "{{stage}}"),)),
)
"""Panels of the last row whose series appear with the first failure."""


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it; the data source and the run are chosen on the page."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, members in PANELS:
        panels.append({"type": "row", "title": row, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        chosen = members + (OCCASIONAL if row == PANELS[-1][0] else ())
        for i, (title, unit, targets) in enumerate(chosen):
            panels.append(_panel(title, unit, targets, {"x": i % 3 * 8, "y": y + 1 + i // 3 * 8, "w": 8, "h": 8}))
        y += 1 + (len(chosen) + 2) // 3 * 8
    for number, panel in enumerate(panels, 1):
        panel["id"] = number
    run = {"name": "run", "label": "Run", "type": "query", "datasource": _SOURCE, "refresh": 2, "sort": 1}
    source = {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"}
    return {
        "title": "distrl",
        "uid": "distrl",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [source, {**run, "query": "label_values(distrl_step, run)", "definition": ""}]},
        "panels": panels,
    }


_SOURCE = {"type": "prometheus", "uid": "${source}"}


def _panel(title: str, unit: str, targets: tuple[tuple[str, str], ...], place: dict[str, int]) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": title,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": _SOURCE,
                "expr": query.replace("$run", 'run="$run"'),
                "legendFormat": legend,
            }
            for i, (query, legend) in enumerate(targets)
        ],
    }


def render() -> str:
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(render())
