"""Nash-MP on a preference without a best answer: three styles that beat each other in a circle.

    python -m benchmarks.intransitive [--seeds 0 1 2] [--steps 200] [--runs runs/intransitive]

A response is one letter, its style: a beats b, b beats c, c beats a, and anything else loses. The reference answers
with a, b and c in unequal shares; the equilibrium of the game that is regularized towards it is known exactly
(`distrl.tabular.nash_equilibrium`), prompt by prompt. The real engine, stages, objective and learner train in one
process, synchronously. Prints a JSON line per arm: the distance KL(equilibrium || policy) over steps, and how often
the trained policy beats the start, with a 95% interval; writes docs/studies/nash.md with a plot, in which arms and
seeds that were not run keep their numbers. Ends with status 1 where Nash-MP does not stay within half of the start's
distance from the equilibrium over the last five points, does not beat the start, or self-play ends as close.
"""

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.engines.build import build_engine
from actors.generation import Generation
from actors.grading import Grading
from actors.reference import Reference
from actors.scoring import model_scorer
from benchmarks.intransitive_page import LAST, write
from benchmarks.lagged import make_trainer
from deploy.check import check_graders
from deploy.remote.generation import ModelText, reference_shares
from deploy.remote.grading import run_comparison
from distrl.config import Config, make_config
from distrl.graders.build import build_graders, describe
from distrl.models import TinyArchitecture, load_model, load_tokenizer
from distrl.schema import Role
from distrl.seeding import Purpose
from distrl.tabular import nash_equilibrium
from distrl.tasks import DataConfig, Problem, load_task, prompt_index
from distrl.tickets import Ticket
from distrl.warmup import WarmupPlan, cached_model
from distrl.weights import policy_tensors
from learners.trainer import Stages

STYLES = "abc"
OTHER = len(STYLES)
BETA = 0.05
SHARES = {"a": 60, "b": 30, "c": 10}
"""Percent of the prompts whose answer in the warm-up has each style."""

MIXTURE = 0.125
"""Share of the reference in Nash-MD's opponents; the paper's."""

ARMS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "nash-mp, half steps": ("nash_mp", {"beta": BETA, "target": "snapshot", "snapshot_every": 10, "prox": 0.5}),
    "nash-mp, average": ("nash_mp", {"beta": BETA, "target": "ema", "ema_rate": 0.1, "prox": 0.5}),
    "nash-md": ("nash_md", {"tau": BETA, "mixture": MIXTURE}),
    "self-play": ("nash_mp", {"beta": BETA, "target": "ema", "ema_rate": 1.0, "prox": 0.0}),
}
"""Recipes with options; self-play has the same gradient, the policy as its opponent and no proximal term."""


def beats(first: str, second: str, answer: str, metadata: Mapping[str, object]) -> float:
    """The preference function: P(first beats second)."""
    return float(game()[style(first), style(second)])


def style(response: str) -> int:
    return STYLES.index(response) if len(response) == 1 and response in STYLES else OTHER


def game() -> Tensor:
    """[4, 4] P(row beats column) of the styles and of everything else."""
    wins = torch.full((4, 4), 0.5, dtype=torch.float64)
    for i in range(3):
        wins[i, (i + 1) % 3], wins[(i + 1) % 3, i] = 1.0, 0.0
    wins[:3, OTHER], wins[OTHER, :3] = 1.0, 0.0
    return wins


@dataclass(frozen=True, slots=True)
class Point:
    step: int
    distance: float
    """Mean over prompts of KL(equilibrium || policy) over styles, nats."""
    shares: tuple[float, ...]
    """Mean share of a, b, c and everything else."""


