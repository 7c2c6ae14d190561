"""One rollout, token by token, with what is known of each token."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from deploy.report.files import Missing, read_config, read_journal
from deploy.report.samples import tokenizer_of
from deploy.report.text import number
from deploy.run_dir import RunDir

Coloring = Literal["log_ratio", "kl", "version"]
TONES = 7
"""Steps of a color scale; the middle one is no color."""


@dataclass(frozen=True, slots=True)
class Token:
    text: str
    tone: int
    """0 ... TONES - 1."""
    title: str


@dataclass(frozen=True, slots=True)
class TokenView:
    """The response of a rollout and what its colors mean."""

    tokens: tuple[Token, ...]
    note: str
    components: tuple[tuple[str, float], ...]
    prompt: str
    missing: tuple[str, ...]


_NOTES: Mapping[str, str] = {
    "log_ratio": "log(behavior / reference) of each token, in nats: orange tokens are likelier under the policy that "
    "sampled them than under the reference, blue ones less likely. The scale ends at ±2.",
    "kl": "Estimate of the KL divergence to the reference at each token, in nats: exp(-r) - 1 + r with r = "
    "log(behavior / reference), never negative (k3 of Schulman 2020). The scale ends at 2.",
    "version": "The policy version that sampled each token; the color changes with the version.",
}


def token_view(run_dir: RunDir, row: Mapping[str, Any], coloring: Coloring) -> TokenView:
    """Reads the tokens of a rollout that `RolloutIndex.one` found."""
    missing = Missing()
    columns = [
        *("rollout_id", "prompt_token_ids", "response_token_ids", "behavior_logps", "ref_logps", "policy_versions"),
        "components",
    ]
    table = read_journal(run_dir, [str(row["file"])], columns, missing)
    if table is None:
        return TokenView((), "The journal no longer holds this rollout's tokens.", (), "", tuple(missing.notes))
    (found,) = table.filter(pc.equal(table["rollout_id"], pa.scalar(row["rollout_id"]))).to_pylist()
    decode = tokenizer_of(run_dir, read_config(run_dir.config, missing)[1])
    reference = found["ref_logps"]
    note = _NOTES[coloring]
    if coloring != "version" and reference is None:
        note = "The run has no reference model: there is no ratio to show."
    texts = [decode.token(i) for i in found["response_token_ids"]]
    tones, titles = _colors(coloring, found["behavior_logps"], reference, found["policy_versions"])
    tokens = tuple(Token(*parts) for parts in zip(texts, tones, titles, strict=True))
    return TokenView(
        tokens, note, tuple(found["components"]), decode.text(found["prompt_token_ids"]), tuple(missing.notes)
    )


def _colors(
    coloring: Coloring, behavior: Sequence[float], reference: Sequence[float] | None, versions: Sequence[int]
) -> tuple[list[int], list[str]]:
    titles = [f"version {v}, log-probability {number(b)}" for v, b in zip(versions, behavior, strict=True)]
    middle = TONES // 2
    if coloring == "version":
        first = versions[0]
        return [(v - first + middle) % TONES for v in versions], titles
    if reference is None:
        return [middle] * len(titles), titles
    ratios = [b - r for b, r in zip(behavior, reference, strict=True)]
    values = ratios if coloring == "log_ratio" else [math.expm1(-r) + r for r in ratios]
    name = "log-ratio" if coloring == "log_ratio" else "KL"
    titles = [f"{title}, {name} {number(v)}" for title, v in zip(titles, values, strict=True)]
    return [middle + round(max(-1.0, min(1.0, v / 2)) * middle) for v in values], titles
