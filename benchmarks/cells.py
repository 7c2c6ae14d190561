"""The sizes that the speed benchmarks are run at: a random model, prompts, and a config for each.

A cell's vocabulary is 4,096 characters and its weights are random, so that every token is about as likely as any other
and one response in 64 ends early at the most: all programs sample the same number of tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distrl.config import Config, make_config
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.tokenizer import character_tokenizer

ALPHABET = "".join(chr(0x4E00 + i) for i in range(4094))  # and two special tokens
PROMPT_TOKENS = 16
PROBLEMS = 2048
CONTEXT = 128


@dataclass(frozen=True, slots=True)
class Cell:
    """One size of model and response, and a batch that takes about a second or two to train."""

    name: str
    architecture: TinyArchitecture
    response_tokens: int
    tickets_per_step: int
    group_size: int
    slots: int
    steps: int

    @property
    def rollouts_per_step(self) -> int:
        return self.tickets_per_step * self.group_size


CELLS = {
    cell.name: cell
    for cell in (
        Cell("1M x 8", TinyArchitecture(128, 3, 4, 256, CONTEXT), 8, 32, 8, 256, 30),
        Cell("1M x 64", TinyArchitecture(128, 3, 4, 256, CONTEXT), 64, 16, 8, 128, 16),
        Cell("10M x 64", TinyArchitecture(320, 7, 5, 864, CONTEXT), 64, 8, 8, 64, 12),
        Cell("50M x 64", TinyArchitecture(640, 10, 10, 1728, CONTEXT), 64, 4, 4, 16, 10),
    )
}


def make_cell(directory: Path, cell: Cell) -> tuple[Path, Path]:
    """Writes the cell's model and prompts below `directory` unless they are there: (model, JSON Lines file)."""
    model, data = directory / cell.name.replace(" ", ""), directory / "prompts.jsonl"
    if not model.exists():
        make_tiny_model(model, character_tokenizer(ALPHABET), seed=0, architecture=cell.architecture)
    if not data.exists():
        rng = np.random.default_rng(0)
        with data.open("w") as file:
            for _ in range(PROBLEMS):
                prompt = "".join(ALPHABET[i] for i in rng.integers(0, len(ALPHABET), PROMPT_TOKENS))
                file.write(json.dumps({"prompt": prompt, "answer": prompt[0]}) + "\n")
    return model, data


def cell_config(cell: Cell, model: Path, data: Path, runs: Path, name: str, **train: Any) -> Config:
    """The config of a run at this size, without reference scoring, and with an evaluation of 16 problems."""
    return make_config(
        {
            "run": {"dir": runs, "name": name},
            "model": {"path": model},
            "data": {"source": "jsonl", "path": str(data)},
            "reward": {"grader": "benchmarks.cells:first_character"},
            "rollout": {"group_size": cell.group_size, "max_new_tokens": cell.response_tokens},
            "generation": {"slots": cell.slots},
            "objective": {"recipe": "topr"},
            "train": {
                "steps": cell.steps,
                "tickets_per_step": cell.tickets_per_step,
                "checkpoint_every_steps": 1000,
                "learning_rate": 1e-6,
                **train,
            },
            "evaluation": {"problems": 16, "every_steps": 0},
        }
    )


def first_character(response: str, answer: str, metadata: dict[str, Any]) -> float:
    """A reward that differs inside a group, so that every step has a gradient: the parity of the first character."""
    return float(ord(response[0]) % 2) if response else 0.0
