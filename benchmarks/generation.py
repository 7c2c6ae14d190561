"""What does the generation actor cost over its engine?

    python -m benchmarks.generation [--repetitions 5] [--tickets 96]

The same tickets are sampled twice: by the engine alone, as an object of this process, and by the generation actor, a
Ray process that is called as the coordinator calls it: one call per ticket, the receipt awaited, the rollouts left in
the object store as a record batch with their text. Both have the same model (that of the quickstart, with random
weights), slots and one torch thread, so they sample the same tokens; that is checked. They alternate and never run at
the same time; the first round warms both up and is left out. A figure is sampled tokens per second from the first
request to the last answer; of the repetitions the median counts. Wanted: the actor reaches 0.95 of the engine.

On a machine with other work the two are not slowed down alike. `tokens_per_cpu_s` is over the seconds of processor time
that the process with the engine took, which other work changes less; it leaves out what Ray's own processes do.

Prints a JSON line per measurement, and one with the ratio.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from actors.calls import RayCaller
from actors.engines.build import build_engine
from deploy.remote.generation import GenerationActor, ModelText
from deploy.remote.policy_store import PolicyStoreActor
from deploy.start import start_ray
from distrl.config import Config, make_config
from distrl.models import load_tokenizer, make_tiny_model
from distrl.sampling import Engine, SampleRequest
from distrl.schema import Role
from distrl.seeding import Purpose
from distrl.tasks.sort_digits import ALPHABET
from distrl.tickets import Ticket
from distrl.tokenizer import character_tokenizer

TIMEOUT_S = 300.0


def tickets(count: int, group_size: int, repetition: int) -> list[Ticket]:
    """Tickets with prompts of eight digits; the noise differs between repetitions."""
    return [
        Ticket(i, 0, f"p{i}", f"{12345678 + 7919 * i}>", Role.POLICY, group_size, stream(repetition, i))
        for i in range(count)
    ]


def stream(repetition: int, ticket_id: int) -> tuple[int, ...]:
    return repetition, int(Purpose.SAMPLING), ticket_id, 0


async def by_engine(engine: Engine, text: ModelText, config: Config, work: Sequence[Ticket]) -> int:
    """Tokens that the engine sampled."""

    async def one(ticket: Ticket) -> int:
        prompt = text.encode(ticket.prompt)
        name = str(ticket.ticket_id)
        samples = await engine.sample(SampleRequest(name, prompt, ticket.group_size, config.sampling, ticket.stream))
        return sum(len(sample.token_ids) for sample in samples)

    return sum(await asyncio.gather(*(one(ticket) for ticket in work)))


async def by_actor(caller: RayCaller, work: Sequence[Ticket]) -> int:
    async def one(ticket: Ticket) -> int:
        receipt, _ = await caller.batch("generate", ticket, timeout_s=TIMEOUT_S)
        return int(receipt.response_tokens)

    return sum(await asyncio.gather(*(one(ticket) for ticket in work)))


class Timed(GenerationActor):
    """A generation actor that tells its processor time."""

    @ray.method
    async def cpu_s(self) -> float:
        return time.process_time()


async def compare(config: Config, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(config.model.path)
    engine, text = build_engine(config, tokenizer), ModelText(tokenizer)
    store = ray.remote(PolicyStoreActor).options(num_cpus=0).remote()
    actor: Any = ray.remote(Timed).options(num_cpus=0).remote(config, "generation-0", store)
    caller = RayCaller("generation-0", actor)
    rates: dict[str, list[dict[str, float]]] = {"engine": [], "actor": []}

    async def cpu_s(kind: str) -> float:
        return time.process_time() if kind == "engine" else float(await actor.cpu_s.remote())

    for repetition in range(arguments.repetitions + 1):
        work = tickets(arguments.tickets, arguments.group_size, repetition)
        sampled = {}
        for kind in ("engine", "actor") if repetition % 2 else ("actor", "engine"):
            began, began_cpu = time.perf_counter(), await cpu_s(kind)
            run = by_engine(engine, text, config, work) if kind == "engine" else by_actor(caller, work)
            sampled[kind] = await run
            took, took_cpu = time.perf_counter() - began, await cpu_s(kind) - began_cpu
            rate = {"tokens_per_s": sampled[kind] / took, "tokens_per_cpu_s": sampled[kind] / took_cpu}
            if repetition:
                rates[kind].append(rate)
                print(json.dumps({"repetition": repetition, "kind": kind, "tokens": sampled[kind], **rate}), flush=True)
        assert sampled["engine"] == sampled["actor"], sampled
    for unit in ("tokens_per_s", "tokens_per_cpu_s"):
        median = {kind: statistics.median(rate[unit] for rate in found) for kind, found in rates.items()}
        pairs = [a[unit] / e[unit] for a, e in zip(rates["actor"], rates["engine"], strict=True)]
        ratio = median["actor"] / median["engine"]
        print(json.dumps({"unit": unit, **median, "actor_over_engine": ratio, "of_each_repetition": pairs}))
    await engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tickets", type=int, default=96)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--slots", type=int, default=256)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        make_tiny_model(Path(directory), character_tokenizer(ALPHABET), seed=0)
        config = make_config(
            {
                "model": {"path": directory},
                "data": {"source": "sort_digits"},
                "rollout": {"max_new_tokens": arguments.max_new_tokens, "group_size": arguments.group_size},
                "generation": {"slots": arguments.slots},
            }
        )
        start_ray()
        try:
            asyncio.run(compare(config, arguments))
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
