"""All objects of a run: the RayJob and what it stands on."""

from typing import Any

import yaml

from deploy.k8s.network import network_policies
from deploy.k8s.pods import (
    COMPONENT,
    CONTAINER_SECURITY,
    INSTANCE,
    NAME,
    RUN_FOLDER,
    SHARED_FOLDER,
    labels,
    ray_pod,
    submitter_pod,
)
from deploy.k8s.values import RAY_VERSION, GroupValues, KubernetesValues, processes, run_name
from distrl.config import Config, make_config
from distrl.errors import ConfigError
from distrl.masking import mask

Json = dict[str, Any]
ENTRYPOINT = 'distrl train "$DISTRL_CONFIG" --resume-or-start'
"""What the driver runs, at the first attempt and at every later one."""


def groups_of(values: KubernetesValues) -> dict[str, GroupValues]:
    """The worker groups by name."""
    return {
        "learner": values.learners,
        "generation": values.generation,
        "grading": values.grading,
        "reference": values.reference,
    }


def run_objects(config: Config, values: KubernetesValues) -> list[Json]:
    """The objects in the order in which they are applied.

    The run's directory is put on the block volume, what it must not lose on the volume that all pods share where its
    config names no object storage, and its metrics are served to the cluster's Prometheus.

    Raises:
        ConfigError: the name or the storage is none for a cluster.
    """
    run = run_name(config)
    # Whether the objective needs reference scoring is known only where the model is: the group is always there.
    groups = groups_of(values)
    autoscaled = any(group.most > group.replicas for group in groups.values())
    place = {"namespace": values.namespace}
    placed = make_config(
        config.model_dump(mode="json"),
        [
            f"run.dir={RUN_FOLDER}",
            f"storage.uri={storage_uri(config, values)}",
            "metrics.host=0.0.0.0",
            f"metrics.port={values.metrics_port}",
            "placement.groups=true",
        ],
    )
    objects: list[Json] = [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": values.namespace,
                "labels": {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")},
            },
        },
        {
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": {"name": f"distrl-{run}"},
            "value": values.priority,
            "globalDefault": False,
            "description": f"Pods of the run {run}",
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": f"{run}-config", **place},
            # What has its default is left out: a new key would change every manifest.
            "data": {"config.yaml": yaml.safe_dump(mask(_chosen(placed)), sort_keys=False)},
        },
        _claim(f"{run}-run", "ReadWriteOncePod", values.run_gib, values.run_storage_class, values),
        _claim(f"{run}-shared", "ReadWriteMany", values.shared_gib, values.shared_storage_class, values),
        *network_policies(run, values, autoscaled=autoscaled),
    ]
    budgets = {"head": 1, "learner": groups["learner"].replicas}
    budgets |= {name: max(1, groups[name].replicas - 1) for name in ("generation", "grading", "reference")}
    objects += [_budget(run, component, least, values) for component, least in budgets.items()]
    objects.append(_pod_monitor(run, values))
    objects.append(_ray_job(run, groups, values, config, autoscaled=autoscaled))
    return objects


def storage_uri(config: Config, values: KubernetesValues) -> str:
    """Where journal, checkpoints and copies of the ledger go: a place that every pod sees.

    Raises:
        ConfigError: it is another folder of the pods, or object storage that no pod may reach.
    """
    uri = config.storage.uri
    if uri is None:
        return f"{SHARED_FOLDER}/runs"
    if uri.startswith(f"{SHARED_FOLDER}/"):
        return uri
    if "://" not in uri or uri.startswith("file:"):
        raise ConfigError(
            f"storage.uri must be object storage, or lie in {SHARED_FOLDER}, the volume that all pods share, got "
            f"{uri!r}; leave it empty for {SHARED_FOLDER}/runs"
        )
    if not values.object_storage_cidr:
        raise ConfigError(
            f"--set object_storage_cidr=... is required where storage.uri is object storage, got none for {uri!r}: the "
            "network policies would let no pod reach it"
        )
    return uri


def _chosen(config: Config) -> Json:
    """The keys that differ from their defaults."""
    return config.model_dump(mode="json", exclude_defaults=True)


