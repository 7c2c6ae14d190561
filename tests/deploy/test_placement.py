"""What a config claims of GPUs, and what is refused before anything starts. Ray's GPUs here are pretended numbers."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from deploy import vstar
from deploy.check import check_run
from deploy.check_gpus import check_placement
from deploy.explain import explain
from deploy.nodes import ClusterNode, Nodes
from deploy.placement import Reservation, check_cluster, check_learners, claims, learner_claims, reserve
from deploy.ray_train import RESOURCE
from deploy.remote.generation import GenerationActor, engine_config
from deploy.run import run_training
from deploy.start import start_ray
from distrl.config import Config, make_config
from distrl.errors import ConfigError, DeadlineError, RefusedError
from distrl.models import TinyArchitecture, make_tiny_model
from distrl.placement import Claim, Node, check_fits
from distrl.schema import Role
from distrl.tasks.sort_digits import ALPHABET
from distrl.tokenizer import character_tokenizer
from tests.builders import refusal

SAMPLES = frozenset({Role.POLICY, Role.EVALUATION})


class Plan:
    """The part of a run's plan that placement reads."""

    samples = SAMPLES


def config(path: Path = Path("m"), **keys: Any) -> Config:
    values: dict[str, Any] = {
        "model": {"path": path},
        "data": {"source": "sort_digits", "heldout_size": 8, "options": {"digits": 4}},
        "rollout": {"group_size": 2, "max_new_tokens": 6},
        "generation": {"engine": "fake", "slots": 8},
        "train": {"steps": 2, "tickets_per_step": 2, "max_staleness": 0},
        "evaluation": {"problems": 8, "every_steps": 0},
        "limits": {"start_timeout_s": 30},
    }
    return make_config(values, [f"{key}={json.dumps(value)}" for key, value in keys.items()])


def claimed(**keys: Any) -> list[Claim]:
    plan: Any = Plan()
    return claims(config(**keys), plan)


def test_a_cpu_run_claims_nothing() -> None:
    assert claimed(**{"generation.actors": 3}) == []


def test_separate_actors_have_a_gpu_each_also_those_that_evaluate() -> None:
    keys = {"placement.mode": "separate", "generation.actors": 2, "generation.evaluation_actors": 1}
    assert claimed(**keys) == [Claim("generation-0", 1), Claim("generation-1", 1), Claim("evaluation-0", 1)]


def test_an_actor_with_parallel_processes_has_a_gpu_for_each_on_one_node() -> None:
    keys = {"placement.mode": "separate", "generation.engine": "vllm", "generation.tensor_parallel_size": 4}
    assert claimed(**keys) == [Claim("generation-0", 4)]


@pytest.mark.parametrize(
    ("mode", "arguments"),
    [
        ("separate", {}),
        ("shared", {"gpu_memory_utilization": 0.3}),
        ("turns", {"gpu_memory_utilization": 0.3, "enable_sleep_mode": True}),
    ],
)
def test_vllm_is_told_its_share_of_the_memory_and_that_it_is_to_sleep(mode: str, arguments: dict[str, Any]) -> None:
    chosen = config(**{"placement.mode": mode, "generation.engine": "vllm", "placement.generation_share": 0.3})
    assert engine_config(chosen, "policy").generation.engine_args == arguments


def test_an_engine_of_the_reference_starts_from_its_directory() -> None:
    chosen = config(**{"reference.path": "/the/reference"})
    assert engine_config(chosen, "reference").model.path == Path("/the/reference")
    assert engine_config(chosen, "opponent").model.path == chosen.model.path


def test_shared_actors_claim_their_share_and_those_that_take_turns_an_equal_part() -> None:
    keys = {"generation.actors": 3, "placement.generation_share": 0.3}
    assert [c.gpus for c in claimed(**{"placement.mode": "shared", **keys})] == [0.3] * 3
    # A third, rounded down to what Ray counts in.
    assert [c.gpus for c in claimed(**{"placement.mode": "turns", **keys})] == [pytest.approx(0.3333)] * 3


