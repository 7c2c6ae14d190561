"""What does the learner cost? Memory and speed of its three parts, each beside the plain way in the same run.

    python -m benchmarks.learner [--hidden 256 512 1024] [--tokens 4096] [--repetitions 2] [--data train.jsonl]

*head*: loss and backward pass over a vocabulary of 151,936 for several widths of the model, by `log_softmax` over whole
logits and by `distrl.vocabulary`; each measurement in a process of its own, whose peak of resident memory counts from
when inputs and weight are there. The two alternate.

*layout*: forward and backward pass over sequences with GSM8K's lengths: 64 at a time as they come and padded to the
longest, against the same sequences bucketed under half, and packed under an eighth, of the tokens that the largest of
the padded passes holds.

*step*: a whole optimizer step of TOPR, against a bare forward and backward pass of the model on the same micro-batches
with its own cross-entropy.

Seconds are CPU seconds of one thread, so that what else runs on the machine counts little; those on the clock stand
beside. A JSON line per measurement, and one with the ratios.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from distrl.logps import PaddedTokens
from distrl.objectives import build
from distrl.policy_model import PolicyModel
from distrl.vocabulary import Head, token_logps
from learners.batches import Budget, TrainingBatch, split
from learners.logp_check import LogpCheckSettings
from learners.optimizer import OptimizerSettings
from learners.trainer import LoopSettings, Trainer

VOCABULARY = 151_936
ROWS = 512
PADDED_ROWS = 64
CHARACTERS_PER_TOKEN = 4
"""GSM8K's texts become lengths by this: no tokenizer of a real vocabulary is at hand."""


