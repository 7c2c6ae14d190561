"""One GRPO run of TRL, for `benchmarks.against_trl`; runs in an environment that has TRL and not distrl.

Usage: python trl_run.py '{"model": ..., "data": ..., ...}'. Prints a JSON line with the time of every step, and
the held-out accuracy after those that are evaluated.
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
    """Notes when every step ended and, every so many steps, the held-out accuracy; measuring does not count as time."""

    def __init__(self, job: dict[str, Any], tokenizer: Any) -> None:
        self.times: list[float] = []
        self.accuracies: list[tuple[float, float]] = []
        self._job = job
        self._tokenizer = tokenizer
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.times.append(time.perf_counter() - self._began)
        every = self._job["evaluate_every"]
        if every and state.global_step % every == 0:
            paused = time.perf_counter()
            self.accuracies.append((self.times[-1], self._accuracy(model)))
            self._began += time.perf_counter() - paused
            control.should_training_stop = self.accuracies[-1][1] >= self._job["target"]

    @torch.no_grad()
    def _accuracy(self, model: Any) -> float:
        rows = [json.loads(line) for line in Path(self._job["heldout"]).read_text().splitlines()]
        prompts = self._tokenizer([r["prompt"] for r in rows], return_tensors="pt", padding=True, padding_side="left")
        was_training = model.training
        model.eval()
        out = model.generate(**prompts, max_new_tokens=self._job["response_tokens"], do_sample=True, top_k=0)
        model.train(was_training)
        texts = self._tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        return sum(t == r["answer"] for t, r in zip(texts, rows, strict=True)) / len(rows)


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
    print(json.dumps({"times": times.times, "accuracies": times.accuracies}))


if __name__ == "__main__":
    main()
