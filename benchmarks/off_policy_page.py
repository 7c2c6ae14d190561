"""Writes docs/studies/off_policy.md, its plots and its numbers from the arms of benchmarks.off_policy."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.off_policy import ARCHITECTURE, OBJECTIVES, RECORDED_BATCHES, REGIMES, SETTINGS

FOLDER = Path(__file__).parents[1] / "docs/studies"
NUMBERS = FOLDER / "off_policy.json"
PAGE = FOLDER / "off_policy.md"
PICTURES = {"accuracy": FOLDER / "off_policy-accuracy.svg", "entropy": FOLDER / "off_policy-entropy.svg"}

Result = dict[str, Any]

TITLES = {
    "lag-0": "0 steps old",
    "lag-4": "4 steps old",
    "lag-16": "16 steps old",
    "offline": "recorded journal only",
}
COLORS = {"topr": "#0072b2", "tis": "#009e73", "tis-paper": "#e69f00", "grpo": "#56b4e9", "reinforce": "#d55e00"}
LABELS = {
    "topr": "TOPR",
    "tis": "TIS, token, C = 2",
    "tis-paper": "TIS, response, C = 1",
    "grpo": "GRPO",
    "reinforce": "REINFORCE",
}


def write(results: Sequence[Result] | None) -> None:
    """Writes the page; without results from the numbers that are stored beside it."""
    if results is None:
        results = json.loads(NUMBERS.read_text())
    else:
        FOLDER.mkdir(parents=True, exist_ok=True)
        results = [_clean(result) for result in results]
        NUMBERS.write_text("[\n" + ",\n".join(json.dumps(result) for result in results) + "\n]\n")
    PAGE.write_text(render(results))
    draw(results)


def _clean(result: Result) -> Result:
    """JSON has no NaN, which stands where nothing was trained yet."""
    points = [
        {name: None if math.isnan(value) else round(value, 5) for name, value in point.items()}
        for point in result["points"]
    ]
    return {**result, "points": points}


def of(results: Sequence[Result], objective: str, regime: str) -> list[Result]:
    """The arms of an objective in a regime, by seed."""
    found = [r for r in results if (r["objective"], r["regime"]) == (objective, regime)]
    return sorted(found, key=lambda r: r["seed"])


def verdict(found: Sequence[Result]) -> str:
    """Stable: every seed ends at or above its start. Collapse: every seed ends below half of it."""
    pairs = [(r["points"][0]["accuracy"], r["points"][-1]["accuracy"]) for r in found]
    collapsed = sum(after < before / 2 for before, after in pairs)
    if all(after >= before for before, after in pairs):
        return "stable"
    return "collapse" if collapsed == len(pairs) else f"neither ({collapsed} of {len(pairs)} collapsed)"


def render(results: Sequence[Result]) -> str:
    """The page."""
    seeds = sorted({r["seed"] for r in results})
    train, rollout = SETTINGS["train"], SETTINGS["rollout"]
    lines = [
        "# Which objectives survive stale data?",
        "",
        "Written by `make study-off-policy` (`benchmarks/off_policy.py`), together with its numbers "
        "([off_policy.json](off_policy.json)) and plots; do not edit.",
        "",
        "Tapered off-policy learning is what lets distrl generate and learn at the same time. Here the same model is "
        "trained with five objectives on data whose age is forced, by the engine, the objectives and the learner of "
        "a run, in one process and step by step: batch k is trained exactly s optimizer steps after it was sampled. "
        "The last regime has no sampling at all: a journal that the start model filled, and nothing else.",
        "",
        f"- **Model and task**: a Qwen3 with {ARCHITECTURE.layers} layers of width {ARCHITECTURE.hidden_size}, warmed "
        "up by supervised steps until it sorts six digits about one time in three.",
        f"- **Reward**: 1 for the right answer, -1 for any other, so that wrong answers are pushed down; "
        f"{train['steps']} steps of {train['tickets_per_step']} prompts x {rollout['group_size']} responses, AdamW at "
        f"{train['learning_rate']:g}; no KL term anywhere.",
        f"- **Offline**: {RECORDED_BATCHES} recorded batches, gone through "
        f"{train['steps'] / RECORDED_BATCHES:g} times.",
        "- **Objectives**: "
        + "; ".join(
            f"{LABELS[name]}: recipe `{recipe}` with {', '.join(f'{k} {v}' for k, v in options.items()) or 'defaults'}"
            for name, (recipe, options) in OBJECTIVES.items()
        )
        + ".",
        f"- **Accuracy**: {SETTINGS['evaluation']['problems']} held-out problems, one response each at temperature 1; "
        f"seeds {', '.join(map(str, seeds))} decide prompts and sampling noise, the start model is the same.",
        "",
        "**Stable**: the final held-out accuracy of every seed is at least that of its start. **Collapse**: that of "
        "every seed is below half of it.",
        "",
        *_short(seeds),
        "## Result",
        "",
        "Held-out accuracy at the end, per seed; the start is "
        + ", ".join(f"{_start(results, seed):.3f}" for seed in seeds)
        + ".",
        "",
        "| objective | " + " | ".join(TITLES[regime] for regime in REGIMES) + " |",
        "|---|" + "---|" * len(REGIMES),
    ]
    for objective in OBJECTIVES:
        cells = []
        for regime in REGIMES:
            found = of(results, objective, regime)
            after = ", ".join(f"{r['points'][-1]['accuracy']:.3f}" for r in found)
            cells.append(f"{after}: {verdict(found)}")
        lines.append(f"| {LABELS[objective]} | " + " | ".join(cells) + " |")
    lines += ["", "![Held-out accuracy over steps](off_policy-accuracy.svg)", ""]
    lines += ["![Entropy over steps](off_policy-entropy.svg)", ""]
    lines += ["## What is seen", "", *findings(results), ""]
    lines += ["## Measured staleness", "", *staleness(results), ""]
    lines += [
        "## Again",
        "",
        "    make study-off-policy",
        "",
        f"An arm takes {statistics.median(r['wall_s'] for r in results):.0f} s in the median on one core of a machine "
        "that does other work too; arms that are done are not done again. Two calls with the same arguments end with "
        "the same bits of weights on one machine (`tests/test_lagged.py`).",
        "",
    ]
    return "\n".join(lines)


def _short(seeds: Sequence[int]) -> list[str]:
    """What is missing of the planned three seeds."""
    return [] if len(seeds) >= 3 else [f"**Only {len(seeds)} seeds so far**; three are planned.", ""]


def _start(results: Sequence[Result], seed: int) -> float:
    return float(next(r for r in results if r["seed"] == seed)["points"][0]["accuracy"])


def findings(results: Sequence[Result]) -> list[str]:
    """One sentence per objective, from the verdicts, and one on what a taper's promise is worth here."""
    lines = []
    for objective in OBJECTIVES:
        by_verdict: dict[str, list[str]] = {}
        for regime in REGIMES:
            by_verdict.setdefault(verdict(of(results, objective, regime)), []).append(TITLES[regime])
        parts = [f"{word} with data {', '.join(regimes)}" for word, regimes in by_verdict.items()]
        lines.append(f"- **{LABELS[objective]}**: {'; '.join(parts)}.")
    means = {o: _mean(of(results, o, "lag-16")) for o in OBJECTIVES}
    best = max(means, key=lambda o: means[o])
    lines.append(
        f"- At 16 steps the highest mean accuracy is {LABELS[best]}'s, {means[best]:.3f}; on fresh data the means are "
        + ", ".join(f"{LABELS[o]} {_mean(of(results, o, 'lag-0')):.3f}" for o in OBJECTIVES)
        + "."
    )
    stale = [regime for regime in REGIMES if regime != "lag-0"]
    ranks = {TITLES[r]: sorted(OBJECTIVES, key=lambda o: -_mean(of(results, o, r)))[:2] for r in stale}
    lines.append(
        "- Highest mean accuracies on stale data: "
        + "; ".join(f"{title}: {LABELS[first]}, then {LABELS[second]}" for title, (first, second) in ranks.items())
        + "."
    )
    lines.append(
        "- A reading, not a measurement: TIS on whole responses and TOPR treat wrong answers alike, min(ratio, 1), and "
        "differ in the right ones, which TOPR keeps at weight 1. Where the former collapses, right answers that have "
        "become unlikely have lost their weight, and what is left pushes down. That TOPR ends above GRPO, whose clip "
        "and standardized credit bound its updates too, shows only where TOPR is named first above."
    )
    return lines


