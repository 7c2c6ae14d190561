"""What a run that replays needs of the recording, checked before it starts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from deploy.run_dir import RunDir
from deploy.run_state import RunState, read_state
from deploy.run_storage import run_storage
from distrl.config import Config
from distrl.errors import ConfigError, LedgerError, RunError, SchemaError
from distrl.graders.build import Graders, describe
from distrl.journal_file import read_verified, ticket_rows
from distrl.masking import mask
from distrl.models import load_tokenizer, vocabulary_size
from distrl.objectives import Recipe
from distrl.objectives.losses import Score
from distrl.prompts import PromptEncoder
from distrl.recording import Recording, read_recording
from distrl.schema import Role
from distrl.storage import Folder, cause
from distrl.tasks import Problem, Task
from distrl.tickets import Recorded

LOOKED_INTO = 8
"""Recorded tickets, spread over the recording, whose rows are compared with the config before the start."""

OPERATIONAL = frozenset({"timeout_s", "attempts", "concurrency", "processes", "cache", "actors"})
"""Settings of graders and environments that no reward depends on."""


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """What a run replays."""

    recording: Recording
    ledger: Path
    """Of the run that recorded."""
    folder: Folder
    """With the journal files."""
    vocabulary: int
    """Tokens that the model knows."""


def check_replay(
    config: Config, recipe: Recipe, graders: Graders, task: Task, samples: frozenset[Role]
) -> ReplayPlan | None:
    """None where nothing is replayed.

    Args:
        task: the run's prompts, without those that are left out.
        samples: roles that the objective needs responses of.
    Raises:
        ConfigError: the recording does not fit the run, is not there or is damaged. RunError: it cannot be read.
    """
    if config.replay.journal is None:
        return None
    _check_objective(recipe, samples)
    source = _source(config)
    try:
        recording = read_recording(source.ledger)
    except LedgerError as error:
        raise ConfigError(f"replay.journal: {error}") from error
    _check_enough(config, recording)
    folder = run_storage(source).journal
    _check_files(folder, recording)
    _check_rewards(source, _recorded_config(source), config)
    problems = _recorded_problems(source, recording, task)
    vocabulary = vocabulary_size(config.model.path)
    encoder = PromptEncoder(load_tokenizer(config.model.path))
    read = lru_cache(maxsize=1)(partial(_read, folder))  # neighbors are often in one file
    for recorded in _spread(recording.tickets):
        rows = _rows(folder, recorded, read(recorded.file, recorded.sha256))
        _check_rows(config, recorded, rows, describe(graders))
        prompt = encoder.encode(problems[recorded.prompt_id].prompt, problems[recorded.prompt_id].messages)
        _check_prompt(recorded, rows, prompt, vocabulary)
    return ReplayPlan(recording, source.ledger, folder, vocabulary)


def _check_objective(recipe: Recipe, samples: frozenset[Role]) -> None:
    """Refuses an objective that a recording has no columns for, or whose gradient is right for fresh rollouts only."""
    if Role.OPPONENT in samples:
        raise ConfigError(
            f"replay.journal must be empty for objective.recipe {recipe.name}, whose responses meet opponents that are "
            "sampled from the policy of the moment; a recording has none: choose another recipe, or leave replay out"
        )
    for term in recipe.terms:
        if isinstance(term.loss, Score) and "behavior" not in term.needs:
            raise ConfigError(
                f"replay.journal must be empty for objective.recipe {recipe.name}, whose term {term.name} weighs "
                "nothing by the behavior policy and is right on-policy only; choose a recipe that does, such as topr, "
                "or leave replay out"
            )


def _source(config: Config) -> RunDir:
    """The run that recorded."""
    given = config.replay.journal
    assert given is not None
    path = given.parent if given.name == "journal" and (given.parent / "run.json").is_file() else given
    source = RunDir(path)
    for file in (source.run_json, source.ledger, source.config):
        if not file.is_file():
            raise ConfigError(
                f"replay.journal must be the directory of a run, or its folder journal, got {given}, which has no "
                f"{file.name}; name the folder that distrl train made, such as runs/NAME"
            )
    if path == config.run_dir.absolute():
        raise ConfigError(
            f"replay.journal must be another run than this one, got {given}; choose a new name with run.name=..."
        )
    try:
        running = read_state(source) == RunState.RUNNING
    except RunError as error:
        raise ConfigError(f"replay.journal: {error}") from error
    if running:
        raise ConfigError(
            f"replay.journal must be a run that has ended, got {given}, which is running; wait for its end, or stop it "
            f"with: distrl stop {path}"
        )
    return source


def _recorded_config(source: RunDir) -> Mapping[str, Any]:
    # Not load_config: secrets are masked there, and the data may be gone.
    try:
        values = yaml.safe_load(source.config.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"replay.journal: {source.config} must be readable ({error!r}); restore it") from error
    if not isinstance(values, dict):
        raise ConfigError(f"replay.journal: {source.config} must be a mapping of sections; restore it")
    return values


def _check_enough(config: Config, recording: Recording) -> None:
    replay, train, found = config.replay, config.train, len(recording.tickets)
    without = f"{recording.left_out} more without rollouts (dropped, unfinished, or given up by distrl compact)"
    if not found:
        raise ConfigError(
            f"replay.journal must have a ticket that can be replayed, got {replay.journal} with none and {without}; "
            "name another run"
        )
    wanted = train.steps * config.replays_per_step
    if wanted > found * replay.epochs:
        raise ConfigError(
            f"replay.epochs must be at least {math.ceil(wanted / found)}, got {replay.epochs}: {replay.journal} has "
            f"{found} tickets that can be replayed, {without}, and train.steps ({train.steps}) with "
            f"{config.replays_per_step} replayed tickets each take {wanted}; raise it to read the recording again, or "
            "lower train.steps"
        )
    sizes = {recorded.rollouts for recorded in recording.tickets} - {config.rollout.group_size}
    if sizes:
        raise ConfigError(
            f"rollout.group_size must be that of the recording {replay.journal}, {min(sizes)}, got "
            f"{config.rollout.group_size}; set it so"
        )


def _check_files(folder: Folder, recording: Recording) -> None:
    try:
        there = folder.files()
    except OSError as error:
        raise ConfigError(
            f"replay.journal: {folder} must be readable: {cause(error)}; mend it and call again"
        ) from error
    named = {recorded.file for recorded in recording.tickets}
    if missing := sorted(named - there.keys()):
        raise ConfigError(
            f"replay.journal: {folder} must have the {len(named)} files that the recorded run's ledger names, "
            f"{len(missing)} of them are not there, such as {missing[0]}; put them back"
        )


def _check_rewards(source: RunDir, theirs: Mapping[str, Any], config: Config) -> None:
    """Rewards are taken as they were recorded, so that this run must grade alike."""
    ours = mask(config.model_dump(mode="json"))
    graders = theirs.get("reward", {}).get("graders", {}), ours["reward"]["graders"]
    if _essence_of_each(graders[0]) != _essence_of_each(graders[1]):
        raise ConfigError(_other_rewards("reward.graders", source, *graders))
    for section in ("environment", "preference"):
        recorded, own = theirs.get(section, {}), ours[section]
        for key in own:
            if key not in OPERATIONAL and key in recorded and recorded[key] != own[key]:
                raise ConfigError(_other_rewards(f"{section}.{key}", source, recorded[key], own[key]))


def _essence_of_each(graders: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {k: v for k, v in one.items() if k not in OPERATIONAL} for name, one in graders.items()}


def _other_rewards(key: str, source: RunDir, recorded: object, own: object) -> str:
    return (
        f"{key} must be that of the recording {source.path}, {recorded!r}, got {own!r}; rewards are replayed as they "
        "were recorded, not graded again: set it so, or leave replay out"
    )


def _recorded_problems(source: RunDir, recording: Recording, task: Task) -> dict[str, Problem]:
    """The recorded prompts, by id; each must be one that this run trains on."""
    ticket_of = {recorded.prompt_id: recorded.ticket_id for recorded in reversed(recording.tickets)}
    found: dict[str, Problem] = {}
    for index in range(len(task.train)):
        if len(found) == len(ticket_of):
            break
        problem = task.train[index]
        if problem.prompt_id in ticket_of:
            found[problem.prompt_id] = problem
    strange = sorted(ticket_of.keys() - found.keys(), key=lambda prompt_id: ticket_of[prompt_id])
    if strange:
        heldout = len({problem.prompt_id for problem in task.heldout} & set(strange))
        held_out = f", {heldout} of them held out here" if heldout else ""
        raise ConfigError(
            f"replay.journal must have prompts that this run trains on, got {source.path} with {len(strange)} of "
            f"{len(ticket_of)} that are not among them{held_out}, the first in its ticket {ticket_of[strange[0]]}; set "
            f"data as in {source.config}"
        )
    return found


def _spread(tickets: Sequence[Recorded]) -> list[Recorded]:
    """A few tickets, the first and the last among them."""
    last = len(tickets) - 1
    places = {round(i * last / max(1, LOOKED_INTO - 1)) for i in range(LOOKED_INTO)}
    return [tickets[place] for place in sorted(places)]


def _read(folder: Folder, file: str, sha256: str) -> pa.Table:
    try:
        return read_verified(folder, file, sha256)
    except SchemaError as error:
        raise ConfigError(f"replay.journal: {error}; put the file back as it was") from error


def _rows(folder: Folder, recorded: Recorded, table: pa.Table) -> pa.RecordBatch:
    rows = ticket_rows(table, recorded.ticket_id, recorded.redraw)
    if rows.num_rows != recorded.rollouts:
        raise ConfigError(
            f"replay.journal: {folder / recorded.file} must hold {recorded.rollouts} rollouts of recorded ticket "
            f"{recorded.ticket_id}, got {rows.num_rows}; look at distrl audit of that run"
        )
    return rows


def _check_rows(config: Config, recorded: Recorded, rows: pa.RecordBatch, grader: str) -> None:
    first = rows.slice(0, 1).to_pylist()[0]
    sampling = config.sampling
    if not math.isclose(first["temperature"], sampling.temperature, rel_tol=1e-6):
        raise ConfigError(
            f"rollout.temperature must be that of the recording {config.replay.journal}, {first['temperature']:g}, got "
            f"{sampling.temperature:g}; log-probabilities of both are compared: set it so"
        )
    if first["max_new_tokens"] > sampling.max_new_tokens:
        raise ConfigError(
            f"rollout.max_new_tokens must be at least that of the recording {config.replay.journal}, "
            f"{first['max_new_tokens']}, got {sampling.max_new_tokens}; raise it"
        )
    if first["grader"] != grader:
        raise ConfigError(
            f"reward.grader must be that of the recording {config.replay.journal}, {first['grader']!r}, got "
            f"{grader!r}; rewards are replayed as they were recorded, not graded again: set it so, or leave replay out"
        )


def _check_prompt(recorded: Recorded, rows: pa.RecordBatch, prompt: tuple[int, ...], vocabulary: int) -> None:
    """The prompt has the same tokens; with an environment its first observation follows."""
    for row in rows.select(["prompt_token_ids", "response_token_ids"]).to_pylist():
        found = tuple(row["prompt_token_ids"])
        if found[: len(prompt)] != prompt or max((*found, *row["response_token_ids"])) >= vocabulary:
            raise ConfigError(
                f"model.path must have the tokenizer of the recording: the prompt of recorded ticket "
                f"{recorded.ticket_id} is {_short(found)} there, and {_short(prompt)} here, with {vocabulary} tokens "
                "in the vocabulary; train a model with the same tokenizer and chat template"
            )


def _short(tokens: Sequence[int]) -> str:
    shown = " ".join(map(str, tokens[:8]))
    return f"tokens {shown}" + (" ..." if len(tokens) > 8 else "")


def in_words(config: Config, plan: ReplayPlan) -> str:
    """What is replayed, on a line."""
    left_out = f", {plan.recording.left_out} more have no rollouts" if plan.recording.left_out else ""
    times = "once" if config.replay.epochs == 1 else f"at most {config.replay.epochs} times"
    return (
        f"replays   {config.replays_per_step} of {config.train.tickets_per_step} tickets a step from "
        f"{config.replay.journal}: {len(plan.recording.tickets)} recorded tickets, each {times}{left_out}"
    )
