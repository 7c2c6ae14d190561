import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distrl.decoding import sample_texts
from distrl.errors import DataError, StageError
from distrl.models import TinyArchitecture, load_model, load_tokenizer, make_tiny_model
from distrl.seeding import Purpose, sampling_noise
from distrl.tasks import DataConfig, Problem, Task, load_task
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from distrl.warmup import WarmupPlan, WarmupReport, cached_model, warm_up

SMALL = TinyArchitecture(hidden_size=32, layers=1, heads=2, intermediate_size=64, context_length=16)
DATA = DataConfig(options={"digits": 2}, train_size=500, heldout_size=4)
PLAN = WarmupPlan(steps=12, batch_size=8, target_accuracy=None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "source", character_tokenizer(ALPHABET), seed=0, architecture=SMALL)
    return tmp_path / "source"


def _run(source: Path, name: str, plan: WarmupPlan, task: Task | None = None) -> tuple[WarmupReport, list[float]]:
    losses: list[float] = []
    task = task or load_task(DATA)
    report = warm_up(source, source.parent / name, task, plan, lambda step, steps, loss: losses.append(loss))
    return report, losses


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def _log_probability(directory: Path, problem: Problem) -> list[float]:
    """Of each token of the answer and its end, one forward pass per problem: nothing is padded."""
    model, tokenizer = load_model(directory, torch.float32), load_tokenizer(directory)
    prompt, answer = tokenizer.encode(problem.prompt), [*tokenizer.encode(problem.answer), tokenizer.eos_token_id]
    with torch.no_grad():
        logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return [logps[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer)]


MIXED = tuple(Problem.of(f"{text}>", "".join(sorted(text))) for text in ("31", "4", "275", "9982", "10"))
"""Five problems of several lengths: one of them validates."""


def test_loss_falls_far_below_that_of_guessing(source: Path) -> None:
    _, losses = _run(source, "out", replace(PLAN, steps=80, batch_size=16))
    # At first nothing is known: the loss is about log 13, the vocabulary. Knowing that answers are two digits and an
    # end already gives 2/3 log 10.
    assert losses[0] == pytest.approx(torch.log(torch.tensor(13.0)).item(), abs=0.1)
    assert sum(losses[-5:]) / 5 < 2 / 3 * torch.log(torch.tensor(10.0)).item()


def test_first_loss_is_the_mean_over_answer_tokens_and_ends(source: Path) -> None:
    # Four of five equal problems are trained on, so that every batch is known.
    task = Task((Problem.of("31>", "13"),) * 5, (), "exact")
    _, losses = _run(source, "out", PLAN, task)
    logps = _log_probability(source, task.train[0])
    assert losses[0] == pytest.approx(-sum(logps) / len(logps), rel=1e-5)


def test_expected_accuracy_is_the_mean_probability_of_the_answers_whatever_their_lengths(source: Path) -> None:
    task = Task(MIXED * 5, (), "exact")  # The last five, one of each, validate.
    report, _ = _run(source, "out", replace(PLAN, steps=40), task)
    directory = source.parent / "out"
    probabilities = [torch.tensor(_log_probability(directory, p)).sum().exp().item() for p in MIXED]
    assert report.expected_accuracy == pytest.approx(sum(probabilities) / 5, rel=1e-4)


def test_expected_accuracy_is_what_sampling_at_temperature_1_estimates(source: Path) -> None:
    task = Task(MIXED[:1] * 5, (), "exact")
    report, _ = _run(source, "out", replace(PLAN, steps=45), task)
    p = report.expected_accuracy
    assert 0.02 < p < 0.98
    model, tokenizer = load_model(source.parent / "out", torch.float32), load_tokenizer(source)
    noise = sampling_noise((0, int(Purpose.EVALUATION)), 4000, 3)
    texts = sample_texts(model, tokenizer, ["31>"] * 4000, noise)
    assert texts.count("13") / 4000 == pytest.approx(p, abs=4 * (p * (1 - p) / 4000) ** 0.5)


def test_same_plan_gives_the_same_model_and_another_seed_another_one(source: Path) -> None:
    first, losses = _run(source, "a", PLAN)
    torch.manual_seed(123)
    second, again = _run(source, "b", PLAN)
    _run(source, "c", replace(PLAN, seed=1))
    assert replace(first, wall_s=0) == replace(second, wall_s=0)
    assert losses == again
    a, b, c = (_weights(source.parent / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])


class Watched:
    """A training set that remembers what it was asked for."""

    def __init__(self, task: Task) -> None:
        self._train = task.train
        self.indices: list[int] = []

    def __len__(self) -> int:
        return len(self._train)

    def __getitem__(self, index: int, /) -> Problem:
        self.indices.append(index)
        return self._train[index]


def test_validation_problems_are_not_trained_on(source: Path) -> None:
    watched = Watched(load_task(DATA))
    _run(source, "out", PLAN, Task(watched, (), "exact"))
    # A fifth of 500 problems, the last ones, and 12 batches of 8 of the others; held-out problems there are none.
    assert watched.indices[:100] == list(range(400, 500))
    assert len(watched.indices) == 100 + 12 * 8
    assert max(watched.indices[100:]) < 400


def test_progress_is_told_after_every_step(source: Path) -> None:
    told: list[tuple[int, int]] = []
    warm_up(source, source.parent / "out", load_task(DATA), PLAN, lambda step, steps, _: told.append((step, steps)))
    assert told == [(step, 12) for step in range(1, 13)]