def test_a_learner_claims_its_share_and_in_turns_half_for_all_of_it() -> None:
    keys = {"train.device": "cuda", "generation.actors": 2, "placement.generation_share": 0.3}
    shared = config(**{"placement.mode": "shared", **keys})
    turns = config(**{"placement.mode": "turns", **keys})
    assert learner_claims(shared) == [Claim("learner-0", 0.4)]
    assert learner_claims(turns) == [Claim("learner-0", 0.5)]
    plan: Any = Plan()
    assert sum(c.gpus for c in [*claims(turns, plan), *learner_claims(turns)]) == pytest.approx(1, abs=1e-3)
    for chosen in (shared, turns):
        check_placement(chosen, SAMPLES)
    # A second worker, as `distrl scale` asks for, can never be there.
    with pytest.raises(ConfigError, match=r"^placement: the run needs 1\.4998 GPUs .* 0\.4998 too few"):
        check_fits([*claims(turns, plan), *learner_claims(turns, 2)], [Node("a", 1)])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"placement.mode": "separate", "generation.engine": "transformers"},
            "placement.mode must be cpu for generation.engine transformers, which runs on the CPU, got separate; leave "
            "it out, or take another engine",
        ),
        (
            {"placement.mode": "turns", "train.max_staleness": 2},
            "train.max_staleness must be 0 for placement.mode turns, got 2; generation and learner never work at the "
            "same time there, and an asynchronous run needs that they do",
        ),
        (
            {"placement.mode": "turns", "train.device": "cuda", "train.workers": 2},
            "train.workers must be 1 for placement.mode turns with train.device cuda, got 2; there is one GPU, which "
            "has one learner: set placement.mode=separate",
        ),
        (
            {"placement.mode": "shared", "train.device": "cuda", "train.parallel": "fsdp"},
            "train.parallel must be ddp for placement.mode shared with train.device cuda, got fsdp; there is one GPU, "
            "which has one learner: set placement.mode=separate",
        ),
        (
            {"placement.mode": "shared", "train.device": "cuda", "placement.learner_share": 0.6},
            "placement: the shares of the one GPU must add up to at most 1, got 1.1 (generation 0.5, learner 0.6), 0.1 "
            "too much; lower a share or the number of actors",
        ),
        (
            {"placement.mode": "turns", "generation.actors": 3},
            "placement: the shares of the one GPU must add up to at most 1, got 1.5 (generation 3 x 0.5), 0.5 too "
            "much; lower a share or the number of actors",
        ),
        (
            {"placement.mode": "shared", "generation.engine": "vllm", "generation.tensor_parallel_size": 2},
            "generation.tensor_parallel_size must be 1 for placement.mode shared, where there is one GPU, got 2; set "
            "placement.mode=separate",
        ),
        (
            {
                "placement.mode": "turns",
                "generation.engine": "vllm",
                "generation.engine_args": {"gpu_memory_utilization": 0.9},
            },
            "generation.engine_args.gpu_memory_utilization must not be set for placement.mode turns, which sets it, "
            "got 0.9; set placement.generation_share instead",
        ),
        (
            {"placement.mode": "shared", "generation.actors": 3, "placement.generation_share": 0.4},
            "placement: the shares of the one GPU must add up to at most 1, got 1.2 (generation 3 x 0.4), 0.2 too "
            "much; lower a share or the number of actors",
        ),
    ],
)
def test_a_config_that_no_cluster_could_run_is_refused(keys: dict[str, Any], message: str) -> None:
    assert refusal(ConfigError, lambda: check_placement(config(**keys), SAMPLES)) == message


def test_opponents_on_gpus_need_a_vllm_of_their_own() -> None:
    samples = SAMPLES | {Role.OPPONENT}
    keys = {"placement.mode": "separate", "generation.engine": "vllm"}
    assert refusal(ConfigError, lambda: check_placement(config(**keys), samples)) == (
        "generation.opponent_actors must be >= 1 for generation.engine vllm with placement.mode separate, got 0; a "
        "vLLM holds one set of weights, and a second one for the role would take memory of the same GPU that the first "
        "has: give the role actors of its own"
    )
    check_placement(config(**keys, **{"generation.opponent_actors": 1}), samples)
    check_placement(config(**{"generation.engine": "vllm"}), samples)


