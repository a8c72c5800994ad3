"""The manifests of examples/kubernetes: Kubernetes takes them, and so does what they start.

Not covered: the fields of RayService that are not those of pods, whose schema comes with KubeRay.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from copyspec_engine.cli.main import app
from copyspec_engine.serve.config import ServeConfig
from copyspec_engine.serve.lifecycle import LAST_EVENTS_S

FOLDER = Path(__file__).parents[1] / "examples" / "kubernetes"
VERSION = "1.34"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def of_kind(name: str, kind: str) -> list[dict[str, Any]]:
    return [document for document in documents(name) if document["kind"] == kind]


def templates(document: Any) -> Iterator[dict[str, Any]]:
    """Every template of pods in a document, wherever it stands."""
    if isinstance(document, dict):
        if "template" in document:
            yield document["template"]
        for value in document.values():
            yield from templates(value)
    elif isinstance(document, list):
        for value in document:
            yield from templates(value)


def as_pod(template: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template.get("metadata", {})}, **template}


FILES = ["copyspec.yaml", "ray-service.yaml"]
PODS = [(f"{document['kind']} {number}", template) for name in FILES for document in documents(name)
        for number, template in enumerate(templates(document))]  # fmt: skip


def args_of_server() -> list[str]:
    (stateful,) = of_kind("copyspec.yaml", "StatefulSet")
    args: list[str] = stateful["spec"]["template"]["spec"]["containers"][0]["args"]
    return args


@pytest.mark.parametrize("name", FILES)
def test_kubernetes_takes_them_and_would_refuse_a_word_it_does_not_know(name: str) -> None:
    for document in documents(name):
        if document["apiVersion"].startswith("ray.io"):
            continue
        kubernetes_validate.validate(document, VERSION, strict=True)
        if "spec" in document:
            wrong = copy.deepcopy(document)
            wrong["spec"]["replicaz"] = 2
            with pytest.raises(kubernetes_validate.ValidationError, match="replicaz"):
                kubernetes_validate.validate(wrong, VERSION, strict=True)


@pytest.mark.parametrize(("name", "template"), PODS, ids=[name for name, _ in PODS])
def test_pods_have_limits_few_rights_and_time_to_end(name: str, template: dict[str, Any]) -> None:
    kubernetes_validate.validate(as_pod(template), VERSION, strict=True)
    pod = template["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    defaults = {key: ServeConfig.model_fields[key].default for key in ("drain_notice_s", "drain_s")}
    assert pod["terminationGracePeriodSeconds"] >= sum(defaults.values()) + 2 * LAST_EVENTS_S
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()


def test_the_server_is_started_with_options_that_it_has_and_asked_where_it_answers() -> None:
    name, *args = args_of_server()
    command: Any = get_command(app)
    given = command.commands[name].make_context(name, args).params
    (stateful,) = of_kind("copyspec.yaml", "StatefulSet")
    (container,) = stateful["spec"]["template"]["spec"]["containers"]
    assert given["host"] == "0.0.0.0"
    assert given["memory_path"].startswith("postgresql://")
    assert [port["containerPort"] for port in container["ports"]] == [given["port"]]
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    notice_s = container["readinessProbe"]["periodSeconds"] * container["readinessProbe"]["failureThreshold"]
    assert notice_s < given["drain_notice_s"]  # it is off the list before it refuses
    grace_s = stateful["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s >= given["drain_notice_s"] + given["drain_s"] + 2 * LAST_EVENTS_S
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(Path(given["api_keys"]).parent) in mounted
    assert all("PASSWORD" not in variable["name"] or "value" not in variable for variable in container["env"])


def test_nginx_hashes_the_names_of_all_servers_and_each_name_is_one_pods() -> None:
    (stateful,) = of_kind("copyspec.yaml", "StatefulSet")
    (config,) = of_kind("copyspec.yaml", "ConfigMap")
    pods = [f"{stateful['metadata']['name']}-{number}" for number in range(stateful["spec"]["replicas"])]
    assert re.findall(r"^\s*server ([\w-]+):8000", config["data"]["copyspec.conf"], flags=re.MULTILINE) == pods
    services = {service["metadata"]["name"]: service["spec"] for service in of_kind("copyspec.yaml", "Service")}
    for pod in pods:
        assert services[pod]["selector"] == {"statefulset.kubernetes.io/pod-name": pod}
    assert services[stateful["spec"]["serviceName"]]["clusterIP"] == "None"
    assert "hash $talk consistent;" in config["data"]["copyspec.conf"]
    guide = (FOLDER.parents[1] / "docs" / "serve.md").read_text(encoding="utf-8")
    talk = re.search(r"map \$http_x_session_id.*?\n\}", guide, flags=re.DOTALL)
    assert talk
    assert "".join(talk[0].split()) in "".join(config["data"]["copyspec.conf"].split())


def test_ray_serve_is_told_options_that_replicas_have(monkeypatch: pytest.MonkeyPatch) -> None:
    from copyspec_engine.scale import build, options

    monkeypatch.setattr(options, "check_reachable", lambda _config: None)  # the keys are in the pod
    (service,) = of_kind("ray-service.yaml", "RayService")
    told = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = told["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    scale, config, engine = options.split_options(application["args"])
    assert not config.is_local
    assert str(engine.memory_path).startswith("postgresql://")
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    container = workers["template"]["spec"]["containers"][0]
    assert float(container["resources"]["limits"]["cpu"]) >= scale.num_cpus
    assert str(Path(str(config.api_keys)).parent) in {mount["mountPath"] for mount in container["volumeMounts"]}
    (replica,) = application["deployments"]
    assert replica["name"] == "Replica"
    scaling = replica["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (workers["minReplicas"], workers["maxReplicas"])
    assert scaling["target_ongoing_requests"] < engine.max_running
