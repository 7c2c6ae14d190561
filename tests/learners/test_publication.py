"""What a step made is published while the next one is trained, and no order that somebody relies on is lost."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from distrl.errors import PolicyError
from distrl.messages import Manifest, PublishAgain, StepReport
from distrl.objectives import build
from learners.checkpoint import TrainState
from learners.logp_check import LogpCheckSettings
from learners.loop import train
from learners.optimizer import OptimizerSettings
from learners.publication import Job, Publication
from learners.trainer import LoopSettings, Stages, Trainer
from tests.learners.workers import FixedLink, Tokenizer, make_model

WAIT_S = 20


@dataclass
class GatedLink(FixedLink):
    """Notes what happens in which order; a publication goes on when its gate is open."""

    gates: dict[int, threading.Event] = field(default_factory=dict)
    happened: list[str] = field(default_factory=list)
    published: dict[tuple[str, int], dict[str, Tensor]] = field(default_factory=dict)
    refuses: int = -1
    asks_again: int = -1
    """Step whose batch is asked for when the policy store has lost the version before it."""
    on_batch: Callable[[int, Callable[[], None]], None] = lambda step, check: None
    grades: Callable[[pa.RecordBatch], pa.RecordBatch] = lambda grades: grades

    def next_batch(
        self, step: int, check: Callable[[], None]
    ) -> tuple[Sequence[Stages], Mapping[int, int]] | PublishAgain:  # type: ignore[override]
        if step == self.asks_again:
            self.asks_again = -1
            return PublishAgain(step - 1, step - 1)
        self.on_batch(step, check)
        self.happened.append(f"batch {step}")
        found, staleness = super().next_batch(step, check)
        return [(rollouts, self.grades(grades), scores) for rollouts, grades, scores in found], staleness

    def trained(self, report: StepReport, staleness: Mapping[int, int]) -> int:
        self.happened.append(f"trained {report.step}")
        return super().trained(report, staleness)

    def publish(self, manifest: Manifest, tensors: Mapping[str, Tensor], *, again: bool = False) -> None:
        if manifest.version in self.gates:
            assert self.gates[manifest.version].wait(WAIT_S)
        if manifest.version == self.refuses:
            raise PolicyError(f"policy version {manifest.version} is refused")
        self.happened.append(f"published {manifest.weights} {manifest.version}{' again' if again else ''}")
        self.published[manifest.weights, manifest.version] = {name: x.clone() for name, x in tensors.items()}

    def commit_checkpoint(self, location: str, state: TrainState, sha256: str) -> None:
        self.happened.append(f"checkpoint {state.step}")


def compared(grades: pa.RecordBatch) -> pa.RecordBatch:
    """With preferences, for games."""
    at = grades.schema.names.index("preference")
    values = [0.25 + 0.5 * (row % 2) for row in range(grades.num_rows)]
    return grades.set_column(at, grades.schema.field(at), pa.array(values, type=pa.float64()))


def run(
    link: GatedLink,
    directory: Path,
    *,
    steps: int = 3,
    beside: bool = True,
    every: int = 100,
    recipe: str = "ppo",
    clock: Callable[[], float] = time.perf_counter,
) -> GatedLink:
    settings = LoopSettings(
        steps=steps,
        temperature=0.9,
        micro_batch_tokens=4096,
        checkpoint_every_steps=every,
        checkpoints=directory,
        optimizer=OptimizerSettings(1e-2, 0, 0.1, (0.9, 0.95), 1.0),
        logp_check=LogpCheckSettings(0, 100.0, 1, "keep", 0.9),
        publish_beside=beside,
    )
    trainer = Trainer(make_model(), Tokenizer(), build(recipe), settings)
    train(trainer, settings, link, trainer._world, None, lambda metrics: None, clock)
    return link


def test_the_next_step_is_trained_while_weights_are_published_and_told_after_that(tmp_path: Path) -> None:
    link = GatedLink(gates={1: threading.Event()})

    def open_when_step_two_has_its_batch(step: int, check: Callable[[], None]) -> None:
        if step == 2:
            assert "published policy 1" not in link.happened
            threading.Timer(0.0, link.gates[1].set).start()

    link.on_batch = open_when_step_two_has_its_batch
    run(link, tmp_path / "beside", steps=2)
    order = link.happened
    assert order.index("batch 2") < order.index("trained 2")
    assert order.index("published policy 1") < order.index("trained 2")
    assert order[-2:] == ["published policy 2", "checkpoint 2"]


def test_what_is_published_are_the_weights_of_its_step_however_far_the_next_one_has_come(tmp_path: Path) -> None:
    link = GatedLink(gates={1: threading.Event()})
    stepped = threading.Event()
    step = Trainer.step

    def after_the_second(self: Trainer, *arguments: Any) -> Any:
        result = step(self, *arguments)
        if arguments[1] == 2:
            stepped.set()
            link.gates[1].set()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", after_the_second)
        run(link, tmp_path / "beside")
    assert stepped.is_set()
    apart = run(GatedLink(), tmp_path / "apart", beside=False)
    assert link.published.keys() == apart.published.keys() == {("policy", n) for n in (1, 2, 3)}
    for version, tensors in apart.published.items():
        for name, tensor in tensors.items():
            assert torch.equal(link.published[version][name], tensor), (version, name)
    weights = [link.published["policy", n]["model.embed_tokens.weight"] for n in (1, 2)]
    assert not torch.equal(*weights)


def test_a_step_says_how_long_it_was_held_by_the_publication_before_it(tmp_path: Path) -> None:
    now = [0.0]

    @dataclass
    class Slow(GatedLink):
        def publish(self, manifest: Manifest, tensors: Mapping[str, Tensor], *, again: bool = False) -> None:
            super().publish(manifest, tensors, again=again)
            if manifest.version == 1:
                now[0] += 5.0

    link = Slow(gates={1: threading.Event()})
    wait = Publication.wait

    def open_and_wait(self: Publication) -> None:
        if "batch 2" in link.happened:  # and trained on it: only its report is held
            link.gates[1].set()
        wait(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Publication, "wait", open_and_wait)
        run(link, tmp_path, steps=2, clock=lambda: now[0])
    assert [report.held_s for report in link.reports] == [0.0, 5.0]
    assert [report.train_s for report in link.reports] == [0.0, 0.0]


def test_without_a_thread_a_step_is_published_before_anything_else_happens(tmp_path: Path) -> None:
    assert run(GatedLink(), tmp_path, steps=2, beside=False).happened == [
        "batch 1",
        "trained 1",
        "published policy 1",
        "batch 2",
        "trained 2",
        "published policy 2",
        "checkpoint 2",
    ]


def test_a_checkpoint_is_begun_when_its_weights_are_published(tmp_path: Path) -> None:
    link = GatedLink(gates={1: threading.Event()})
    saved = threading.Event()
    begin = Trainer.begin_checkpoint

    def note(self: Trainer, state: TrainState) -> None:
        link.happened.append(f"begins checkpoint {state.step}")
        saved.set()
        begin(self, state)

    def open_unless_saved() -> None:
        # Long enough for a checkpoint that waits for nothing to begin before.
        saved.wait(0.2)
        link.gates[1].set()

    threading.Thread(target=open_unless_saved).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "begin_checkpoint", note)
        run(link, tmp_path, steps=2, every=1)
    assert link.happened.index("published policy 1") < link.happened.index("begins checkpoint 1")
    assert link.happened[-2:] == ["begins checkpoint 2", "checkpoint 2"]


def test_opponents_are_published_before_the_policy_of_their_step(tmp_path: Path) -> None:
    happened = run(GatedLink(grades=compared), tmp_path, recipe="nash_mp").happened
    published = [what for what in happened if what.startswith("published")]
    assert published[:2] == ["published opponent 1", "published policy 1"]


def test_lost_weights_are_published_again_after_what_was_under_way(tmp_path: Path) -> None:
    link = run(GatedLink(asks_again=2), tmp_path, steps=2)
    published = [what for what in link.happened if what.startswith("published")]
    assert published == ["published policy 1", "published policy 1 again", "published policy 2"]


def test_a_publication_that_failed_ends_the_loop_before_anything_more_is_told(tmp_path: Path) -> None:
    link = GatedLink(refuses=1)
    with pytest.raises(PolicyError, match=r"^policy version 1 is refused$"):
        run(link, tmp_path)
    assert "trained 2" not in link.happened
    assert not any(what.startswith(("published", "checkpoint")) for what in link.happened)


def test_a_publication_that_failed_ends_the_wait_for_a_batch(tmp_path: Path) -> None:
    link = GatedLink(refuses=1)

    def wait(step: int, check: Callable[[], None]) -> None:
        until = time.monotonic() + WAIT_S
        while step == 2 and time.monotonic() < until:
            check()

    link.on_batch = wait
    with pytest.raises(PolicyError, match=r"^policy version 1 is refused$"):
        run(link, tmp_path)
    assert link.happened == ["batch 1", "trained 1"]


def held_by(gate: threading.Event) -> Job:
    def wait() -> None:
        assert gate.wait(WAIT_S)

    return wait


def test_one_publication_at_a_time() -> None:
    done: list[str] = []
    gate = threading.Event()
    with Publication(beside=True) as publication:
        publication.begin([held_by(gate), lambda: done.append("a"), lambda: done.append("b")])
        publication.check()  # it is under way, and nothing is wrong with it
        assert not done
        gate.set()
        publication.begin([lambda: done.append("c")])
        assert done[:2] == ["a", "b"]
    assert done == ["a", "b", "c"]


def test_an_exception_of_the_loop_does_not_wait_for_a_publication() -> None:
    gate = threading.Event()

    def fail() -> None:
        with Publication(beside=True) as publication:
            publication.begin([held_by(gate)])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    gate.set()