@pytest.fixture(scope="module")
def four_gpus() -> Iterator[None]:
    start_ray(pretend_gpus=4)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("model")
    size = TinyArchitecture(hidden_size=32, layers=1, heads=2, intermediate_size=32)
    make_tiny_model(directory, character_tokenizer(ALPHABET), seed=0, architecture=size)
    return directory


class Device:
    """An actor that says which GPUs Ray gave it."""

    def ids(self) -> list[str]:
        return [str(i) for i in ray.get_gpu_ids()]


def devices(reservation: Reservation, stages: dict[str, int]) -> list[list[str]]:
    made: Any = ray.remote(Device)
    actors = [
        made.options(num_cpus=0, **reservation.options(stage)).remote() for stage, n in stages.items() for _ in range(n)
    ]
    found: list[list[str]] = ray.get([actor.ids.remote() for actor in actors], timeout=60)
    for actor in actors:
        ray.kill(actor)
    return found


@pytest.mark.ray
def test_separate_actors_get_devices_of_their_own_and_one_that_is_replaced_gets_the_same_again(
    four_gpus: None,
) -> None:
    plan: Any = Plan()
    keys = {"placement.mode": "separate", "generation.actors": 3, "generation.evaluation_actors": 1}
    reservation = reserve(config(**keys), plan)
    try:
        assert reservation.options("grading") == {}
        first = devices(reservation, {"generation": 3, "evaluation": 1})
        assert sorted(first) == [["0"], ["1"], ["2"], ["3"]]
        # All four have ended by now; their places are still this run's.
        assert ray.available_resources().get("GPU", 0) == 0
        assert len(devices(reservation, {"generation": 2})) == 2
        late: dict[str, Any] = {"placement.mode": "separate", "limits.start_timeout_s": 0.2}
        assert refusal(DeadlineError, lambda: reserve(config(**late), plan)) == (
            "placement: 1 GPUs for 1 generation actors must be free within limits.start_timeout_s = 0.2 s, 0 are; "
            "wait for the other job, or lower the number of actors"
        )
    finally:
        reservation.release()


@pytest.mark.ray
def test_a_placement_that_this_cluster_can_never_give_is_refused_and_starts_nothing(
    four_gpus: None, model: Path, tmp_path: Path
) -> None:
    keys = {"placement.mode": "separate", "generation.actors": 5, "run.dir": str(tmp_path)}
    wanted = config(model, **keys)
    plan = check_run(wanted)  # some cluster could run it
    assert "places    1 GPU(s) for each of 5 generation actor(s)" in explain(wanted, plan)
    message = (
        "placement: the run needs 5 GPUs (generation 5 x 1), the cluster has 4, 1 too few; lower the number of actors, "
        "share a GPU with placement.mode=shared or turns, or add nodes"
    )
    assert refusal(ConfigError, lambda: run_training(wanted)) == message
    assert not (wanted.run_dir / "ledger.sqlite").exists()
    assert ray.util.placement_group_table() == {} or all(
        group["state"] == "REMOVED" for group in ray.util.placement_group_table().values()
    )


class SeenGenerationActor(GenerationActor):
    """Says which GPUs Ray gave it."""

    def __init__(self, config: Config, name: str, *arguments: Any) -> None:
        super().__init__(config, name, *arguments)
        (config.run.dir / name).write_text(json.dumps([str(i) for i in ray.get_gpu_ids()]))


