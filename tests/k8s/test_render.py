"""What is rendered validates, is one with the Kustomize folder, and refuses what a cluster would not take."""

import json
import shutil
import subprocess
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.k8s import folder
from deploy.k8s.objects import Json, run_objects, to_yaml
from deploy.k8s.values import OVERLAYS, make_values
from distrl.config import Config, make_config
from distrl.errors import ConfigError
from tests.builders import refusal
from tests.deploy.commands import call

CRDS = next(
    (up / "shared/k8s-schemas" for up in folder.FOLDER.parents[1:] if (up / "shared/k8s-schemas").is_dir()),
    folder.FOLDER.parents[1] / "shared/k8s-schemas",
)
"""KubeRay's published CRDs, in a folder `shared` beside the checkout."""
EXTRA = ["image=distrl:1", "generation.max_replicas=4", "object_storage_cidr=10.0.0.0/8", "environment_secret=keys"]


ON_GPUS = {"train.device": "cuda", "placement.mode": "separate", "generation.engine": "vllm"}


def config(**changes: Any) -> Config:
    values = {"run": {"name": "mine"}, "model": {"path": "/shared/model"}, "data": {"source": "sort_digits"}}
    return make_config(values, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def rendered(case: str) -> list[Json]:
    """The two overlays of the folder, and one with every option that adds something."""
    if case in OVERLAYS:
        return folder.overlay_objects(case)
    made = config(**ON_GPUS)
    return run_objects(made, make_values("gpu", EXTRA, made))


@pytest.fixture(params=[*OVERLAYS, "everything"], name="objects")
def objects_of(request: pytest.FixtureRequest) -> list[Json]:
    return rendered(request.param)


def job(objects: list[Json]) -> Json:
    return next(o for o in objects if o["kind"] == "RayJob")


def test_the_objects_of_kubernetes_validate_strictly(objects: list[Json]) -> None:
    import kubernetes_validate

    checked = 0
    for thing in objects:
        if thing["kind"] not in ("RayJob", "PodMonitor"):
            kubernetes_validate.validate(thing, "1.35", strict=True)
            checked += 1
    pods = [job(objects)["spec"]["submitterPodTemplate"]]
    cluster = job(objects)["spec"]["rayClusterSpec"]
    pods += [g["template"] for g in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for i, pod in enumerate(pods):
        whole = {"apiVersion": "v1", "kind": "Pod", **pod, "metadata": {**pod["metadata"], "name": f"pod-{i}"}}
        kubernetes_validate.validate(whole, "1.35", strict=True)
    assert checked >= 12


def closed(schema: Any) -> Any:
    """A schema that refuses unknown fields, as the API server does in strict mode."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    opened = made.pop("x-kubernetes-preserve-unknown-fields", False)
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("anyOf", None)
        made["type"] = ["integer", "string"]
    if (
        "properties" in made
        and "additionalProperties" not in made
        and isinstance(made["properties"], dict)
        and not opened
    ):
        made["additionalProperties"] = False
    return made


@pytest.fixture(scope="module", name="crd")
def published_crd() -> Any:
    file = CRDS / "ray.io_rayjobs.yaml"
    if not file.is_file():
        pytest.skip(f"KubeRay's published CRDs are not there: put ray.io_rayjobs.yaml into {CRDS}")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(file.read_text(), Loader=loader)["spec"]["versions"]
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"]
    made = closed(schema)
    made["properties"]["metadata"] = {"type": "object"}  # the API server knows metadata, the CRD does not say it
    for template in _templates(made):
        template["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(made)


def _templates(schema: Any) -> list[Any]:
    spec = schema["properties"]["spec"]["properties"]
    cluster = spec["rayClusterSpec"]["properties"]
    groups = (cluster["headGroupSpec"], cluster["workerGroupSpecs"]["items"])
    return [spec["submitterPodTemplate"], *(group["properties"]["template"] for group in groups)]


def test_the_job_validates_against_the_crd_of_kuberay_and_unknown_fields_are_refused(
    crd: Any, objects: list[Json]
) -> None:
    found = job(objects)
    assert [f"{list(e.path)}: {e.message[:200]}" for e in crd.iter_errors(found)] == []
    misspelt = json.loads(json.dumps(found))
    misspelt["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["tolerationz"] = []
    assert len(list(crd.iter_errors(misspelt))) == 1


@pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not installed: apt-get install kubernetes-client"
)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_builds_an_overlay_to_what_is_rendered(overlay: str) -> None:
    built = subprocess.run(
        ["kubectl", "kustomize", str(folder.FOLDER / "overlays" / overlay)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    by_name = {(o["kind"], o["metadata"]["name"]): o for o in yaml.safe_load_all(built.stdout)}
    assert by_name == {(o["kind"], o["metadata"]["name"]): o for o in rendered(overlay)}


def test_the_folder_is_what_the_code_writes() -> None:
    written = folder.files()
    there = {
        p.relative_to(folder.FOLDER): p.read_text() for p in folder.FOLDER.rglob("*.yaml") if p.name != "config.yaml"
    }
    assert there == written, "run: python -m deploy.k8s.folder"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_command_prints_the_overlay_of_the_folder_the_same_bytes_each_time(
    overlay: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"--set={s}" for s in (*folder.IMAGES[overlay], *folder.ELASTIC[overlay])]
    file = str(folder.FOLDER / "overlays" / overlay / "config.yaml")
    printed = []
    for _ in range(2):
        assert call(monkeypatch, "k8s", "render", file, "--overlay", overlay, *settings) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == to_yaml(rendered(overlay))


def test_the_config_in_the_cluster_is_the_run_s_own_with_its_places() -> None:
    (found,) = [o for o in rendered("everything") if o["kind"] == "ConfigMap"]
    written = make_config(yaml.safe_load(found["data"]["config.yaml"]))
    assert str(written.run_dir) == "/run/distrl/mine"
    assert (written.metrics.host, written.metrics.port) == ("0.0.0.0", 9464)
    assert written.storage.uri == "/shared/runs"
    assert written.placement.groups
    assert written.train == config(**ON_GPUS).train


def test_counts_and_gpus_come_from_the_config() -> None:
    made = config(**ON_GPUS, **{"generation.actors": 6})
    values = make_values("gpu", ["image=d:1", "generation.gpus=2", "learners.gpus=1"], made)
    assert (values.generation.replicas, values.learners.replicas) == (3, 1)
    found = job(run_objects(made, values))["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    generation = next(g for g in found if g["groupName"] == "generation")
    assert (generation["minReplicas"], generation["maxReplicas"], generation["resources"]["GPU"]) == (3, 3, "2")


@pytest.mark.parametrize(
    ("overlay", "settings", "message"),
    [
        ("tpu", ["image=d:1"], "--overlay must be one of cpu, gpu, got 'tpu'"),
        (
            "cpu",
            [],
            "--set image=... is required: the image of the pods, with its tag, such as --set "
            "image=registry.example/distrl:0.1.0-cpu; deploy/docker/Dockerfile builds it",
        ),
        (
            "cpu",
            ["image=d:latest"],
            "--set image must not be :latest, pods of one run must have one version, got 'd:latest'; name a version or "
            "a digest",
        ),
        (
            "cpu",
            ["image=d"],
            "--set image must match pattern '^$|^[^\\s]+(:[^\\s:@/]+|@sha256:[0-9a-f]{64})$', got 'd'",
        ),
        ("cpu", ["imagge=d:1"], "--set imagge is not a known key, got 'd:1'; docs/kubernetes.md lists them"),
        ("cpu", ["image"], "--set must have the form key=value, got 'image'"),
        (
            "gpu",
            ["image=d:1", "generation.gpus=2"],
            "generation.actors times their GPUs must be a multiple of generation.gpus (2), pods are equal, got 5 x 1; "
            "change --set generation.gpus",
        ),
        (
            "gpu",
            ["image=d:1", "grace_s=50"],
            "--set grace_s must be more than drain_s + 15 (60), got 50; otherwise pods are killed before Ray has "
            "drained them",
        ),
        (
            "gpu",
            ["image=d:1", "grading.replicas=3", "grading.max_replicas=2"],
            "--set grading.max_replicas must be >= replicas (3), got 2",
        ),
    ],
)
def test_what_a_cluster_would_not_take_is_refused(overlay: str, settings: list[str], message: str) -> None:
    made = config(**(ON_GPUS if overlay == "gpu" else {}), **{"generation.actors": 5})
    assert refusal(ConfigError, lambda: make_values(overlay, settings, made)) == message


@pytest.mark.parametrize(
    ("overlay", "changes", "message"),
    [
        (
            "gpu",
            {"train.device": "cpu"},
            "learners.gpus must be 0 where the run uses none there, got 8: they would be idle; set train.device=cuda "
            "in the config, or --set learners.gpus=0",
        ),
        (
            "gpu",
            {"placement.mode": "cpu"},
            "generation.gpus must be 0 where the run uses none there, got 1: they would be idle; set "
            "placement.mode=separate in the config, or --set generation.gpus=0",
        ),
        (
            "cpu",
            {},
            "learners.gpus must be at least 1, the config has train.device=cuda, got 0; choose --overlay gpu, or --set "
            "learners.gpus",
        ),
        (
            "gpu",
            {"train.workers": 12},
            "train.workers must be a multiple of learners.gpus (8), a worker has one GPU and pods are equal, got 12; "
            "change --set learners.gpus",
        ),
        (
            "gpu",
            {"generation.tensor_parallel_size": 2},
            "generation.gpus must be a multiple of generation.tensor_parallel_size (2), the processes of one actor are "
            "in one pod, got 1; change --set generation.gpus",
        ),
    ],
)
def test_gpus_that_the_run_does_not_use_or_that_do_not_divide_are_refused(
    overlay: str, changes: dict[str, Any], message: str
) -> None:
    made = config(**ON_GPUS | changes)
    assert refusal(ConfigError, lambda: make_values(overlay, ["image=d:1"], made)) == message


def test_what_a_run_must_not_lose_goes_where_every_pod_sees_it() -> None:
    def storage(uri: str, *settings: str) -> str:
        made = config(**{"storage.uri": uri})
        objects = run_objects(made, make_values("cpu", ["image=d:1", *settings], made))
        (found,) = [o for o in objects if o["kind"] == "ConfigMap"]
        return str(make_config(yaml.safe_load(found["data"]["config.yaml"])).storage.uri)

    bucket = "s3://bucket/runs?region=eu-west-1"
    assert storage(bucket, "object_storage_cidr=10.0.0.0/8") == bucket
    assert storage("/shared/mine") == "/shared/mine"
    assert refusal(ConfigError, lambda: storage(bucket)) == (
        "--set object_storage_cidr=... is required where storage.uri is object storage, got none for "
        "'s3://bucket/runs?region=eu-west-1': the network policies would let no pod reach it"
    )
    assert refusal(ConfigError, lambda: storage("/data/runs")) == (
        "storage.uri must be object storage, or lie in /shared, the volume that all pods share, got '/data/runs'; "
        "leave it empty for /shared/runs"
    )


def test_keys_are_where_storage_is_written_and_not_where_models_programs_run() -> None:
    spec = job(rendered("everything"))["spec"]["rayClusterSpec"]
    pods = {"head": spec["headGroupSpec"]} | {g["groupName"]: g for g in spec["workerGroupSpecs"]}
    holders = [name for name, pod in pods.items() if "envFrom" in pod["template"]["spec"]["containers"][0]]
    assert holders == ["head", "learner"]


def test_a_name_that_kubernetes_does_not_take_is_refused() -> None:
    made = config(**{"run.name": "x" * 41})
    assert refusal(ConfigError, lambda: run_objects(made, make_values("cpu", ["image=d:1"], made))) == (
        f"run.name must have 1 to 40 letters, digits and dashes for Kubernetes, got {'x' * 41!r}; choose another with "
        "run.name=..."
    )
