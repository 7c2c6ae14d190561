"""Every recipe whose columns a run produces goes through the real training loop, with a real model and engine."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from actors.engines.transformers import TransformersEngine
from deploy.check import PRODUCED
from distrl.logps import pad_rollouts, split_rows
from distrl.manifest import cut, lay_out, unpack
from distrl.messages import Manifest, StepReport
from distrl.models import TinyArchitecture, load_model, load_tokenizer, make_tiny_model
from distrl.objectives import build, recipe_names
from distrl.policy_model import response_logps
from distrl.sampling import Sample, SampleRequest, SamplingParams
from distrl.schema import Stage, record_batch
from distrl.tokenizer import character_tokenizer
from learners.checkpoint import TrainState
from learners.logp_check import LogpCheckSettings
from learners.loop import train
from learners.optimizer import OptimizerSettings
from learners.trainer import LoopSettings, Stages, Trainer
from learners.world import World
from tests.builders import generation_columns, grading_columns

STEPS = 20
TICKETS, GROUP = 4, 4
PARAMS = SamplingParams(max_new_tokens=4)

HERE = PRODUCED - {"v_star", "preference", "pairs", "pair_preference"}
"""What one sampler gives. The others come from a table that is made before the run or from opponents; they have tests
of their own, tests/system/test_vstar.py and tests/system/test_opponents.py among them."""

READY = [name for name in recipe_names() if build(name).needs <= HERE]


class LocalLink:
    """Samples each batch on the spot from the weights that the loop published last: the run of one process."""

    def __init__(self, model: Path) -> None:
        tokenizer = load_tokenizer(model)
        self._reference = load_model(model, torch.float32)
        self._engine_model = load_model(model, torch.float32)
        self._wanted = tokenizer.encode("1")[0]
        self._prompt = tuple(tokenizer.encode("12>"))
        self._eos = int(tokenizer.eos_token_id)
        self._weights: tuple[int, dict[str, torch.Tensor]] | None = None
        self.reports: list[StepReport] = []
        self.rewards: list[float] = []
        self.checkpoints: list[int] = []

    def next_batch(self, step: int, check: Callable[[], None]) -> tuple[Sequence[Stages], Mapping[int, int]]:
        sampled = asyncio.run(self._sample(step))
        tickets = [self._stages(step * TICKETS + i, samples) for i, samples in enumerate(sampled)]
        rewards = [r for _, grading, _ in tickets for r in grading.column("reward").to_pylist()]
        self.rewards.append(float(np.mean(rewards)))
        return tickets, {step * TICKETS + i: 0 for i in range(TICKETS)}

    async def _sample(self, step: int) -> list[list[Sample]]:
        engine = TransformersEngine(self._engine_model, eos_token_ids=(self._eos,), pad_token_id=0, slots=32, threads=1)
        try:
            if self._weights is not None:
                await engine.load(*self._weights)
            requests = [SampleRequest(f"{step}.{i}", self._prompt, GROUP, PARAMS, (7, step, i)) for i in range(TICKETS)]
            return list(await asyncio.gather(*(engine.sample(r) for r in requests)))
        finally:
            await engine.close()

    def _stages(self, ticket_id: int, samples: list[Sample]) -> Stages:
        columns = generation_columns(ticket_id, [len(s.token_ids) for s in samples], self._prompt)
        columns |= {
            "response_token_ids": [s.token_ids for s in samples],
            "behavior_logps": [s.logps for s in samples],
            "policy_versions": [s.versions for s in samples],
        }
        generation = record_batch(Stage.GENERATION, columns)
        ids = columns["rollout_id"]
        grades: dict[str, Any] = grading_columns(ids)
        grades["reward"] = [float(s.token_ids[0] == self._wanted) for s in samples]
        return generation, record_batch(Stage.GRADING, grades), self._score(generation, ids)

    def _score(self, generation: pa.RecordBatch, ids: list[str]) -> pa.RecordBatch:
        tokens = pad_rollouts(generation, 0)
        with torch.no_grad():
            logps = split_rows(response_logps(self._reference, tokens, 1.0), tokens.response_mask)
        times = {"reference_started_s": [0.0] * len(ids), "reference_finished_s": [0.0] * len(ids)}
        return record_batch(
            Stage.REFERENCE, {"rollout_id": ids, "ref_logps": logps, "ref_version": [0] * len(ids), **times}
        )

    def trained(self, report: StepReport, staleness: Mapping[int, int]) -> int:
        self.reports.append(report)
        return report.step

    def restored(self, state: TrainState) -> int:
        raise AssertionError("nothing is restored here")

    def publish(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor], *, again: bool = False) -> None:
        layout = lay_out(manifest.tensors)
        self._weights = (manifest.version, unpack(manifest, layout, list(cut(tensors, layout))))

    def commit_checkpoint(self, location: str, state: TrainState, sha256: str) -> None:
        self.checkpoints.append(state.step)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("model")
    size = TinyArchitecture(hidden_size=16, layers=1, heads=2, intermediate_size=16)
    make_tiny_model(directory, character_tokenizer("0123>"), seed=0, architecture=size)
    return directory


def learn(model: Path, recipe: str, directory: Path) -> LocalLink:
    settings = LoopSettings(
        steps=STEPS,
        temperature=1.0,
        micro_batch_tokens=64,
        checkpoint_every_steps=15,
        checkpoints=directory,
        optimizer=OptimizerSettings(3e-2, 0, 0.0, (0.9, 0.95), 1.0),
        logp_check=LogpCheckSettings(rollouts=2, bound=1e-3, max_staleness=0, update_mode="keep", temperature=1.0),
    )
    trainer = Trainer(load_model(model, torch.float32), load_tokenizer(model), build(recipe), settings)
    link = LocalLink(model)
    train(trainer, settings, link, World(), None, lambda metrics: None)
    return link


@pytest.mark.parametrize("recipe", READY)
def test_a_recipe_learns_to_begin_with_the_wanted_token(model: Path, tmp_path: Path, recipe: str) -> None:
    """One prompt, reward 1 for one first token in seven: twenty steps are plenty for a policy gradient."""
    link = learn(model, recipe, tmp_path)
    assert len(link.reports) == STEPS
    assert link.checkpoints == [15, 20]
    for report in link.reports:
        assert all(np.isfinite(value) for value in report.metrics.values()), report.metrics
        assert 0 <= report.metrics["entropy"] <= np.log(7)  # of seven tokens
        assert report.metrics["logp_mismatch_max"] < 1e-4
        # Sampled from the weights that are trained: all ratios of policy to behavior are 1.
        assert report.metrics.get("ratio_mean", 1.0) == pytest.approx(1.0, abs=1e-3)
    assert np.mean(link.rewards[-3:]) > np.mean(link.rewards[:3]) + 0.3


def test_the_recipes_that_need_more_than_one_sampler_are_known() -> None:
    """A recipe that becomes trainable here, or no longer is, is noticed."""
    assert set(recipe_names()) - set(READY) == {
        "a_star_po",
        "nash_md",
        "nash_mp",
        "online_ipo",
    }
