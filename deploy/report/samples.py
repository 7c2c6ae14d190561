"""Some rollouts to read: correct and wrong ones from the start and from the end of the run."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from deploy.report.files import LedgerTables, Missing, Record, read_journal
from deploy.run_dir import RunDir
from distrl.errors import LedgerError
from distrl.schema import Role
from distrl.staleness import Version, staleness

PER_VERDICT = 3
"""Samples of each verdict, early and late."""
SEARCHED = 64
"""Most tickets that are looked through at each end of the run."""

SAMPLES = pa.schema(
    [
        pa.field("when", pa.string(), nullable=False),
        pa.field("rollout_id", pa.string(), nullable=False),
        pa.field("ticket_id", pa.int64(), nullable=False),
        pa.field("step", pa.int64()),
        pa.field("prompt_id", pa.string()),
        pa.field("prompt", pa.string()),
        pa.field("response", pa.string()),
        pa.field("verdict", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("reward", pa.float64()),
        pa.field("response_tokens", pa.int64()),
        pa.field("finish_reason", pa.string()),
        pa.field("oldest_version", pa.int64()),
        pa.field("newest_version", pa.int64()),
        pa.field("staleness", pa.int64()),
    ]
)
"""`when` is early or late; `step` trained the rollout; `staleness` is that of the rollout, in optimizer steps."""

_COLUMNS = [
    "rollout_id",
    "ticket_id",
    "prompt_id",
    "prompt_token_ids",
    "text",
    "verdict",
    "reason",
    "reward",
    "response_token_ids",
    "finish_reason",
    "policy_versions",
    "role",
]
_VERDICTS = ("correct", "wrong", "failed")


def choose_samples(run_dir: RunDir, config: Mapping[str, Any], ledger: LedgerTables, missing: Missing) -> pa.Table:
    """The first rollout of each verdict in each of the first and of the last trained tickets, PER_VERDICT of each.

    One per ticket and verdict, so that the samples show several prompts.
    """
    tickets = ledger.tickets
    trained = tickets.filter(pc.and_(pc.is_valid(tickets["trained_step"]), pc.is_valid(tickets["journal_file"])))
    ordered = trained.sort_by([("trained_step", "ascending"), ("ticket_id", "ascending")]).to_pylist()
    if not ordered:
        return SAMPLES.empty_table()
    decode = _decoder(run_dir, config, missing)
    half = (len(ordered) + 1) // 2
    ends = {"early": ordered[:half][:SEARCHED], "late": ordered[half:][::-1][:SEARCHED]}
    rows = []
    for when, searched in ends.items():
        found = _search(run_dir, searched, missing)
        for verdict in _VERDICTS:
            chosen = found[verdict][:PER_VERDICT]
            rows += [_row(when, ticket, rollout, ledger.versions, decode) for ticket, rollout in chosen]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def _search(run_dir: RunDir, tickets: Iterable[Record], missing: Missing) -> dict[str, list[tuple[Record, Record]]]:
    found: dict[str, list[tuple[Record, Record]]] = {verdict: [] for verdict in _VERDICTS}
    for ticket in tickets:
        if all(len(found[verdict]) >= PER_VERDICT for verdict in ("correct", "wrong")):
            break
        table = read_journal(run_dir, [ticket["journal_file"]], _COLUMNS, missing)
        if table is None:
            continue
        seen: set[str] = set()
        for rollout in table.filter(pc.equal(table["ticket_id"], ticket["ticket_id"])).to_pylist():
            if rollout["verdict"] not in seen:
                seen.add(rollout["verdict"])
                found[rollout["verdict"]].append((ticket, rollout))
    return found


def _row(
    when: str,
    ticket: Record,
    rollout: Record,
    versions: Mapping[int, Version],
    decode: Callable[[list[int]], str],
) -> Record:
    # The versions of a replayed rollout are those of the run that recorded it.
    replayed = rollout["role"] == Role.REPLAY
    used = [] if replayed else rollout["policy_versions"]
    return {
        "when": when,
        "rollout_id": rollout["rollout_id"],
        "ticket_id": ticket["ticket_id"],
        "step": ticket["trained_step"],
        "prompt_id": rollout["prompt_id"],
        "prompt": decode(rollout["prompt_token_ids"]),
        "response": rollout["text"],
        "verdict": rollout["verdict"],
        "reason": rollout["reason"],
        "reward": rollout["reward"],
        "response_tokens": len(rollout["response_token_ids"]),
        "finish_reason": rollout["finish_reason"],
        "oldest_version": min(used, default=None),
        "newest_version": max(used, default=None),
        "staleness": None if replayed else _staleness(versions, min(used), ticket["trained_step"]),
    }


def _staleness(versions: Mapping[int, Version], oldest: int, step: int) -> int | None:
    """Of a rollout that `step` trained: up to the newest version with the step before. None where it is unknown."""
    current = max((v.version for v in versions.values() if v.step == step - 1), default=None)
    if current is None:
        return None
    try:
        return staleness(versions, oldest, current)
    except LedgerError:
        return None


@dataclass(frozen=True, slots=True)
class Decoder:
    """Tokens to text; the numbers themselves where no tokenizer is there."""

    tokenizer: Any

    def text(self, tokens: list[int]) -> str:
        if self.tokenizer is None:
            return " ".join(map(str, tokens))
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))

    def token(self, token: int) -> str:
        """One token as it stands in a text; the pieces of a character that several tokens make are not readable."""
        return f"{token} " if self.tokenizer is None else self.text([token])


def tokenizer_of(run_dir: RunDir, config: Mapping[str, Any]) -> Decoder:
    """Prompts are journalled as tokens; the tokenizer is that of the run's own checkpoint, or of its model."""
    model = config.get("model")
    folders = sorted(run_dir.checkpoints.glob("*/tokenizer.json"), reverse=True)
    if isinstance(model, dict) and model.get("path"):
        folders.append(Path(str(model["path"])) / "tokenizer.json")
    for path in folders:
        if path.is_file():
            from tokenizers import Tokenizer

            return Decoder(Tokenizer.from_file(str(path)))
    return Decoder(None)


def _decoder(run_dir: RunDir, config: Mapping[str, Any], missing: Missing) -> Callable[[list[int]], str]:
    found = tokenizer_of(run_dir, config)
    if found.tokenizer is None:
        missing.add("No tokenizer is there, neither in a checkpoint nor in model.path: prompts are shown as token ids.")
    return found.text
