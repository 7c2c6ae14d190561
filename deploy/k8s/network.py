"""Network policies: everything is denied, then what a run needs is allowed."""

from typing import Any

from deploy.k8s.pods import COMPONENT, INSTANCE, NAME, labels
from deploy.k8s.values import KubernetesValues

Json = dict[str, Any]
NAMESPACE = "kubernetes.io/metadata.name"


def network_policies(run: str, values: KubernetesValues, *, autoscaled: bool) -> list[Json]:
    """One policy per reason."""
    everybody = {"matchLabels": {NAME: "distrl", INSTANCE: run}}
    ray_pods = {**everybody, "matchExpressions": [{"key": COMPONENT, "operator": "NotIn", "values": ["submitter"]}]}
    head, submitter = ({"matchLabels": labels(run, part)} for part in ("head", "submitter"))
    dashboard = [{"protocol": "TCP", "port": 8265}]
    scraped = [{"protocol": "TCP", "port": port} for port in (8080, 44217, 44227, values.metrics_port)]
    rules: list[tuple[str, Json, Json]] = [
        ("deny-all", everybody, {}),
        (
            "dns",
            everybody,
            {
                "egress": [
                    {
                        "to": [{"namespaceSelector": {"matchLabels": {NAMESPACE: "kube-system"}}}],
                        "ports": [{"protocol": p, "port": 53} for p in ("UDP", "TCP")],
                    }
                ]
            },
        ),
        # Ray's processes listen at random ports, between all nodes.
        (
            "ray",
            ray_pods,
            {"ingress": [{"from": [{"podSelector": ray_pods}]}], "egress": [{"to": [{"podSelector": ray_pods}]}]},
        ),
        ("submit", submitter, {"egress": [{"to": [{"podSelector": head}], "ports": dashboard}]}),
        (
            "dashboard",
            head,
            {
                "ingress": [
                    {
                        "from": [
                            {"podSelector": submitter},
                            # Without the operator here a job is given up after 300 s, and not tried again.
                            {"namespaceSelector": {"matchLabels": {NAMESPACE: values.operator_namespace}}},
                        ],
                        "ports": dashboard,
                    }
                ]
            },
        ),
        (
            "metrics",
            ray_pods,
            {
                "ingress": [
                    {
                        "from": [{"namespaceSelector": {"matchLabels": {NAMESPACE: values.monitoring_namespace}}}],
                        "ports": scraped,
                    }
                ]
            },
        ),
    ]
    if autoscaled:
        api = {
            "to": [{"ipBlock": {"cidr": values.api_server_cidr}}],
            "ports": [{"protocol": "TCP", "port": p} for p in (443, 6443)],
        }
        rules.append(("api-server", head, {"egress": [api]}))
    if values.object_storage_cidr:
        out = {"to": [{"ipBlock": {"cidr": values.object_storage_cidr}}], "ports": [{"protocol": "TCP", "port": 443}]}
        rules.append(("object-storage", ray_pods, {"egress": [out]}))
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": f"{run}-{name}", "namespace": values.namespace},
            "spec": {
                "podSelector": pods,
                # A rule of one direction must not deny the other: only the first policy names both.
                "policyTypes": [d for d in ("Ingress", "Egress") if d.lower() in rule or not rule],
                **rule,
            },
        }
        for name, pods, rule in rules
    ]
