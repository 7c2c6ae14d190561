"""Writes docs/studies/nash.md, its plot and its numbers from the arms of benchmarks.intransitive."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs/studies"
NUMBERS = FOLDER / "nash.json"
PAGE = FOLDER / "nash.md"
PICTURE = FOLDER / "nash.svg"

Result = dict[str, Any]

COLORS = {
    "nash-mp, half steps": "#0072b2",
    "nash-mp, average": "#009e73",
    "nash-md": "#cc79a7",
    "self-play": "#d55e00",
}
LAST = 5
"""Points at the end over which an arm must stay where it is."""


def write(results: Sequence[Result] | None, every: int) -> None:
    """Writes the page; arms and seeds that are not among the results keep the numbers that are stored beside it.

    Args:
        every: steps between two points.
    """
    stored: list[Result] = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else []
    if results is None:
        results = stored
    else:
        anew = {(result["arm"], result["seed"]) for result in results}
        points = len(results[0]["distance"])
        others = [r for r in stored if (r["arm"], r["seed"]) not in anew and len(r["distance"]) == points]
        results = [*others, *results]
        kept = [{name: value for name, value in result.items() if name != "points"} for result in results]
        NUMBERS.write_text("[\n" + ",\n".join(json.dumps(one) for one in kept) + "\n]\n")
    PAGE.write_text(render(results, every))
    draw(results, every)


def render(results: Sequence[Result], every: int) -> str:
    """The page."""
    equilibrium = results[0]["equilibrium"]
    rest = next((r["rest_of_nash_md"] for r in results if "rest_of_nash_md" in r), None)
    steps = every * (len(results[0]["distance"]) - 1)
    lines = [
        "# Does Nash-MP find an equilibrium that self-play circles?",
        "",
        "Written by `make study-nash` (`benchmarks/intransitive.py`), together with its numbers "
        "([nash.json](nash.json)) and plot; do not edit.",
        "",
        "A response is one letter, its style. Style a beats b, b beats c, c beats a; anything else loses to all "
        "three. No style is best, and a policy that always answers what beats the others today is beaten "
        "tomorrow. The game regularized towards the start, which answers a, b and c in unequal shares, has one "
        "equilibrium, known exactly prompt by prompt; averaged over the prompts it is "
        + ", ".join(f"{letter} {share:.3f}" for letter, share in zip("abc", equilibrium, strict=False))
        + ".",
        "",
        f"The real engine, graders, objective and learner train {steps} steps. Distance is KL(equilibrium || policy), "
        f"exact, every {every} steps; the win rate is of {steps} steps of training against the start, with a 95% "
        "interval.",
        "",
        f"| arm | seed | distance at the start | at the end | largest of the last {LAST} | wins against the start |",
        "|---|---|---|---|---|---|",
    ]
    for result in sorted(results, key=lambda r: (list(COLORS).index(r["arm"]), r["seed"])):
        distance, wins = result["distance"], result["win_rate_against_start"]
        lines.append(
            f"| {result['arm']} | {result['seed']} | {distance[0]:.3f} | {distance[-1]:.4f} "
            f"| {max(distance[-LAST:]):.4f} | {wins['value']:.3f} ({wins['low']:.3f} to {wins['high']:.3f}) |"
        )
    about_nash_md = (
        "The loss of nash-md, whose opponents are the policy mixed with an eighth of the start, is stationary at a "
        f"distance of {rest:.4f}, by its closed form. It has no proximal term, and the learning rate of the others."
        if rest is not None
        else ""
    )
    lines += [
        "",
        "![Distance from the equilibrium over steps](nash.svg)",
        "",
        "Self-play wins against the start as well: beating one opponent is no sign of an equilibrium.",
        "",
        *([about_nash_md, ""] if about_nash_md else []),
        "## Again",
        "",
        "    make study-nash",
        "",
    ]
    return "\n".join(lines)


def draw(results: Sequence[Result], every: int) -> None:
    """Distances of all arms on a logarithmic axis, a line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The same file from the same numbers.
    plt.rcParams["svg.hashsalt"] = "nash"
    figure, axes = plt.subplots(figsize=(8, 4.5))
    named = set()
    for result in results:
        steps = [every * i for i in range(len(result["distance"]))]
        arm = result["arm"]
        axes.plot(steps, result["distance"], color=COLORS[arm], label=None if arm in named else arm, linewidth=1.3)
        named.add(arm)
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("KL(equilibrium || policy), nats")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)
