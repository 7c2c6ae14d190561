"""The benchmarks of coordinator and page still drive them, and the model of scale agrees with the simulation."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.coordinator import run as run_coordinator
from benchmarks.rollouts import make as make_large_run
from benchmarks.scale_model import Cluster, Costs, bounds
from benchmarks.simulate import Simulation

COSTS = Costs(ticket_s=1e-4, publish_bytes_per_s=1e9, journal_bytes_per_s=1e9, bytes_per_token=16.0)
SMALL = Cluster(
    name="small",
    gpus=8,
    learner_gpus=4,
    gpus_per_replica=1,
    parameters=1e8,
    kv_bytes_per_token=10_000,
    slots=16,
    mean_tokens=500,
    sigma=0.5,
    group=4,
    tickets_per_step=16,
    max_staleness=4,
)


def test_the_coordinators_benchmark_trains_what_it_was_asked_for(tmp_path: Path) -> None:
    found = asyncio.run(run_coordinator(tmp_path, actors=10, tickets=40, group_size=4))
    assert found["tickets"] == 40
    assert found["cpu_us_per_ticket"] > 0


@pytest.mark.parametrize(
    ("part", "cluster", "costs"),
    [
        ("generation", replace(SMALL, gpus=5, slots=8), COSTS),
        ("learning", replace(SMALL, learner_gpus=1, gpus=8), replace(COSTS, publish_bytes_per_s=1e10)),
        ("publishing", SMALL, replace(COSTS, publish_bytes_per_s=2e7)),
        ("coordinator", SMALL, replace(COSTS, ticket_s=0.05)),
        ("staleness", replace(SMALL, slots=256, mean_tokens=5000, learner_gpus=7, max_staleness=1), COSTS),
        ("journal", SMALL, replace(COSTS, journal_bytes_per_s=3e5)),
    ],
)
def test_the_simulated_run_is_as_fast_as_the_part_that_the_model_names(
    part: str, cluster: Cluster, costs: Costs
) -> None:
    """Each part in turn is made slow; a simulation that knows nothing of the bounds is held up as the model says."""
    found = bounds(cluster, costs)
    assert min(found, key=found.__getitem__) == part
    others = min(rate for name, rate in found.items() if name not in (part, "learning alone"))
    assert others > 1.5 * found[part], "the parts are too close to each other to tell them apart"
    assert Simulation(cluster, costs, steps=60).run() == pytest.approx(found[part], rel=0.06)


def test_the_run_of_the_page_s_benchmark_is_one_that_the_page_can_read(tmp_path: Path) -> None:
    run_dir = make_large_run(tmp_path, 64)
    assert sum(pa.ipc.open_file(path).read_all().num_rows for path in run_dir.journal.glob("*.arrow")) == 64
