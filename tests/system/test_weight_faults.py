"""Weight updates with real processes that are killed or stopped in the middle: whoever waits is told who and which.

Gates fix the moment: a process that reaches one tells so and goes on only when it is opened.
"""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from actors.calls import RayCaller
from actors.outcome import Outcome
from actors.pipeline import Pipeline, PipelineLimits
from actors.pool import Pool
from actors.recorder import Recorder
from actors.updates import Unversioned, UpdateLimits, Updates
from deploy.learner import RayLink
from deploy.publisher import Publisher
from deploy.remote.generation import GenerationActor
from deploy.remote.policy_store import PolicyStoreActor
from deploy.run import run_training
from deploy.start import start_ray
from distrl.config import Config, make_config
from distrl.errors import DeadlineError, DistrlError, LostWeightsError, PolicyError
from distrl.manifest import describe
from distrl.messages import Content, Delivery, LoadReceipt
from distrl.models import TinyArchitecture, load_model, make_tiny_model
from distrl.staleness import Version
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from distrl.weights import policy_tensors

pytestmark = pytest.mark.ray

CHUNK = 4096
SOON_S = 120.0
"""What a test allows for things that have no deadline of their own here; nothing is expected to take it."""
DEADLINE_S = 3.0


class Gate:
    """Holds the first who reaches a name that is held, until it is opened; lets everybody else pass."""

    def __init__(self) -> None:
        self._reached: dict[str, asyncio.Event] = {}
        self._open: dict[str, asyncio.Event] = {}

    async def hold(self, name: str) -> None:
        self._reached[name], self._open[name] = asyncio.Event(), asyncio.Event()

    async def pass_through(self, name: str) -> None:
        if name in self._open and not self._reached[name].is_set():
            self._reached[name].set()
            await self._open[name].wait()

    async def reached(self, name: str) -> None:
        await self._reached[name].wait()

    async def open(self, name: str) -> None:
        self._open.pop(name).set()


class Store(PolicyStoreActor):
    def __init__(self, gate: Any) -> None:
        super().__init__()
        self._gate = gate

    @ray.method
    async def fetch(self, version: int, have: Mapping[str, Content], weights: str = "policy") -> Delivery:
        await self._gate.pass_through.remote(f"fetch {version}")
        return await super().fetch(version, have, weights)

    @ray.method
    async def pid(self) -> int:
        return os.getpid()


class Sampler(GenerationActor):
    @ray.method
    async def pid(self) -> int:
        return os.getpid()

    @ray.method
    async def version(self) -> int:
        return self._engines["policy"].version


class Learner:
    """Publishes the model with its first weights multiplied, in small chunks; stops at a gate before chunk 1."""

    def __init__(self, model: Path, store: Any, gate: Any) -> None:
        def on_chunk(index: int) -> None:
            if index == 1:
                ray.get(gate.pass_through.remote("publish"))

        self._tensors = policy_tensors(load_model(model, torch.float32))
        self._publisher = Publisher(store, DEADLINE_S, CHUNK, on_chunk)

    def publish(self, version: int, factors: Mapping[str, float]) -> int:
        """Returns the bytes that were sent."""
        tensors = scaled(self._tensors, factors)
        return self._publisher.publish(describe(tensors, version=version, step=version), tensors)

    def pid(self) -> int:
        return os.getpid()


def scaled(tensors: Mapping[str, Tensor], factors: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: tensor * factors.get(name, factors.get("*", 1.0)) for name, tensor in tensors.items()}


class Setting:
    """The processes of one test module and what talks to them."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.gate = _actor(Gate)
        self.store = _actor(Store, self.gate, max_restarts=-1)
        self.samplers = [self.sampler(i) for i in range(2)]
        self.learners = [self.learner() for _ in range(2)]
        ray.get([s.version.remote() for s in self.samplers] + [one.pid.remote() for one in self.learners])

    def sampler(self, number: int) -> Any:
        return _actor(Sampler, self.config, f"generation-{number}", self.store)

    def learner(self) -> Any:
        return _actor(Learner, self.config.model.path, self.store, self.gate)

    async def follow(self, version: int, *samplers: Any, timeout_s: float = SOON_S, attempts: int = 1) -> "Follow":
        """The coordinator's part for some generation actors, up to one version."""
        return Follow(version, samplers, timeout_s, attempts)


