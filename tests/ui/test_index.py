"""The index finds every rollout of a run by what is known of it."""

from pathlib import Path

import pyarrow.ipc as ipc
import pytest

from deploy.run_dir import RunDir
from deploy.ui.index import Filter, RolloutIndex, open_index
from deploy.ui.tokens import TONES, token_view
from tests.report.runs import GROUP, TICKETS_PER_STEP, Drawn, MadeRun, make_run


@pytest.fixture(scope="module", name="made")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(name="index")
def made_index(made: MadeRun) -> RolloutIndex:
    index = RolloutIndex(made.dir, None)
    index.refresh()
    return index


def ids(drawn: Drawn, *groups: int) -> set[str]:
    return {f"p{drawn.ticket_id}.0.{g}" for g in groups or range(GROUP)}


def found(index: RolloutIndex, **wanted: object) -> set[str]:
    rows, total = index.find(Filter(**wanted), limit=1000)  # type: ignore[arg-type]
    assert total == len(rows)
    return {row["rollout_id"] or f"ticket {row['ticket_id']}" for row in rows}


def test_all_rollouts_are_there_newest_ticket_first(made: MadeRun, index: RolloutIndex) -> None:
    rows, total = index.find(Filter(), limit=3)
    newest = max(d.ticket_id for d in made.drawn)
    assert total == len(made.drawn) * GROUP
    assert [r["rollout_id"] for r in rows] == [f"p{newest}.0.0", f"p{newest}.0.1", f"p{newest - 1}.0.0"]
    assert [r["rollout_id"] for r in index.find(Filter(), limit=1, offset=2)[0]] == [rows[2]["rollout_id"]]


def test_filters_take_what_the_run_was_made_of(made: MadeRun, index: RolloutIndex) -> None:
    good = {i for d in made.drawn for g, r in enumerate(d.rewards) if r == 1.0 for i in ids(d, g)}
    assert found(index, verdict="correct") == found(index, reward_min=0.5) == good
    assert found(index, verdict="wrong") == found(index, reward_max=0.5) == found(index) - good
    for age in (0, 1):
        assert found(index, staleness=age) == {i for d in made.drawn if d.staleness == age for i in ids(d)}
    for version in (0, 2):
        assert found(index, version=version) == {i for d in made.drawn if d.version == version for i in ids(d)}
    assert found(index, step=2, verdict="correct") == good & {i for d in made.drawn if d.step == 2 for i in ids(d)}


def test_search_is_for_a_part_whatever_the_case_and_wildcards_are_letters(index: RolloutIndex) -> None:
    assert found(index, search="ANSWER p3.0") == {"p3.0.0", "p3.0.1"}
    assert found(index, search="p3.0_0") == found(index, search="%") == set()


def test_dropped_tickets_are_found_by_reason_also_without_rollouts(index: RolloutIndex) -> None:
    dropped = found(index, drop_reason="any")
    assert len(dropped) == 3
    assert all(i.startswith("ticket ") for i in dropped)
    assert found(index, drop_reason="generation_failed") < dropped


def test_what_is_written_later_is_read_once_and_a_second_index_reads_the_first_one_s_file(tmp_path: Path) -> None:
    made = make_run(tmp_path, steps=1)
    index = open_index(made.dir)
    assert index.refresh() == TICKETS_PER_STEP * GROUP
    index.close()
    for file in made.dir.journal.iterdir():
        file.unlink()  # what was read is not read again
    again = open_index(made.dir)
    assert again.refresh() == TICKETS_PER_STEP * GROUP
    assert len(found(again)) == TICKETS_PER_STEP * GROUP
    again.close()


def test_an_index_of_another_format_is_made_anew(tmp_path: Path) -> None:
    import sqlite3

    made = make_run(tmp_path, steps=1)
    file = made.dir.path / "report" / "rollouts.sqlite"
    file.parent.mkdir()
    with sqlite3.connect(file) as db:
        db.execute("CREATE TABLE rollouts (something INTEGER)")
        db.execute("PRAGMA user_version = 99")
    db.close()
    index = open_index(made.dir)
    assert index.refresh() == TICKETS_PER_STEP * GROUP
    index.close()


def test_tokens_are_colored_by_what_the_journal_recorded(made: MadeRun, index: RolloutIndex) -> None:
    row = index.one("p0.0.0")
    assert row is not None
    neutral = token_view(made.dir, row, "log_ratio")
    # Behavior and reference agree on every token of the made run: a ratio of 1 has no color.
    assert [t.tone for t in neutral.tokens] == [TONES // 2] * made.drawn[0].tokens[0]
    assert index.one("p99.0.0") is None


def test_a_token_that_the_reference_finds_unlikely_has_the_full_color(tmp_path: Path) -> None:
    made = make_run(tmp_path, steps=1)
    for file in made.dir.journal.iterdir():
        table = ipc.open_file(file).read_all()
        rows = table.to_pylist()
        for row in rows:
            row["ref_logps"] = [-3.5, *row["ref_logps"][1:]]  # behavior is -0.5: a log-ratio of 3 nats
        with ipc.new_file(file, table.schema) as writer:
            writer.write_table(type(table).from_pylist(rows, schema=table.schema))
    index = RolloutIndex(RunDir(made.dir.path), None)
    index.refresh()
    row = index.one("p0.0.0")
    assert row is not None
    by_ratio, by_kl = (token_view(made.dir, row, c).tokens for c in ("log_ratio", "kl"))
    assert [t.tone for t in by_ratio][:2] == [TONES - 1, TONES // 2]
    # exp(-3) - 1 + 3 = 2.0498 nats
    assert by_kl[0].title.endswith("KL 2.05")
