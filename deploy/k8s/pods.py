"""Pod templates: every container without privileges, with its limits, and with places to write where it must."""

from typing import Any

from deploy.k8s.values import GroupValues, KubernetesValues

Json = dict[str, Any]
CONFIG_FOLDER = "/etc/distrl"
RUN_FOLDER = "/run/distrl"
SHARED_FOLDER = "/shared"
HOME_FOLDER = "/home/distrl"
"""Not /home/ray: Python lies there in Ray's images, and a volume would hide it."""
NAME, INSTANCE, COMPONENT = (f"app.kubernetes.io/{word}" for word in ("name", "instance", "component"))

CONTAINER_SECURITY: Json = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "runAsUser": 1000,
}
# The image's user is ray, 1000, in the group users, 100; fsGroup lets it write to volumes.
POD_SECURITY: Json = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "runAsGroup": 100,
    "fsGroup": 100,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}


def labels(run: str, component: str) -> Json:
    """KubeRay hands a RayJob's labels to the cluster and not to pods: they must be in each template."""
    return {NAME: "distrl", INSTANCE: run, COMPONENT: component}


def ray_pod(
    run: str, component: str, group: GroupValues, values: KubernetesValues, *, autoscaled: bool = False
) -> Json:
    """The template of a head (component `head`) or worker pod.

    Args:
        autoscaled: the autoscaler runs beside this head and needs the service account's token.
    """
    head = component == "head"
    pod: Json = {
        "securityContext": POD_SECURITY,
        "automountServiceAccountToken": head and autoscaled,
        "enableServiceLinks": False,
        "priorityClassName": f"distrl-{run}",
        "restartPolicy": "Never",  # KubeRay makes a new pod; a restarted container would be a second Ray node
        "terminationGracePeriodSeconds": values.grace_s,
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": key,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": labels(run, component)},
            }
            for key in ("topology.kubernetes.io/zone", "kubernetes.io/hostname")
        ],
        "affinity": _affinity(group, values),
        "containers": [_ray_container(component, group, values)],
        "volumes": _volumes(run, head, group),
    }
    tolerations = []
    if group.gpus:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if group.spot:
        tolerations.append({"key": values.spot_key, "operator": "Exists", "effect": "NoSchedule"})
    if tolerations:
        pod["tolerations"] = tolerations
    return {"metadata": {"labels": labels(run, component)}, "spec": pod}


def _affinity(group: GroupValues, values: KubernetesValues) -> Json:
    """Spot pods prefer spot nodes; the others never lie on one, also where it has no taint."""
    if group.spot:
        preference = {"matchExpressions": [{"key": values.spot_key, "operator": "Exists"}]}
        return {
            "nodeAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": preference}]
            }
        }
    term = {"matchExpressions": [{"key": values.spot_key, "operator": "DoesNotExist"}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}


def _ray_container(component: str, group: GroupValues, values: KubernetesValues) -> Json:
    head = component == "head"
    ports = [{"name": "metrics", "containerPort": 8080}]
    if head:
        named = (("gcs", 6379), ("dashboard", 8265), ("client", 10001), ("as-metrics", 44217), ("dash-metrics", 44227))
        ports += [{"name": name, "containerPort": port} for name, port in named]
        ports.append({"name": "distrl", "containerPort": values.metrics_port})
    mounts: list[Json] = [
        {"name": "ray-logs", "mountPath": "/tmp/ray"},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "home", "mountPath": HOME_FOLDER},
        {"name": "shared-mem", "mountPath": "/dev/shm"},
        {"name": "shared", "mountPath": SHARED_FOLDER},
    ]
    if head:
        mounts += [
            {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
            {"name": "run", "mountPath": RUN_FOLDER},
        ]
    container: Json = {
        "name": "ray-head" if head else "ray-worker",
        "image": image(group, values),
        "imagePullPolicy": "IfNotPresent",
        "securityContext": CONTAINER_SECURITY,
        "resources": resources(group),
        "ports": ports,
        "env": [
            {"name": "HOME", "value": HOME_FOLDER},
            {"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": str(values.drain_s)},
            {"name": "HF_HUB_OFFLINE", "value": "1"},
            *([{"name": "DISTRL_CONFIG", "value": f"{CONFIG_FOLDER}/config.yaml"}] if head else []),
        ],
        "volumeMounts": mounts,
        "livenessProbe": _probe(delay_s=30, failures=120),
        "readinessProbe": _probe(delay_s=10, failures=10),
    }
    # Whoever writes to object storage needs its keys; where models' programs run there are none.
    if component in ("head", "learner") and values.environment_secret:
        container["envFrom"] = [{"secretRef": {"name": values.environment_secret}}]
    return container


def image(group: GroupValues, values: KubernetesValues) -> str:
    return values.gpu_image if group.gpus and values.gpu_image else values.image


def resources(group: GroupValues) -> Json:
    """Requests are the limits: a pod that is killed for memory it was promised costs a checkpoint."""
    amounts: Json = {"cpu": str(group.cpu), "memory": f"{group.memory_gib}Gi"}
    if group.gpus:
        amounts["nvidia.com/gpu"] = str(group.gpus)
    return {"requests": amounts, "limits": amounts}


def _probe(delay_s: int, failures: int) -> Json:
    """The node agent's health, which needs no token."""
    return {
        "httpGet": {"path": "/api/healthz", "port": 52365},
        "initialDelaySeconds": delay_s,
        "periodSeconds": 5,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _volumes(run: str, head: bool, group: GroupValues) -> list[Json]:
    half = f"{max(1, group.memory_gib // 2)}Gi"
    volumes: list[Json] = [
        # KubeRay shares this name with the autoscaler.
        {"name": "ray-logs", "emptyDir": {"sizeLimit": "20Gi"}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "20Gi"}},
        {"name": "home", "emptyDir": {"sizeLimit": "20Gi"}},
        {"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": half}},
        {"name": "shared", "persistentVolumeClaim": {"claimName": f"{run}-shared"}},
    ]
    if head:
        volumes += [
            {"name": "config", "configMap": {"name": f"{run}-config"}},
            {"name": "run", "persistentVolumeClaim": {"claimName": f"{run}-run"}},
        ]
    return volumes


def submitter_pod(run: str, values: KubernetesValues) -> Json:
    """KubeRay writes its command; everything else must be here."""
    small = GroupValues(cpu=1, memory_gib=2)
    return {
        "metadata": {"labels": labels(run, "submitter")},
        "spec": {
            "securityContext": POD_SECURITY,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "priorityClassName": f"distrl-{run}",
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": values.grace_s,
            "containers": [
                {
                    "name": "ray-job-submitter",
                    "image": values.image,
                    "imagePullPolicy": "IfNotPresent",
                    "securityContext": CONTAINER_SECURITY,
                    "resources": resources(small),
                    "env": [{"name": "HOME", "value": "/tmp"}],
                    "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
                }
            ],
            "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
        },
    }
