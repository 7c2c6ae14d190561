"""The checks of a config before its run: each says what it found, and what to do where that is not enough."""

import asyncio
import importlib.metadata
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploy.check import RunPlan, check_graders, check_run
from deploy.metrics.endpoint import check_port
from distrl.config import Config
from distrl.errors import DistrlError
from distrl.storage import Folder, cause

Verdict = Literal["ok", "warning", "bad"]
GIB = 1 << 30

TRAINED_BYTES = 16
"""Bytes per parameter of a learner in float32: weight, gradient and AdamW's two moments."""
SERVED_BYTES = 4
"""Bytes per parameter of a generation or reference actor in float32."""
CHECKPOINT_BYTES = 12
"""Bytes per parameter of a checkpoint: weights and both moments."""


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    verdict: Verdict
    text: str


def examine(config: Config) -> list[Finding]:
    """All checks, in the order in which a user would fix them; a check that cannot be made is bad, with its reason."""
    plan: list[RunPlan] = []

    def whole() -> Finding:
        plan.append(check_run(config))
        return Finding("config", "ok", "model, data, objective and graders fit each other")

    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("config", whole),
        ("tokenizer", lambda: _tokenizer(config)),
        ("versions", lambda: _versions(config)),
        ("processors", lambda: _processors(config)),
        ("gpus", lambda: _gpus(config, plan[0] if plan else None)),
        ("memory", lambda: _memory(config, scores_reference=not plan or plan[0].scores_reference)),
        ("disk", lambda: _disk(config)),
        ("storage", lambda: _storage(config)),
        ("port", lambda: _port(config)),
        ("grader", lambda: _grader(config)),
    ]
    return [_made(name, check) for name, check in checks]


