"""One GRPO run of TRL, for `benchmarks.against_trl`; runs in an environment that has TRL and not distrl.

Usage: python trl_run.py '{"model": ..., "data": ..., ...}'. Prints a JSON line with the time of every step. Every
`save_every` steps, where that is not 0, it writes the model to `output`/step-N.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def parity(completions: list[str], **_: Any) -> list[float]:
    """The reward of the cells: the parity of the first character."""
    return [float(ord(c[0]) % 2) if c else 0.0 for c in completions]


def exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The reward of sorting digits."""
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


class Times(TrainerCallback):
    """Notes when every step ended; writing a model does not count as time."""

    def __init__(self, job: dict[str, Any], tokenizer: Any) -> None:
        self.times: list[float] = []
        self._job = job
        self._tokenizer = tokenizer
        self._began = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.times.append(time.perf_counter() - self._began)
        every = self._job["save_every"]
        if every and state.global_step % every == 0:
            paused = time.perf_counter()
            directory = Path(self._job["output"]) / f"step-{state.global_step}"
            model.save_pretrained(directory)
            self._tokenizer.save_pretrained(directory)
            self._began += time.perf_counter() - paused


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = [json.loads(line) for line in Path(job["data"]).read_text().splitlines()]
    times = Times(job, tokenizer)
    config = GRPOConfig(
        output_dir=job["output"],
        use_cpu=True,
        max_steps=job["steps"],
        per_device_train_batch_size=job["rollouts_per_step"],
        num_generations=job["group_size"],
        max_completion_length=job["response_tokens"],
        temperature=1.0,
        top_k=0,
        beta=0.0,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=0.95,
        optim="adamw_torch",
        seed=job["seed"],
        gradient_checkpointing=False,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        reward_funcs=parity if job["reward"] == "parity" else exact,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[times],
    )
    trainer.train()
    print(json.dumps({"times": times.times}))


if __name__ == "__main__":
    main()
