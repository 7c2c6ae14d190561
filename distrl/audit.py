"""Proves on a run's ledger and journal that no prompt was lost and none was trained twice; reads only.

Each rule has a name, and a broken one is told with the ticket, step or file that breaks it. A run that goes on may be
audited: what is under way is then no violation.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from sqlite3 import Row
from typing import Any

from distrl.audit_replays import check_replays
from distrl.audit_tables import Selection, selection
from distrl.errors import LedgerError, SchemaError
from distrl.journal_file import read_table
from distrl.ledger_reader import LedgerReader
from distrl.schema import Role
from distrl.staleness import Version, staleness, way
from distrl.storage import Folder, cause

FinalState = frozenset({"committed", "dropped"})
WITH_ROLLOUTS = ("ready", "trained", "committed")
"""States of tickets whose rollouts must lie in the journal."""


@dataclass(frozen=True, slots=True)
class Contract:
    """What the run promised, from its config."""

    tickets_per_step: int
    max_staleness: int | None
    """Optimizer steps; None where stale rollouts are kept."""
    finished: bool
    """Whether the run has ended as planned: then every ticket must be committed or dropped."""
    redraws: int = 0
    """How often one ticket may be drawn again with other noise."""
    drop_abandoned: bool = False
    """Whether nothing may be trained that weights sampled which were left."""
    replays_per_step: int = 0
    """Tickets of every batch that another run has recorded."""
    replay_epochs: int = 1
    """How often one recorded ticket may be replayed."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule."""

    rule: str
    detail: str


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit found."""

    violations: tuple[Violation, ...]
    tickets: Mapping[str, int]
    """By state."""
    steps: int
    """Optimizer steps of the newest branch."""
    committed_steps: int
    staleness: Mapping[int, int]
    """Trained and committed tickets by their staleness, in optimizer steps; replayed ones have none."""
    replayed: Mapping[str, int]
    """Trained and committed tickets that were replayed, by the run that recorded them."""
    recorded: Mapping[str, int]
    """Tickets that the recording has, by its run."""
    drops: Mapping[str, int]
    """By reason."""
    selection: Selection
    """Drops and waits by length and difficulty."""
    returned: Mapping[str, int]
    """How often tickets went back to an earlier state, by cause."""
    reissued: tuple[Mapping[str, Any], ...]
    """Every ticket that was issued again: ticket, redraw before, state, cause."""
    failed_calls: Mapping[str, int]
    """By stage."""
    abandoned_steps: int
    """Steps that were trained and are on no committed or running branch."""
    off_branch_tickets: int
    """Trained or committed tickets with tokens of weights that are no ancestors of those that trained on them."""
    epochs: int
    """How often a process has taken the ledger over."""
    journal_files: int
    journal_bytes: int
    put_back: tuple[Mapping[str, Any], ...]
    """How often the run went on from a copy of its ledger: the checkpoint that the copy lay with, and the journal files
    that it did not know. What had happened since is lost: their rollouts were sampled again."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def audit(
    ledger: Path,
    contract: Contract,
    journal: Folder | None = None,
    checkpoint_sha256: Callable[[str], str] | None = None,
) -> Audit:
    """Audits a run.

    Args:
        ledger: its SQLite file.
        journal: folder of the journal files; None takes them from where they were when the ledger named them.
        checkpoint_sha256: the hash of a checkpoint's files, as the ledger has it; raises OSError where they are not
            there. None leaves checkpoints out.
    Raises:
        LedgerError: the ledger cannot be read.
    """
    with LedgerReader(ledger) as reader:
        reader.rows("BEGIN")  # one moment for all queries, while the run goes on
        return _Auditor(reader, contract, journal, checkpoint_sha256).run()


