"""What the live pages say: the report's own view, the rollouts, the processes."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlencode

from deploy.live import read_live
from deploy.report.data import read_run
from deploy.report.page import environment
from deploy.report.text import moment
from deploy.report.view import make_view
from deploy.run_dir import RunDir
from deploy.run_state import RunState, read_state
from deploy.ui.index import Filter, RolloutIndex
from deploy.ui.processes import health_of, ledger_rows, process_map, stage_rows
from deploy.ui.tokens import Coloring, token_view
from distrl.errors import RefusedError

PAGE_ROWS = 50
COLORINGS: Mapping[Coloring, str] = {"log_ratio": "log-ratio", "kl": "KL", "version": "version"}
VERDICTS = ("correct", "wrong", "failed")


@dataclass(frozen=True, slots=True)
class Live:
    """What every page of the server has beside its content."""

    name: str
    state: str
    following: bool
    """Whether the page looks for news."""
    here: str
    """Which of the pages it is."""


def live_of(run_dir: RunDir, here: str) -> Live:
    state = read_state(run_dir)
    return Live(run_dir.path.name, state, state in (RunState.RUNNING, RunState.CREATED), here)


def overview(run_dir: RunDir) -> str:
    """The report of the run as it is now, with the same data and templates."""
    view = make_view(read_run(run_dir.path))
    return environment().get_template("report.html").render(view=view, live=live_of(run_dir, "overview")).lstrip()


def parse_filter(query: Mapping[str, str]) -> Filter:
    """A filter from the form's fields; empty fields take all.

    Raises:
        RefusedError: a field is not a number where one belongs.
    """
    kinds = {"reward_min": float, "reward_max": float, "staleness": int, "version": int, "step": int}
    values: dict[str, Any] = {"search": query.get("search", "")}
    for field in fields(Filter):
        text = query.get(field.name, "").strip()
        if field.name == "search" or not text:
            continue
        try:
            values[field.name] = kinds.get(field.name, str)(text)
        except ValueError:
            raise RefusedError(f"{field.name} must be a number, got {text!r}") from None
    return Filter(**values)


def rollouts(run_dir: RunDir, index: RolloutIndex, query: Mapping[str, str]) -> str:
    """A list of rollouts, PAGE_ROWS at a time."""
    total = index.refresh()
    page = max(1, int(query.get("page", "1")) if query.get("page", "1").isdigit() else 1)
    found, matching = index.find(parse_filter(query), limit=PAGE_ROWS, offset=(page - 1) * PAGE_ROWS)
    pages = max(1, -(-matching // PAGE_ROWS))
    kept = {k: v for k, v in query.items() if k != "page" and v}
    links = {n: "?" + urlencode({**kept, "page": n}) for n in (page - 1, page + 1) if 1 <= n <= pages}
    return (
        environment()
        .get_template("rollouts.html")
        .render(
            live=live_of(run_dir, "rollouts"),
            rows=found,
            matching=matching,
            total=total,
            page_number=page,
            pages=pages,
            before=links.get(page - 1),
            after=links.get(page + 1),
            query={field.name: query.get(field.name, "") for field in fields(Filter)},
            verdicts=VERDICTS,
            reasons=index.drop_reasons(),
        )
    )


def rollout(run_dir: RunDir, index: RolloutIndex, rollout_id: str, query: Mapping[str, str]) -> str | None:
    """One rollout with its tokens; None where there is none of this id."""
    index.refresh()
    row = index.one(rollout_id)
    if row is None:
        return None
    coloring: Coloring = next((c for c in COLORINGS if c == query.get("color")), "log_ratio")
    return (
        environment()
        .get_template("rollout.html")
        .render(
            live=live_of(run_dir, "rollout"),
            row=row,
            view=token_view(run_dir, row, coloring),
            group=index.group(row["ticket_id"]),
            coloring=coloring,
            colorings=COLORINGS,
        )
    )


def processes(run_dir: RunDir, now_s: float) -> str:
    """Who is there and how they do, and what the ledger says of the tickets."""
    state, live = read_live(run_dir), live_of(run_dir, "processes")
    here = live.following and state is not None
    return (
        environment()
        .get_template("processes.html")
        .render(
            live=live,
            health=health_of(read_state(run_dir), state, now_s),
            nodes=process_map(run_dir, state, now_s) if here and state is not None else (),
            stages=stage_rows(state) if here and state is not None else None,
            ledger=ledger_rows(run_dir),
            at=None if state is None else moment(state["time_s"]),
        )
    )