def _claim(name: str, mode: str, gib: int, storage_class: str, values: KubernetesValues) -> Json:
    spec: Json = {
        # ReadWriteOncePod: two attempts of a run can overlap, and only one of them may write its ledger.
        "accessModes": [mode],
        "volumeMode": "Filesystem",
        "resources": {"requests": {"storage": f"{gib}Gi"}},
    }
    if storage_class:
        spec["storageClassName"] = storage_class
    metadata = {"name": name, "namespace": values.namespace}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def _budget(run: str, component: str, least: int, values: KubernetesValues) -> Json:
    """An integer: Kubernetes can count pods only of what has a scale subresource, which a RayCluster has not."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": f"{run}-{component}", "namespace": values.namespace},
        "spec": {"minAvailable": least, "selector": {"matchLabels": labels(run, component)}},
    }


def _pod_monitor(run: str, values: KubernetesValues) -> Json:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": run, "namespace": values.namespace, "labels": {"release": "prometheus"}},
        "spec": {
            "selector": {
                "matchLabels": {NAME: "distrl", INSTANCE: run},
                "matchExpressions": [{"key": COMPONENT, "operator": "NotIn", "values": ["submitter"]}],
            },
            "podMetricsEndpoints": [
                {
                    "port": port,
                    # The dashboard and the alert rules ask for the label `run`.
                    "relabelings": [
                        {
                            "sourceLabels": ["__meta_kubernetes_pod_label_app_kubernetes_io_instance"],
                            "targetLabel": "run",
                        }
                    ],
                }
                for port in ("metrics", "as-metrics", "dash-metrics", "distrl")
            ],
        },
    }


def _ray_job(
    run: str, groups: dict[str, GroupValues], values: KubernetesValues, config: Config, *, autoscaled: bool
) -> Json:
    cluster: Json = {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token", "secretName": values.auth_secret},
        "headGroupSpec": {
            "resources": {"CPU": "0"},  # the driver and our control actors, and no task of anybody else
            "rayStartParams": {"dashboard-host": "0.0.0.0"},
            "template": ray_pod(run, "head", values.head, values, autoscaled=autoscaled),
        },
        "workerGroupSpecs": [
            _worker_group(run, name, group, values, processes(name, config)) for name, group in groups.items()
        ],
    }
    if autoscaled:
        cluster["enableInTreeAutoscaling"] = True
        small = {"cpu": "500m", "memory": "1Gi"}
        cluster["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": 300,
            "securityContext": CONTAINER_SECURITY,
            "resources": {"requests": small, "limits": small},
            "env": [{"name": "HOME", "value": "/tmp/ray"}, {"name": "TMPDIR", "value": "/tmp/ray"}],
        }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": run, "namespace": values.namespace, "labels": labels(run, "job")},
        "spec": {
            "submissionMode": "K8sJobMode",
            "entrypoint": ENTRYPOINT,
            "backoffLimit": values.backoff_limit,
            "submitterConfig": {"backoffLimit": 2},
            "submitterPodTemplate": submitter_pod(run, values),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 3600,
            "rayClusterSpec": cluster,
        },
    }


def _worker_group(run: str, name: str, group: GroupValues, values: KubernetesValues, count: int) -> Json:
    """
    Args:
        count: processes of the config that the group's least number of pods must hold; each takes one of the group's
            resource, so that one more of them has the autoscaler add a pod.
    """
    amounts: Json = {"CPU": str(group.cpu), f"distrl_{name}": str(-(-count // group.replicas))}
    if group.gpus:
        amounts["GPU"] = str(group.gpus)
    return {
        "groupName": name,
        "replicas": group.replicas,
        "minReplicas": group.replicas,
        "maxReplicas": group.most,
        "resources": amounts,
        "rayStartParams": {},
        "template": ray_pod(run, name, group, values),
    }


class _Dumper(yaml.SafeDumper):
    """Without anchors, which an object repeated in two places would get, and with texts of lines as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, data: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _text)


def to_yaml(objects: list[Json]) -> str:
    """One YAML document per object; the same objects give the same bytes."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, explicit_start=True, width=120)
