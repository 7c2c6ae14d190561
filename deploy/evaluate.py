"""Measures a model on held-out problems, in this process: an engine, the graders, no Ray.

The noise of a problem's responses is that of a run's own evaluations. With one response per problem the numbers are
those that a run with this config and seed would have for the same weights.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from actors.calls import LocalCaller
from actors.engines.build import build_engine
from actors.engines.request_rules import check_request
from actors.environments import EnvironmentHost
from actors.episodes import Episodes, Trajectory, single_turn
from deploy.check import check_graders, check_heldout, measure_prompts
from distrl.config import Config
from distrl.environments.registry import environment_factory
from distrl.errors import ConfigError, StageError
from distrl.graders.build import Graders, build_graders, chosen_graders, describe, resources
from distrl.graders.combined import AsyncGrader
from distrl.graders.grade import Response
from distrl.models import load_tokenizer
from distrl.passk import accuracy, mean_pass_at_k
from distrl.sampling import Engine, SampleRequest
from distrl.seeding import Purpose
from distrl.tasks import Problem, load_task
from distrl.tasks.jsonl import read_problems
from distrl.tasks.problem import Message

OWN = "heldout"
"""Name of the config's own held-out set."""

Advance = Callable[[str, int, int], None]
"""Told (set, problems done, problems) after every problem."""


