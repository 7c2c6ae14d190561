"""What is refused of a run that replays: keys that it would not read, and recordings that do not fit."""

import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from deploy.check import check_run
from deploy.explain import explain
from deploy.learner import loop_settings
from deploy.report.tables import versions
from deploy.run import wanted
from deploy.run_dir import RunDir, write_json
from deploy.run_state import _process_start
from distrl.config import Config, make_config
from distrl.errors import ConfigError
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.schema import Role
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from tests.builders import refusal
from tests.recorded import record_run

SMALL = TinyArchitecture(hidden_size=16, layers=1, heads=2, intermediate_size=16)


@pytest.fixture(scope="module", name="model")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("model")
    make_tiny_model(directory, character_tokenizer(ALPHABET), seed=0, architecture=SMALL)
    return directory


def config(model: Path, directory: Path, name: str = "new", /, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": str(directory), "name": name},
        "model": {"path": str(model)},
        "data": {"source": "sort_digits", "heldout_size": 8, "options": {"digits": 2}},
        "rollout": {"group_size": 2, "max_new_tokens": 4},
        "train": {"steps": 4, "tickets_per_step": 4},
    }
    return make_config(values, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


@pytest.fixture(name="recorded")
def recording(model: Path, tmp_path: Path) -> Path:
    return record_run(config(model, tmp_path, "recorded"), 16)


def replaying(model: Path, recorded: Path, **changes: Any) -> Config:
    return config(model, recorded.parent, **{"replay.journal": str(recorded), **changes})


# Keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"replay.journal": None, "replay.ratio": 0.5},
            "replay.ratio must be left out where replay.journal is empty: nothing is replayed, got 0.5; remove it (its "
            "default is 1.0), or set replay.journal",
        ),
        (
            {"replay.ratio": 0.3},
            "replay.ratio must give a whole number of train.tickets_per_step (4), got 0.3, which gives 1.2; set it to "
            "a multiple of 1 / 4",
        ),
        (
            {"replay.ratio": 0.5, "train.max_staleness": 0},
            "train.max_staleness must be at least 1 where replay.journal is set, got 0; it promises that all rollouts "
            "come from the newest weights, and recorded ones do not: raise it, or leave replay out",
        ),
        (
            {"train.max_staleness": 5},
            "train.max_staleness must be left out where replay.ratio is 1: nothing is sampled for training, got 5; "
            "remove it (its default is 2), or lower replay.ratio",
        ),
        (
            {"generation.actors": 2},
            "generation.actors must be left out where replay.ratio is 1: nothing is sampled for training, got 2; "
            "remove it (its default is 1), or lower replay.ratio",
        ),
        (
            {"evaluation.problems": 8},
            "evaluation.problems must be left out where replay.ratio is 1 and generation.evaluation_actors is 0: "
            "nothing is sampled, graded or evaluated, got 8; remove it (its default is 1024), or set "
            "generation.evaluation_actors",
        ),
    ],
)
def test_keys_that_contradict_replay_or_that_nobody_would_read(
    model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    given = {"replay.journal": str(tmp_path), **changes}
    assert refusal(ConfigError, lambda: config(model, tmp_path, **given)) == message


# Plans ------------------------------------------------------------------------------------------------------------


def test_an_offline_run_has_nobody_who_samples_or_grades(model: Path, recorded: Path) -> None:
    offline = replaying(model, recorded)
    plan = check_run(offline)
    assert plan.samples == frozenset()
    assert wanted(offline, plan) == {"replay": 1}
    lines = explain(offline, plan)
    assert f"replays   4 of 4 tickets a step from {recorded}: 16 recorded tickets, each once" in lines
    assert "samples   nothing: no generation and no grading actors" in lines
    with_reference = replaying(model, recorded, **{"objective.options": {"kl_coefficient": 0.1}})
    assert wanted(with_reference, check_run(with_reference)) == {"reference": 1, "replay": 1}


def test_a_learner_keeps_old_weights_to_compare_with_only_where_something_is_sampled(
    model: Path, recorded: Path
) -> None:
    run_dir = RunDir(recorded)
    assert loop_settings(replaying(model, recorded), run_dir).logp_check.rollouts == 0
    assert loop_settings(replaying(model, recorded, **{"replay.ratio": 0.5}), run_dir).logp_check.rollouts == 8


def test_an_offline_run_evaluates_with_actors_of_its_own(model: Path, recorded: Path) -> None:
    changes = {"generation.evaluation_actors": 1, "evaluation.problems": 8, "evaluation.problems_during": 4}
    offline = replaying(model, recorded, **changes)
    plan = check_run(offline)
    assert plan.samples == {Role.EVALUATION}
    assert wanted(offline, plan) == {"evaluation": 1, "grading": 1, "replay": 1}


def test_a_mixed_run_samples_the_rest_and_bounds_its_age_alone(model: Path, recorded: Path) -> None:
    changes = {"replay.ratio": 0.25, "evaluation.problems": 8, "train.steps": 16}
    # The folder journal of the run does as well.
    mixed = replaying(model, recorded, **{**changes, "replay.journal": str(recorded / "journal")})
    plan = check_run(mixed)
    assert wanted(mixed, plan) == {"generation": 1, "grading": 1, "replay": 1}
    assert (mixed.replays_per_step, mixed.admission.tickets_per_step) == (1, 3)


# Recordings -------------------------------------------------------------------------------------------------------


def refused(model: Path, recorded: Path, **changes: Any) -> str:
    chosen = replaying(model, recorded, **changes)
    return refusal(ConfigError, lambda: check_run(chosen))


def test_a_recording_that_ends_before_the_run_does(model: Path, recorded: Path) -> None:
    assert refused(model, recorded, **{"train.steps": 9}) == (
        f"replay.epochs must be at least 3, got 1: {recorded} has 16 tickets that can be replayed, 0 more without "
        "rollouts (dropped, unfinished, or given up by distrl compact), and train.steps (9) with 4 replayed tickets "
        "each take 36; raise it to read the recording again, or lower train.steps"
    )
    check_run(replaying(model, recorded, **{"train.steps": 9, "replay.epochs": 3}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout.group_size": 4}, "rollout.group_size must be that of the recording {run}, 2, got 4; set it so"),
        (
            {"rollout.temperature": 0.5},
            "rollout.temperature must be that of the recording {run}, 1, got 0.5; log-probabilities of both are "
            "compared: set it so",
        ),
        (
            {"rollout.max_new_tokens": 3},
            "rollout.max_new_tokens must be at least that of the recording {run}, 4, got 3; raise it",
        ),
        (
            {"reward.grader": "numeric"},
            "reward.grader must be that of the recording {run}, 'exact', got 'numeric'; rewards are replayed as "
            "they were recorded, not graded again: set it so, or leave replay out",
        ),
        (
            {"objective.recipe": "reinforce"},
            "replay.journal must be empty for objective.recipe reinforce, whose term policy weighs nothing by the "
            "behavior policy and is right on-policy only; choose a recipe that does, such as topr, or leave replay out",
        ),
        (
            {"run.name": "recorded"},
            "replay.journal must be another run than this one, got {run}; choose a new name with run.name=...",
        ),
    ],
)
def test_what_the_recording_has_otherwise(model: Path, recorded: Path, changes: dict[str, Any], message: str) -> None:
    assert refused(model, recorded, **changes) == message.format(run=recorded)


def test_opponents_are_not_recorded(model: Path, recorded: Path) -> None:
    changes = {"objective.recipe": "nash_mp", "preference.function": "reward_difference"}
    assert refused(model, recorded, **changes) == (
        "replay.journal must be empty for objective.recipe nash_mp, whose responses meet opponents that are sampled "
        "from the policy of the moment; a recording has none: choose another recipe, or leave replay out"
    )


def test_prompts_that_the_run_does_not_train_on(model: Path, recorded: Path) -> None:
    message = refused(model, recorded, **{"data.options": {"digits": 3}})
    found = len({i for (i,) in prompts(recorded)})
    assert message == (
        f"replay.journal must have prompts that this run trains on, got {recorded} with {found} of {found} that are "
        f"not among them, the first in its ticket 0; set data as in {recorded}/config.yaml"
    )


def prompts(recorded: Path) -> list[Any]:
    with sqlite3.connect(recorded / "ledger.sqlite") as db:
        return db.execute("SELECT prompt_id FROM tickets").fetchall()


def test_another_tokenizer(model: Path, recorded: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "other", character_tokenizer(ALPHABET[::-1]), seed=0, architecture=SMALL)
    message = refused(model, recorded, **{"model.path": str(tmp_path / "other")})
    assert message.startswith(
        "model.path must have the tokenizer of the recording: the prompt of recorded ticket 0 is tokens "
    )
    assert message.endswith("in the vocabulary; train a model with the same tokenizer and chat template")


def test_other_graders_behind_the_same_names(model: Path, tmp_path: Path) -> None:
    graders = {"reward.graders": {"exact": {"weight": 1.0}, "regex": {"weight": 0.1, "options": {"pattern": "1"}}}}
    recorded = record_run(config(model, tmp_path, "recorded", **graders), 16)
    slower = {**graders["reward.graders"], "exact": {"weight": 1.0, "timeout_s": 3.0}}
    check_run(replaying(model, recorded, **{"reward.graders": slower}))  # no reward depends on that
    other = {**graders["reward.graders"], "regex": {"weight": 0.1, "options": {"pattern": "2"}}}
    message = refused(model, recorded, **{"reward.graders": other})
    assert message.startswith(f"reward.graders must be that of the recording {recorded}, {{'exact': ")
    assert message.endswith("not graded again: set it so, or leave replay out")


def test_a_run_that_runs_is_not_replayed(model: Path, recorded: Path) -> None:
    alive = {"format": 1, "name": "recorded", "state": "running", "pid": os.getpid()}
    write_json(recorded / "run.json", {**alive, "process_started": _process_start(os.getpid())})
    assert refused(model, recorded) == (
        f"replay.journal must be a run that has ended, got {recorded}, which is running; wait for its end, or stop it "
        f"with: distrl stop {recorded}"
    )


def test_what_is_no_run(model: Path, recorded: Path) -> None:
    (recorded / "ledger.sqlite").unlink()
    assert refused(model, recorded) == (
        f"replay.journal must be the directory of a run, or its folder journal, got {recorded}, which has no "
        "ledger.sqlite; name the folder that distrl train made, such as runs/NAME"
    )


def test_files_that_are_damaged_or_missing(model: Path, recorded: Path) -> None:
    file = recorded / "journal/0.arrow"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    message = refused(model, recorded)
    assert message.startswith(f"replay.journal: journal file {file}: must have sha256 ")
    assert message.endswith("; the file was damaged; put the file back as it was")
    file.unlink()
    assert refused(model, recorded) == (
        f"replay.journal: {recorded}/journal must have the 1 files that the recorded run's ledger names, 1 of them are "
        "not there, such as 0.arrow; put them back"
    )


def test_the_recorded_config_cannot_be_read(model: Path, recorded: Path) -> None:
    (recorded / "config.yaml").write_text("- a list\n")
    assert refused(model, recorded) == (
        f"replay.journal: {recorded}/config.yaml must be a mapping of sections; restore it"
    )


def test_a_page_says_of_a_replayed_rollout_that_its_versions_are_of_another_run() -> None:
    assert [versions(None, None), versions(3, 3), versions(3, 5)] == ["of another run", "3", "3 to 5"]
