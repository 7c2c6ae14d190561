"""What the server answers, and what it refuses."""

import http.client
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.live import LiveState
from deploy.run_dir import find_run, write_json
from deploy.run_state import RunState, claim
from deploy.ui import pages
from deploy.ui.processes import ledger_rows, process_map
from deploy.ui.server import Server
from distrl.errors import RefusedError
from tests.builders import refusal
from tests.deploy.commands import call
from tests.metrics.snapshots import snapshot
from tests.report.runs import TICKETS_PER_STEP, MadeRun, make_run

PROCESSES = [
    {"name": "driver", "stage": "driver", "state": "up", "pid": 1, "host": "head"},
    {"name": "grading-0.1", "stage": "grading", "state": "waiting", "restarts": 1},
    {"name": "generation-0", "stage": "generation", "state": "up", "restarts": 0, "pid": 11, "host": "gpu-1"},
    {"name": "generation-1.2", "stage": "generation", "state": "up", "restarts": 2, "pid": 12, "host": "gpu-1"},
    {"name": "learner", "stage": "learner", "state": "up", "restarts": 0, "pid": 13, "host": "gpu-1"},
    {"name": "coordinator", "stage": "coordinator", "state": "up", "restarts": 0, "pid": 2, "host": "head"},
]
for _row in PROCESSES:
    if "restarts" in _row and "host" in _row:
        _row["node"] = ("a" if _row["host"] == "head" else "b") * 56


@pytest.fixture(scope="module", name="made")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module", name="server")
def serving(made: MadeRun) -> Iterator[Server]:
    server = Server(made.dir, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def get(server: Server, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_another_host_name_is_refused_so_that_no_page_elsewhere_can_read_the_run(server: Server) -> None:
    assert get(server, "/rollouts")[0] == 200
    assert get(server, "/rollouts", host="example.org")[0] == 403


def test_what_is_not_there_is_404_and_a_wrong_field_is_named(server: Server) -> None:
    assert get(server, "/nothing") == (404, "There is no page /nothing.")
    assert get(server, "/rollout/p99.0.0")[0] == 404
    assert get(server, "/rollouts?reward_min=much") == (400, "reward_min must be a number, got 'much'")


def test_a_port_that_is_taken_is_refused(made: MadeRun) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = other.getsockname()[1]
        message = refusal(RefusedError, lambda: Server(made.dir, "127.0.0.1", port))
    assert message == (
        f"--port must be free to listen at on 127.0.0.1, got {port}: Address already in use; choose another, or 0 for "
        "any free one"
    )


def test_the_processes_of_a_run_are_shown_with_their_health(tmp_path: Path) -> None:
    made = make_run(tmp_path, steps=1)
    claim(made.dir)
    now = [1000.0]
    live = LiveState(made.dir, lambda: now[0])
    seen = snapshot(
        3, oldest=None, learner_waiting=True, generation_held=False, stopping=False, failed=None, done=False
    )
    live.update(seen)
    write_json(made.dir.processes, {"processes": PROCESSES})
    page = pages.processes(made.dir, now_s=1001.0)
    for words in ("12 of 16 places taken", "waits for a batch", "Something moved"):
        assert words in page
    nodes = process_map(made.dir, seen | {"time_s": 1000.0}, now_s=1001.0)
    assert [(n.title, [(c.name, c.health) for c in n.cards]) for n in nodes] == [
        ("head, Ray node aaaaaaaa", [("driver", "healthy"), ("coordinator", "healthy")]),
        (
            "gpu-1, Ray node bbbbbbbb",
            [("learner", "healthy"), ("generation-0", "healthy"), ("generation-1.2", "warning")],
        ),
        ("no machine yet", [("grading-0.1", "bad")]),
    ]
    by_name = {c.name: c for n in nodes for c in n.cards}
    assert by_name["generation-1.2"].facts == "process 12; replaced 2 times"
    assert by_name["generation-0"].facts == "process 11; version 3, 0 steps behind"
    assert by_name["grading-0.1"].does == "has ended, is replaced"
    silent = process_map(made.dir, seen | {"time_s": 1000.0}, now_s=1100.0)
    assert silent[0].cards[1].does == "silent for " + "1 min 40 s".replace(" ", "\N{NO-BREAK SPACE}")
    now[0] = 1100.0
    live.update(seen)
    assert "Nothing has moved for 1\N{NO-BREAK SPACE}min" in pages.processes(made.dir, now_s=1101.0)
    assert "has not heard from the coordinator" in pages.processes(made.dir, now_s=1200.0)
    live.close()
    assert find_run(made.dir.path).live.exists() is False


def test_the_ledger_is_summed_up_also_of_a_run_that_is_over(made: MadeRun) -> None:
    found = ledger_rows(made.dir)
    assert found is not None
    values = dict(found.rows)
    trained = 4 * TICKETS_PER_STEP
    assert values["Tickets ever issued"] == str(trained + 3)
    assert values["… trained"] == str(trained)
    assert (values["… dropped: grading_failed"], values["… dropped: generation_failed"]) == ("2", "1")
    assert (values["Last trained step"], values["Oldest data trained, steps"]) == ("4", "1")
    assert "Tickets ever issued" in pages.processes(made.dir, now_s=0.0)


def test_a_driver_that_died_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_run(tmp_path, steps=1)
    monkeypatch.setattr("deploy.ui.pages.read_state", lambda run_dir: RunState.DIED)
    assert "distrl resume goes on" in pages.processes(made.dir, now_s=0.0)


def test_the_terminal_shows_the_same_rollouts(
    made: MadeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "rollouts", str(made.dir.path), "--search", "p3.0.1") == 0
    printed = capsys.readouterr().out
    assert "p3.0.1" in printed
    assert "1 of 1 rollouts that fit" in printed
    assert call(monkeypatch, "rollouts", str(made.dir.path), "--show", "p3.0.1") == 0
    assert "answer p3.0.1" in capsys.readouterr().out
    assert call(monkeypatch, "rollouts", str(made.dir.path), "--show", "p99") == 2
    assert capsys.readouterr().err == (
        f"RefusedError: --show must be the id of a rollout of {made.dir.path}, got 'p99'; list them without --show\n"
    )