def head(way: str, hidden: int, tokens: int) -> dict[str, Any]:
    """One loss and backward pass; called in a process of its own."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    weight = (torch.randn(VOCABULARY, hidden, generator=generator) * 0.02).requires_grad_()
    symbols = torch.randint(VOCABULARY, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _memory_kib("VmRSS")
    began, began_cpu = time.perf_counter(), time.process_time()
    if way == "plain":
        logps = torch.log_softmax(states @ weight.T, 1).gather(1, symbols[:, None])[:, 0]
    else:
        logps = token_logps(states, Head(weight), symbols[:, None]).logps[:, 0]
    (logps * upstream).sum().backward()
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    peak = _memory_kib("VmHWM") - before
    return {"part": "head", "way": way, "hidden": hidden, "cpu_s": cpu, "clock_s": seconds, "peak_mib": peak / 1024}


def _memory_kib(name: str) -> int:
    """Of this process: VmRSS is what is resident, VmHWM the most that was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure_head(hidden: int, tokens: int, repetitions: int) -> dict[str, float]:
    found: dict[str, list[dict[str, Any]]] = {"plain": [], "blocks": []}
    for _ in range(repetitions):
        for way, results in found.items():
            command = [sys.executable, "-m", "benchmarks.learner", "--one", way, str(hidden), str(tokens)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results.append(json.loads(output))
            print(json.dumps(results[-1]), flush=True)

    def least(way: str, key: str) -> float:
        return min(result[key] for result in found[way])

    return {
        f"head_{hidden}_peak_of_plain": least("blocks", "peak_mib") / least("plain", "peak_mib"),
        f"head_{hidden}_speed_of_plain": least("plain", "cpu_s") / least("blocks", "cpu_s"),
        f"head_{hidden}_speed_of_plain_by_clock": least("plain", "clock_s") / least("blocks", "clock_s"),
    }


def lengths_of(data: Path | None) -> list[tuple[int, int]]:
    """Prompt and response lengths, in tokens, of GSM8K's problems, or of a distribution with the same quartiles."""
    if data is None:
        # Characters of questions and answers of the training file: mean and deviation of their logarithms.
        generator = torch.Generator().manual_seed(0)
        logs = torch.randn(ROWS, 2, generator=generator) * torch.tensor([0.382, 0.487]) + torch.tensor([5.384, 5.544])
        texts = logs.exp().tolist()
    else:
        lines = [json.loads(line) for line in data.read_text().splitlines()[:ROWS]]
        texts = [(len(line["question"]), len(line["answer"])) for line in lines]
    return [(max(1, int(q / CHARACTERS_PER_TOKEN)), max(1, int(a / CHARACTERS_PER_TOKEN))) for q, a in texts]


def make_model() -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(config)


def make_batch(lengths: Sequence[tuple[int, int]]) -> TrainingBatch:
    """Random tokens of these lengths, four rows to a ticket."""
    prompts, responses = (torch.tensor(x) for x in zip(*lengths, strict=True))
    P, T = int(prompts.max()), int(responses.max())
    ids = torch.randint(4096, (len(lengths), P + T), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(T) < responses[:, None]
    group = torch.arange(len(lengths)) // 4
    logps = torch.where(mask, -8.3, 0.0)
    rewards = (torch.arange(len(lengths)) % 2).float()
    tensors = {"mask": mask, "behavior_logps": logps, "rewards": rewards, "group": group}
    tokens = PaddedTokens(ids, prompts, mask)
    return TrainingBatch(
        tokens, tensors, int(mask.sum()), torch.zeros_like(mask, dtype=torch.int64), ["none"] * len(ids)
    )


def timed(work: Callable[[], None], repetitions: int) -> tuple[float, float]:
    """Least CPU and clock seconds."""
    found = []
    for _ in range(repetitions):
        began, cpu = time.perf_counter(), time.process_time()
        work()
        found.append((time.process_time() - cpu, time.perf_counter() - began))
    return min(cpu for cpu, _ in found), min(clock for _, clock in found)


def measure_layout(batch: TrainingBatch, repetitions: int) -> tuple[dict[str, float], int]:
    lengths, group = batch.tokens.lengths, batch.tensors["group"]
    padded = list(torch.arange(len(lengths)).split(PADDED_ROWS))
    budget = max(len(part) * int(lengths[part].max()) for part in padded)
    model = make_model()
    ways: dict[str, tuple[PolicyModel, list[Tensor]]] = {
        "padded": (PolicyModel(model), padded),
        "bucketed": (PolicyModel(model), split(lengths, group, Budget(budget // 2), 1)[0]),
        "packed": (PolicyModel(model, layout="packed"), split(lengths, group, Budget(budget // 8, packed=True), 1)[0]),
    }
    seconds = {}
    for way, (policy, parts) in ways.items():

        def work(policy: PolicyModel = policy, parts: Sequence[Tensor] = parts) -> None:
            for part in parts:
                policy(batch.tokens.rows(part), 1.0).logps.sum().backward()
            model.zero_grad()

        seconds[way], clock = timed(work, repetitions)
        rate = int(lengths.sum()) / seconds[way]
        line = {"part": "layout", "way": way, "passes": len(parts), "cpu_s": seconds[way], "clock_s": clock}
        print(json.dumps({**line, "tokens_per_cpu_s": rate}), flush=True)
    ratios = {f"layout_{way}_of_padded": seconds["padded"] / seconds[way] for way in ("bucketed", "packed")}
    return ratios, budget // 2


def measure_step(batch: TrainingBatch, budget: int, repetitions: int) -> dict[str, float]:
    settings = LoopSettings(
        steps=100,
        temperature=1.0,
        micro_batch_tokens=budget,
        checkpoint_every_steps=100,
        checkpoints=Path(),
        optimizer=OptimizerSettings(1e-5, 0, 0.0, (0.9, 0.95), 1.0),
        logp_check=LogpCheckSettings(0, 1.0, 0, "keep", 1.0),
    )
    model = make_model()
    trainer = Trainer(model, _Tokenizer(), build("topr"), settings)
    parts = split(batch.tokens.lengths, batch.tensors["group"], Budget(budget), 1)[0]
    rows = [_aligned(batch.tokens.rows(part)) for part in parts]

    def bare() -> None:
        for ids, labels in rows:
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
        model.zero_grad()

    def step() -> None:
        trainer.step(batch, 1)

    seconds: dict[str, list[float]] = {"bare": [], "step": []}
    for _ in range(repetitions):
        for way, work in (("bare", bare), ("step", step)):
            cpu, clock = timed(work, 1)
            seconds[way].append(cpu)
            print(json.dumps({"part": "step", "way": way, "cpu_s": cpu, "clock_s": clock}), flush=True)
    return {"step_of_bare": statistics.median(seconds["bare"]) / statistics.median(seconds["step"])}


def _aligned(tokens: PaddedTokens) -> tuple[Tensor, Tensor]:
    """Rows that begin in column 0, and labels at response tokens."""
    P = tokens.input_ids.shape[1] - tokens.response_mask.shape[1]
    columns = torch.arange(int(tokens.lengths.max()))
    at = (columns + (P - tokens.prompt_lengths)[:, None]).clamp(max=tokens.input_ids.shape[1] - 1)
    ids = tokens.input_ids.gather(1, at)
    learned = (columns >= tokens.prompt_lengths[:, None]) & (columns < tokens.lengths[:, None])
    return ids, torch.where(learned, ids, -100)


class _Tokenizer:
    pad_token_id = 0

    def save_pretrained(self, directory: Path) -> None:
        raise AssertionError("nothing is saved here")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", nargs="*", type=int, default=[256, 512, 1024])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--data", type=Path, help="GSM8K's train.jsonl; without it, lengths of the same distribution")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        way, hidden, tokens = arguments.one
        print(json.dumps(head(way, int(hidden), int(tokens))))
        return
    batch = make_batch(lengths_of(arguments.data))
    ratios, budget = measure_layout(batch, arguments.repetitions)
    ratios |= measure_step(batch, budget, arguments.repetitions)
    for hidden in arguments.hidden:
        ratios |= measure_head(hidden, arguments.tokens, arguments.repetitions)
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
