"""Write docs/recipes.md and its pictures from the recipes themselves: `python docs/recipes_page.py`.

The weight in a picture is measured, not drawn: the gradient of the recipe's loss at one-token responses whose
ratio runs along the axis, with credit +1 and -1.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distrl.objectives import Batch, Recipe, build, evaluate, prepare, recipe_names
from distrl.objectives.describe import recipe
from distrl.objectives.losses import Score
from distrl.objectives.regularized import Regularized

HERE = Path(__file__).parent
POINTS = 961
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 230, 44, 12, 14, 40
CEILING = 6.0
COLORS = {1: "#7fb2e0", -1: "#c8541a"}
LEVELS = {
    "token": "of a token",
    "prefix": "up to a token",
    "sequence": "of the whole response",
    "mean": "of the response, geometric mean",
}

INTRODUCTION = """\
# Recipes

<!-- Written by `python docs/recipes_page.py` from the recipes; edit those. -->

A recipe is a credit and a list of terms, composed by name from the axes of `distrl/objectives`. Each file in
`distrl/objectives/recipes` is one; `distrl.objectives.compute(name, tensors)` runs it in any trainer.

Symbols: `pi` is the policy being trained, `mu` the behavior policy that sampled the response, `ref` the reference.
`r` is the ratio `pi / mu` of a token, `rho` that of a whole response, `s` its geometric mean. `A` is the credit,
`R` the reward, `H` the potential of a taper, with `H' = weight / r`.

**Class** says what the tests prove of the expected gradient, by enumeration of every response in float64 to 1e-10:
*policy*, that of the stated objective under the policy; *potential*, that of `E_mu[sum_t A_t H(r_t)]` at fixed
credits, away from the edges of a band; *group*, a known multiple of the policy gradient over whole groups, or an
independent loop over them.

**Status** says where formula and constants were read: in the *paper*, in its authors' or common *code*, or that they
are partly our *reconstruction*.

The pictures show what a sample's `A grad log pi` is multiplied with, against the importance ratio: blue and solid for
good responses (`A > 0`), orange and dashed for bad ones (`A < 0`). They are measured from the loss's gradient.

## In another trainer

```python
import torch
from distrl.objectives import build, check, compute, required_columns

recipe = build("topr", baseline=0.0)
check(recipe, lowest_reward=-1.0, produced=frozenset({"policy", "behavior", "rewards"}))
assert required_columns(recipe) == {"policy", "behavior", "rewards"}

logps = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -0.5, -0.5]], requires_grad=True)  # [B, T] log pi of each token
output = compute(
    recipe,
    {
        "logps": logps,
        "behavior_logps": torch.tensor([[-1.2, -1.9, 0.0], [-0.4, -0.7, -0.5]]),
        "mask": torch.tensor([[True, True, False], [True, True, True]]),  # True where the policy chose the token
        "rewards": torch.tensor([1.0, -1.0]),
    },
)
output.loss.backward()
print(output.metrics)
```

`compute` takes a batch that is used whole. For micro-batches, several ranks or several updates per batch there are
`prepare` and `evaluate`, see the docstring of `distrl.objectives`; the result is the same to rounding. A missing or
misshapen tensor, an option that nothing reads and a composition that would not train what it says are errors that
name the recipe, the reason and the remedy.

## All of them
"""


def weights(chosen: Recipe, log_ratio: Tensor, credit: float) -> Tensor:
    """[n] the factor in front of A grad log pi at each log ratio of one-token responses."""
    n = len(log_ratio)
    logps = torch.full((n, 1), -30.0, dtype=torch.float64).add(log_ratio[:, None]).requires_grad_()
    other = logps.detach() - log_ratio[:, None]
    zeros = torch.zeros(n, dtype=torch.float64)
    tensors = {"mask": torch.ones(n, 1).bool(), "logps": logps, "group": torch.zeros(n).long(), "rewards": zeros}
    tensors |= {"values": zeros[:, None], "v_star": zeros, "preference": zeros}
    tensors |= {"behavior_logps": other, "proximal_logps": other}
    tensors |= {"ref_logps": logps.detach(), "anchor_logps": logps.detach()}
    tensors |= {"pairs": torch.zeros(1, 2).long(), "pair_preference": zeros[:1]}
    batch = Batch.from_tensors(tensors, recipe=chosen.name)
    plan = prepare(chosen, batch)
    term = chosen.terms[0]
    if not isinstance(term.loss, Score | Regularized):
        return term.weight(batch, plan.credit)[:, 0]
    fixed = torch.full((n, 1), credit, dtype=torch.float64)
    # Every response counts alike, whatever its group is worth and however it is averaged.
    plan = replace(plan, credit=fixed, shares=(torch.ones(n, 1).double(), *plan.shares[1:]))
    only = replace(chosen, terms=(term,))
    output = evaluate(only, batch, replace(plan, shares=plan.shares[:1], coefficients=plan.coefficients[:1]))
    return -torch.autograd.grad(output.loss, logps)[0][:, 0] / credit


def ratios(chosen: Recipe) -> tuple[Tensor, dict[str, float]]:
    """[n] log ratios of a picture's axis, and its ticks."""
    if chosen.name == "gspo":
        ticks = {f"{x:g}": math.log(x) for x in (0.999, 0.9995, 1.0, 1.0005, 1.001)}
    else:
        ticks = {name: math.log(x) for name, x in (("1/8", 0.125), ("1/4", 0.25), ("1/2", 0.5))}
        ticks |= {f"{x:g}": math.log(x) for x in (1.0, 2.0, 4.0, 8.0)}
    return torch.linspace(min(ticks.values()), max(ticks.values()), POINTS, dtype=torch.float64), ticks


