"""What the page says: from the report's data to the titles, sentences, charts and rows of the templates."""

from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from deploy.report.data import Facts, ReportData, count, learner_wait_fraction
from deploy.report.figures import Chart, accuracy_chart, health_charts, reward_chart
from deploy.report.gantt import Gantt, gantt
from deploy.report.tables import (
    Rows,
    drops_by_length_table,
    drops_table,
    evaluations_table,
    steps_table,
    waits_table,
)
from deploy.report.text import DASH, TIMES, duration, moment, number, percent


@dataclass(frozen=True, slots=True)
class Tile:
    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """The whole page."""

    facts: Facts
    state: str
    state_note: str
    tiles: tuple[Tile, ...]
    settings: tuple[tuple[str, str], ...]
    main_charts: tuple[Chart, ...]
    charts: tuple[Chart, ...]
    timeline: Gantt | None
    waits: Rows
    evaluations: Rows
    steps: Rows
    drops: Rows | None
    drops_by_length: Rows | None
    samples: tuple[dict[str, Any], ...]
    written: str
    source: str


def make_view(data: ReportData) -> View:
    facts = data.facts
    state, state_note = _state(facts)
    return View(
        facts=facts,
        state=state,
        state_note=state_note,
        tiles=_tiles(data),
        settings=_settings(facts),
        main_charts=(reward_chart(data.steps), accuracy_chart(data)),
        charts=health_charts(data),
        timeline=gantt(data.timeline, facts.window),
        waits=waits_table(data),
        evaluations=evaluations_table(data.evaluations),
        steps=steps_table(data.steps),
        drops=drops_table(data.tickets),
        drops_by_length=drops_by_length_table(data.tickets),
        samples=tuple(data.samples.to_pylist()),
        written=moment(facts.written_s),
        source=facts.path,
    )


def _state(facts: Facts) -> tuple[str, str]:
    if facts.state in ("finished", "stopped"):
        more = " It was stopped, and can be resumed." if facts.state == "stopped" else ""
        return facts.state, f"Ran from {moment(facts.first_s)} to {moment(facts.last_s)}.{more}"
    if facts.state == "failed":
        return "failed", str(facts.cause)
    if facts.state == "empty":
        return "empty", "Nothing has been recorded yet: the run is starting, or it ended before its first record."
    ago = duration(max(0.0, facts.written_s - (facts.last_s or facts.written_s)))
    return "not finished", f"The last sign of life came {ago} before this report: it is running, or it was stopped."


def _tiles(data: ReportData) -> tuple[Tile, ...]:
    steps, tickets, evaluations = data.steps, data.tickets, data.evaluations
    tiles = []
    if evaluations.num_rows:
        first, last = evaluations.slice(0, 1).to_pylist()[0], evaluations.to_pylist()[-1]
        note = f"± {percent(last['standard_error'])}, {last['responses']:,} problems"
        if evaluations.num_rows > 1:
            note = f"± {percent(last['standard_error'])}; was {percent(first['accuracy'])}"
        tiles.append(Tile("Held-out accuracy", percent(last["accuracy"]), note))
    planned = data.facts.setting("train.steps")
    tiles.append(Tile("Optimizer steps", number(steps.num_rows), f"of {number(planned)}" if planned else ""))
    trained = pc.sum(tickets.filter(pc.is_valid(tickets["trained_step"]))["rollouts"]).as_py() or 0
    tiles.append(Tile("Rollouts trained", number(trained), f"{number(data.facts.checkpoints)} checkpoints"))
    began, ended = data.facts.first_s, data.facts.last_s
    wall_s = (data.facts.summary or {}).get("wall_s")
    if wall_s is None and began is not None and ended is not None:
        tiles.append(Tile("Time so far", duration(ended - began), "first ticket to last record"))
    else:
        tiles.append(Tile("Wall time", duration(wall_s), "with start and evaluations" if wall_s else ""))
    waited = learner_wait_fraction(steps)
    tiles.append(Tile("Learner waiting", percent(waited), "of its time after the first batch"))
    bound = data.facts.setting("train.max_staleness")
    most = pc.max(tickets["staleness"]).as_py()
    on_stale = data.facts.setting("train.on_stale")
    tiles.append(Tile("Largest staleness", number(most), _bound_note(bound, on_stale)))
    dropped = count(tickets, "dropped")
    tiles.append(Tile("Tickets dropped", number(dropped), f"of {number(tickets.num_rows)} issued"))
    return tuple(tiles)


def _bound_note(bound: object, on_stale: object) -> str:
    if bound is None:
        return "optimizer steps"
    return f"steps; aim {bound}, kept beyond" if on_stale == "keep" else f"steps; allowed {bound}"


def _graders(facts: Facts) -> str:
    graders = facts.setting("reward.graders")
    if isinstance(graders, dict) and graders:
        return " + ".join(f"{number(one.get('weight', 1.0))} {name}" for name, one in graders.items())
    return str(facts.setting("reward.grader") or "the data source's own")


def _settings(facts: Facts) -> tuple[tuple[str, str], ...]:
    def get(name: str) -> str:
        value = facts.setting(name)
        return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value or DASH)

    if not facts.config:
        return ()
    options = facts.setting("objective.options") or {}
    chosen = ", ".join(f"{k} = {v}" for k, v in options.items()) if isinstance(options, dict) else ""
    data_path = facts.setting("data.path")
    return (
        ("Model", get("model.path")),
        ("Data", get("data.source") + (f", {data_path}" if data_path else "")),
        ("Grader", _graders(facts)),
        ("Objective", get("objective.recipe") + (f" ({chosen})" if chosen else "")),
        ("A step", f"{get('train.tickets_per_step')} prompts {TIMES} {get('rollout.group_size')} responses"),
        ("Learning rate", f"{get('train.learning_rate')}, gradient norm clipped to {get('train.max_grad_norm')}"),
        ("Sampling", f"temperature {get('rollout.temperature')}, at most {get('rollout.max_new_tokens')} tokens"),
        (
            "Staleness",
            f"at most {get('train.max_staleness')} steps; a ticket about to pass it: {get('train.on_stale')}",
        ),
        (
            "Actors",
            f"{get('generation.actors')} generation ({get('generation.engine')}), {get('grading.actors')} grading, "
            f"{get('reference.actors')} reference",
        ),
        ("Seed", get("run.seed")),
        *_replay(facts),
    )


def _replay(facts: Facts) -> tuple[tuple[str, str], ...]:
    """What part of every batch another run has recorded; nothing where none is."""
    if not facts.setting("replay.journal"):
        return ()
    part = "all tickets" if facts.setting("replay.ratio") == 1 else f"{percent(facts.setting('replay.ratio'))} of them"
    return (("Replayed", f"{part}, from {facts.setting('replay.journal')}; staleness and sampling are of the others"),)
