"""Which objectives survive stale data? Writes docs/studies/off_policy.md.

    python -m benchmarks.off_policy [--seeds 0 1 2] [--runs runs/off-policy] [--seconds 1e9] [--page-only]

Every arm trains the same warmed-up model to sort six digits, in one process, with batches that are exactly 0, 4 or 16
optimizer steps old, or with a recorded journal and nothing else. An arm that is done is a file in `--runs` and is not
done again; with `--seconds` the command ends after the arm under way and goes on the next time. The page is written
when all arms are there.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lagged import Outcome, Point, record_journal, train_lagged, train_offline
from distrl.config import Config, make_config
from distrl.models import TinyArchitecture
from distrl.tasks import DataConfig
from distrl.tasks.sort_digits import ALPHABET
from distrl.warmup import WarmupPlan, cached_model

DATA = DataConfig(source="sort_digits", heldout_size=512, options={"digits": 6})
ARCHITECTURE = TinyArchitecture(hidden_size=64, layers=2, heads=4, intermediate_size=192, context_length=32)
WARMUP = WarmupPlan(steps=1500, target_accuracy=0.3)

OBJECTIVES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "topr": ("topr", {"baseline": 0.0}),
    "tis": ("tis", {"level": "token", "high": 2.0}),
    "tis-paper": ("tis", {"level": "sequence", "high": 1.0, "baseline": "none"}),
    "grpo": ("grpo", {"kl_coefficient": 0.0}),
    "reinforce": ("reinforce", {}),
}
"""By name in the study, recipe and the options that differ from its defaults."""

LAGS = (0, 4, 16)
OFFLINE = "offline"
REGIMES = (*(f"lag-{lag}" for lag in LAGS), OFFLINE)
RECORDED_BATCHES = 20
"""Batches of the recorded journal; longer training goes through them again."""

SETTINGS: Mapping[str, Any] = {
    "rollout": {"group_size": 8, "max_new_tokens": 8},
    "generation": {"slots": 128},
    "reward": {"grader": "benchmarks.graders:plus_or_minus"},
    "train": {"steps": 120, "tickets_per_step": 16, "learning_rate": 3e-4},
    "evaluation": {"problems": 512, "every_steps": 20},
}


@dataclass(frozen=True, slots=True)
class Arm:
    """One training of the study."""

    objective: str
    regime: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.regime}-{self.seed}"


def arms(seeds: Sequence[int]) -> Iterator[Arm]:
    """All arms; a seed is complete before the next one begins."""
    for seed in seeds:
        for regime in REGIMES:
            for objective in OBJECTIVES:
                yield Arm(objective, regime, seed)


def arm_config(arm: Arm, model: Path, runs: Path, settings: Mapping[str, Any] = SETTINGS) -> Config:
    recipe, options = OBJECTIVES[arm.objective]
    return make_config(
        {
            "run": {"dir": str(runs), "name": arm.name, "seed": arm.seed},
            "model": {"path": str(model)},
            "data": DATA.model_dump(mode="json"),
            "objective": {"recipe": recipe, "options": dict(options)},
            **settings,
        }
    )


def run_arm(arm: Arm, model: Path, runs: Path, settings: Mapping[str, Any] = SETTINGS) -> dict[str, Any]:
    """Trains one arm; what it found, as JSON."""
    config = arm_config(arm, model, runs, settings)
    began = time.perf_counter()

    def look(point: Point) -> None:
        print(f"{arm.name}: step {point.step}, held-out accuracy {point.accuracy:.3f}", file=sys.stderr, flush=True)

    outcome: Outcome
    if arm.regime == OFFLINE:
        outcome = train_offline(config, recorded(config, runs), look)
    else:
        outcome = train_lagged(config, int(arm.regime.removeprefix("lag-")), look)
    ages = outcome.staleness
    return {
        "objective": arm.objective,
        "regime": arm.regime,
        "seed": arm.seed,
        "key": key(),
        "points": [dataclasses.asdict(point) for point in outcome.points],
        "staleness": {"first": ages[0], "last": ages[-1], "largest": max(ages), "mean": sum(ages) / len(ages)},
        "weights_sha256": outcome.weights_sha256,
        "wall_s": round(time.perf_counter() - began, 1),
    }


def recorded(config: Config, runs: Path) -> Path:
    """The journal of a seed: sampled by the model of the start on the first call."""
    journal = runs / f"journal-{config.run.seed}-{key()}"
    if not journal.exists():
        aside = journal.with_name(journal.name + ".partial")
        record_journal(config, aside, RECORDED_BATCHES)
        aside.rename(journal)
    return journal


def key() -> str:
    """Names what an arm's numbers depend on, beside the code."""
    parts: list[Any] = [DATA.model_dump(mode="json"), dataclasses.asdict(ARCHITECTURE), dataclasses.asdict(WARMUP)]
    parts += [{name: [recipe, dict(o)] for name, (recipe, o) in OBJECTIVES.items()}, dict(SETTINGS), RECORDED_BATCHES]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def warm_model() -> Path:
    """The model that every arm starts from."""
    cache = Path("runs/.models").absolute()
    return cached_model(cache, DATA, alphabet=ALPHABET, seed=0, architecture=ARCHITECTURE, plan=WARMUP)


def done(path: Path) -> dict[str, Any] | None:
    """What an arm found before, if its settings were these."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found if found["key"] == key() else None


def main() -> None:
    from benchmarks.off_policy_page import write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/off-policy"))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--page-only", action="store_true", help="write the page from the arms that are stored in docs")
    arguments = parser.parse_args()
    if arguments.page_only:
        write(None)
        return
    arguments.runs.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    model = warm_model()
    results = []
    for arm in arms(arguments.seeds):
        path = arguments.runs / f"{arm.name}.json"
        found = done(path)
        if found is None:
            if time.monotonic() - began > arguments.seconds:
                sys.exit(f"stopped after --seconds {arguments.seconds:g}; call it again to go on")
            found = run_arm(arm, model, arguments.runs)
            aside = path.with_suffix(".partial")
            aside.write_text(json.dumps(found) + "\n")
            aside.rename(path)
            ages, points = found["staleness"], found["points"]
            line = {"arm": arm.name, "before": points[0]["accuracy"], "after": points[-1]["accuracy"], **ages}
            print(json.dumps({**line, "wall_s": found["wall_s"]}), flush=True)
        results.append(found)
    write(results)


if __name__ == "__main__":
    main()
