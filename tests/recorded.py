"""Recordings for tests of replay: what a run leaves, without the run."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from actors.journal import write_file
from deploy.run_dir import create_run_dir, write_json
from distrl.config import Config
from distrl.graders.build import chosen_graders, describe
from distrl.ledger import Ledger
from distrl.models import load_tokenizer
from distrl.prompts import PromptEncoder
from distrl.rollouts import join
from distrl.schema import Stage, record_batch
from distrl.storage import Folder
from distrl.tasks import load_task, prompt_index
from distrl.tickets import DropReason, ReturnCause
from tests.builders import generation_batch, generation_columns, grading_batch, grading_columns


def write_recording(directory: Path, tickets: Sequence[pa.RecordBatch], dropped: Collection[int] = ()) -> Path:
    """A ledger and a journal of one file.

    Args:
        tickets: joined rows of each ticket; their numbers are their places.
        dropped: tickets that were journalled and dropped all the same.
    Returns:
        The ledger's path.
    """
    folder = Folder(directory / "journal")
    folder.make()
    receipt = write_file(folder, "0.arrow", tickets)
    ledger = Ledger(directory / "ledger.sqlite", clock=lambda: 0.0, owner="the run that recorded")
    version = ledger.allocate_version(None, 0)
    for ticket_id, rows in enumerate(tickets):
        tokens = sum(len(row) for row in rows.column("response_token_ids").to_pylist())
        sampled: Any = {"versions": [version], "rollouts": rows.num_rows, "response_tokens": tokens}
        ledger.issue(lambda _, rows=rows: str(rows.column("prompt_id")[0]))  # type: ignore[misc]
        ledger.mark_generated(ticket_id, **sampled)
        if ticket_id == 1:  # its first draw was lost
            ledger.return_ticket(ticket_id, ReturnCause.RESTART, redraw=False)
            ledger.mark_generated(ticket_id, **sampled)
        if ticket_id in dropped:
            ledger.drop(ticket_id, DropReason.JOURNAL_FAILED, "the answer was lost")
        else:
            rewards = rows.column("reward").to_pylist()
            ledger.mark_ready(ticket_id, journal_file=receipt, reward_mean=sum(rewards) / len(rewards))
    ledger.close()
    return directory / "ledger.sqlite"


def small_recording(directory: Path, tickets: int) -> Path:
    """`tickets` tickets of two rollouts that can be replayed, after one that was dropped."""
    batches = [generation_batch(ticket_id, (2, 3)) for ticket_id in range(tickets + 1)]
    return write_recording(directory, [join(batch, grading_batch(batch), None) for batch in batches], dropped=[0])


def record_run(config: Config, tickets: int, **columns: Any) -> Path:
    """The directory of a finished run with the prompts of its config, responses of two tokens and mixed rewards.

    Args:
        columns: other values of columns of generation or grading, the same in all rows.
    """
    run_dir = create_run_dir(config)
    write_json(run_dir.run_json, {"format": 1, "name": config.run.name, "state": "finished"})
    task = load_task(config.data)
    encoder = PromptEncoder(load_tokenizer(config.model.path))
    size = config.rollout.group_size
    grader = describe(chosen_graders(config.reward.grader, config.reward.graders, task.default_reward))
    batches = []
    for ticket_id in range(tickets):
        problem = task.train[prompt_index(config.run.seed, ticket_id, len(task.train))]
        given = generation_columns(ticket_id, [2] * size, encoder.encode(problem.prompt, problem.messages))
        given |= {
            "prompt_id": [problem.prompt_id] * size,
            "response_token_ids": [[1, 2]] * size,
            "temperature": [config.rollout.temperature] * size,
            "max_new_tokens": [config.rollout.max_new_tokens] * size,
        }
        grades = grading_columns(given["rollout_id"]) | {"grader": [grader] * size}
        for name, value in columns.items():
            (given if name in given else grades)[name] = [value] * size
        batches.append(join(record_batch(Stage.GENERATION, given), record_batch(Stage.GRADING, grades), None))
    write_recording(run_dir.path, batches)
    return run_dir.path
