"""Supervised warm-up: a model that solves a task now and then, so that reinforcement learning has something to
reinforce.

    directory = cached_model(Path.home() / ".cache/distrl", DataConfig(), alphabet=ALPHABET, seed=0)
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from distrl.decoding import sample_texts
from distrl.errors import DataError
from distrl.models import TinyArchitecture, load_model, load_tokenizer, make_tiny_model, save_model
from distrl.prompts import PromptEncoder
from distrl.rewards import make_grader
from distrl.seeding import Purpose, generator, sampling_noise
from distrl.tasks import DataConfig, Problem, Task, load_task
from distrl.tokenizer import character_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int, float], None]
"""Called after each step with the step (from 1), the most steps and the loss."""

_CODE = 1
"""Raised with every change of the code that changes its weights; part of a cached model's key."""
_REPORT = "warmup.json"
_IGNORED = -100  # Target of a position without loss, as in torch.
_RAMP_STEPS = 50
_CHECK_EVERY = 10
_VALIDATION = 256


@dataclass(frozen=True, slots=True)
class WarmupPlan:
    """How to warm a model up."""

    steps: int = 400
    """Most optimizer steps, >= 1."""
    batch_size: int = 32
    """Problems per step."""
    learning_rate: float = 3e-3
    """AdamW's, after a linear rise over the first 50 steps."""
    seed: int = 0
    """Decides the order of the problems, >= 0."""
    threads: int = 1
    """CPU threads of torch. The same model results only for the same number."""
    target_accuracy: float | None = 0.25
    """Stop once this share of sampled answers is expected to be right; None goes through all steps."""


@dataclass(frozen=True, slots=True)
class WarmupReport:
    """What a warm-up did. Its accuracies are of problems that it was not trained on, but that are not held out."""

    steps: int
    loss: float
    """Of the last step: mean negative log-likelihood (nats) of an answer token."""
    expected_accuracy: float
    """Mean probability of exactly the reference answer, sampled at temperature 1."""
    sampled_accuracy: float
    """Share of responses sampled at temperature 1 that the task's grader calls correct."""
    reached_target: bool
    wall_s: float


