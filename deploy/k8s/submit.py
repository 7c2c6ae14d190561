"""Applies a run's objects through the official client of Kubernetes."""

from importlib.util import find_spec
from typing import Any

from distrl.errors import RefusedError, RunError


def submit(objects: list[dict[str, Any]], context: str | None) -> list[str]:
    """Server-side apply, one object after the other; what was applied, as kind/name.

    Secrets are not among them: Ray's token must be there already.

    Args:
        context: of the kubeconfig; None takes the current one, or the pod's own service account.
    Raises:
        RefusedError: the client is not installed, or there is no cluster to talk to. RunError: the cluster refused.
    """
    if find_spec("kubernetes") is None:
        raise RefusedError("distrl k8s submit needs the package kubernetes; pip install 'distrl[kubernetes]'")
    from kubernetes import client, config
    from kubernetes.dynamic import DynamicClient
    from kubernetes.dynamic.exceptions import DynamicApiError, ResourceNotFoundError
    from urllib3.exceptions import HTTPError

    try:
        config.load_config(context=context)  # type: ignore[no-untyped-call]
        api = DynamicClient(client.ApiClient())  # type: ignore[no-untyped-call]
    except (config.ConfigException, HTTPError, OSError) as error:
        raise RefusedError(
            f"distrl k8s submit must reach a cluster: {error}; look at kubectl config get-contexts, or print the "
            "objects with distrl k8s render"
        ) from error
    applied: list[str] = []
    for thing in objects:
        name = f"{thing['kind']}/{thing['metadata']['name']}"
        try:
            resource = api.resources.get(api_version=thing["apiVersion"], kind=thing["kind"])
            api.server_side_apply(  # type: ignore[no-untyped-call]
                resource,
                body=thing,
                namespace=thing["metadata"].get("namespace"),
                field_manager="distrl",
                query_params=[("fieldValidation", "Strict")],
            )
        except ResourceNotFoundError as error:
            raise RunError(
                f"{name}: the cluster has no {thing['apiVersion']} {thing['kind']}; install KubeRay, or the Prometheus "
                f"operator for PodMonitor; applied before: {', '.join(applied) or 'nothing'}"
            ) from error
        except (DynamicApiError, HTTPError) as error:
            raise RunError(
                f"{name}: the cluster refused it: {error}; applied before: {', '.join(applied) or 'nothing'}"
            ) from error
        applied.append(name)
    return applied
