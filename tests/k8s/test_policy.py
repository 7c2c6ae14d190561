"""What every pod of a run must keep, asserted on every pod of every rendering."""

from typing import Any

import pytest

from deploy.k8s.objects import Json
from deploy.k8s.pods import COMPONENT, INSTANCE
from tests.k8s.test_render import OVERLAYS, job, rendered

CASES = [*OVERLAYS, "everything"]


def pods(case: str) -> dict[str, Json]:
    """By component: the pod templates of a job."""
    spec = job(rendered(case))["spec"]
    cluster = spec["rayClusterSpec"]
    found = {"submitter": spec["submitterPodTemplate"], "head": cluster["headGroupSpec"]["template"]}
    return found | {g["groupName"]: g["template"] for g in cluster["workerGroupSpecs"]}


PODS = [pytest.param(case, name, id=f"{case}-{name}") for case in CASES for name in pods(case)]


def amount(text: str) -> float:
    return float(text.removesuffix("Gi")) if text.endswith("Gi") else float(text.removesuffix("m")) / 1000


@pytest.fixture(name="pod")
def one_pod(case: str, name: str) -> Json:
    return pods(case)[name]


@pytest.mark.parametrize(("case", "name"), PODS)
class TestEveryPod:
    def test_is_nobody_special(self, pod: Json, case: str, name: str) -> None:
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == 1000
        assert security["fsGroup"] == 100
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}

    def test_gives_no_container_privileges_or_a_writable_root(self, pod: Json, case: str, name: str) -> None:
        for container in (*pod["spec"]["containers"], *pod["spec"].get("initContainers", ())):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert security["readOnlyRootFilesystem"] is True
            assert "privileged" not in security

    def test_is_apart_from_its_host(self, pod: Json, case: str, name: str) -> None:
        spec = pod["spec"]
        assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
        assert not any("hostPath" in volume for volume in spec["volumes"])

    def test_has_requests_and_limits(self, pod: Json, case: str, name: str) -> None:
        for container in pod["spec"]["containers"]:
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert {"cpu", "memory"} <= requests.keys() & limits.keys()
            assert requests.get("nvidia.com/gpu") == limits.get("nvidia.com/gpu")

    def test_can_write_where_it_must(self, pod: Json, case: str, name: str) -> None:
        volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
        (container,) = pod["spec"]["containers"]
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        assert "/tmp" in mounts
        # Ray's images have Python below /home/ray, which a volume would hide.
        assert not [path for path in mounts if path.startswith(("/home/ray", "/opt", "/usr"))]
        home = next(e["value"] for e in container["env"] if e["name"] == "HOME")
        assert home in mounts
        if name == "submitter":
            return
        assert mounts["/tmp/ray"] == "ray-logs"
        assert "emptyDir" in volumes["ray-logs"]
        shared = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert shared["medium"] == "Memory"
        assert amount(shared["sizeLimit"]) <= amount(container["resources"]["limits"]["memory"])

    def test_has_labels_that_policies_select(self, pod: Json, case: str, name: str) -> None:
        labels = pod["metadata"]["labels"]
        assert labels[COMPONENT] == name

        def selects(selector: Json) -> bool:
            return selector.get("matchLabels", {}).items() <= labels.items() and all(
                labels.get(e["key"]) not in e["values"] for e in selector.get("matchExpressions", ())
            )

        objects = rendered(case)
        denied = [
            o
            for o in objects
            if o["kind"] == "NetworkPolicy"
            and o["spec"]["policyTypes"] == ["Ingress", "Egress"]
            and not o["spec"].keys() & {"ingress", "egress"}
        ]
        assert any(selects(o["spec"]["podSelector"]) for o in denied)
        budgets = [o for o in objects if o["kind"] == "PodDisruptionBudget" and selects(o["spec"]["selector"])]
        monitors = [o for o in objects if o["kind"] == "PodMonitor" and selects(o["spec"]["selector"])]
        assert (len(budgets), len(monitors)) == ((0, 0) if name == "submitter" else (1, 1))
        for budget in budgets:
            assert type(budget["spec"]["minAvailable"]) is int
        for constraint in pod["spec"].get("topologySpreadConstraints", ()):
            assert selects(constraint["labelSelector"])
        assert ("topologySpreadConstraints" in pod["spec"]) == (name != "submitter")

    def test_ends_after_ray_has_drained_it_and_is_not_restarted_in_place(self, pod: Json, case: str, name: str) -> None:
        assert pod["spec"]["restartPolicy"] == "Never"
        for container in pod["spec"]["containers"]:
            drain = [e["value"] for e in container["env"] if e["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
            assert all(pod["spec"]["terminationGracePeriodSeconds"] > int(d) + 15 for d in drain)
            assert len(drain) == (name != "submitter")

    def test_has_probes_a_pinned_image_and_a_priority(self, pod: Json, case: str, name: str) -> None:
        first = pod["spec"]["containers"][0]
        assert first["name"] in ("ray-head", "ray-worker", "ray-job-submitter")
        assert ":" in first["image"]
        assert not first["image"].endswith(":latest")
        if name != "submitter":
            assert {"livenessProbe", "readinessProbe"} <= first.keys()
        priorities = [o["metadata"]["name"] for o in rendered(case) if o["kind"] == "PriorityClass"]
        assert pod["spec"]["priorityClassName"] in priorities

    def test_has_a_token_of_the_api_server_only_where_the_autoscaler_needs_it(
        self, pod: Json, case: str, name: str
    ) -> None:
        autoscaled = job(rendered(case))["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling", False)
        assert pod["spec"]["automountServiceAccountToken"] is (name == "head" and autoscaled)

    def test_holds_no_secret_by_value(self, pod: Json, case: str, name: str) -> None:
        for container in pod["spec"]["containers"]:
            values = {e["name"]: e.get("value") for e in container["env"]}
            assert not [n for n in values if "TOKEN" in n or "KEY" in n or "PASSWORD" in n]
            assert all("secretRef" in source for source in container.get("envFrom", ()))


@pytest.mark.parametrize("case", CASES)
class TestTheCluster:
    def cluster(self, case: str) -> Any:
        return job(rendered(case))["spec"]["rayClusterSpec"]

    def test_authenticates_by_a_token_of_a_named_secret(self, case: str) -> None:
        assert self.cluster(case)["authOptions"] == {"mode": "token", "secretName": "distrl-ray-auth"}
        assert self.cluster(case)["rayVersion"] == __import__("ray").__version__

    def test_keeps_work_and_spot_nodes_away_from_the_head(self, case: str) -> None:
        head = self.cluster(case)["headGroupSpec"]
        assert head["resources"] == {"CPU": "0"}
        spec = head["template"]["spec"]
        assert "tolerations" not in spec
        (term,) = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
            "nodeSelectorTerms"
        ]
        assert term == {"matchExpressions": [{"key": "distrl.dev/spot", "operator": "DoesNotExist"}]}

    def test_gives_the_learners_resource_to_learners_alone(self, case: str) -> None:
        groups = {g["groupName"]: g for g in self.cluster(case)["workerGroupSpecs"]}
        assert set(groups) == {"learner", "generation", "grading", "reference"}
        for name, group in groups.items():
            own = [resource for resource in group["resources"] if resource.startswith("distrl_")]
            assert own == [f"distrl_{name}"]
            assert int(group["resources"][own[0]]) >= 1
        for group in groups.values():
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert "nvidia.com/gpu" not in str(groups["grading"]) + str(groups["reference"])

    def test_scales_only_where_a_group_is_elastic_and_then_without_privileges(self, case: str) -> None:
        cluster = self.cluster(case)
        elastic = any(g["minReplicas"] < g["maxReplicas"] for g in cluster["workerGroupSpecs"])
        assert elastic == (case != "cpu") == cluster.get("enableInTreeAutoscaling", False)
        if elastic:
            options = cluster["autoscalerOptions"]
            assert options["version"] == "v2"
            assert options["securityContext"]["readOnlyRootFilesystem"] is True
            assert options["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert options["resources"].keys() == {"requests", "limits"}

    def test_goes_on_with_a_run_by_itself_and_only_one_attempt_writes_it(self, case: str) -> None:
        spec = job(rendered(case))["spec"]
        assert spec["submissionMode"] == "K8sJobMode"
        assert spec["backoffLimit"] > 0
        assert "--resume-or-start" in spec["entrypoint"]
        claims = {o["metadata"]["name"]: o["spec"] for o in rendered(case) if o["kind"] == "PersistentVolumeClaim"}
        modes = {name.rpartition("-")[2]: c["accessModes"] for name, c in claims.items()}
        assert modes == {"run": ["ReadWriteOncePod"], "shared": ["ReadWriteMany"]}
        users = [name for name, pod in pods(case).items() if any(v["name"] == "run" for v in pod["spec"]["volumes"])]
        assert users == ["head"]

    def test_lets_the_operator_and_the_submitter_reach_the_dashboard_and_nobody_else_in(self, case: str) -> None:
        policies = {
            o["metadata"]["name"].partition("-")[2]: o["spec"] for o in rendered(case) if o["kind"] == "NetworkPolicy"
        }
        (rule,) = policies["dashboard"]["ingress"]
        assert rule["ports"] == [{"protocol": "TCP", "port": 8265}]
        namespaces = [s["namespaceSelector"]["matchLabels"] for s in rule["from"] if "namespaceSelector" in s]
        assert namespaces == [{"kubernetes.io/metadata.name": "kuberay-system"}]
        for name, policy in policies.items():
            for rule in policy.get("ingress", ()):
                assert rule["from"], name
            for rule in policy.get("egress", ()):
                assert rule["to"], name
        assert ("api-server" in policies) == (case != "cpu")
        assert ("object-storage" in policies) == (case == "everything")


def test_names_are_short_enough_for_what_kuberay_appends() -> None:
    for case in CASES:
        found = job(rendered(case))["metadata"]
        assert len(found["name"]) <= 47
        assert found["labels"][INSTANCE] == found["name"]