@pytest.mark.parametrize(
    ("target", "steps", "reached"),
    [(0.0, 10, True), (1.0, 12, False), (None, 12, True)],
)
def test_training_stops_at_the_first_check_that_meets_the_target(
    source: Path, target: float | None, steps: int, reached: bool
) -> None:
    report, losses = _run(source, "out", replace(PLAN, target_accuracy=target))
    assert (report.steps, len(losses), report.reached_target) == (steps, steps, reached)
    assert report.loss == losses[-1]


def test_sampled_accuracy_is_one_where_the_answer_is_known_by_heart(source: Path) -> None:
    report, _ = _run(source, "out", replace(PLAN, steps=200), Task(MIXED[:1] * 10, (), "exact"))
    assert report.expected_accuracy > 0.99
    assert report.sampled_accuracy == 1.0


def test_response_that_the_tasks_grader_cannot_judge_is_not_counted_as_wrong(source: Path) -> None:
    task = Task(MIXED[:1] * 5, (), "reasoning_gym")
    with pytest.raises(StageError, match=rf"^grader reasoning_gym failed on prompt {MIXED[0].prompt_id}: "):
        _run(source, "out", PLAN, task)


def test_number_of_threads_is_put_back(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    during: set[int] = set()
    plan = replace(PLAN, threads=before + 1)
    warm_up(source, source.parent / "out", load_task(DATA), plan, lambda *_: during.add(torch.get_num_threads()))
    assert (during, torch.get_num_threads()) == ({before + 1}, before)


def test_result_is_a_model_directory_with_its_tokenizer(source: Path) -> None:
    _run(source, "out", PLAN)
    assert load_tokenizer(source.parent / "out").encode("31>") == load_tokenizer(source).encode("31>")
    assert load_model(source.parent / "out", torch.float32).config.eos_token_id == 1


def test_character_outside_the_alphabet_is_refused(source: Path) -> None:
    task = Task((Problem.of("x>", "1"),) * 5, (), "exact")
    with pytest.raises(DataError) as error:
        _run(source, "out", PLAN, task)
    assert str(error.value) == (
        "tokenizer must be able to encode every problem, got 'x>': WordLevel error: Missing [UNK] token from the "
        "vocabulary; pass an alphabet with all characters of the task"
    )


def test_too_few_problems_are_refused(source: Path) -> None:
    with pytest.raises(DataError) as error:
        _run(source, "out", PLAN, Task(MIXED[:4], (), "exact"))
    assert str(error.value) == (
        "task must have at least 5 training problems, got 4; one in five is kept for validation"
    )


def _cached(cache: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {"data": DATA, "alphabet": ALPHABET, "seed": 0, "architecture": SMALL}
    return cached_model(cache, **{**values, "plan": replace(PLAN, steps=2), **changes})


def test_cached_model_is_made_once(tmp_path: Path) -> None:
    told: list[int] = []
    first = _cached(tmp_path / "cache", progress=lambda step, *_: told.append(step))
    second = _cached(tmp_path / "cache", progress=lambda step, *_: told.append(step))
    assert first == second
    assert told == [1, 2]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name]
    assert load_model(first, torch.float32).config.vocab_size == 13


def test_cached_model_tells_what_determined_it_and_how_it_went(tmp_path: Path) -> None:
    content = json.loads((_cached(tmp_path) / "warmup.json").read_text())
    assert content["report"]["steps"] == 2
    assert content["key"]["architecture"]["hidden_size"] == 32
    assert set(content["key"]) == {
        "code", "torch", "transformers", "data", "alphabet", "seed", "architecture", "plan",
    }  # fmt: skip


def test_everything_that_determines_a_model_is_in_its_name(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"alphabet": ALPHABET[::-1]},
        {"data": DATA.model_copy(update={"seed": 1})},
        {"architecture": replace(SMALL, intermediate_size=32)},
        {"plan": replace(PLAN, steps=1)},
        {"plan": replace(PLAN, steps=2, learning_rate=1e-3)},
        {"plan": replace(PLAN, steps=2, seed=1)},
        {"plan": replace(PLAN, steps=2, target_accuracy=0.5)},
    ]
    assert len({_cached(tmp_path, **change) for change in changes}) == len(changes)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_interrupted_warm_up_leaves_nothing_that_is_taken_for_a_model(tmp_path: Path) -> None:
    def die(*_: object) -> None:
        raise Killed

    with pytest.raises(Killed):
        _cached(tmp_path, progress=die)
    assert list(tmp_path.iterdir()) == []
    assert (_cached(tmp_path) / "warmup.json").is_file()


def test_model_that_another_process_made_first_is_kept(tmp_path: Path) -> None:
    # The other process is this one, asking for the same model in the middle of the warm-up.
    made_first: list[Path] = []

    def meanwhile(step: int, *_: object) -> None:
        if step == 1:
            made_first.append(_cached(tmp_path))
            (made_first[0] / "mark").touch()

    final = _cached(tmp_path, progress=meanwhile)
    assert [final] == made_first == list(tmp_path.iterdir())
    assert (final / "mark").exists()


def test_remnant_of_a_model_is_replaced(tmp_path: Path) -> None:
    final = _cached(tmp_path)
    (final / "warmup.json").unlink()
    (final / "model.safetensors").unlink()
    assert _cached(tmp_path) == final
    assert load_model(final, torch.float32).config.vocab_size == 13