@pytest.mark.ray
def test_values_are_sampled_on_gpus_of_their_own(
    four_gpus: None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {
        "placement.mode": "separate",
        "run.dir": str(tmp_path),
        "vstar.path": str(tmp_path / "values.parquet"),
        "vstar.responses": 2,
        "data.train_size": 4,
    }
    monkeypatch.setattr(vstar, "GenerationActor", SeenGenerationActor)
    many = config(model, **keys, **{"generation.reference_actors": 5})
    assert refusal(ConfigError, lambda: vstar.make_table(many, lambda done, of: None)) == (
        "placement: the run needs 5 GPUs (reference-sampling 5 x 1), the cluster has 4, 1 too few; lower the number of "
        "actors, share a GPU with placement.mode=shared or turns, or add nodes"
    )
    two = config(model, **keys, **{"generation.reference_actors": 2})
    assert vstar.make_table(two, lambda done, of: None)["sampled"] == 4
    given = [json.loads((tmp_path / f"reference-sampling-{i}").read_text()) for i in range(2)]
    assert [len(one) for one in given] == [1, 1]
    assert given[0] != given[1]


@pytest.mark.ray
def test_the_gpus_of_the_learner_count_too(four_gpus: None) -> None:
    plan: Any = Plan()
    keys = {
        "placement.mode": "separate",
        "generation.actors": 3,
        "train.device": "cuda",
        "train.workers": 2,
    }
    assert refusal(ConfigError, lambda: check_cluster(config(**keys), plan)) == (
        "placement: the run needs 5 GPUs (generation 3 x 1, learner 2 x 1), the cluster has 4, 1 too few; lower the "
        "number of actors, share a GPU with placement.mode=shared or turns, or add nodes"
    )


@pytest.mark.ray
def test_sharing_on_a_node_with_several_devices_is_refused(four_gpus: None) -> None:
    plan: Any = Plan()
    name = ray.nodes()[0]["NodeName"]
    assert refusal(ConfigError, lambda: check_cluster(config(**{"placement.mode": "shared"}), plan)) == (
        f"placement.mode=shared must have nodes with one GPU, {name} has 4; show Ray one of them with "
        "CUDA_VISIBLE_DEVICES, or set placement.mode=separate"
    )


@pytest.mark.ray
def test_a_run_on_pretended_gpus_trains_to_its_end(four_gpus: None, model: Path, tmp_path: Path) -> None:
    """The scheduling is real and the engine is not: it needs no device."""
    keys = {"placement.mode": "separate", "generation.actors": 2, "run.dir": str(tmp_path)}
    summary = run_training(config(model, **keys))
    assert (summary["state"], summary["steps"]) == ("finished", 2)
    # All are given back; Ray frees them when the killed processes have ended.
    deadline = time.monotonic() + 60
    while ray.available_resources().get("GPU", 0) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def nodes_with(monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float]) -> None:
    """These nodes, and one that is about to go: it has no room for anybody."""
    stay = tuple(ClusterNode(f"id{i}", r, name=f"n{i}") for i, r in enumerate(resources))
    goes = ClusterNode("id-goes", {RESOURCE: 8.0, "GPU": 8.0}, drains=True, name="goes")
    monkeypatch.setattr(Nodes, "look", lambda self: (*stay, goes))


def test_more_learners_than_the_nodes_have_room_for_are_refused_with_the_shortfall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes_with(monkeypatch, {RESOURCE: 2.0}, {RESOURCE: 1.0}, {"CPU": 4.0})
    plan: Any = Plan()
    check_learners(config(), plan, {"learners": 3, "grading": 100})
    check_learners(config(), plan, {"grading": 100})
    assert refusal(RefusedError, lambda: check_learners(config(), plan, {"learners": 5})) == (
        "--learners must be at most 3, the workers that the 3 node(s) have room for (their resource distrl_learner), "
        "got 5, 2 too many; ask for fewer, or add nodes"
    )


def test_more_learners_than_there_are_gpus_beside_those_of_generation_are_refused_with_the_shortfall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes_with(monkeypatch, {RESOURCE: 8.0, "GPU": 4.0})
    plan: Any = Plan()
    settings = config(**{"placement.mode": "separate", "generation.actors": 2, "train.device": "cuda"})
    check_learners(settings, plan, {"learners": 2})
    assert refusal(ConfigError, lambda: check_learners(settings, plan, {"learners": 3})) == (
        "placement: the run needs 5 GPUs (generation 2 x 1, learner 3 x 1), the cluster has 4, 1 too few; lower the "
        "number of actors, share a GPU with placement.mode=shared or turns, or add nodes"
    )
