"""The main job: a tiny model, made and warmed up here, learns to sort digits by asynchronous RL."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.progress import Terminal
from deploy.run import run_training
from distrl.config import make_config
from distrl.tasks import DataConfig

CONFIG = Path(__file__).parent / "quickstart.yaml"
"""The config of the quickstart, without `model.path`: the model is made first."""


def run_quickstart(overrides: Sequence[str], console: Console) -> None:
    """Makes or finds the warmed-up model, then trains."""
    values = yaml.safe_load(CONFIG.read_text())
    made_below = Path("made below").absolute()
    values["model"] = {"path": made_below}
    config = make_config(values, overrides)  # a wrong override is refused before the warm-up, not after
    if config.run_dir.exists():
        config = make_config(values, [*overrides, f"run.name={_next_name(config.run_dir)}"])
    if config.model.path == made_below:
        path = warm_model(console, config.data)
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": path})})
    run_training(config, Terminal(console, config.train.steps, config.run.name))


def warm_model(console: Console, data: DataConfig | None = None) -> Path:
    """The quickstart's model: made and trained on answers for some seconds on the first call, cached after that."""
    from distrl.tasks.sort_digits import ALPHABET
    from distrl.warmup import WarmupPlan, cached_model

    data = data or make_config({**yaml.safe_load(CONFIG.read_text()), "model": {"path": "-"}}).data
    plan = WarmupPlan()
    cache = Path("runs/.models").absolute()
    known = set(cache.glob("*"))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("loss {task.fields[loss]:.2f}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("warming up a new model by supervised steps", total=plan.steps, loss=0.0)

        def advance(step: int, steps: int, loss: float) -> None:
            progress.update(task, completed=step, loss=loss)

        path = cached_model(cache, data, alphabet=ALPHABET, seed=0, plan=plan, progress=advance)
    report = json.loads((path / "warmup.json").read_text())["report"]
    console.print(
        f"Model {'found' if path in known else 'made'}: {os.path.relpath(path)}, warmed up by {report['steps']} "
        f"supervised steps ({report['wall_s']:.0f} s when it was made) to a sampled accuracy of "
        f"{report['sampled_accuracy']:.2f}",
        highlight=False,
        soft_wrap=True,
    )
    return path


def _next_name(taken: Path) -> str:
    """The quickstart may be run again and again: quickstart, quickstart-2, quickstart-3, ..."""
    number = 2
    while taken.with_name(f"{taken.name}-{number}").exists():
        number += 1
    return f"{taken.name}-{number}"
