"""What does a weight update cost, and how long does sampling pause for it?

    python -m benchmarks.weight_sync [--repetitions 5] [--actors 1 2 3 4]

A learner (this process), the policy store and 1 to 4 generation actors, each a process with the real decode loop that
has requests in flight the whole time. For every number of actors three kinds of updates alternate:

- `whole`: every tensor has changed; published, then pulled by all actors at once;
- `changed`: one layer has changed; only its tensors move;
- `reload`: the usual way without transport: the learner saves a Hugging Face directory, every actor ends its engine,
  loads the model from there and starts a new engine. What was in flight is lost.

Seconds are from the start of the publication until the last actor has loaded. `bytes_per_s` is the size of the policy,
times the actors, over those seconds; a `plain copy` of as many bytes in memory, in this process, stands next to each
update and is what the ratio is over. The pause is the time in which an actor samples no token, by its own clock. The
first round is left out, and of the others the median counts; of the pauses also the largest.

On a machine with fewer cores than processes the actors sample, verify and copy against each other: more actors then
mean a longer update, and the figures are of the machine as much as of the code.

Prints a JSON line per update, and one per number of actors with the ratios.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors.calls import RayCaller
from actors.engines.build import build_engine
from deploy.publisher import Publisher
from deploy.remote.generation import GenerationActor
from deploy.remote.policy_store import PolicyStoreActor
from deploy.start import start_ray
from distrl.config import Config, make_config
from distrl.errors import StageError
from distrl.manifest import describe
from distrl.messages import LoadReceipt
from distrl.models import TinyArchitecture, load_model, load_tokenizer, make_tiny_model
from distrl.sampling import SampleRequest
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from distrl.weights import policy_tensors

TIMEOUT_S = 300.0
ARCHITECTURE = TinyArchitecture(hidden_size=512, layers=4, heads=8, intermediate_size=2048)
KINDS = ("whole", "changed", "reload")


class Sampler(GenerationActor):
    """A generation actor that always has requests in flight, and that knows the usual way as well."""

    def __init__(self, config: Config, name: str, store: Any) -> None:
        super().__init__(config, name, store)
        self._config = config
        self._busy: asyncio.Task[None] | None = None

    @ray.method
    async def keep_busy(self) -> None:
        if self._busy is None:
            self._busy = asyncio.create_task(self._sample_on())

    async def _sample_on(self) -> None:
        number = 0
        while True:
            number += 1
            request = SampleRequest(str(number), (3, 4, 5), 16, self._config.sampling, (0, 0, number, 0))
            try:
                await self._engines["policy"].sample(request)
            except StageError:  # the engine was ended by a reload, and what was in flight is lost
                await asyncio.sleep(0)

    @ray.method
    async def reload(self, directory: str, version: int) -> LoadReceipt:
        """Ends the engine and starts one with the model in `directory`."""
        began = time.perf_counter()
        await self._engines["policy"].close()
        path = self._config.model.model_copy(update={"path": Path(directory)})
        config = self._config.model_copy(update={"model": path})
        # In a thread: otherwise this actor could not even be asked how it is.
        engine = await asyncio.to_thread(build_engine, config, load_tokenizer(config.model.path))
        tensors: dict[str, torch.Tensor] = {}
        await engine.load(version, tensors, changed_only=True)
        self._engines = {"policy": engine}
        self._have = {"policy": {}}
        return LoadReceipt(version, 0.0, time.perf_counter() - began, 0)


class Bench:
    """The learner's side."""

    def __init__(self, config: Config, samplers: list[Any], store: Any, directory: Path) -> None:
        self._config = config
        self._callers = [RayCaller(f"generation-{i}", s) for i, s in enumerate(samplers)]
        self._model = load_model(config.model.path, torch.float32)
        self._tensors = policy_tensors(self._model)
        self._publisher = Publisher(store, TIMEOUT_S)
        self._directory = directory
        self._version = 0
        self.bytes = sum(t.nbytes for t in self._tensors.values())

    def plain_copy_s(self, actors: int) -> float:
        """Seconds to copy the policy's bytes once for each actor."""
        source = np.concatenate([t.numpy().reshape(-1).view(np.uint8) for t in self._tensors.values()])
        target = np.zeros_like(source)
        began = time.perf_counter()
        for _ in range(actors):
            np.copyto(target, source)
        return time.perf_counter() - began

    async def update(self, kind: str, actors: int) -> dict[str, Any]:
        self._version += 1
        version = self._version
        for name, tensor in self._tensors.items():
            if kind != "changed" or ".layers.1." in name:
                tensor.mul_(1.0001)
        began = time.perf_counter()
        if kind == "reload":
            path = self._directory / f"version-{version}"
            self._model.save_pretrained(path)
            load_tokenizer(self._config.model.path).save_pretrained(path)
            calls = [c.ask("reload", str(path), version, timeout_s=TIMEOUT_S) for c in self._callers[:actors]]
        else:
            manifest = describe(self._tensors, version=version, step=version)
            await asyncio.to_thread(self._publisher.publish, manifest, self._tensors)
            calls = [c.ask("pull", version, timeout_s=TIMEOUT_S) for c in self._callers[:actors]]
        published = time.perf_counter()
        receipts = await asyncio.gather(*calls)
        ended = time.perf_counter()
        copy_s = self.plain_copy_s(actors)
        return {
            "kind": kind,
            "actors": actors,
            "seconds": ended - began,
            "publish_s": published - began,
            "bytes_per_s": actors * self.bytes / (ended - began),
            "plain_copy_bytes_per_s": actors * self.bytes / copy_s,
            "pause_ms": [round(1000 * r.pause_s, 3) for r in receipts],
            "moved_bytes": [r.moved_bytes for r in receipts],
        }