def _mean(found: Sequence[Result]) -> float:
    return statistics.mean(r["points"][-1]["accuracy"] for r in found)


def staleness(results: Sequence[Result]) -> list[str]:
    """What the versions in the rollouts say, by regime."""
    lines = ["Optimizer steps between the weights that sampled a batch and those that it changed, read from the"]
    lines += ["versions that its tokens carry.", "", "| regime | first batch | last batch | largest | mean |"]
    lines += ["|---|---|---|---|---|"]
    for regime in REGIMES:
        ages = [r["staleness"] for r in results if r["regime"] == regime]
        assert all(age == ages[0] for age in ages), f"{regime}: arms differ in their staleness"
        age = ages[0]
        lines.append(f"| {TITLES[regime]} | {age['first']} | {age['last']} | {age['largest']} | {age['mean']:.1f} |")
    lines += ["", "The first s batches find no older weights than those of the start."]
    return lines


def draw(results: Sequence[Result]) -> None:
    """The plots: one panel per regime, thin lines for seeds and a thick one for their mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"svg.hashsalt": "distrl", "svg.fonttype": "none", "font.size": 9}
    import matplotlib.pyplot as plt

    for name, path in PICTURES.items():
        figure, panels = plt.subplots(1, len(REGIMES), figsize=(11, 3.2), sharey=True)
        for panel, regime in zip(panels, REGIMES, strict=True):
            for objective in OBJECTIVES:
                curves = [_curve(r, name) for r in of(results, objective, regime)]
                for steps, values in curves:
                    panel.plot(steps, values, color=COLORS[objective], linewidth=0.6, alpha=0.5)
                mean = [statistics.mean(column) for column in zip(*(values for _, values in curves), strict=True)]
                panel.plot(curves[0][0], mean, color=COLORS[objective], linewidth=2, label=LABELS[objective])
            panel.set_title(TITLES[regime])
            panel.set_xlabel("optimizer step")
            panel.grid(color="#e4e4e4")
        panels[0].set_ylabel("held-out accuracy" if name == "accuracy" else "entropy per token, nats")
        panels[0].set_ylim(bottom=0)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=len(OBJECTIVES), frameon=False)
        figure.tight_layout(rect=(0, 0.09, 1, 1))
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def _curve(result: Result, name: str) -> tuple[list[float], list[float]]:
    points = [point for point in result["points"] if point[name] is not None]
    return [p["step"] for p in points], [p[name] for p in points]