class Follow:
    """`Updates` of a coordinator that knows of one published version."""

    def __init__(self, version: int, samplers: tuple[Any, ...], timeout_s: float, attempts: int) -> None:
        self.pool = Pool("generation")
        self.members = [self.pool.add(RayCaller(f"generation-{i}", s), 1) for i, s in enumerate(samplers)]
        self.recorder = Recorder(None, time.time)
        self.lost: list[str] = []
        journal = RayCaller("journal", None)  # nothing is sampled here, so nothing is written
        limits = PipelineLimits(attempts, 0.0, *[SOON_S] * 5, 1, 1)
        pipeline = Pipeline(self.pool, Pool("grading"), None, journal, limits, time.time)
        pipeline.on_loss = lambda member, cause: self.lost.append(cause)
        self.updates = Updates(
            Unversioned(Version(version, None, version)),
            pipeline,
            UpdateLimits(attempts, 0.0, timeout_s, timeout_s),
            self.recorder,
            Outcome(self.recorder),
        )
        may_load = asyncio.Event()
        may_load.set()
        follow = self.updates.follow
        self.tasks = [asyncio.create_task(follow(self.pool, member, may_load)) for member in self.members]

    async def loaded(self, number: int) -> None:
        while not self.updates.is_up_to_date(self.members[number]):
            if self.tasks[number].done():
                self.tasks[number].result()
            await asyncio.sleep(0.01)

    async def failure(self, number: int) -> str:
        with pytest.raises(DeadlineError) as caught:
            await self.tasks[number]
        return str(caught.value)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def _refused(call: Any) -> DistrlError:
    with pytest.raises(DistrlError) as caught:
        await call
    return caught.value


def _actor(kind: type, *arguments: Any, max_restarts: int = 0) -> Any:
    made: Any = ray.remote(kind).options(num_cpus=0, max_restarts=max_restarts, max_task_retries=0)
    return made.remote(*arguments)


def get(reference: Any) -> Any:
    return ray.get(reference, timeout=SOON_S)


def pid_of(actor: Any) -> int:
    """The pid of an actor, once Ray has restarted it where that is needed."""
    deadline = time.monotonic() + SOON_S
    while True:
        try:
            return int(ray.get(actor.pid.remote(), timeout=SOON_S))
        except ray.exceptions.ActorUnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def run(coroutine: Any) -> None:
    asyncio.run(asyncio.wait_for(coroutine, SOON_S))


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that is there and does nothing."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    model = tmp_path_factory.mktemp("model")
    size = TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64)
    make_tiny_model(model, character_tokenizer(ALPHABET), seed=0, architecture=size)
    values: dict[str, Any] = {
        "model": {"path": model},
        "data": {"source": "sort_digits"},
        "rollout": {"group_size": 2, "max_new_tokens": 6},
        "generation": {"slots": 4},
        "limits": {"sync_timeout_s": SOON_S},
    }
    start_ray()
    yield Setting(make_config(values))
    ray.shutdown()


NORM = "model.norm.weight"


def test_a_learner_killed_in_the_middle_of_publishing_takes_nothing_away_that_was_published(setting: Setting) -> None:
    first, second = setting.learners
    pid = pid_of(first)
    whole = get(first.publish.remote(1, {}))
    assert whole > 2 * CHUNK  # several chunks, so that there is a middle
    get(setting.gate.hold.remote("publish"))
    broken = first.publish.remote(2, {"*": 2.0})
    get(setting.gate.reached.remote("publish"))
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        get(broken)
    get(setting.gate.open.remote("publish"))

    async def scenario() -> None:
        follow = await setting.follow(1, *setting.samplers)
        for number in (0, 1):
            await follow.loaded(number)
        await follow.close()
        # The half of version 2 is refused by its number, at once.
        lost = await setting.follow(2, setting.samplers[0])
        assert await lost.failure(0) == (
            "generation-0 must load policy version 2 in at most 1 attempts; the last error was: generation-0 keeps "
            "policy version 1: policy version 2 must be in the store, which has [1]; pull the newest"
        )

    run(scenario())
    # The next learner publishes the next version; only then does the half of version 2 go.
    before = get(setting.store.held.remote())["bytes"]
    sent = get(second.publish.remote(3, {NORM: 3.0}))
    after = get(setting.store.held.remote())["bytes"]
    assert sent == 32 * 4  # the one tensor that differs from version 1
    assert (before, after) == (whole + CHUNK, whole + sent)


def test_an_actor_killed_in_the_middle_of_a_pull_is_named_and_delays_nobody(setting: Setting) -> None:
    victim, other = setting.samplers
    victim_pid = pid_of(victim)

    async def scenario() -> None:
        await setting.gate.hold.remote("fetch 3")
        follow = await setting.follow(3, victim)
        await setting.gate.reached.remote("fetch 3")
        os.kill(victim_pid, signal.SIGKILL)
        await follow.tasks[0]  # it is taken out, whoever supervises the processes starts another
        (cause,) = follow.lost
        assert cause.startswith("generation-0.pull: the process is gone: ")
        assert (follow.pool.members, follow.pool.lost) == ([], {"generation-0": cause})
        # The store is still busy with the dead one's call; the other need not wait for that.
        others = await setting.follow(3, other)
        await others.loaded(0)
        await others.close()
        await setting.gate.open.remote("fetch 3")

    run(scenario())
    setting.samplers[0] = setting.sampler(0)