class _Auditor:
    def __init__(
        self,
        reader: LedgerReader,
        contract: Contract,
        journal: Folder | None,
        checkpoint_sha256: Callable[[str], str] | None,
    ) -> None:
        self._contract = contract
        self._checkpoint_sha256 = checkpoint_sha256
        self._journal = journal
        self._reader = reader
        self._versions = reader.versions()
        self._tickets = reader.rows("SELECT * FROM tickets ORDER BY ticket_id")
        self._trainings = reader.rows("SELECT * FROM trainings ORDER BY version, ticket_id")
        self._checkpoints = reader.rows("SELECT * FROM checkpoints ORDER BY rowid")
        self._files: dict[str, Row] = {r["path"]: r for r in reader.rows("SELECT * FROM journal_files")}
        self._sampled_by: dict[int, list[int]] = defaultdict(list)
        for row in reader.rows("SELECT * FROM ticket_versions"):
            self._sampled_by[row["ticket_id"]].append(row["version"])
        self._origins = reader.replays()
        self._recorded = reader.recordings()

    def run(self) -> Audit:
        rules: list[tuple[str, Iterator[str]]] = [
            ("versions", self._check_versions()),
            ("order", self._check_order()),
            ("finished", self._check_finished()),
            ("drops", self._check_drops()),
            ("redraws", self._check_redraws()),
            ("trained_once", self._check_trained_once()),
            ("committed", self._check_committed()),
            ("batches", self._check_batches()),
            ("staleness", self._check_staleness()),
            ("replays", check_replays(self._tickets, self._origins, self._recorded, self._contract.replay_epochs)),
            ("journal", self._check_journal()),
            ("checkpoints", self._check_checkpoints()),
        ]
        violations = []
        for name, found in rules:
            try:
                violations += [Violation(name, detail) for detail in found]
            except LedgerError as error:  # a tree of versions that cannot be followed
                violations.append(Violation(name, str(error)))
        returns = self._reader.rows("SELECT * FROM returns ORDER BY rowid")
        trained = [t for t in self._tickets if t["state"] in ("trained", "committed")]
        fresh = [t for t in trained if t["ticket_id"] not in self._origins]
        branch = set(self._live_branch()) if not any(v.rule == "versions" for v in violations) else set()
        made = {r["version"] for r in self._trainings}
        committed = self._checkpoints[-1]["step"] if self._checkpoints else 0
        return Audit(
            violations=tuple(violations),
            tickets=self._reader.counts(),
            steps=max((t["trained_step"] or 0 for t in trained), default=0),
            committed_steps=committed,
            staleness=dict(sorted(Counter(t["staleness"] for t in fresh).items())),
            replayed=dict(
                Counter(self._origins[t["ticket_id"]].run for t in trained if t["ticket_id"] in self._origins)
            ),
            recorded=self._recorded,
            drops=self._reader.drops(),
            selection=selection(self._tickets, self._reader.rows("SELECT * FROM waits")),
            returned=dict(Counter(r["cause"] for r in returns)),
            reissued=tuple(
                {"ticket_id": r["ticket_id"], "redraw": r["redraw"], "state": r["old_state"], "cause": r["cause"]}
                for r in returns
                if r["new_state"] == "issued"
            ),
            failed_calls=dict(Counter(r["stage"] for r in self._reader.rows("SELECT stage FROM failures"))),
            abandoned_steps=len(made - branch),
            off_branch_tickets=self._off_branch(trained, branch),
            epochs=self._reader.epoch(),
            journal_files=len(self._files),
            journal_bytes=sum(f["bytes"] for f in self._files.values()),
            put_back=tuple(self._put_back()),
        )

    # Rules ------------------------------------------------------------------------------------------------------

    def _check_versions(self) -> Iterator[str]:
        """Version numbers have no gap, and a version's parent is older and no further than one step before it."""
        if list(self._versions) != list(range(len(self._versions))):
            yield f"versions must be 0 to {len(self._versions) - 1} without a gap, got {_short(self._versions)}"
            return
        for version in self._versions.values():
            if version.parent is None:
                if version.version != 0:
                    yield f"version {version.version} has no parent"
                continue
            parent = self._versions.get(version.parent)
            if parent is None or parent.version >= version.version:
                yield f"version {version.version} must have an older parent, got {version.parent}"
            elif version.step - parent.step not in (0, 1):
                yield (
                    f"version {version.version} of step {version.step} must be at most one step after its parent "
                    f"{parent.version}, which is of step {parent.step}"
                )

    def _check_order(self) -> Iterator[str]:
        """Every draw of the order is a ticket: none was skipped."""
        for expected, ticket in enumerate(self._tickets):
            if ticket["ticket_id"] != expected:
                yield f"ticket {expected} is not in the ledger, the next one there is {ticket['ticket_id']}"
                return

    def _check_finished(self) -> Iterator[str]:
        if self._contract.finished:
            for ticket in self._tickets:
                if ticket["state"] not in FinalState:
                    yield f"ticket {ticket['ticket_id']} must be committed or dropped, it is {ticket['state']}"

    def _check_drops(self) -> Iterator[str]:
        for ticket in self._tickets:
            if (ticket["state"] == "dropped") != (ticket["drop_reason"] is not None):
                yield f"ticket {ticket['ticket_id']} is {ticket['state']} with drop reason {ticket['drop_reason']}"

    def _check_redraws(self) -> Iterator[str]:
        """A ticket meets other noise only where it was drawn again for its age, and not too often."""
        redrawn = Counter(
            r["ticket_id"] for r in self._reader.rows("SELECT ticket_id FROM returns WHERE cause = 'redrawn'")
        )
        for ticket in self._tickets:
            name, redraw = f"ticket {ticket['ticket_id']}", ticket["redraw"]
            if redraw != redrawn[ticket["ticket_id"]]:
                yield f"{name} is draw {redraw} of its prompt, and was drawn again {redrawn[ticket['ticket_id']]} times"
            if redraw > self._contract.redraws:
                yield f"{name} was drawn again {redraw} times, at most {self._contract.redraws} are allowed"

    def _check_trained_once(self) -> Iterator[str]:
        """On the branch of the newest weights every trained ticket stands once, and no other does."""
        branch = set(self._live_branch())
        yield from self._compare_with_branch(branch, {"trained", "committed"}, "the newest weights")

    def _check_committed(self) -> Iterator[str]:
        """The steps behind the last checkpoint trained exactly the committed tickets."""
        for ticket in self._tickets:
            if (ticket["state"] == "committed") != (ticket["checkpoint"] is not None):
                yield f"ticket {ticket['ticket_id']} is {ticket['state']} and names checkpoint {ticket['checkpoint']}"
        if self._checkpoints:
            last = self._checkpoints[-1]
            branch = set(self._branch(last["version"]))
            yield from self._compare_with_branch(branch, {"committed"}, f"checkpoint {last['path']}")
            if last["step"] != self._versions[last["version"]].step:
                yield f"checkpoint {last['path']} is of step {last['step']}, its version is of another"

    def _compare_with_branch(self, branch: set[int], states: set[str], what: str) -> Iterator[str]:
        times = Counter(r["ticket_id"] for r in self._trainings if r["version"] in branch)
        for ticket_id, count in sorted(times.items()):
            if count > 1:
                yield f"ticket {ticket_id} was trained {count} times on the way to {what}"
        expected = {t["ticket_id"] for t in self._tickets if t["state"] in states}
        for ticket_id in sorted(expected - set(times)):
            yield f"ticket {ticket_id} is {' or '.join(sorted(states))}, but no step on the way to {what} trained it"
        for ticket_id in sorted(set(times) - expected):
            yield f"ticket {ticket_id} was trained on the way to {what}, but is not {' or '.join(sorted(states))}"

    def _check_batches(self) -> Iterator[str]:
        """Every step of the branch trained one whole batch, and the ledger's step of a ticket is the one it was."""
        branch = set(self._live_branch())
        batches = Counter(r["version"] for r in self._trainings)
        replays = Counter(r["version"] for r in self._trainings if r["ticket_id"] in self._origins)
        made = sorted(v for v in branch if batches[v])
        steps = sorted(self._versions[v].step for v in made)
        if steps != list(range(1, len(steps) + 1)):
            yield f"the steps trained must be 1 to {len(steps)}, each once, got {_short(steps)}"
        for version in made:
            if batches[version] != self._contract.tickets_per_step:
                yield (
                    f"step {self._versions[version].step} must have trained train.tickets_per_step = "
                    f"{self._contract.tickets_per_step} tickets, got {batches[version]}"
                )
            if replays[version] != self._contract.replays_per_step:
                yield (
                    f"step {self._versions[version].step} must have trained {self._contract.replays_per_step} replayed "
                    f"tickets, got {replays[version]}"
                )
        step_of = {r["ticket_id"]: self._versions[r["version"]].step for r in self._trainings if r["version"] in branch}
        for ticket in self._tickets:
            if ticket["trained_step"] != step_of.get(ticket["ticket_id"]):
                yield (
                    f"ticket {ticket['ticket_id']} was trained in step {step_of.get(ticket['ticket_id'])}, "
                    f"the ledger says {ticket['trained_step']}"
                )

    def _check_staleness(self) -> Iterator[str]:
        """The recorded age is that of the most stale token along the tree of versions, and within the bound."""
        branch = set(self._live_branch())
        bound = self._contract.max_staleness
        recorded = {t["ticket_id"]: t["staleness"] for t in self._tickets}
        for row in self._trainings:
            if row["version"] not in branch:
                continue
            ticket_id, parent = row["ticket_id"], self._versions[row["version"]].parent
            sampled_by = self._sampled_by[ticket_id]
            if ticket_id in self._origins:
                if sampled_by or recorded[ticket_id] is not None:
                    yield f"ticket {ticket_id} is replayed, and has a version or an age of this run"
                continue
            if not sampled_by or parent is None:
                yield f"ticket {ticket_id} was trained, and no policy version is recorded that sampled it"
                continue
            age = max(staleness(self._versions, v, parent) for v in sampled_by)
            if age != recorded[ticket_id]:
                yield f"ticket {ticket_id} was trained with staleness {age}, the ledger says {recorded[ticket_id]}"
            if self._contract.drop_abandoned and any(way(self._versions, v, parent)[0] for v in sampled_by):
                yield f"ticket {ticket_id} was trained, weights sampled it that were left before"
            if bound is not None and age > bound:
                yield f"ticket {ticket_id} was trained with staleness {age}, train.max_staleness is {bound}"

    def _check_journal(self) -> Iterator[str]:
        """What is ready, trained or committed lies in the journal, under the hash that the ledger has."""
        wanted: dict[str, list[Row]] = defaultdict(list)
        retired = {r["ticket_id"] for r in self._reader.rows("SELECT ticket_id FROM retired")}
        for ticket in self._tickets:
            if ticket["state"] not in WITH_ROLLOUTS:
                continue
            if ticket["state"] == "committed" and ticket["journal_file"] is None and ticket["ticket_id"] in retired:
                continue
            if ticket["journal_file"] not in self._files:
                yield f"ticket {ticket['ticket_id']} is {ticket['state']}, and the ledger names no journal file of it"
            else:
                wanted[ticket["journal_file"]].append(ticket)
        for name, tickets in wanted.items():
            yield from self._check_file(self._files[name], tickets)

    def _check_file(self, file: Row, tickets: Iterable[Row]) -> Iterator[str]:
        name = PurePosixPath(file["path"]).name
        folder = self._journal or Folder(Path(file["path"]).parent)
        path = str(folder / name)
        try:
            data = folder.read(name)
        except OSError as error:
            yield f"journal file {path} of tickets {_short(_ids(tickets))} cannot be read: {cause(error)}"
            return
        found = hashlib.sha256(data).hexdigest()
        if found != file["sha256"]:
            yield f"journal file {path} must have sha256 {file['sha256']}, got {found}; it was damaged"
            return
        columns = ["ticket_id", "redraw", "prompt_id", "role", "reward", "policy_versions"]
        try:
            table = read_table(data, path).select(columns)
        except SchemaError as error:
            yield str(error)
            return
        rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for row in table.to_pylist():
            rows[row["ticket_id"]].append(row)
        for ticket in tickets:
            own = [r for r in rows[ticket["ticket_id"]] if r["redraw"] == ticket["redraw"]]
            yield from self._check_rows(path, ticket, own)

    def _check_rows(self, path: str, ticket: Row, rows: list[dict[str, Any]]) -> Iterator[str]:
        where = f"journal file {path}: ticket {ticket['ticket_id']}"
        if len(rows) != ticket["rollouts"]:
            yield f"{where} must have {ticket['rollouts']} rollouts of redraw {ticket['redraw']}, got {len(rows)}"
            return
        if {r["prompt_id"] for r in rows} != {ticket["prompt_id"]}:
            yield f"{where} must be of prompt {ticket['prompt_id']}, got {rows[0]['prompt_id']}"
        role = Role.REPLAY if ticket["ticket_id"] in self._origins else Role.POLICY
        if {r["role"] for r in rows} != {role}:
            yield f"{where} must have the role {role}, got {rows[0]['role']}"
        versions = {v for r in rows for v in r["policy_versions"]}
        if role == Role.POLICY and versions != set(self._sampled_by[ticket["ticket_id"]]):
            yield f"{where} was sampled by versions {_short(sorted(versions))}, the ledger has others"
        mean = sum(r["reward"] for r in rows) / len(rows)
        if abs(mean - ticket["reward_mean"]) > 1e-9 * max(1.0, abs(mean)):
            yield f"{where} has mean reward {mean}, the ledger says {ticket['reward_mean']}"

    def _check_checkpoints(self) -> Iterator[str]:
        """The files of every checkpoint that was not given up have the hash that the ledger names."""
        for row in self._checkpoints:
            if self._checkpoint_sha256 is None or row["removed_s"] is not None:
                continue
            try:
                found = self._checkpoint_sha256(row["path"])
            except OSError as error:
                yield f"checkpoint {row['path']} cannot be read: {cause(error)}"
            else:
                if found != row["sha256"]:
                    yield f"checkpoint {row['path']} must have sha256 {row['sha256']}, got {found}; it was damaged"

    # ------------------------------------------------------------------------------------------------------------

    def _put_back(self) -> Iterator[Mapping[str, Any]]:
        if self._reader.rows("SELECT 1 FROM sqlite_master WHERE name = 'put_back'"):  # younger than the first ledgers
            for row in self._reader.rows("SELECT checkpoint, lost_files FROM put_back ORDER BY rowid"):
                yield dict(row)

    def _live_branch(self) -> list[int]:
        """Versions on the way to the newest weights that count: those that trained tickets, or the last checkpoint."""
        trained = {t["ticket_id"] for t in self._tickets if t["state"] == "trained"}
        tips = [r["version"] for r in self._trainings if r["ticket_id"] in trained]
        if self._checkpoints:
            tips.append(self._checkpoints[-1]["version"])
        return self._branch(max(tips)) if tips else []

    def _branch(self, tip: int) -> list[int]:
        branch: list[int] = []
        at: int | None = tip
        while at is not None:
            version = _known(self._versions, at)
            branch.append(at)
            at = version.parent
        return branch

    def _off_branch(self, trained: Iterable[Row], branch: set[int]) -> int:
        return sum(not set(self._sampled_by[t["ticket_id"]]) <= branch for t in trained)


def _known(versions: Mapping[int, Version], version: int) -> Version:
    if version not in versions:
        raise LedgerError(f"version {version} is not in the ledger, which knows {len(versions)} versions")
    return versions[version]


def _ids(tickets: Iterable[Row]) -> list[int]:
    return [t["ticket_id"] for t in tickets]


def _short(numbers: Iterable[int]) -> str:
    """The numbers, or the first of them where they are many."""
    values = list(numbers)
    return ", ".join(map(str, values[:8])) + (f" and {len(values) - 8} more" if len(values) > 8 else "")