def warm_up(
    source: Path, destination: Path, task: Task, plan: WarmupPlan, progress: Progress | None = None
) -> WarmupReport:
    """Trains the model of one directory on a task's answers and writes it to another.

    Minimizes the cross entropy of answer and end-of-sequence token, given the prompt, with AdamW. Deterministic,
    given the plan, on one machine. A share of the *training* problems is kept for validation; held-out ones are not
    touched.

    Raises:
        DataError: `source` is not a model directory, or the tokenizer cannot encode a problem.
    """
    started_s = time.monotonic()
    model = load_model(source, torch.float32, setting="source")
    tokenizer = load_tokenizer(source, setting="source")
    validation_size = min(_VALIDATION, len(task.train) // 5)
    if validation_size == 0:
        raise DataError(
            f"task must have at least 5 training problems, got {len(task.train)}; one in five is kept for validation"
        )
    train_size = len(task.train) - validation_size
    validation = [task.train[train_size + i] for i in range(validation_size)]
    with _threads(plan.threads):
        steps, loss = _train(model, tokenizer, task, train_size, validation, plan, progress)
        expected = _expected_accuracy(model, tokenizer, validation)
        sampled = _sampled_accuracy(model, tokenizer, validation, task.default_reward, plan.seed)
    save_model(destination, model, tokenizer)
    reached = plan.target_accuracy is None or expected >= plan.target_accuracy
    return WarmupReport(steps, loss, expected, sampled, reached, time.monotonic() - started_s)


def cached_model(
    cache: Path,
    data: DataConfig,
    *,
    alphabet: str,
    seed: int,
    architecture: TinyArchitecture | None = None,
    plan: WarmupPlan | None = None,
    progress: Progress | None = None,
) -> Path:
    """The directory of a tiny, warmed-up model, made on the first call and found again on later ones.

    It appears in the cache under its name at once and complete, with its `warmup.json` (key and report), or not at
    all: processes may ask for the same model at the same time, and one that is killed leaves nothing that is taken
    for a model.

    Args:
        cache: directory of all such models; made where it is missing.
        alphabet: every character of the task, see `character_tokenizer`.
        seed: of the initial weights.
        progress: see `warm_up`; not called where the model is found.
    """
    architecture, plan = architecture or TinyArchitecture(), plan or WarmupPlan()
    key = {
        "code": _CODE,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "data": data.model_dump(mode="json"),
        "alphabet": alphabet,
        "seed": seed,
        "architecture": asdict(architecture),
        "plan": asdict(plan),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    final = cache / f"{data.source}-{digest[:16]}"
    if (final / _REPORT).is_file():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=cache) as temporary:
        initial, warm = Path(temporary, "initial"), Path(temporary, "warm")
        make_tiny_model(initial, character_tokenizer(alphabet), seed=seed, architecture=architecture)
        report = warm_up(initial, warm, load_task(data), plan, progress)
        (warm / _REPORT).write_text(json.dumps({"key": key, "report": asdict(report)}, indent=2) + "\n")
        _publish(warm, final)
    return final


def _publish(made: Path, final: Path) -> None:
    try:
        made.rename(final)
    except OSError:
        if (final / _REPORT).is_file():
            return  # Another process was faster; its model is the same.
        if not final.is_dir():
            raise
        # A remnant, for example of a cache that was removed in part.
        shutil.rmtree(final)
        made.rename(final)


def _train(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    train_size: int,
    validation: Sequence[Problem],
    plan: WarmupPlan,
    progress: Progress | None,
) -> tuple[int, float]:
    """Steps taken, and the last loss. Without dropout: the model stays in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    rng = generator(plan.seed, Purpose.WARMUP)
    step, loss, target = 0, 0.0, plan.target_accuracy
    for step in range(1, plan.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * min(1.0, step / _RAMP_STEPS)
        batch = [task.train[int(i)] for i in rng.integers(train_size, size=plan.batch_size)]
        nll_BT, targets_BT = _answer_nll(model, tokenizer, batch)
        mean_nll = nll_BT.sum() / (targets_BT != _IGNORED).sum()
        optimizer.zero_grad()
        mean_nll.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss = mean_nll.item()
        if progress is not None:
            progress(step, plan.steps, loss)
        if target is not None and step % _CHECK_EVERY == 0:
            accuracy = _expected_accuracy(model, tokenizer, validation)
            if accuracy >= target:
                break
    return step, loss


def _answer_nll(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", problems: Sequence[Problem]
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood [B, T] of the answers' tokens and ends, 0 elsewhere; and the targets [B, T]."""
    rows, starts = [], []
    for problem in problems:
        prompt = _encode_prompt(tokenizer, problem)
        rows.append([*prompt, *_encode_answer(tokenizer, problem), int(tokenizer.eos_token_id)])
        starts.append(len(prompt))
    width = max(map(len, rows))
    # Attention is causal: padding on the right is seen by no answer, whatever its token.
    tokens_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    targets_BT = torch.full((len(rows), width - 1), _IGNORED)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        targets_BT[i, start - 1 : len(row) - 1] = torch.tensor(row[start:])
    logits_BTV = model(tokens_BT[:, :-1], use_cache=False).logits
    nll_BT = cross_entropy(logits_BTV.float().mT, targets_BT, reduction="none", ignore_index=_IGNORED)
    return nll_BT, targets_BT


def _encode_prompt(tokenizer: "PreTrainedTokenizerBase", problem: Problem) -> tuple[int, ...]:
    with _naming(problem.prompt):
        return PromptEncoder(tokenizer).encode(problem.prompt, problem.messages)


def _encode_answer(tokenizer: "PreTrainedTokenizerBase", problem: Problem) -> list[int]:
    with _naming(problem.answer):
        return list(tokenizer.encode(problem.answer, add_special_tokens=False))


@contextmanager
def _naming(text: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise DataError(
            f"tokenizer must be able to encode every problem, got {text!r}: {error}; "
            "pass an alphabet with all characters of the task"
        ) from error


@torch.no_grad()
def _expected_accuracy(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", problems: Sequence[Problem]
) -> float:
    """Mean probability of the reference answers: what sampling at temperature 1 estimates, without its noise."""
    nll_BT, _ = _answer_nll(model, tokenizer, problems)
    return nll_BT.sum(1).neg().exp().mean().item()


def _sampled_accuracy(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    grader: str,
    seed: int,
) -> float:
    longest = max(len(_encode_answer(tokenizer, p)) for p in problems) + 1
    noise = sampling_noise((seed, int(Purpose.WARMUP), 1), len(problems), longest)
    texts = sample_texts(model, tokenizer, [_encode_prompt(tokenizer, p) for p in problems], noise)
    grades = make_grader(grader)(problems, texts)
    return sum(grade.verdict == "correct" for grade in grades) / len(grades)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
