"""Writes docs/studies/a_star_po.md, its plot and its numbers from the phases of benchmarks.a_star_po."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs/studies"
NUMBERS = FOLDER / "a_star_po.json"
PAGE = FOLDER / "a_star_po.md"
PICTURE = FOLDER / "a_star_po.svg"

Line = dict[str, Any]

LABELS = {"stage 1": "A*-PO, stage 1", "a_star_po": "A*-PO, stage 2", "grpo": "GRPO"}
COLORS = {"stage 1": "#56b4e9", "a_star_po": "#0072b2", "grpo": "#d55e00"}
IDLE = 0.05
"""Share of the machine's processors below which others do not matter."""


def write(lines: Sequence[Line] | None, found: Mapping[str, Any] | None = None) -> None:
    """Writes the page; without results from the numbers that are stored beside it.

    Args:
        lines: of all phases and seeds.
        found: what `benchmarks.a_star_po.compare` says of them.
    """
    if lines is None or found is None:
        stored = json.loads(NUMBERS.read_text())
        lines, found = stored["phases"], stored["compared"]
    else:
        phases = ",\n".join(json.dumps(line) for line in lines)
        NUMBERS.write_text(f'{{"compared": {json.dumps(found)},\n"phases": [\n{phases}\n]}}\n')
    assert lines is not None
    assert found is not None
    PAGE.write_text(render(lines, found))
    draw(lines)


def render(lines: Sequence[Line], found: Mapping[str, Any]) -> str:
    """The page."""
    by_phase = {phase: sorted((x for x in lines if x["phase"] == phase), key=lambda x: x["seed"]) for phase in LABELS}
    first, trained = by_phase["stage 1"][0], by_phase["a_star_po"][0]
    others = [line["others"] for line in lines]
    page = [
        "# A*-PO against GRPO at equal rollouts",
        "",
        "Written by `make study-a-star-po` (`benchmarks/a_star_po.py`), together with its numbers "
        "([a_star_po.json](a_star_po.json)) and plot; do not edit.",
        "",
        "The quickstart's task and start model, asynchronously on Ray. Stage 1 (`distrl vstar`) answers every training "
        f"prompt with the reference, {first['rollouts']} rollouts, once for all runs with that reference. Stage 2 and "
        f"GRPO are trained with {trained['rollouts']} rollouts each, in equally many steps, with the same learning "
        "rate and bound of staleness: stage 2 one response to a prompt, GRPO a group of 16.",
        "",
        "| phase | seed | rollouts | held-out accuracy before | after | processor s | wall s | learner waits "
        "| largest memory, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for phase, label in LABELS.items():
        for line in by_phase[phase]:
            before, after = (f"{line[key]:.3f}" if key in line else "" for key in ("before", "after"))
            waits = f"{line['waited']:.0%}" if "waited" in line else ""
            page.append(
                f"| {label} | {line['seed']} | {line['rollouts']} | {before} | {after} | {line['cpu_s']:.0f} "
                f"| {line['wall_s']:.0f} | {waits} | {line['largest_bytes'] / 2**20:.0f} |"
            )
    rises = {phase: found[phase] for phase in ("a_star_po", "grpo")}
    page += [
        "",
        "![Mean reward over steps, and processor seconds](a_star_po.svg)",
        "",
        "The rise of the held-out accuracy, mean over the seeds and its standard error: "
        + ", ".join(f"{LABELS[p]} {r['rise']:.3f} ({r['standard_error']:.3f})" for p, r in rises.items())
        + ".",
        "",
        "| A*-PO over GRPO, medians over the seeds | stage 2 | both stages |",
        "|---|---|---|",
        f"| processor seconds | {found['stage_2_over_grpo_cpu_s']:.2f} | {found['both_stages_over_grpo_cpu_s']:.2f} |",
        f"| wall seconds | {found['stage_2_over_grpo_wall_s']:.2f} | {found['both_stages_over_grpo_wall_s']:.2f} |",
        f"| largest memory | {found['stage_2_over_grpo_memory']:.2f} "
        f"| {max(found['stage_1_over_grpo_memory'], found['stage_2_over_grpo_memory']):.2f} |",
        "",
        "Seconds are of whole commands, with the start of all processes and the evaluations of 1,024 problems before "
        "and after. The learner waits for batches, of the time from its first batch to its last step. Memory is the "
        "proportional set size of all processes together, the largest of all looks, one a second. One response per "
        "prompt is 16 times as many tickets as groups of 16, each with calls of its own to the stages.",
    ]
    if max(others) > IDLE:
        page += [
            "",
            f"Other work used {min(others):.0%} to {max(others):.0%} of the machine's processors during these phases: "
            "processor seconds can be compared, wall seconds hardly.",
        ]
    page += ["", "## Again", "", "    make study-a-star-po", ""]
    return "\n".join(page)


def draw(lines: Sequence[Line]) -> None:
    """Mean reward of each step's rollouts, and processor seconds by phase and seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The same file from the same numbers.
    plt.rcParams["svg.hashsalt"] = "a_star_po"
    figure, (learning, cost) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 2))
    named = set()
    for line in lines:
        if "rewards" not in line:
            continue
        phase = line["phase"]
        label = None if phase in named else LABELS[phase]
        steps = range(1, len(line["rewards"]) + 1)
        learning.plot(steps, line["rewards"], color=COLORS[phase], label=label, linewidth=1.3)
        named.add(phase)
    learning.set_xlabel("optimizer step")
    learning.set_ylabel("mean reward of the step's rollouts")
    learning.grid(alpha=0.25)
    learning.legend(frameon=False)
    seeds = sorted({line["seed"] for line in lines})
    bottom = dict.fromkeys(seeds, 0.0)
    for phase in LABELS:
        offset = 0.2 if phase == "grpo" else -0.2
        for line in (x for x in lines if x["phase"] == phase):
            below = 0.0 if phase == "grpo" else bottom[line["seed"]]
            label = LABELS[phase] if line["seed"] == seeds[0] else None
            cost.bar(line["seed"] + offset, line["cpu_s"], 0.36, below, color=COLORS[phase], label=label)
            if phase != "grpo":
                bottom[line["seed"]] += line["cpu_s"]
    cost.set_xticks(seeds, [f"seed {seed}" for seed in seeds])
    cost.set_ylabel("processor seconds")
    cost.set_ylim(top=1.25 * cost.get_ylim()[1])
    cost.legend(frameon=False, fontsize=8, loc="upper center", ncols=3, columnspacing=1.0, handlelength=1.2)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)
