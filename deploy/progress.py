"""What a run shows while it runs: a live view on a terminal, plain lines elsewhere."""

import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Snapshot = dict[str, Any]


class Progress(Protocol):
    """Told what happens; used as a context manager around the run."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def phase(self, text: str) -> None:
        """A new part of the start-up begins."""
        ...

    def line(self, text: str) -> None:
        """Something that the user should read."""
        ...

    def update(self, snapshot: Snapshot) -> None: ...
    def finish(self, summary: dict[str, Any], path: Path) -> None: ...


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def phase(self, text: str) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def update(self, snapshot: Snapshot) -> None:
        pass

    def finish(self, summary: dict[str, Any], path: Path) -> None:
        pass


class Terminal:
    """Live view where the console is a terminal; elsewhere one line per evaluation and every tenth of the steps.

    Args:
        steps: of the run.
    """

    def __init__(self, console: Console, steps: int, name: str) -> None:
        self._console = console
        self._steps = steps
        self._name = name
        self._began = time.monotonic()
        self._phase = ""
        self._step: dict[str, Any] | None = None
        self._rewards: deque[float] = deque(maxlen=5)
        self._evaluation: dict[str, Any] | None = None
        self._rates = _Rates()
        self._snapshot: Snapshot | None = None
        self._live = Live(console=console, refresh_per_second=5) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def phase(self, text: str) -> None:
        self._phase = text
        if self._live is None:
            self.line(text)
        self._draw()

    def update(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._rates.update(time.monotonic(), snapshot["rollouts"])
        for record in snapshot["records"]:
            self._take(record)
        self._draw()

    def finish(self, summary: dict[str, Any], path: Path) -> None:
        if self._live is not None:
            self._live.stop()
        measured = [
            f"{_accuracy(summary, name)} {name}"
            for name in ("before", "after")
            if summary[f"heldout_accuracy_{name}"] is not None
        ]
        waited = f"the learner waited {summary['learner_wait_fraction']:.0%} of its time"
        lines = [
            f"{summary['rollouts']} rollouts and {summary['steps']} steps in {summary['wall_s']:.0f} s; largest "
            f"staleness {summary['max_observed_staleness']}; {waited}",
            f"All of it: {path}/summary.json",
        ]
        if measured:
            problems = summary["heldout_problems_before"] or summary["heldout_problems_after"]
            lines.insert(0, f"Held-out accuracy on {problems} problems: {', '.join(measured)}")
        if summary["state"] == "stopped":
            lines.append(f"Stopped with a checkpoint. Go on with: distrl resume {path}")
        self._console.print("\n" + "\n".join(lines), highlight=False, soft_wrap=True)

    def _take(self, record: dict[str, Any]) -> None:
        match record["kind"]:
            case "step":
                self._step = record
                self._rewards.append(record["reward_mean"])
                if self._live is None and (record["step"] == 1 or record["step"] % max(1, self._steps // 10) == 0):
                    self.line(_step_line(record, self._steps) + f"; {self._who_waits()}")
            case "evaluation":
                self._evaluation = record
                if self._live is None:
                    self.line(_evaluation_line(record))
            case "failed_call" | "dropped" | "failed":
                self.line(f"{record['kind'].replace('_', ' ')}: {record['message']}")

    def line(self, text: str) -> None:
        seconds = time.monotonic() - self._began
        self._console.print(f"{seconds:6.1f} s  {text}", highlight=False, markup=False, soft_wrap=True)

    def _who_waits(self) -> str:
        snapshot = self._snapshot
        if snapshot is None:
            return ""
        if snapshot["generation_held"]:
            return "generation waits for the learner"
        if not snapshot["learner_waiting"]:
            return "nobody waits"
        oldest = snapshot["oldest"]
        return f"the learner waits for {oldest['stage'] if oldest else 'new tickets'}"

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(self._view())

    def _view(self) -> Group:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        done = self._step["step"] if self._step else 0
        if self._step is None:
            table.add_row("now", self._phase)
        else:
            table.add_row("step", f"{done} of {self._steps}")
            table.add_row("reward", f"{sum(self._rewards) / len(self._rewards):.3f}  (mean of 5 steps)")
            mean, most = self._step["staleness_mean"], self._step["staleness_max"]
            age = age_in_words(self._step) if mean is None else f"mean {mean:.2f}, max {most} steps"
            table.add_row("staleness", age)
        if self._evaluation is not None:
            table.add_row("held-out", _evaluation_line(self._evaluation))
        if self._snapshot is not None:
            rates = ", ".join(f"{stage} {rate:.0f}" for stage, rate in self._rates.read().items())
            table.add_row("rollouts/s", rates or "-")
            table.add_row("waiting", self._who_waits())
        seconds = time.monotonic() - self._began
        title = Text(f"{self._name}  {seconds:.0f} s", style="bold")
        return Group(title, ProgressBar(total=self._steps, completed=done, width=60), table)


class _Rates:
    """Rollouts per second of each stage over the last ten seconds."""

    def __init__(self) -> None:
        self._history: deque[tuple[float, dict[str, int]]] = deque()

    def update(self, now: float, totals: dict[str, int]) -> None:
        self._history.append((now, totals))
        while self._history[0][0] < now - 10.0:
            self._history.popleft()

    def read(self) -> dict[str, float]:
        if len(self._history) < 2:
            return {}
        (start, first), (end, last) = self._history[0], self._history[-1]
        return {stage: (count - first.get(stage, 0)) / (end - start) for stage, count in last.items()}


def _accuracy(summary: dict[str, Any], name: str) -> str:
    value = summary[f"heldout_accuracy_{name}"]
    return f"{value:.3f} ± {summary[f'heldout_accuracy_{name}_standard_error']:.3f}"


def _step_line(record: dict[str, Any], steps: int) -> str:
    return (
        f"step {record['step']} of {steps}: reward {record['reward_mean']:.3f}, staleness {age_in_words(record)}, step "
        f"{record['train_s']:.2f} s, waited {record['wait_s']:.2f} s"
    )


def age_in_words(record: dict[str, Any]) -> str:
    """Staleness of a step's batch; replayed tickets have none."""
    if record["staleness_mean"] is None:
        return "none, all of it is replayed"
    return f"{record['staleness_mean']:.2f} (max {record['staleness_max']})"


def _evaluation_line(record: dict[str, Any]) -> str:
    failed = f", {record['failed']} failed" if record["failed"] else ""
    return (
        f"held-out accuracy {record['accuracy']:.3f} ± {record['standard_error']:.3f} on {record['responses']} "
        f"problems{failed} at step {record['step']}"
    )