def svg(chosen: Recipe) -> str:
    """The picture of a recipe's weight."""
    log_ratio, ticks = ratios(chosen)
    low, high = float(log_ratio[0]), float(log_ratio[-1])

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / CEILING * (HEIGHT - TOP - BOTTOM)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f"<title>{chosen.name}: weight against the importance ratio</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for name, value in ticks.items():
        lines.append(f'<path d="M{x(value):.1f} {y(0):.1f}V{y(CEILING):.1f}" stroke="#e4e4e4"/>')
        lines.append(f'<text x="{x(value):.1f}" y="{y(0) + 15:.1f}" text-anchor="middle">{name}</text>')
    for mark in range(int(CEILING) + 1):
        lines.append(f'<path d="M{x(low):.1f} {y(mark):.1f}H{x(high):.1f}" stroke="#e4e4e4"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark}</text>')
    for sign, width in ((1, 4.5), (-1, 2.0)):
        dash = ' stroke-dasharray="7 4"' if sign < 0 else ""
        for piece in pieces(log_ratio, weights(chosen, log_ratio, float(sign))):
            points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in piece)
            color = COLORS[sign]
            lines.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{width}"{dash}/>')
    lines.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{axis(chosen)}</text>')
    middle = f"{(HEIGHT - BOTTOM + TOP) / 2:.0f}"
    lines.append(f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">weight</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def pieces(log_ratio: Tensor, weight: Tensor) -> Iterator[list[tuple[float, float]]]:
    """The curve below the ceiling, cut where it jumps; inside a piece one point in eight is enough."""
    points = list(zip(log_ratio.tolist(), weight.tolist(), strict=True))
    jumps = [i + 1 for i in range(len(points) - 1) if abs(points[i + 1][1] - points[i][1]) > 0.15]
    for start, end in itertools.pairwise([0, *jumps, len(points)]):
        piece = [point for point in points[start:end] if point[1] <= CEILING]
        if len({value for _, value in piece}) == 1:
            yield [piece[0], piece[-1]]
        elif len(piece) > 1:
            yield [*piece[:-1:8], piece[-1]]


def axis(chosen: Recipe) -> str:
    """What the horizontal axis of a picture is."""
    found = chosen.terms[0].ratios
    if not found:
        return "importance ratio (not read)"
    over = " ".join(found[0].over)
    return f"ratio of policy to {over}, {LEVELS[found[0].level]}"


def section(name: str) -> str:
    """A recipe's section of the page."""
    found = recipe(name)
    lines = [f"## {name}", "", found["summary"], "", f"![weight of {name}](images/weights-{name}.svg)", ""]
    lines += ["```text", found["formula"], "```", ""]
    lines += [f"- **Source**: {found['source']}.", f"- **Class**: {found['class']}. **Status**: {found['status']}."]
    if found["note"]:
        lines.append(f"- **Note**: {found['note']}")
    lines.append(f"- **Composition**: credit `{found['credit']}`; " + "; ".join(terms(found)) + ".")
    columns = ", ".join(f"`{column['name']}` {column['shape']}" for column in found["columns"])
    lines.append(f"- **Reads**: {columns}.")
    lines.append(f"- **The system runs**: {', '.join(found['roles'])}. Responses are drawn from {sampler(found)}.")
    lines += [f"- **Upkeep** of {model}: {how}." for model, how in found["upkeep"].items()]
    if found["options"]:
        lines += ["", "| option | default | range | meaning |", "|---|---|---|---|"]
        lines += [row(option, rule) for option, rule in found["options"].items()]
    return "\n".join(lines) + "\n"


def terms(found: dict[str, Any]) -> list[str]:
    return [f"term {term} `{composition}`" for term, composition in found["terms"].items()]


def sampler(found: dict[str, Any]) -> str:
    return "the policy itself" if "itself" in found["sampler"] else "any behavior policy"


def row(option: str, rule: dict[str, Any]) -> str:
    allowed = ", ".join(rule["choices"]) or (f">= {rule['min']:g}" if rule["min"] is not None else "any")
    default = rule["default"] if isinstance(rule["default"], str) else f"{rule['default']:g}"
    return f"| `{option}` | {default} | {allowed} | {rule['help']} |"


def pages() -> dict[Path, str]:
    """Every file of the page, by path."""
    names = recipe_names()
    index = " · ".join(f"[{name}](#{name})" for name in names)
    page = "\n".join([INTRODUCTION, index, "", *(section(name) for name in names)])
    pictures = {HERE / "images" / f"weights-{name}.svg": svg(build(name)) for name in names}
    return {HERE / "recipes.md": page, **pictures}


if __name__ == "__main__":
    for path, content in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
