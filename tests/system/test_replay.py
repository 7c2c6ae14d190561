"""Runs that train what another run has recorded, alone and beside fresh rollouts, with real processes."""

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from deploy.audit import audit_run
from deploy.report.write import write_report
from deploy.run import run_training
from deploy.run_dir import RunDir
from deploy.start import start_ray
from deploy.ui.index import Filter, open_index
from distrl.config import Config, make_config
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from tests.system import sigkill

pytestmark = [pytest.mark.ray, pytest.mark.nodes]

RECORDED = 24
"""Tickets of the recording."""
GROUP = 4


@pytest.fixture(scope="module", name="folder")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model and a finished run `recorded`, over a Ray that runs."""
    folder: Path = tmp_path_factory.mktemp("replay")
    size = TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64)
    make_tiny_model(folder / "model", character_tokenizer(ALPHABET), seed=0, architecture=size)
    start_ray()
    run_training(config(folder, "recorded", {}, steps=RECORDED // 4))
    yield folder
    ray.shutdown()


def values(folder: Path, name: str, replay: dict[str, Any], **train: Any) -> dict[str, Any]:
    # With a reference model, which scores replayed rollouts as it scores fresh ones.
    return {
        "run": {"dir": str(folder), "name": name},
        "model": {"path": str(folder / "model")},
        "data": {"source": "sort_digits", "heldout_size": 16, "options": {"digits": 4}},
        "rollout": {"group_size": GROUP, "max_new_tokens": 6},
        "objective": {"options": {"kl_coefficient": 0.01}},
        "train": {"tickets_per_step": 4, "learning_rate": 1e-3, "checkpoint_every_steps": 2, **train},
        "replay": replay,
        **({} if replay.get("ratio", 0) == 1 else {"evaluation": {"problems": 16, "every_steps": 0}}),
    }


def config(folder: Path, name: str, replay: dict[str, Any], **train: Any) -> Config:
    return make_config(values(folder, name, replay, **train))


def offline(folder: Path, name: str) -> dict[str, Any]:
    """Two passes over the recording."""
    return values(folder, name, {"journal": str(folder / "recorded"), "ratio": 1, "epochs": 2}, steps=12)


def query(run: Path, sql: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(run / "ledger.sqlite") as db:
        return db.execute(sql).fetchall()


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


def kill_between_two_checkpoints(driver: Any, run: Path) -> None:
    """SIGKILL to all processes of a run while steps are trained that no checkpoint has.

    The ledger's write lock is the gate: while it is held here, no step and no checkpoint is recorded.
    """
    deadline = time.monotonic() + sigkill.DEADLINE_S
    while time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.005)
        if not (run / "checkpoints").is_dir() or not any((run / "checkpoints").iterdir()):
            continue  # the ledger may have no tables yet
        with sigkill._writing_locked(run):
            ((trained,), (checkpoints,)) = (
                query(run, "SELECT COUNT(*) FROM tickets WHERE state = 'trained'")[0],
                query(run, "SELECT COUNT(*) FROM checkpoints")[0],
            )
            if trained and checkpoints:
                sigkill._kill(driver)
                return
    sigkill._end(driver)
    raise AssertionError(f"the run was not caught:\n{(run.parent / 'log').read_text()}")


def begin(given: dict[str, Any]) -> Any:
    path = Path(given["run"]["dir"]) / f"{given['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(given))
    return sigkill._start("train", path)


def killed_and_resumed(given: dict[str, Any]) -> Path:
    """The directory of a run that was killed once and then finished."""
    run = Path(given["run"]["dir"]) / given["run"]["name"]
    kill_between_two_checkpoints(begin(given), run)
    assert audit_run(run).violations == ()
    assert sigkill._start("resume", run).wait(sigkill.DEADLINE_S) == 0, (run.parent / "log").read_text()
    return run


def test_an_offline_run_starts_nobody_who_samples_and_ends_alike_after_a_sigkill(folder: Path) -> None:
    summary = run_training(make_config(offline(folder, "alone")))
    alone = folder / "alone"
    # The processes of the run: the unique ones, a reference actor and the reader of the recording.
    assert {record["message"] for record in records(alone, "joined")} == {"reference-0", "replay-0"}
    rows = json.loads((alone / "processes.json").read_text())["processes"]
    unique = {"driver", "policy-store", "journal", "coordinator"}
    assert {row["stage"] for row in rows} - {"learner"} == unique | {"reference", "replay"}
    assert records(alone, "load") == []  # no actor ever loaded weights
    assert records(alone, "evaluation") == []
    assert (summary["steps"], summary["rollouts"], summary["max_observed_staleness"]) == (12, 12 * 4 * GROUP, 0)
    assert summary["heldout_accuracy_after"] is None

    found = audit_run(alone)
    assert found.violations == ()
    assert (found.replayed, found.recorded, found.staleness) == ({"recorded": 48}, {"recorded": RECORDED}, {})
    # Both passes in the order of the recording, each ticket with its recorded prompt.
    origins = query(alone, "SELECT source_ticket, epoch FROM replays ORDER BY ticket_id")
    there = [i for (i,) in query(folder / "recorded", "SELECT ticket_id FROM tickets WHERE state='committed'")]
    assert origins == [(i, epoch) for epoch in (0, 1) for i in there]
    prompts = dict(query(folder / "recorded", "SELECT ticket_id, prompt_id FROM tickets"))
    for source, prompt in query(alone, "SELECT source_ticket, prompt_id FROM replays JOIN tickets USING (ticket_id)"):
        assert prompts[source] == prompt

    killed = killed_and_resumed(offline(folder, "killed"))
    after = audit_run(killed)
    assert after.violations == ()
    assert after.returned["rollback"] > 0
    assert after.replayed == found.replayed
    assert sigkill.contents(sigkill._last(killed)) == sigkill.contents(sigkill._last(alone))


def test_the_rollouts_are_those_of_the_recording_and_are_shown(folder: Path) -> None:
    index, recorded = open_index(RunDir(folder / "alone")), open_index(RunDir(folder / "recorded"))
    assert index.refresh() == 48 * GROUP
    recorded.refresh()
    origin = dict(query(folder / "alone", "SELECT ticket_id, source_ticket FROM replays"))
    shown, _ = index.find(Filter(), limit=1000)
    source, _ = recorded.find(Filter(), limit=1000)
    same = ("prompt_id", "prompt", "response", "reward", "verdict", "finish_reason", "tokens")
    by_ticket: dict[int, Counter[tuple[Any, ...]]] = {}
    for row in source:
        by_ticket.setdefault(row["ticket_id"], Counter())[tuple(row[name] for name in same)] += 1
    mine: dict[int, Counter[tuple[Any, ...]]] = {}
    for row in shown:
        assert (row["oldest_version"], row["newest_version"], row["staleness"]) == (None, None, None)
        mine.setdefault(row["ticket_id"], Counter())[tuple(row[name] for name in same)] += 1
    assert all(rows == by_ticket[origin[ticket_id]] for ticket_id, rows in mine.items())
    one = index.one(shown[0]["rollout_id"])
    assert one is not None
    assert one["origin"] == f"ticket {origin[one['ticket_id']]} of recorded, pass 2"
    index.close()
    recorded.close()
    page = write_report(RunDir(folder / "alone").path).page.read_text()
    assert "is left out" not in page
    assert f"all tickets, from {folder}/recorded; staleness and sampling are of the others" in page


def test_half_of_every_batch_is_replayed_also_after_a_sigkill(folder: Path) -> None:
    given = values(folder, "mixed", {"journal": str(folder / "recorded" / "journal"), "ratio": 0.5}, steps=12)
    mixed = killed_and_resumed(given)
    found = audit_run(mixed)
    assert found.violations == ()
    assert (found.committed_steps, found.replayed) == (12, {"recorded": 24})
    per_step = query(
        mixed,
        "SELECT trained_step, SUM(ticket_id IN (SELECT ticket_id FROM replays)), COUNT(*) FROM tickets"
        " WHERE trained_step IS NOT NULL GROUP BY trained_step",
    )
    assert per_step == [(step, 2, 4) for step in range(1, 13)]
    # Ages are those of the fresh half alone.
    assert sum(found.staleness.values()) == 24
    assert max(found.staleness) <= 2
    steps = records(mixed, "step")
    assert {record["replayed"] for record in steps} == {2}
    assert all(sum(record["staleness_counts"].values()) == 2 for record in steps)
    assert records(mixed, "load") != []
