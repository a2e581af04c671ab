"""The manifests of launch/kubernetes/: valid, and in agreement with the server and each other."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fairkv_jax.serve.flags import parse
from fairkv_jax.serve.metrics import Metrics
from fairkv_jax.serve.server import THREAD_GRACE_S
from tests.serve.live import ROOT

FOLDER = ROOT / "launch" / "kubernetes"
INSTALL_S = 300.0
KUBERNETES_VALIDATE = "kubernetes-validate>=1.35"


def read(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def pods() -> dict[str, dict[str, Any]]:
    """The pod templates by their role."""
    group = read("leaderworkerset.yaml")[0]["spec"]["leaderWorkerTemplate"]
    return {
        "replica": read("deployment.yaml")[0]["spec"]["template"],
        "leader": group["leaderTemplate"],
        "worker": group["workerTemplate"],
    }


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod["spec"]["containers"]
    return found


@pytest.mark.long
def test_kubernetes_accepts_them(tmp_path: Path):
    """The pods of a LeaderWorkerSet are validated as pods, as its own schema is not built in."""
    documents = [
        document
        for name in ("deployment.yaml", "service.yaml", "hpa.yaml", "leaderworkerset.yaml")
        for document in read(name)
    ]
    kinds = {"apiVersion": "v1", "kind": "Pod"}
    documents += [
        {**kinds, "metadata": {**pod["metadata"], "name": role}, "spec": pod["spec"]}
        for role, pod in pods().items()
    ]
    files = []
    for i, document in enumerate(documents):
        if document["kind"] != "LeaderWorkerSet":
            files.append(tmp_path / f"{i}.json")
            files[-1].write_text(json.dumps(document), encoding="utf-8")
    run = [sys.executable, "-m", "uv", "run", "--no-project", "--quiet", "--python", sys.executable]
    run += ["--with", KUBERNETES_VALIDATE]
    try:
        subprocess.run([*run, "true"], capture_output=True, check=True, timeout=INSTALL_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"kubernetes-validate cannot be installed: {error.stderr!r}")
    validated = subprocess.run(
        [*run, "kubernetes-validate", "--strict", *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert validated.returncode == 0, validated.stdout + validated.stderr
    assert (validated.stdout + validated.stderr).count(" passed for ") == len(files) == 7


@pytest.mark.parametrize("role", ["replica", "leader", "worker"])
def test_a_pod_may_drain_for_as_long_as_its_server_does(role: str):
    pod = pods()[role]
    server = parse(container(pod)["args"], {}).server
    sleep = 0
    if role != "worker":
        command = container(pod)["lifecycle"]["preStop"]["exec"]["command"]
        assert command[0] == "sleep"
        sleep = int(command[1])
    needed = sleep + server.shutdown_timeout + THREAD_GRACE_S
    assert pod["spec"]["terminationGracePeriodSeconds"] > needed


@pytest.mark.parametrize("role", ["replica", "leader"])
def test_probes_ask_the_port_at_which_the_server_listens(role: str):
    served = container(pods()[role])
    server = parse(served["args"], {}).server
    assert (server.host, server.port) == ("0.0.0.0", served["ports"][0]["containerPort"])
    paths = {"startupProbe": "/ready", "readinessProbe": "/health", "livenessProbe": "/live"}
    for probe, path in paths.items():
        assert served[probe]["httpGet"] == {"path": path, "port": served["ports"][0]["name"]}


def test_workers_have_the_leaders_arguments_and_no_port():
    leader, worker = container(pods()["leader"]), container(pods()["worker"])
    assert leader["args"] == worker["args"]
    assert not {"ports", "startupProbe", "readinessProbe", "livenessProbe"} & set(worker)
    group = read("leaderworkerset.yaml")[0]
    assert group["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert group["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"


def test_services_select_the_pods():
    (service,) = read("service.yaml")
    assert service["spec"]["selector"] == pods()["replica"]["metadata"]["labels"]
    group, leaders = read("leaderworkerset.yaml")
    assert leaders["spec"]["selector"] == {
        "leaderworkerset.sigs.k8s.io/name": group["metadata"]["name"],
        "leaderworkerset.sigs.k8s.io/worker-index": "0",
    }
    for one in (service, leaders):
        assert one["spec"]["ports"][0]["targetPort"] == "http"


def test_the_number_of_replicas_follows_a_metric_that_the_server_has():
    (scaler,) = read("hpa.yaml")
    (deployment,) = read("deployment.yaml")
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"]  # or every update of the file would reset it
    (metric,) = scaler["spec"]["metrics"]
    (adapter,) = read("prometheus-adapter.yaml")
    (rule,) = adapter["rules"]["custom"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    series = rule["seriesQuery"].partition("{")[0]
    assert f"# TYPE {series} gauge" in Metrics().exposition()[0].decode()
