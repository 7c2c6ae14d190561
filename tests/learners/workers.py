"""Trains the same tickets in one process or in several real ones, for tests that compare them."""

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import Qwen3Config, Qwen3ForCausalLM

from distrl.messages import Manifest, StepReport
from distrl.objectives import build
from learners.checkpoint import TrainState
from learners.logp_check import LogpCheckSettings
from learners.loop import train
from learners.optimizer import OptimizerSettings
from learners.parallel import ParallelSettings
from learners.trainer import LoopSettings, Stages, Trainer
from learners.world import World
from tests.builders import generation_batch, grading_batch, reference_batch

STEPS = 4
GROUPS = [(5, (2, 9, 3)), (1, (4, 4, 1)), (7, (1, 2, 6)), (2, (8, 5, 3))]
"""Prompt length and response lengths of each ticket of a step."""


def tickets(step: int) -> list[Stages]:
    """The same for everybody; lengths move around from step to step."""
    found = []
    for place, (prompt, responses) in enumerate(GROUPS):
        number = step * len(GROUPS) + place
        turned = responses[step % 3 :] + responses[: step % 3]
        generation = generation_batch(number, turned, tuple((3 + number + i) % 20 for i in range(prompt)))
        found.append((generation, grading_batch(generation), reference_batch(generation)))
    return found


@dataclass
class FixedLink:
    """Gives out `tickets` and keeps what it is told."""

    reports: list[StepReport] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    checkpoints: list[Path] = field(default_factory=list)

    def next_batch(self, step: int, check: Callable[[], None]) -> tuple[Sequence[Stages], Mapping[int, int]]:
        return tickets(step), {step * len(GROUPS) + i: 0 for i in range(len(GROUPS))}

    def trained(self, report: StepReport, staleness: Mapping[int, int]) -> int:
        self.reports.append(report)
        return report.step

    def restored(self, state: TrainState) -> int:
        return state.version + 100

    def publish(self, manifest: Manifest, tensors: Mapping[str, Tensor], *, again: bool = False) -> None:
        self.weights = {name: x.detach().clone() for name, x in tensors.items()}

    def commit_checkpoint(self, location: str, state: TrainState, sha256: str) -> None:
        self.checkpoints.append(Path(location))


class Tokenizer:
    pad_token_id = 0

    def save_pretrained(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")


def make_model(dtype: torch.dtype = torch.float64) -> Any:
    config = Qwen3Config(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3ForCausalLM(config).to(dtype)


@dataclass(frozen=True)
class Case:
    """How a run is made; the tickets are the same in all."""

    recipe: str = "ppo"
    options: Mapping[str, Any] = field(default_factory=dict)
    parallel: str = "ddp"
    dtype: torch.dtype = torch.float64
    """Of the parameters."""
    products: torch.dtype = torch.float32
    layout: str = "bucketed"
    micro_batch_tokens: int = 64
    activation_checkpointing: bool = False
    max_grad_norm: float = 1.0
    steps: int = STEPS
    checkpoint_every_steps: int = 100


def run(case: Case, directory: Path, world: World | None = None, resume: Path | None = None) -> FixedLink:
    """One worker's part of a run; what the link was told, empty on all workers but the first."""
    world = world or World()
    settings = LoopSettings(
        steps=case.steps,
        temperature=0.9,
        micro_batch_tokens=case.micro_batch_tokens,
        checkpoint_every_steps=case.checkpoint_every_steps,
        checkpoints=directory,
        optimizer=OptimizerSettings(1e-2, 0, 0.1, (0.9, 0.95), case.max_grad_norm),
        logp_check=LogpCheckSettings(3, 100.0, 1, "keep", 0.9),
        layout=case.layout,  # type: ignore[arg-type]
        parallel=ParallelSettings(
            case.parallel,  # type: ignore[arg-type]
            case.products,
            activation_checkpointing=case.activation_checkpointing,
        ),
    )
    trainer = Trainer(make_model(case.dtype), Tokenizer(), build(case.recipe, **case.options), settings, world)
    link = FixedLink()
    state = None if resume is None else trainer.restore(resume)
    train(trainer, settings, link, world, state, lambda metrics: None)
    return link


def spawn(worker: Callable[..., None], size: int, *arguments: Any) -> None:
    """Runs `worker(world, *arguments)` in `size` processes with gloo; raises what one of them raises."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(_enter, args=(worker, size, port, arguments), nprocs=size)  # type: ignore[no-untyped-call]


def _enter(rank: int, worker: Callable[..., None], size: int, port: int, arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=size)
    try:
        worker(World.join(rank, size, torch.device("cpu")), *arguments)
    finally:
        distributed.destroy_process_group()