def test_an_actor_that_starts_late_gets_the_newest_version_whole(setting: Setting) -> None:
    late = setting.sampler(7)

    async def scenario() -> None:
        follow = await setting.follow(3, late)
        await follow.loaded(0)
        await follow.close()
        (load,) = [r for r in follow.recorder.after(-1) if r["kind"] == "load"]
        assert (load["version"], load["moved_tensors"]) == (3, 24)

    run(scenario())
    assert get(late.version.remote()) == 3
    ray.kill(late)


def test_an_actor_that_is_stopped_is_named_when_its_deadline_is_over_and_goes_on_afterwards(setting: Setting) -> None:
    # The first has taken a killed one's place, with the weights that it started from.
    slow, quick = setting.samplers
    pid = pid_of(slow)

    async def scenario() -> None:
        with stopped(pid):
            follow = await setting.follow(3, slow, quick, timeout_s=DEADLINE_S, attempts=2)
            await follow.loaded(1)
            assert await follow.failure(0) == (
                "generation-0 must load policy version 3 in at most 2 attempts; the last error was: "
                f"generation-0.pull must answer within {DEADLINE_S:g} s, got nothing"
            )
            await follow.close()
        again = await setting.follow(3, slow)
        await again.loaded(0)
        await again.close()

    run(scenario())


def test_a_store_that_is_stopped_is_named_with_the_version_when_the_deadline_is_over(setting: Setting) -> None:
    learner = setting.learners[1]
    with stopped(pid_of(setting.store)), pytest.raises(ray.exceptions.RayTaskError) as caught:
        get(learner.publish.remote(4, {}))
    assert isinstance(caught.value.cause, DeadlineError)
    assert str(caught.value.cause) == (
        f"policy-store must take policy version 4 from the learner within limits.publish_timeout_s = {DEADLINE_S:g} "
        "s, it did not; look at the log of policy-store"
    )
    get(learner.publish.remote(4, {}))


def test_a_store_that_is_killed_comes_back_empty_and_is_filled_again_by_the_learner(setting: Setting) -> None:
    learner, sampler = setting.learners[1], setting.samplers[1]
    get(learner.publish.remote(5, {}))
    get(sampler.pull.remote(5))
    get(learner.publish.remote(6, {NORM: 6.0}))
    os.kill(pid_of(setting.store), signal.SIGKILL)

    async def lost() -> None:
        caller = RayCaller("generation-1", sampler)
        async with asyncio.timeout(SOON_S):
            while "WorkerLostError" in str(error := await _refused(caller.ask("pull", 6, timeout_s=SOON_S))):
                # Ray tells of the death, then of the restart; either way the learner is asked for the weights.
                assert isinstance(error, LostWeightsError)
        assert isinstance(error, LostWeightsError)
        assert str(error) == (
            "generation-1 keeps policy version 5: policy version 6 must be in the store, which has none; "
            "pull the newest"
        )

    run(lost())
    sent = get(learner.publish.remote(7, {NORM: 7.0}))
    assert sent == get(setting.store.held.remote())["bytes"]  # everything, though one tensor differs from version 6

    receipt: LoadReceipt = get(sampler.pull.remote(7))
    # It had version 5, of which one tensor differs: what it has does not move, whoever lost it.
    assert (receipt.version, receipt.moved_tensors) == (7, 1)


class Silent:
    """A coordinator that has no batch."""

    async def next_batch(self, step: int, session: int) -> None:
        await asyncio.Event().wait()


@pytest.mark.usefixtures("setting")
def test_a_wait_for_a_batch_ends_with_what_happened_to_a_publication_meanwhile() -> None:
    link = RayLink(_actor(Silent), None, DEADLINE_S, DEADLINE_S)

    def check() -> None:
        raise PolicyError("policy version 1 is refused")

    with pytest.raises(PolicyError, match=r"^policy version 1 is refused$"):
        link.next_batch(2, check)


def test_a_run_whose_store_dies_before_anybody_has_the_new_weights_goes_on(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Synchronous, with one generation actor: without these weights there is no next batch, and the learner waits."""
    died = tmp_path / "died"

    class DiesOnce(PolicyStoreActor):
        @ray.method
        async def fetch(self, version: int, have: Mapping[str, Content], weights: str = "policy") -> Delivery:
            if not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return await super().fetch(version, have, weights)

    monkeypatch.setattr("deploy.processes.PolicyStoreActor", DiesOnce)
    values = setting.config.model_dump(mode="json")
    values["run"] |= {"dir": str(tmp_path), "name": "run"}
    values["data"] |= {"heldout_size": 8, "options": {"digits": 4}}
    values["train"] |= {"steps": 3, "tickets_per_step": 2, "max_staleness": 0}
    values["evaluation"] |= {"problems": 8, "every_steps": 0}
    config = make_config(values)
    summary = run_training(config)
    assert died.exists()
    assert (summary["state"], summary["steps"], summary["tickets"]["dropped"]) == ("finished", 3, {})
    records = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["message"] for r in records if r["kind"] == "published_again"] == [
        "policy version 1: the policy store had lost it"
    ]
    assert [r["version"] for r in records if r["kind"] == "load"] == [1, 2, 3]
