"""Which generation actors a config asks for, and which weights they hold."""

from pathlib import Path
from typing import Any

import pytest

from deploy.check import check_run
from deploy.explain import explain
from deploy.roles import own_actors, weights_by_role
from distrl.config import Config, make_config
from distrl.errors import ConfigError
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.schema import Role
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from tests.builders import refusal

EVERYBODY = frozenset(Role)


def config(path: Path = Path("m"), **generation: int) -> Config:
    data: dict[str, Any] = {"source": "sort_digits", "heldout_size": 8, "options": {"digits": 4}}
    return make_config({"model": {"path": path}, "data": data, "generation": generation, "evaluation": {"problems": 8}})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("model")
    size = TinyArchitecture(hidden_size=32, layers=1, heads=2, intermediate_size=32)
    make_tiny_model(directory, character_tokenizer(ALPHABET), seed=0, architecture=size)
    return directory


def test_roles_without_actors_of_their_own_share_those_of_the_policy_with_all_their_weights() -> None:
    assert weights_by_role(config(), EVERYBODY) == {Role.POLICY: ("opponent", "policy", "reference")}
    assert weights_by_role(config(), frozenset({Role.POLICY, Role.EVALUATION})) == {Role.POLICY: ("policy",)}


def test_actors_of_a_role_hold_its_weights_alone_and_those_of_the_policy_do_not() -> None:
    chosen = config(evaluation_actors=1, opponent_actors=2)
    assert own_actors(chosen) == {Role.EVALUATION: 1, Role.REFERENCE: 0, Role.OPPONENT: 2}
    assert weights_by_role(chosen, EVERYBODY) == {
        Role.POLICY: ("policy", "reference"),
        Role.EVALUATION: ("policy",),
        Role.OPPONENT: ("opponent",),
    }


def test_actors_for_a_role_that_nothing_is_sampled_for_are_refused(model: Path) -> None:
    for role in ("reference", "opponent"):
        chosen = config(model, **{f"{role}_actors": 2})
        assert refusal(ConfigError, lambda chosen=chosen: check_run(chosen)) == (  # type: ignore[misc]
            f"generation.{role}_actors must be 0 for objective.recipe topr as configured, got 2; nothing is sampled "
            "for that role: remove it"
        )


def test_actors_for_evaluations_are_told_of(model: Path) -> None:
    chosen = config(model, evaluation_actors=2)
    plan = check_run(chosen)
    assert plan.samples == {Role.POLICY, Role.EVALUATION}
    (line,) = [line for line in explain(chosen, plan) if line.startswith("samples")]
    assert line.endswith("; 2 more for evaluation alone")