async def measure(config: Config, directory: Path, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = ray.remote(PolicyStoreActor).options(num_cpus=0).remote()
    samplers: list[Any] = []
    for actors in arguments.actors:
        while len(samplers) < actors:
            made: Any = ray.remote(Sampler).options(num_cpus=0)
            samplers.append(made.remote(config, f"generation-{len(samplers)}", store))
        for sampler in samplers:
            await sampler.keep_busy.remote()
        bench = Bench(config, samplers, store, directory / str(actors))
        bench._version = 1000 * actors  # versions only grow
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for repetition in range(arguments.repetitions + 1):
            for kind in KINDS:
                # After a reload an actor knows no hashes: what it has must be known before a part can move.
                if kind == "changed" or repetition == 0:
                    await bench.update("whole", actors)
                result = await bench.update(kind, actors)
                if repetition:
                    found[kind].append(result)
                    print(json.dumps({"repetition": repetition, **result}), flush=True)
        print(json.dumps(summarize(actors, bench.bytes, found)), flush=True)


def summarize(actors: int, size: int, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    seconds = {kind: statistics.median(r["seconds"] for r in results) for kind, results in found.items()}
    pauses = {kind: [p for r in results for p in r["pause_ms"]] for kind, results in found.items()}
    over_copy = [r["bytes_per_s"] / r["plain_copy_bytes_per_s"] for r in found["whole"]]
    return {
        "actors": actors,
        "policy_bytes": size,
        "median_s": seconds,
        "whole_bytes_per_s": statistics.median(r["bytes_per_s"] for r in found["whole"]),
        "whole_over_plain_copy": statistics.median(over_copy),
        "reload_over_whole_s": seconds["reload"] / seconds["whole"],
        "reload_over_changed_s": seconds["reload"] / seconds["changed"],
        "pause_ms_median": {kind: statistics.median(values) for kind, values in pauses.items()},
        "pause_ms_max": {kind: max(values) for kind, values in pauses.items()},
        "changed_share_moved": statistics.median(b for r in found["changed"] for b in r["moved_bytes"]) / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 3, 4])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        make_tiny_model(model, character_tokenizer(ALPHABET), seed=0, architecture=ARCHITECTURE)
        config = make_config(
            {
                "model": {"path": model},
                "data": {"source": "sort_digits"},
                "rollout": {"max_new_tokens": 48, "group_size": 16},
                "generation": {"slots": 32},
                "limits": {"sync_timeout_s": TIMEOUT_S},
            }
        )
        start_ray()
        try:
            asyncio.run(measure(config, Path(directory), arguments))
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