class Text(Protocol):
    """Text to tokens and back."""

    def encode(self, prompt: str, messages: Sequence[Message], /) -> tuple[int, ...]: ...
    def decode(self, token_ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Problems to measure on."""

    name: str
    problems: Sequence[Problem]
    graders: Graders


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one problem."""

    correct: int
    reward_sum: float
    tokens: int
    cut: int
    """Responses that ended at the limit of tokens."""


def evaluate_model(
    config: Config, more: Sequence[str], samples: int, ks: Sequence[int], advance: Advance
) -> dict[str, Any]:
    """Samples and grades `samples` responses to every problem of every held-out set with the model in `model.path`.

    Args:
        more: further sets as `name=path.jsonl`.
        ks: of pass@k; none takes the powers of two up to `samples`.
    Returns:
        What was asked for, and by set: problems, failed, responses, accuracy and pass@k with intervals, the mean
        reward, the mean number of tokens and the share of responses that were cut.
    Raises:
        ConfigError, DataError: an argument, the config, a set or the model cannot be used.
        StageError: a set has no problem that could be sampled and graded; has the last cause.
    """
    # Imports Ray, which is not started: the text must be that of a run's own generation.
    from deploy.remote.generation import ModelText, episode_limits

    began = time.perf_counter()
    ks = check_ks(ks, samples)
    sets = heldout_sets(config, more)
    tokenizer = load_tokenizer(config.model.path, setting="MODEL")
    engine = build_engine(config, tokenizer)

    text = ModelText(tokenizer, config.environment.role)
    episodes = None
    if config.environment.name is not None:
        host = LocalCaller("environment", EnvironmentHost(environment_factory(config)))
        episodes = Episodes([host], text, episode_limits(config))

    async def measure() -> list[dict[str, Any]]:
        graders = [build_graders(one.graders, config.grading.concurrency, resources(config)) for one in sets]
        try:
            return [
                await measure_set(Sampler(engine, text, grader, config, samples, episodes), one, ks, advance)
                for one, grader in zip(sets, graders, strict=True)
            ]
        finally:
            for grader in graders:
                grader.close()
            await engine.close()

    results = asyncio.run(measure())
    return {
        "model": str(config.model.path),
        "samples": samples,
        "temperature": config.rollout.temperature,
        "max_new_tokens": config.rollout.max_new_tokens,
        "seed": config.run.seed,
        "sets": results,
        "wall_s": round(time.perf_counter() - began, 3),
    }


def check_ks(ks: Sequence[int], samples: int) -> tuple[int, ...]:
    """The k of pass@k, in order.

    Raises:
        ConfigError: one is larger than the number of responses, or below 1.
    """
    for k in ks:
        if not 1 <= k <= samples:
            raise ConfigError(f"--k must be from 1 to --samples ({samples}), got {k}; raise --samples or leave it out")
    return tuple(sorted(set(ks))) or tuple(2**i for i in range(samples.bit_length()))


def heldout_sets(config: Config, more: Sequence[str]) -> list[HeldOut]:
    """The config's own set and those of `--heldout`.

    Raises:
        ConfigError, DataError: a set is not well named, or cannot be read.
    """
    whole = load_task(config.data)
    task = whole.without(measure_prompts(config, whole, setting="MODEL").left_out)
    check_heldout(config, task)
    own = task.heldout[: config.evaluation.problems]
    sets = [HeldOut(OWN, own, check_graders(config, task))]
    default = "exact" if config.environment.name is None else "episode"
    for argument in more:
        name, equals, path = argument.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--heldout must have the form name=path.jsonl, got {argument!r}; name the set")
        if name in {known.name for known in sets}:
            raise ConfigError(f"--heldout must have a new name for each set, got {name!r} twice; name one otherwise")
        problems = read_problems(f"--heldout {name}", path, config.data)
        sets.append(HeldOut(name, problems, chosen_graders(config.reward.grader, config.reward.graders, default)))
    return sets


class Sampler:
    """Samples and grades one problem at a time; many calls share the engine's batches."""

    def __init__(
        self,
        engine: Engine,
        text: Text,
        grader: AsyncGrader,
        config: Config,
        samples: int,
        episodes: Episodes | None = None,
    ) -> None:
        self._episodes = episodes
        self._engine = engine
        self._text = text
        self._grader = grader
        self._config = config
        self._samples = samples

    @property
    def samples(self) -> int:
        return self._samples

    @property
    def places(self) -> int:
        """Problems at a time that fill the engine's slots, and one that waits."""
        return -(-self._config.generation.slots // self._samples) + 1

    def request(self, index: int, problem: Problem) -> SampleRequest:
        """
        Raises:
            StageError: the prompt cannot be tokenized, or the engine could not sample it.
        """
        try:
            prompt = self._text.encode(problem.prompt, problem.messages)
        except Exception as error:
            raise StageError(f"prompt {problem.prompt_id} cannot be tokenized: {error}") from error
        stream = (self._config.run.seed, int(Purpose.EVALUATION), index, 0)
        request = SampleRequest(problem.prompt_id, prompt, self._samples, self._config.sampling, stream)
        check_request(
            request,
            vocabulary_size=self._engine.vocabulary_size,
            context_length=self._engine.context_length,
        )
        return request

    async def _rollouts(self, request: SampleRequest, problem: Problem) -> list[Trajectory]:
        if self._episodes is None:
            return [single_turn(sample) for sample in await self._engine.sample(request)]
        return await self._episodes.play_group(self._engine, request, problem)

    async def run(self, index: int, problem: Problem) -> Outcome | StageError:
        """What became of the problem, or why it could not be judged.

        Raises:
            StageError: the engine has stopped, and with it everything else.
        """
        try:
            request = self.request(index, problem)
        except StageError as error:
            return error
        try:
            answers = await self._rollouts(request, problem)
        except StageError as error:
            if self._episodes is None:
                raise
            return error
        longest = self._config.rollout.max_new_tokens
        responses = [
            Response(
                self._text.decode(answer.token_ids),
                f"{problem.prompt_id}.{sample}",
                len(answer.token_ids),
                longest,
                answer.finish_reason,
                tuple(answer.turn_rewards),
            )
            for sample, answer in enumerate(answers)
        ]
        try:
            grades = await self._grader.grade([problem] * len(responses), responses)
        except StageError as error:
            return error
        return Outcome(
            correct=sum(grade.verdict == "correct" for grade in grades),
            reward_sum=sum(grade.reward for grade in grades),
            tokens=sum(len(answer.token_ids) for answer in answers),
            cut=sum(answer.finish_reason == "length" for answer in answers),
        )


async def measure_set(sampler: Sampler, heldout: HeldOut, ks: Sequence[int], advance: Advance) -> dict[str, Any]:
    """Samples, grades and sums up one set.

    Raises:
        StageError: the engine has stopped, or no problem could be judged.
    """
    outcomes: list[Outcome | StageError] = []
    waiting = iter(enumerate(heldout.problems))

    async def worker() -> None:
        for index, problem in waiting:
            outcomes.append(await sampler.run(index, problem))
            advance(heldout.name, len(outcomes), len(heldout.problems))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(sampler.places, len(heldout.problems))):
                group.create_task(worker())
    except* StageError as errors:
        raise errors.exceptions[0] from None
    judged = [outcome for outcome in outcomes if isinstance(outcome, Outcome)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, StageError)]
    if not judged:
        raise StageError(
            f"held-out set {heldout.name}: none of {len(failures)} problems could be judged; {failures[-1]}"
        )
    return summarize(heldout, judged, failures, sampler.samples, ks)


def summarize(
    heldout: HeldOut, judged: Sequence[Outcome], failures: Sequence[StageError], samples: int, ks: Sequence[int]
) -> dict[str, Any]:
    """The numbers of one set; problems that could not be judged count neither as correct nor as wrong."""
    correct = [outcome.correct for outcome in judged]
    responses = samples * len(judged)
    return {
        "name": heldout.name,
        "grader": describe(heldout.graders),
        "problems": len(judged),
        "failed": len(failures),
        "first_failure": str(failures[0]) if failures else None,
        "responses": responses,
        "accuracy": asdict(accuracy(samples, correct)),
        "pass_at_k": {str(k): asdict(mean_pass_at_k(samples, correct, k, seed=0)) for k in ks},
        "reward_mean": sum(outcome.reward_sum for outcome in judged) / responses,
        "response_tokens_mean": sum(outcome.tokens for outcome in judged) / responses,
        "cut_share": sum(outcome.cut for outcome in judged) / responses,
    }