def _made(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except DistrlError as error:
        return Finding(name, "bad", str(error))
    except OSError as error:
        return Finding(name, "bad", f"{type(error).__name__}: {error}")


def parameters(model: Path) -> int:
    """Parameters of a model directory, from the headers of its safetensors files alone.

    Raises:
        OSError: there is no such file.
    """
    total = 0
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {model}")
    for file in files:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                size = 1
                for extent in entry["shape"]:
                    size *= extent
                total += size
    return total


def _tokenizer(config: Config) -> Finding:
    from distrl.models import load_tokenizer

    rows = int(json.loads((config.model.path / "config.json").read_text())["vocab_size"])
    tokens = len(load_tokenizer(config.model.path))
    if tokens > rows:
        text = f"model.path: the tokenizer must not have more tokens than the model has rows ({rows}), got {tokens}; "
        return Finding("tokenizer", "bad", text + "use the tokenizer that the model was trained with")
    return Finding("tokenizer", "ok", f"{tokens} tokens fit the model's {rows} rows")


def _versions(config: Config) -> Finding:
    wanted = ["torch", "transformers", "ray"]
    if config.generation.engine == "vllm":
        wanted.append("vllm")
    found, lacking = [], []
    for name in wanted:
        for distribution in (name, f"{name}-cpu"):
            try:
                found.append(f"{distribution} {importlib.metadata.version(distribution)}")
                break
            except importlib.metadata.PackageNotFoundError:
                continue
        else:
            lacking.append(name)
    if lacking:
        text = f"generation.engine {config.generation.engine} needs {', '.join(lacking)}, which is not installed; "
        return Finding("versions", "bad", text + "pip install 'distrl[vllm]', or set generation.engine=transformers")
    return Finding("versions", "ok", ", ".join(found) + "; docs/support.md has the tested ones")


def _processes(config: Config) -> int:
    """Processes that compute at the same time, if all are busy."""
    return config.train.workers + config.generation.actors + config.reference.actors


def _processors(config: Config) -> Finding:
    cores = len(os.sched_getaffinity(0))
    wanted = _processes(config) * config.run.threads_per_process
    text = f"{wanted} busy threads on {cores} cores"
    if wanted > 2 * cores:
        remedy = (
            "lower run.threads_per_process or the numbers of actors: threads that share a core slow each other down"
        )
        return Finding("processors", "warning", f"{text}; {remedy}")
    return Finding("processors", "ok", text)


def gpus_wanted(config: Config, plan: RunPlan | None) -> int:
    """GPUs that a run needs to be scheduled at all; 0 where it computes on CPUs.

    Args:
        plan: None where the config is bad; then only the learner's are known.
    """
    from deploy.placement import claims, learner_claims

    wanted = [*learner_claims(config), *(() if plan is None else claims(config, plan))]
    total: float = sum(claim.gpus for claim in wanted)
    return math.ceil(total - 1e-6)


def _gpus(config: Config, plan: RunPlan | None) -> Finding:
    wanted, there = gpus_wanted(config, plan), _gpus_here()
    if wanted > there:
        return Finding(
            "gpus",
            "bad",
            f"the run needs {wanted} GPUs at once, this machine has {there}: {wanted - there} too few, and it would "
            "wait for them for ever; lower train.workers or generation.actors, or run it on a cluster",
        )
    return Finding("gpus", "ok", f"{wanted} needed, {there} here")


def _gpus_here() -> int:
    import torch

    return int(torch.cuda.device_count())


def _memory(config: Config, *, scores_reference: bool) -> Finding:
    size = parameters(config.model.path)
    learners = config.train.workers
    roles = {
        "learners": learners * size * TRAINED_BYTES,
        "generation": config.generation.actors * size * SERVED_BYTES,
        "reference": config.reference.actors * size * SERVED_BYTES if scores_reference else 0,
        "rollouts": config.limits.ready_bytes,
    }
    told = ", ".join(f"{name} {amount / GIB:.2f}" for name, amount in roles.items() if amount)
    wanted, there = sum(roles.values()), _memory_here()
    text = f"{size / 1e6:.2f} million parameters in float32: {told} GiB, without activations and caches"
    if config.placement.mode != "cpu":
        return Finding("memory", "ok", f"{text}; compare it with your GPUs")
    if wanted > there:
        short = f"{(wanted - there) / GIB:.2f} too few"
        text += f"; together {wanted / GIB:.2f} GiB of {there / GIB:.2f} that are free: {short}"
        return Finding(
            "memory", "bad", text + "; lower the numbers of actors or limits.ready_bytes, or take more machines"
        )
    return Finding("memory", "ok", f"{text}; {there / GIB:.2f} GiB are free")


def _memory_here() -> int:
    """Bytes that this process may still take: what the machine has, or the container's limit."""
    with open("/proc/meminfo") as file:
        values = {line.split(":")[0]: int(line.split()[1]) for line in file}
    free = values["MemAvailable"] * 1024
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(name).read_text().strip() if Path(name).is_file() else "max"
        if text.isdigit():
            free = min(free, int(text))
    return free


def _storage(config: Config) -> Finding:
    """Writes a file and deletes it again."""
    if config.storage.uri is None:
        return Finding("storage", "ok", "journal and checkpoints lie in the run's directory")
    folder, name = Folder(config.storage.uri), f".distrl-doctor-{os.getpid()}"
    try:
        folder.make()
        folder.write(name, b"distrl doctor")
        folder.delete(name)
    except OSError as error:
        return Finding("storage", "bad", f"storage.uri: {folder} must be writable: {cause(error)}; mend it")
    return Finding("storage", "ok", f"{folder} can be written to")


def _disk(config: Config) -> Finding:
    place = config.run.dir
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return Finding("disk", "bad", f"run.dir must be writable, {place} is not; permit it, or set run.dir")
    free = shutil.disk_usage(place).free
    # One more than are kept: the new one is complete before an old one goes.
    wanted = (config.train.keep_checkpoints + 2) * parameters(config.model.path) * CHECKPOINT_BYTES
    text = f"checkpoints need {wanted / GIB:.2f} GiB, {free / GIB:.2f} are free in {place}; the journal grows besides"
    return Finding(
        "disk", "bad" if wanted > free else "ok", text + ("; make room, or set run.dir" if wanted > free else "")
    )


def _port(config: Config) -> Finding:
    check_port(config.metrics)
    port = config.metrics.port or "a free port"
    return Finding("port", "ok", f"metrics at {config.metrics.host}, {port}")


def _grader(config: Config) -> Finding:
    """Grades the true answer to a real prompt, and an empty response."""
    from distrl.graders.build import build_graders, describe, resources
    from distrl.graders.grade import Response
    from distrl.tasks import load_task

    task = load_task(config.data)
    problem = task.heldout[0]
    graders = check_graders(config, task)
    grader = build_graders(graders, 1, resources(config))
    answer = problem.answer if isinstance(problem.answer, str) else ""
    try:
        grades = asyncio.run(grader.grade([problem, problem], [Response(answer), Response("")]))
    finally:
        grader.close()
    told = (
        f"{describe(graders)} on held-out prompt {problem.prompt_id}: reward {grades[0].reward:g} for its own answer, "
    )
    return Finding("grader", "ok", told + f"{grades[1].reward:g} for nothing")
