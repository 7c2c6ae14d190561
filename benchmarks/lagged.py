"""Training in one process, step by step, with a staleness that is forced instead of bounded.

The engine, the stages, the objective and the optimizer are those of a run; what is left out is everything that
happens at the same time. So two calls with the same arguments give the same numbers, and batch k is trained exactly
`lag` optimizer steps after it was sampled.
"""

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from actors.engines.build import build_engine
from actors.generation import Generation
from actors.grading import Grading
from actors.journal import Journal
from deploy.check import build_recipe, check_graders
from deploy.learner import loop_settings
from deploy.remote.generation import ModelText
from deploy.run_dir import RunDir
from distrl.config import Config
from distrl.graders.build import build_graders, describe
from distrl.journal_file import read_table
from distrl.models import load_model, load_tokenizer
from distrl.schema import Role
from distrl.seeding import Purpose
from distrl.tasks import Problem, load_task, prompt_index
from distrl.tickets import Ticket
from distrl.weights import policy_tensors
from learners.trainer import Stages, Trainer


@dataclass(frozen=True, slots=True)
class Point:
    """What was seen after some optimizer steps."""

    step: int
    accuracy: float
    """Of one response to each held-out problem, sampled at the rollouts' temperature."""
    standard_error: float
    entropy: float
    """Of the policy at a response token of the last trained batch, nats; NaN before the first."""
    loss: float
    kl_behavior: float
    """Mean log(behavior / policy) per token of the last trained batch, nats."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One arm."""

    points: tuple[Point, ...]
    staleness: tuple[int, ...]
    """Of every trained batch: optimizer steps between the weights that sampled it and those that it changed, read
    from the versions that its tokens carry."""
    weights_sha256: str
    """Of the final weights: equal for equal arms."""


class Sampler:
    """The generation and grading stages of a run, called one after the other."""

    def __init__(self, config: Config) -> None:
        tokenizer = load_tokenizer(config.model.path)
        task = load_task(config.data)
        graders = check_graders(config, task)
        self._config = config
        self._task = task
        self._engine = build_engine(config, tokenizer)

        async def fetch(*_: Any) -> Any:
            raise AssertionError("weights are loaded directly")

        self._generation = Generation(
            "generation-0", {"policy": self._engine}, ModelText(tokenizer), config.sampling, fetch
        )
        self._grading = Grading(describe(graders), build_graders(graders, 1), concurrency=1)

    async def load(self, version: int, model: Any) -> None:
        await self._engine.load(version, policy_tensors(model))

    async def close(self) -> None:
        await self._engine.close()

    async def batch(self, number: int) -> list[Stages]:
        """The tickets of batch `number` (the first is 1): the same prompts and noise whatever the weights."""
        config = self._config
        size = config.train.tickets_per_step
        tickets = []
        for ticket_id in range((number - 1) * size, number * size):
            problem = self._task.train[prompt_index(config.run.seed, ticket_id, len(self._task.train))]
            tickets.append((self._ticket(problem, Role.POLICY, ticket_id, config.rollout.group_size), problem))
        return await self._sample(tickets)

    async def accuracy(self) -> tuple[float, float]:
        """Held-out accuracy and its standard error; the noise of a problem is the same at every call."""
        problems = self._task.heldout[: self._config.evaluation.problems]
        tickets = [(self._ticket(p, Role.EVALUATION, i, 1), p) for i, p in enumerate(problems)]
        graded = await self._sample(tickets)
        found = np.array([grading.column("verdict")[0].as_py() == "correct" for _, grading, _ in graded])
        share = float(found.mean())
        return share, float(np.sqrt(share * (1 - share) / len(found)))

    def _ticket(self, problem: Problem, role: Role, number: int, responses: int) -> Ticket:
        purpose = Purpose.EVALUATION if role is Role.EVALUATION else Purpose.SAMPLING
        stream = (self._config.run.seed, int(purpose), number, 0)
        return Ticket(number, 0, problem.prompt_id, problem.prompt, role, responses, stream, problem.messages)

    async def _sample(self, tickets: Sequence[tuple[Ticket, Problem]]) -> list[Stages]:
        async def one(ticket: Ticket, problem: Problem) -> Stages:
            _, generated = await self._generation.generate(ticket)
            _, graded = await self._grading.grade({problem.prompt_id: problem}, generated)
            return generated, graded, None

        return list(await asyncio.gather(*(one(ticket, problem) for ticket, problem in tickets)))


