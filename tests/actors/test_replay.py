"""The replay stage: recorded columns under the numbers of the ticket that replays them, and damage told as such."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from actors.replay import Replay
from distrl.errors import RunError
from distrl.recording import read_recording
from distrl.rollouts import join
from distrl.schema import SCHEMAS, Stage
from distrl.storage import Folder
from distrl.tickets import Recorded, Ticket
from learners.batches import NO_VERSION, training_batch
from learners.logp_check import LogpCheck, LogpCheckSettings
from tests.builders import generation_columns, grading_batch, grading_columns, refusal, run, unchecked_batch
from tests.recorded import small_recording, write_recording


@pytest.fixture(name="recorded")
def recorded_ticket(tmp_path: Path) -> Recorded:
    return read_recording(small_recording(tmp_path, tickets=3)).tickets[1]  # number 2


def ticket_for(recorded: Recorded, number: int = 7, v_star: float | None = None) -> Ticket:
    return Ticket(number, 0, recorded.prompt_id, "", "replay", 2, (), v_star=v_star, recorded=recorded)


def replay(directory: Path, vocabulary: int = 100) -> Replay:
    return Replay(Folder(directory / "journal"), vocabulary)


def test_rollouts_keep_what_was_recorded_and_get_the_numbers_of_their_ticket(
    tmp_path: Path, recorded: Recorded
) -> None:
    reader = replay(tmp_path)
    receipt, generation = run(reader.generate(ticket_for(recorded, v_star=0.25)))
    graded, grading = run(reader.grades(ticket_for(recorded)))
    was, grades = generation_columns(2, (2, 3)), grading_columns(["p2.0.0", "p2.0.1"])
    assert generation.schema.names == SCHEMAS[Stage.GENERATION].names
    changed = {
        "rollout_id": ["r7.0.0", "r7.0.1"],
        "ticket_id": [7, 7],
        "role": ["replay", "replay"],
        "v_star": [0.25, 0.25],
    }
    for name in SCHEMAS[Stage.GENERATION].names:
        expected = pa.array(changed.get(name, was[name]), SCHEMAS[Stage.GENERATION].field(name).type)
        assert generation.column(name).equals(expected), name
    assert grading.column("rollout_id").to_pylist() == changed["rollout_id"]
    assert grading.column("reward").to_pylist() == grades["reward"]
    # No version of this run sampled it.
    assert (receipt.ticket_id, receipt.rollouts, receipt.response_tokens, receipt.versions) == (7, 2, 5, ())
    assert graded.reward_sums == (sum(grades["reward"]),)
    assert join(generation, grading, None).num_rows == 2


def damaged(tmp_path: Path, recorded: Recorded) -> str:
    return refusal(RunError, lambda: run(replay(tmp_path).generate(ticket_for(recorded))))


def test_a_file_that_was_changed_or_is_gone_ends_the_run_with_its_name(tmp_path: Path, recorded: Recorded) -> None:
    file = tmp_path / "journal/0.arrow"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    begin = f"replay.journal: {file} must hold the rollouts of recorded ticket 2: journal file {file}: must "
    end = "; put the file back as it was, then go on with distrl resume"
    message = damaged(tmp_path, recorded)
    assert message.startswith(begin + f"have sha256 {recorded.sha256}, got ")
    assert message.endswith("; the file was damaged" + end)
    file.unlink()
    assert damaged(tmp_path, recorded) == begin + ("be readable, the ledger names it: No such file or directory" + end)


def test_a_ticket_without_its_rollouts_ends_the_run(tmp_path: Path, recorded: Recorded) -> None:
    file = tmp_path / "journal/0.arrow"
    assert damaged(tmp_path, replace(recorded, redraw=3)) == (
        f"replay.journal: {file} must hold the rollouts of recorded ticket 2: it must have 2 rollouts of it, got 0; "
        "put the file back as it was, then go on with distrl resume"
    )


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path, recorded: Recorded) -> None:
    assert refusal(RunError, lambda: run(replay(tmp_path, vocabulary=13).generate(ticket_for(recorded)))) == (
        "replay.journal: response_token_ids of recorded ticket 2 must be tokens of model.path, which knows 13, got 15; "
        "train a model with the recording's tokenizer"
    )


def test_values_that_no_stage_would_have_let_through_are_refused(tmp_path: Path) -> None:
    given: dict[str, Any] = generation_columns(0, (2, 3)) | {"behavior_logps": [[-1.0, 0.5], [-1.0] * 3]}
    generation = unchecked_batch(Stage.GENERATION, given)
    ledger = write_recording(tmp_path, [join(generation, grading_batch(generation), None)])
    (recorded,) = read_recording(ledger).tickets
    assert "rollout r7.0.0: behavior_logps must be <= 0, got 0.5" in damaged(tmp_path, recorded)


class NeverCalled:
    """Stands for the policy, whose log-probabilities nobody may ask for."""

    def __call__(self, *arguments: object) -> None:
        raise AssertionError("a replayed rollout was compared with weights of this run")


def test_a_replayed_rollout_names_no_version_of_this_run(tmp_path: Path, recorded: Recorded) -> None:
    """Also where the number of one is in it: the recorded versions here are 2 and 3."""
    reader = replay(tmp_path)
    _, generation = run(reader.generate(ticket_for(recorded)))
    _, grading = run(reader.grades(ticket_for(recorded)))
    assert {v for row in generation.column("policy_versions").to_pylist() for v in row} == {2, 3}
    batch = training_batch([(generation, grading, None)], pad_token_id=0)
    assert set(batch.versions.flatten().tolist()) == {NO_VERSION}
    assert batch.tensors["group"].tolist() == [7, 7]
    settings = LogpCheckSettings(rollouts=8, bound=0.1, max_staleness=2, update_mode="keep", temperature=1.0)
    assert LogpCheck(NeverCalled(), settings)(batch, version=2, step=1) == {}  # type: ignore[arg-type]


def test_a_fresh_rollout_beside_a_replayed_one_keeps_its_versions(tmp_path: Path, recorded: Recorded) -> None:
    reader = replay(tmp_path)
    _, generation = run(reader.generate(ticket_for(recorded)))
    _, grading = run(reader.grades(ticket_for(recorded)))
    columns = generation_columns(4, (2, 3))
    fresh: pa.RecordBatch = unchecked_batch(Stage.GENERATION, columns)
    batch = training_batch([(fresh, grading_batch(fresh), None), (generation, grading, None)], pad_token_id=0)
    assert batch.versions[:2].tolist() == [[4, 5, 0], [4, 5, 5]]
    assert set(batch.versions[2:].flatten().tolist()) == {NO_VERSION}
