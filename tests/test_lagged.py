"""The loop of the off-policy study: ages are forced, not bounded, and its numbers are a function of its arguments."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.lagged import read_journal, record_journal, train_lagged, train_offline
from distrl.config import Config, make_config
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tokenizer import character_tokenizer

STEPS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("model")
    size = TinyArchitecture(hidden_size=16, layers=1, heads=2, intermediate_size=16, context_length=16)
    make_tiny_model(directory, character_tokenizer("0123456789>"), seed=0, architecture=size)
    return directory


def config(model: Path, **changes: Any) -> Config:
    values: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {"source": "sort_digits", "heldout_size": 4, "options": {"digits": 4}},
        "reward": {"grader": "benchmarks.graders:plus_or_minus"},
        "rollout": {"group_size": 2, "max_new_tokens": 4},
        "generation": {"slots": 32},
        "objective": {"recipe": "reinforce"},
        "train": {"steps": STEPS, "tickets_per_step": 2, "learning_rate": 1e-3},
        "evaluation": {"problems": 4, "every_steps": 2},
    }
    return make_config(values, [f"{key}={value}" for key, value in changes.items()])


@pytest.mark.parametrize(("lag", "ages"), [(0, (0, 0, 0, 0, 0)), (2, (0, 1, 2, 2, 2)), (9, (0, 1, 2, 3, 4))])
def test_a_batch_is_trained_exactly_so_many_steps_after_it_was_sampled(
    model: Path, lag: int, ages: tuple[int, ...]
) -> None:
    outcome = train_lagged(config(model), lag)
    assert outcome.staleness == ages
    assert [point.step for point in outcome.points] == [0, 2, 4, 5]


def test_the_same_arguments_give_the_same_bits_and_another_lag_or_seed_others(model: Path) -> None:
    first, again = train_lagged(config(model), 2), train_lagged(config(model), 2)
    assert first.weights_sha256 == again.weights_sha256
    others = {train_lagged(config(model), 0).weights_sha256}
    others.add(train_lagged(config(model, **{"run.seed": 1}), 2).weights_sha256)
    assert len(others | {first.weights_sha256}) == 3


def test_offline_training_reads_the_journal_again_and_again_and_samples_nothing(model: Path, tmp_path: Path) -> None:
    settings = config(model)
    record_journal(settings, tmp_path / "journal", batches=2)
    tickets = list(read_journal(tmp_path / "journal"))
    assert [rows.column("ticket_id")[0].as_py() for rows, *_ in tickets] == [0, 1, 2, 3]
    outcome = train_offline(settings, tmp_path / "journal")
    assert outcome.staleness == (0, 1, 2, 3, 4)
    # Until the batches repeat, it is training on what the start's weights sampled: a lag that never ends.
    two = config(model, **{"train.steps": 2})
    assert train_offline(two, tmp_path / "journal").weights_sha256 == train_lagged(two, 9).weights_sha256
