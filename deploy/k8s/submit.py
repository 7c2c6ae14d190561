"""Applies a run's objects through the official client of Kubernetes."""

import json
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distrl.errors import RefusedError, RunError

Json = dict[str, Any]
CALL_S = 30.0
"""Seconds for one call to the API server."""


def submit(objects: list[Json], context: str | None) -> list[str]:
    """Server-side apply, one object after the other; what was applied, as kind/name.

    Secrets are not among them: the one with Ray's token must be there already. A RayJob that is there is left alone,
    because KubeRay ignores what is changed in one that runs.

    Args:
        context: of the kubeconfig; None takes the current one, or the pod's own service account.
    Raises:
        RefusedError: the client is not installed, there is no cluster to talk to, the RayJob is there already or the
            secret is not; nothing was applied. RunError: the cluster refused an object; names those that it took.
    """
    if find_spec("kubernetes") is None:
        raise RefusedError("distrl k8s submit needs the package kubernetes; pip install 'distrl[kubernetes]'")
    with tempfile.TemporaryDirectory(prefix="distrl-k8s-") as folder:
        cluster = _Cluster(_connect(context, Path(folder)))
        job = next(thing for thing in objects if thing["kind"] == "RayJob")
        cluster.refuse_to_overwrite(job)
        cluster.refuse_without_token(job)
        applied: list[str] = []
        for thing in objects:
            cluster.apply(thing, applied)
            applied.append(_name(thing))
    return applied


def _connect(context: str | None, folder: Path) -> Any:
    """
    Args:
        folder: for what the client learns of the cluster. By default it keeps that in /tmp under a name that anybody
            can guess, and believes it the next time.
    """
    from kubernetes import client, config
    from kubernetes.dynamic import DynamicClient
    from kubernetes.dynamic.exceptions import DynamicApiError
    from urllib3.exceptions import HTTPError

    class Bounded(DynamicClient):
        """The client itself waits for ever."""

        def request(self, method: str, path: str, body: Any = None, **params: Any) -> Any:
            return super().request(method, path, body, **{"_request_timeout": CALL_S, **params})

    try:
        files = os.environ.get("KUBECONFIG") or "~/.kube/config"
        # The client's own choice between the two fails on a context, and prints.
        if context is not None or any(Path(f).expanduser().exists() for f in files.split(os.pathsep) if f):
            config.load_kube_config(config_file=files, context=context)  # type: ignore[no-untyped-call]
        else:
            config.load_incluster_config()  # type: ignore[no-untyped-call]
        return Bounded(client.ApiClient(), cache_file=str(folder / "discovery.json"))  # type: ignore[no-untyped-call]
    except DynamicApiError as error:
        raise RefusedError(
            f"distrl k8s submit must be let into the cluster, it answered {_why(error)}; log in again, or choose "
            "another --context"
        ) from error
    except (config.ConfigException, HTTPError, OSError) as error:
        raise RefusedError(
            f"distrl k8s submit must reach a cluster: {_unreached(error)}; look at kubectl config get-contexts, or "
            "print the objects with distrl k8s render"
        ) from error


class _Cluster:
    """The calls of a submission."""

    def __init__(self, api: Any) -> None:
        self._api = api

    def refuse_to_overwrite(self, job: Json) -> None:
        if self._find(job["apiVersion"], "RayJob", job["metadata"]["name"], job["metadata"]["namespace"]):
            here = f"-n {job['metadata']['namespace']} rayjob {job['metadata']['name']}"
            raise RefusedError(
                f"run.name: {_name(job)} must not be in the cluster yet, KubeRay ignores changes of a job that is; "
                f"choose another run.name, or go on with this run by kubectl delete {here} and submitting it again, "
                "its volumes stay"
            )

    def refuse_without_token(self, job: Json) -> None:
        namespace = job["metadata"]["namespace"]
        secret = job["spec"]["rayClusterSpec"]["authOptions"]["secretName"]
        if self._find("v1", "Secret", secret, namespace) is False:
            raise RefusedError(
                f"--set auth_secret: the Secret {secret} must be in the namespace {namespace} before the run, its pods "
                f"wait for it; kubectl create namespace {namespace}; kubectl -n {namespace} create secret generic "
                f'{secret} --from-literal=auth_token="$(openssl rand -hex 32)"'
            )

    def apply(self, thing: Json, applied: list[str]) -> None:
        """
        Args:
            applied: the objects before, for the message.
        Raises:
            RunError: the cluster refused it.
        """
        from kubernetes.dynamic.exceptions import DynamicApiError, ResourceNotFoundError
        from urllib3.exceptions import HTTPError

        so_far = f"applied before: {', '.join(applied) or 'nothing'}"
        try:
            resource = self._api.resources.get(api_version=thing["apiVersion"], kind=thing["kind"])
            self._api.server_side_apply(
                resource,
                body=thing,
                namespace=thing["metadata"].get("namespace"),
                field_manager="distrl",
                query_params=[("fieldValidation", "Strict")],
            )
        except ResourceNotFoundError as error:
            raise RunError(
                f"{_name(thing)}: the cluster has no {thing['apiVersion']} {thing['kind']}; install KubeRay, or the "
                f"Prometheus operator for PodMonitor; {so_far}"
            ) from error
        except DynamicApiError as error:
            raise RunError(f"{_name(thing)}: the cluster refused it, {_why(error)}; {so_far}") from error
        except (HTTPError, OSError) as error:
            raise RunError(f"{_name(thing)}: the cluster must answer: {_unreached(error)}; {so_far}") from error

    def _find(self, version: str, kind: str, name: str, namespace: str) -> bool | None:
        """Whether there is such an object; None where the cluster does not say."""
        from kubernetes.dynamic.exceptions import DynamicApiError, NotFoundError, ResourceNotFoundError
        from urllib3.exceptions import HTTPError

        try:
            self._api.resources.get(api_version=version, kind=kind).get(name=name, namespace=namespace)
        except NotFoundError:
            return False
        except (DynamicApiError, ResourceNotFoundError, HTTPError, OSError):
            # Applying it will say why, with what was applied before.
            return None
        return True


def _name(thing: Json) -> str:
    return f"{thing['kind']}/{thing['metadata']['name']}"


def _unreached(error: Exception) -> str:
    """Which server and why, without the names of Python's objects."""
    from urllib3.exceptions import MaxRetryError

    if not isinstance(error, MaxRetryError):
        return str(error)
    server = (
        f"{getattr(error.pool, 'scheme', '')}://{getattr(error.pool, 'host', '')}:{getattr(error.pool, 'port', '')}"
    )
    return f"{server} does not answer: {str(error.reason).rpartition(': ')[2]}"


def _why(error: Any) -> str:
    """The API server's own words, without headers and traceback."""
    try:
        said = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        said = error.reason
    return f"{error.status}: {said}"