def make_model(folder: Path) -> tuple[Path, DataConfig]:
    """The start model: answers each of 100 prompts with one letter, in the shares of SHARES."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [letter for letter, share in SHARES.items() for _ in range(share)]
    lines = [json.dumps({"prompt": f"{n:02d}>", "answer": letters[(n * 37) % 100]}) for n in range(100)]
    for name in ("train", "heldout"):
        text = lines if name == "train" else ['{"prompt": "000>", "answer": "a"}']
        (folder / f"{name}.jsonl").write_text("\n".join(text) + "\n")
    data = DataConfig(
        source="jsonl", path=str(folder / "train.jsonl"), heldout_path=str(folder / "heldout.jsonl"), heldout_size=1
    )
    size = TinyArchitecture(hidden_size=32, layers=2, heads=2, intermediate_size=64, context_length=16)
    plan = WarmupPlan(steps=60, target_accuracy=None)
    model = cached_model(folder / "models", data, alphabet="0123456789>abc", seed=0, architecture=size, plan=plan)
    return model, data


def arm_config(name: str, seed: int, steps: int, model: Path, data: DataConfig) -> Config:
    return make_config(
        {
            "run": {"seed": seed},
            "model": {"path": str(model)},
            "data": data.model_dump(mode="json"),
            "rollout": {"group_size": 8, "max_new_tokens": 3},
            "generation": {"slots": 128},
            "objective": {"recipe": ARMS[name][0], "options": dict(ARMS[name][1])},
            "preference": {"function": "benchmarks.intransitive:beats", "opponents": 8},
            "train": {"steps": steps, "tickets_per_step": 16, "learning_rate": 3e-3, "max_staleness": 0},
            "evaluation": {"problems": 1},
        }
    )


class Players:
    """Policy and opponents as a generation actor has them, with grading and reference scoring, in one process."""

    def __init__(self, config: Config) -> None:
        tokenizer, self._task = load_tokenizer(config.model.path), load_task(config.data)
        self._config, graders = config, check_graders(config, self._task)
        shares = reference_shares(config)
        self.engines = {name: build_engine(config, tokenizer, shares.get(name, 0.0)) for name in ("policy", "opponent")}

        async def fetch(*_: Any) -> Any:
            raise AssertionError("weights are loaded directly")

        self._generation = Generation("generation-0", self.engines, ModelText(tokenizer), config.sampling, fetch)
        self._grading = Grading(
            describe(graders),
            build_graders(graders, 1),
            1,
            comparison=run_comparison(config),
            opponents=config.preference.opponents,
        )
        self._reference = Reference(model_scorer(config.model.path, config.rollout.temperature, 1))

    async def batch(self, step: int) -> list[Stages]:
        size = self._config.train.tickets_per_step
        return list(await asyncio.gather(*(self._ticket(n) for n in range(step * size, (step + 1) * size))))

    async def _ticket(self, number: int) -> Stages:
        problem = self._task.train[prompt_index(self._config.run.seed, number, len(self._task.train))]
        (_, ours), (_, theirs) = [await self._sample(number, problem, role) for role in (Role.POLICY, Role.OPPONENT)]
        _, graded = await self._grading.grade({problem.prompt_id: problem}, ours, theirs)
        _, scored = await self._reference.score(ours)
        return ours, graded, scored

    async def _sample(self, number: int, problem: Problem, role: Role) -> Any:
        purpose = Purpose.SAMPLING if role == Role.POLICY else Purpose.OPPONENT
        stream = (self._config.run.seed, int(purpose), number, 0)
        size = self._config.rollout.group_size
        return await self._generation.generate(Ticket(number, 0, problem.prompt_id, problem.prompt, role, size, stream))

    async def win_rate(self) -> tuple[float, float]:
        """How often the policy's responses beat the opponents', and half a 95% interval; 8 of each to 100 prompts.

        Responses to one prompt are one observation.
        """
        rates = []
        for n in range(len(self._task.train)):
            problem = self._task.train[n]
            (_, ours), (_, theirs) = [await self._sample(10**6 + n, problem, r) for r in (Role.POLICY, Role.OPPONENT)]
            _, graded = await self._grading.grade({problem.prompt_id: problem}, ours, theirs)
            rates.append(sum(graded.column("preference").to_pylist()) / ours.num_rows)
        mean = sum(rates) / len(rates)
        error = math.sqrt(sum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1) / len(rates))
        return mean, 1.96 * error


def distribution(model: Any, tokenizer: Any) -> Tensor:
    """[100, 4] probability of each style, prompt by prompt; exact, from the logits of two tokens."""
    prompts = torch.tensor([tokenizer.encode(f"{n:02d}>") for n in range(100)])
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in STYLES]
    found = torch.zeros(100, 4, dtype=torch.float64)
    with torch.no_grad():
        first = model(prompts).logits[:, -1].double().softmax(-1)
        for i, letter in enumerate(letters):
            ended = model(torch.cat([prompts, torch.full((100, 1), letter)], 1)).logits[:, -1].double().softmax(-1)
            found[:, i] = first[:, letter] * ended[:, tokenizer.eos_token_id]
    found[:, OTHER] = 1.0 - found[:, :OTHER].sum(1)
    return found


def rest_of_nash_md(start: Tensor) -> Tensor:
    """[100, 4] where the loss of Nash-MD is stationary: its mixture is the equilibrium at BETA / (1 - MIXTURE)."""
    mixed = torch.stack([nash_equilibrium(game(), row, BETA / (1 - MIXTURE)) for row in start])
    return (start.log() + mixed @ game().T / BETA).softmax(1)


def distance(target: Tensor, policy: Tensor) -> float:
    """Mean over prompts of KL(target || policy)."""
    return float((target * (target.log() - policy.clamp(min=1e-12).log())).sum(1).mean())


def run_arm(name: str, seed: int, steps: int, every: int, model_path: Path, data: DataConfig) -> dict[str, Any]:
    """Trains one arm."""
    config = arm_config(name, seed, steps, model_path, data)
    trainer, model = make_trainer(config)
    tokenizer: Any = load_tokenizer(config.model.path)
    start = distribution(load_model(config.model.path, torch.float32), tokenizer)
    target = torch.stack([nash_equilibrium(game(), row, BETA) for row in start])
    points: list[Point] = []

    def look(step: int) -> None:
        now = distribution(model.eval(), tokenizer)
        points.append(Point(step, distance(target, now), tuple(round(x, 4) for x in now.mean(0).tolist())))

    async def train() -> tuple[float, float]:
        players = Players(config)
        try:
            look(0)
            opponents = -1
            for step in range(steps):
                await players.engines["policy"].load(step, policy_tensors(model))
                if trainer.anchors.changed("opponent") != opponents:
                    opponents = trainer.anchors.changed("opponent")
                    with trainer.anchors.in_place_of_the_policy("opponent"):
                        await players.engines["opponent"].load(step, policy_tensors(model))
                trainer.step(trainer.training_batch(await players.batch(step)), step + 1)
                if (step + 1) % every == 0:
                    look(step + 1)
            await players.engines["policy"].load(steps, policy_tensors(model))
            start_model = load_model(config.model.path, torch.float32)
            await players.engines["opponent"].load(steps, policy_tensors(start_model))
            return await players.win_rate()
        finally:
            for engine in players.engines.values():
                await engine.close()

    rate, half = asyncio.run(train())
    return {
        "arm": name,
        "seed": seed,
        "distance": [round(p.distance, 5) for p in points],
        "points": [asdict(p) for p in points],
        "equilibrium": [round(x, 4) for x in target.mean(0).tolist()],
        "rest_of_nash_md": round(distance(target, rest_of_nash_md(start)), 5),
        "win_rate_against_start": {"value": rate, "low": rate - half, "high": rate + half},
    }


def faults(results: Sequence[dict[str, Any]]) -> list[str]:
    """What the runs do not show."""
    found = []
    rest = {r["seed"]: min(r["distance"][-LAST:]) for r in results if r["arm"] == "self-play"}
    for result in results:
        if not result["arm"].startswith("nash-mp"):
            continue
        who = f"{result['arm']}, seed {result['seed']}"
        farthest = max(result["distance"][-LAST:])
        if farthest > 0.5 * result["distance"][0]:
            found.append(f"{who}: is {farthest:.4f} from the equilibrium near its end")
        if result["win_rate_against_start"]["low"] <= 0.5:
            found.append(f"{who}: does not beat the start")
        if rest.get(result["seed"], math.inf) <= farthest:
            found.append(f"{who}: self-play is as close to the equilibrium")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--runs", type=Path, default=Path("runs/intransitive"))
    parser.add_argument("--page-only", action="store_true", help="write the page from the numbers beside it")
    arguments = parser.parse_args()
    if arguments.page_only:
        write(None, arguments.every)
        return
    model, data = make_model(arguments.runs.absolute())
    results = []
    for seed in arguments.seeds:
        for arm in arguments.arms:
            results.append(run_arm(arm, seed, arguments.steps, arguments.every, model, data))
            print(json.dumps({k: v for k, v in results[-1].items() if k != "points"}), flush=True)
            print(json.dumps(results[-1]["points"][-1]), file=sys.stderr, flush=True)
    write(results, arguments.every)
    if shown := faults(results):
        sys.exit("; ".join(shown))


if __name__ == "__main__":
    main()
