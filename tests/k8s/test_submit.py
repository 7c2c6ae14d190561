"""`distrl k8s submit` sends what `render` prints, and says in full what the cluster had against it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deploy.k8s import folder
from deploy.k8s.submit import submit
from distrl.errors import RefusedError, RunError
from tests.builders import refusal
from tests.deploy.commands import call
from tests.k8s.api_server import ApiServer, kubeconfig

pytest.importorskip("kubernetes", reason="the package kubernetes is not installed: pip install 'distrl[kubernetes]'")

SECRET = "/api/v1/namespaces/distrl/secrets/distrl-ray-auth"
JOB = "/apis/ray.io/v1/namespaces/distrl/rayjobs/train"
CONFIG = folder.FOLDER / "overlays" / "cpu" / "config.yaml"
ARGUMENTS = ("k8s", "submit", str(CONFIG), "--set", "image=distrl:0.1.0-cpu")


@pytest.fixture(name="api")
def api_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    with ApiServer() as api:
        api.objects[SECRET] = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "distrl-ray-auth"}}
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path / "kubeconfig", api.url)))
        yield api


def test_every_object_is_applied_in_order_strictly_under_one_name(
    api: ApiServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *ARGUMENTS) == 0
    told = capsys.readouterr().out
    assert call(monkeypatch, "k8s", "render", *ARGUMENTS[2:]) == 0
    rendered = list(yaml.safe_load_all(capsys.readouterr().out))
    assert api.applied() == rendered
    assert told.splitlines() == [f"applied {o['kind']}/{o['metadata']['name']}" for o in rendered]
    sent = [r for r in api.requests if r.method == "PATCH"]
    assert {r.kind for r in sent} == {"application/apply-patch+yaml"}
    assert {(*r.query["fieldManager"], *r.query["fieldValidation"]) for r in sent} == {("distrl", "Strict")}
    assert (sent[0].path, sent[1].path, sent[-1].path) == (
        "/api/v1/namespaces/distrl",
        "/apis/scheduling.k8s.io/v1/priorityclasses/distrl-train",
        JOB,
    )
    assert {r.method for r in api.requests} == {"GET", "PATCH"}


def test_a_job_that_is_there_is_left_alone(api: ApiServer) -> None:
    submit(folder.overlay_objects("cpu"), None)
    before = len(api.applied())
    assert refusal(RefusedError, lambda: submit(folder.overlay_objects("cpu"), None)) == (
        "run.name: RayJob/train must not be in the cluster yet, KubeRay ignores changes of a job that is; choose "
        "another run.name, or go on with this run by kubectl delete -n distrl rayjob train and submitting it again, "
        "its volumes stay"
    )
    assert len(api.applied()) == before
    # A job that was deleted: what stayed of it is applied again, unchanged.
    del api.objects[JOB]
    submit(folder.overlay_objects("cpu"), None)
    assert len(api.applied()) == 2 * before


def test_without_the_secret_nothing_is_applied(api: ApiServer) -> None:
    del api.objects[SECRET]
    assert refusal(RefusedError, lambda: submit(folder.overlay_objects("cpu"), None)) == (
        "--set auth_secret: the Secret distrl-ray-auth must be in the namespace distrl before the run, its pods wait "
        "for it; kubectl create namespace distrl; kubectl -n distrl create secret generic distrl-ray-auth "
        '--from-literal=auth_token="$(openssl rand -hex 32)"'
    )
    assert api.applied() == []


def test_who_may_not_read_secrets_may_submit_all_the_same(api: ApiServer) -> None:
    api.answers[SECRET] = (403, "Forbidden", 'secrets "distrl-ray-auth" is forbidden')
    assert submit(folder.overlay_objects("cpu"), None)[-1] == "RayJob/train"


def test_what_is_forbidden_is_said_in_the_cluster_s_words_with_what_was_applied_before(api: ApiServer) -> None:
    api.answers["/apis/scheduling.k8s.io/v1/priorityclasses/distrl-train"] = (
        403,
        "Forbidden",
        'priorityclasses.scheduling.k8s.io "distrl-train" is forbidden: User "me" cannot patch resource',
    )
    assert refusal(RunError, lambda: submit(folder.overlay_objects("cpu"), None)) == (
        "PriorityClass/distrl-train: the cluster refused it, 403: priorityclasses.scheduling.k8s.io "
        '"distrl-train" is forbidden: User "me" cannot patch resource; applied before: Namespace/distrl'
    )


def test_a_field_that_somebody_else_manages_is_a_conflict_and_is_not_taken(api: ApiServer) -> None:
    api.answers["/api/v1/namespaces/distrl"] = (
        409,
        "Conflict",
        'Apply failed with 1 conflict: conflict with "kubectl": .metadata.labels',
    )
    assert refusal(RunError, lambda: submit(folder.overlay_objects("cpu"), None)) == (
        'Namespace/distrl: the cluster refused it, 409: Apply failed with 1 conflict: conflict with "kubectl": '
        ".metadata.labels; applied before: nothing"
    )
    assert not any("force" in r.query for r in api.requests)


def test_a_cluster_without_kuberay_is_told(api: ApiServer) -> None:
    api.lacking = frozenset({"RayJob"})
    message = refusal(RunError, lambda: submit(folder.overlay_objects("cpu"), None))
    before = [f"{o['kind']}/{o['metadata']['name']}" for o in folder.overlay_objects("cpu")][:-1]
    assert message == (
        "RayJob/train: the cluster has no ray.io/v1 RayJob; install KubeRay, or the Prometheus operator for "
        f"PodMonitor; applied before: {', '.join(before)}"
    )


def test_who_is_not_let_in_is_told_to_log_in(api: ApiServer) -> None:
    api.everybody_is_a_stranger = True
    assert refusal(RefusedError, lambda: submit(folder.overlay_objects("cpu"), None)) == (
        "distrl k8s submit must be let into the cluster, it answered 401: Unauthorized; log in again, or choose "
        "another --context"
    )


def test_a_cluster_that_cannot_be_reached_is_told(api: ApiServer) -> None:
    message = refusal(RefusedError, lambda: submit(folder.overlay_objects("cpu"), "elsewhere"))
    assert message == (
        "distrl k8s submit must reach a cluster: http://127.0.0.1:1 does not answer: [Errno 111] Connection refused; "
        "look at kubectl config get-contexts, or print the objects with distrl k8s render"
    )


def test_a_context_that_is_not_there_is_told(api: ApiServer, tmp_path: Path) -> None:
    message = refusal(RefusedError, lambda: submit(folder.overlay_objects("cpu"), "production"))
    assert message == (
        "distrl k8s submit must reach a cluster: Invalid kube-config file. Expected object with name production in "
        f"{tmp_path / 'kubeconfig'}/contexts list; look at kubectl config get-contexts, or print the objects with "
        "distrl k8s render"
    )


def test_without_a_kubeconfig_and_outside_a_pod_there_is_no_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert call(monkeypatch, *ARGUMENTS) == 2
    assert capsys.readouterr() == (
        "",
        "RefusedError: distrl k8s submit must reach a cluster: Service host/port is not set.; look at kubectl config "
        "get-contexts, or print the objects with distrl k8s render\n",
    )


def test_without_the_client_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.k8s.submit.find_spec", lambda name: None)
    assert refusal(RefusedError, lambda: submit(folder.overlay_objects("cpu"), None)) == (
        "distrl k8s submit needs the package kubernetes; pip install 'distrl[kubernetes]'"
    )
