"""Objectives: credit, weight, anchor, loss and aggregation composed into recipes by name.

A recipe is a list of terms, coefficient * sum(where * weight * loss) / global count, over one credit.
`prepare` looks at the whole global batch once per optimizer step and makes a plan; `evaluate` gives the part
of the loss that any whole groups of it contribute. Global counts are in the plan, so parts are added and
nothing is divided by the caller: the split into micro-batches, their order, their padding and the number of
ranks do not change the result.

    recipe = build("topr", kl_coefficient=0.01)
    check(recipe, lowest_reward=0.0, group_size=8)
    score_reference = "reference" in required_columns(recipe)

    batch = Batch.from_tensors(tensors, recipe=recipe.name, step=step)  # the whole step; no logps yet
    plan = prepare(recipe, batch)
    outputs = []
    for index in micro_batches:  # [b] row numbers, whole groups
        logps = policy_logps(index)  # [b, W] fresh, W up to T; values and logits go beside it as `fresh`
        rows = batch.rows(index, logps)
        output = evaluate(recipe, rows, plan.rows(index, logps.shape[1]))
        output.loss.backward()
        outputs.append(output)
    optimizer.step()
    metrics = combine(outputs)

Over ranks: each rank prepares the same global batch (mask and what the credit reads, mostly rewards and
group; the other tensors may be of its own rows only), keeps `plan.rows(own_index)` and
`Batch.from_tensors(own_tensors, ...)`, and goes on as above. Its losses are parts of one sum: gradients are
summed over ranks (where they are averaged, multiply the loss by the number of ranks). Metrics: sum
`totals.sums` and take the largest of `totals.maxima` over ranks; `plan.metrics` are the same everywhere.

With several updates per batch the plan is made once, and `evaluate` weighs by the fresh log-probabilities
each time.
"""

from distrl.objectives.batch import MODEL_TENSORS, Anchor, Batch
from distrl.objectives.build import Option, build, options, recipe_names
from distrl.objectives.checks import check
from distrl.objectives.credit import Credit
from distrl.objectives.evaluate import compute, evaluate, prepare, required_columns
from distrl.objectives.recipe import LossOutput, Plan, Recipe, Term, Totals, combine
from distrl.objectives.values import optimal_value

__all__ = [
    "MODEL_TENSORS",
    "Anchor",
    "Batch",
    "Credit",
    "LossOutput",
    "Option",
    "Plan",
    "Recipe",
    "Term",
    "Totals",
    "build",
    "check",
    "combine",
    "compute",
    "evaluate",
    "optimal_value",
    "options",
    "prepare",
    "recipe_names",
    "required_columns",
]