def train_lagged(config: Config, lag: int, look: Callable[[Point], None] = lambda point: None) -> Outcome:
    """Trains `config.train.steps` steps; batch k is sampled from the weights of step max(0, k - 1 - lag).

    The first `lag` batches find no older weights than those of the start, and are less stale.

    Args:
        look: told of every measurement, which are made every `evaluation.every_steps` steps, at the start and at the
            end.
    """

    async def run() -> Outcome:
        sampler, trainer, model = Sampler(config), *make_trainer(config)
        try:
            waiting = [await sampler.batch(k) for k in range(1, min(lag + 1, config.train.steps) + 1)]

            async def after(step: int) -> Sequence[Stages]:
                """Publishes the weights of `step` and gives the batch of the step that follows."""
                if step:
                    await sampler.load(step, model)
                    if step + lag + 1 <= config.train.steps:
                        waiting.append(await sampler.batch(step + lag + 1))
                return waiting.pop(0) if step < config.train.steps else []

            return await _train(config, sampler, trainer, model, after, look)
        finally:
            await sampler.close()

    return asyncio.run(run())


def train_offline(config: Config, journal: Path, look: Callable[[Point], None] = lambda point: None) -> Outcome:
    """Trains on the rollouts of a journal, in their order, again from the first one when they are through."""
    tickets = list(read_journal(journal))
    size = config.train.tickets_per_step

    async def run() -> Outcome:
        sampler, trainer, model = Sampler(config), *make_trainer(config)
        try:

            async def after(step: int) -> Sequence[Stages]:
                if step:
                    await sampler.load(step, model)
                return [tickets[(step * size + i) % len(tickets)] for i in range(size)]

            return await _train(config, sampler, trainer, model, after, look)
        finally:
            await sampler.close()

    return asyncio.run(run())


def record_journal(config: Config, directory: Path, batches: int) -> None:
    """Samples `batches` batches from the weights of the start into a journal, as a run writes it."""

    async def run() -> None:
        sampler, journal = Sampler(config), Journal(directory)
        try:
            for number in range(1, batches + 1):
                await asyncio.gather(*(journal.append(*stages) for stages in await sampler.batch(number)))
        finally:
            await sampler.close()

    asyncio.run(run())


def read_journal(directory: Path) -> Iterator[Stages]:
    """The tickets of a journal, in order; their columns are joined already."""
    tables = [read_table(path.read_bytes(), path) for path in sorted(directory.glob("*.arrow"))]
    table = pa.concat_tables(tables).sort_by([("ticket_id", "ascending"), ("group_index", "ascending")])
    ids = table.column("ticket_id").to_numpy()
    for ticket_id in np.unique(ids):
        rows = table.filter(ids == ticket_id).combine_chunks().to_batches()[0]
        yield rows, rows, None


def make_trainer(config: Config) -> tuple[Trainer, Any]:
    """A run's learner with its model."""
    import torch

    torch.set_num_threads(config.run.threads_per_process)
    model: Any = load_model(config.model.path, torch.float32)
    settings = replace(loop_settings(config, RunDir(config.run_dir)), checkpoint_every_steps=config.train.steps)
    return Trainer(model, load_tokenizer(config.model.path), build_recipe(config), settings), model


async def _train(
    config: Config, sampler: Sampler, trainer: Trainer, model: Any, after: Any, look: Callable[[Point], None]
) -> Outcome:
    points: list[Point] = []
    ages: list[int] = []
    metrics: dict[str, float] = {}
    every = config.evaluation.every_steps
    for step in range(config.train.steps + 1):
        batch = await after(step)
        if step in (0, config.train.steps) or (every and step % every == 0):
            accuracy, error = await sampler.accuracy()
            nothing = float("nan")
            seen = (metrics.get("entropy", nothing), metrics.get("loss", nothing), metrics.get("kl_behavior", nothing))
            points.append(Point(step, accuracy, error, *seen))
            look(points[-1])
        if step == config.train.steps:
            break
        oldest = min(min(row) for generated, *_ in batch for row in generated.column("policy_versions").to_pylist())
        ages.append(step - oldest)
        metrics = dict(trainer.step(trainer.training_batch(batch), step + 1).metrics)
    return Outcome(tuple(points), tuple(ages), _sha256(model))


def _sha256(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(policy_tensors(model).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
