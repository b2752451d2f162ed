"""What is deployed: that it names settings, commands, addresses and metrics that there are, and packs an image that runs our server."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families
from scene import ROOT, Service
from typer.main import get_command

from features.state.settings import ANOTHERS, INTERNAL, Settings, variable_of
from models.registry import model_names
from serving.http.access import OPEN_PATHS

DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
USER = 1034
"""As whom the image runs."""
SETTINGS = {variable_of(name) for name in Settings.__struct_fields__ if name not in INTERNAL} | set(ANOTHERS)


def documents() -> list[dict[str, Any]]:
    return [document for path in KUBERNETES for document in yaml.safe_load_all(path.read_text())]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [document for document in documents() if document["kind"] == kind]


def pods() -> Iterator[dict[str, Any]]:
    for document in of_kind("Deployment"):
        yield document["spec"]["template"]["spec"]
    for document in of_kind("CronJob"):
        yield document["spec"]["jobTemplate"]["spec"]["template"]["spec"]


def containers() -> Iterator[dict[str, Any]]:
    for pod in pods():
        yield from [*pod.get("initContainers", []), *pod["containers"]]


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return loaded


def check_command(words: list[str]) -> None:
    """See that ``python -m PACKAGE COMMAND --OPTION`` is one of ours."""
    at = words.index("python")
    assert words[at + 1] == "-m", words
    package, said = words[at + 2], words[at + 3 :]
    group: Any = get_command(__import__(f"{package}.__main__", fromlist=["app"]).app)
    while said and not said[0].startswith("-") and said[0] in getattr(group, "commands", {}):
        group, said = group.commands[said[0]], said[1:]
    if said and not said[0].startswith("-"):
        assert package == "training", words
        assert said[0] in model_names(None), words
    options = {option for each in group.params for option in each.opts}
    assert {word for word in said if word.startswith("--")} <= options, words


def test_every_variable_is_a_setting() -> None:
    named = {name for path in FILES for name in re.findall(r"\bUBIQUO_[A-Z_]+\b", path.read_text())}
    assert {"UBIQUO_DATABASE", "UBIQUO_REDIS", "UBIQUO_LAKE"} <= named
    assert named - SETTINGS == set()


def test_what_is_set_there_can_be() -> None:
    [config], [secret] = of_kind("ConfigMap"), of_kind("Secret")
    told = {**config["data"], **secret["stringData"]}
    found = Settings.from_environment(told)
    assert (found.lake, found.redis, found.log) == ("s3://ubiquo/log", "redis:6379", "json")
    assert found.database.startswith("postgresql://")
    service = compose()["services"]["ubiquo"]
    filled = {name: re.sub(r"\$\{(\w+)[^}]*\}", "a-password", value) for name, value in service["environment"].items()}
    assert Settings.from_environment(filled).lake == "s3://ubiquo/log"


def test_no_image_names_a_registry_and_ours_is_one() -> None:
    images = [each["image"] for each in containers()] + [each["image"] for each in compose()["services"].values()]
    assert [image for image in images if "." in image.partition("/")[0] and "/" in image] == []
    assert {image for image in images if image.startswith("ubiquo")} == {"ubiquo:latest"}
    assert all(":" in image for image in images)


class TestKubernetes:
    def test_every_command_is_there(self) -> None:
        commands = [container["command"] for container in containers()]
        assert len(commands) >= 4
        for command in commands:
            check_command(shlex.split(command[-1]) if command[0] == "sh" else command)

    def test_probes_ask_what_needs_no_key(self) -> None:
        [service] = [each for each in containers() if "ports" in each]
        ports = {each["name"]: each["containerPort"] for each in service["ports"]}
        for name in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = service[name]["httpGet"]
            assert asked["path"] in OPEN_PATHS
            assert asked["port"] in ports
        assert service["livenessProbe"]["httpGet"]["path"] == "/livez"
        [front] = [each for each in of_kind("Service") if each["spec"].get("clusterIP") != "None"]
        assert front["spec"]["ports"][0]["targetPort"] in ports
        assert str(ports["http"]) == service["command"][service["command"].index("--port") + 1]

    def test_a_roll_out_and_a_drain_leave_services_that_answer(self) -> None:
        [deployment], [budget] = of_kind("Deployment"), of_kind("PodDisruptionBudget")
        assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
        assert 0 < budget["spec"]["minAvailable"] < deployment["spec"]["replicas"]
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        for each in (*of_kind("Service"), budget, deployment):
            selected = each["spec"]["selector"]
            assert labels.items() >= selected.get("matchLabels", selected).items()
        assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 30

    def test_what_is_mounted_and_read_is_there(self) -> None:
        names = {(each["kind"], each["metadata"]["name"]) for each in documents()}
        for pod in pods():
            volumes = {each["name"] for each in pod["volumes"]}
            claims = {each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if "persistentVolumeClaim" in each}
            assert {("PersistentVolumeClaim", claim) for claim in claims} <= names
            for container in (*pod.get("initContainers", []), *pod["containers"]):
                assert {each["name"] for each in container["volumeMounts"]} == volumes
                for source in container["envFrom"]:
                    [(kind, reference)] = source.items()
                    assert (kind.removesuffix("Ref")[0].upper() + kind.removesuffix("Ref")[1:], reference["name"]) in names
            security = pod["securityContext"]
            assert (security["runAsNonRoot"], security["runAsUser"], security["fsGroup"]) == (True, USER, USER)
        [claim] = of_kind("PersistentVolumeClaim")
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]

    def test_mounts_are_where_the_settings_look(self) -> None:
        [config] = of_kind("ConfigMap")
        for container in containers():
            mounted = {each["mountPath"] for each in container["volumeMounts"]}
            assert mounted == {config["data"]["UBIQUO_HOME"], config["data"]["UBIQUO_CACHE"]}


class TestCompose:
    def test_every_command_of_ours_is_there(self) -> None:
        ours = [
            each["command"] for each in compose()["services"].values() if each["image"].startswith("ubiquo") and "python" in each["command"]
        ]
        assert len(ours) == 3
        for command in ours:
            check_command(command)

    def test_what_a_service_needs_is_started(self) -> None:
        told = compose()
        volumes = set(told["volumes"])
        for name, service in told["services"].items():
            assert set(service.get("depends_on", [])) <= set(told["services"]), name
            mounted = {each.partition(":")[0] for each in service.get("volumes", []) if not each.startswith(".")}
            assert mounted <= volumes, name
        environment = told["services"]["ubiquo"]["environment"]
        for variable in ("UBIQUO_DATABASE", "UBIQUO_REDIS", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"):
            host = re.search(r"(?:@|//|^)([a-z0-9]+):\d+", environment[variable])
            assert host is not None, variable
            assert host.group(1) in told["services"], variable

    def test_whoever_runs_our_image_is_asked_where_it_answers_or_not_at_all(self) -> None:
        services = compose()["services"]
        for name, service in services.items():
            if not service["image"].startswith("ubiquo"):
                continue
            check, command = service["healthcheck"], service["command"]
            if "--port" not in command:
                # the image's own check asks a service, which this is none of
                assert check == {"disable": True}, name
                continue
            [(port, path)] = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)'", check["test"][-1])
            assert port == command[command.index("--port") + 1], name
            assert path in (OPEN_PATHS if "serving" in command else ("/health",)), name
        for name, service in services.items():
            needed = service.get("depends_on", {})
            for other, how in needed.items() if isinstance(needed, dict) else ():
                has_check = "healthcheck" in services[other]
                assert how["condition"] == ("service_healthy" if has_check else "service_completed_successfully"), (name, other)

    def test_the_balancer_asks_whether_a_service_is_ready(self) -> None:
        text = (DEPLOY / "balancer.cfg").read_text()
        [path] = re.findall(r"httpchk GET (\S+)", text)
        assert path in OPEN_PATHS
        [(service, port)] = re.findall(r"server-template \S+ \d+ (\w+):(\d+)", text)
        assert [port] == compose()["services"][service]["expose"]
        [bound] = re.findall(r"bind :(\d+)", text)
        assert compose()["services"]["balancer"]["ports"][0].endswith(f":{bound}")


class TestWhatIsWatched:
    def test_each_service_is_found_by_a_name_and_a_port_that_there_are(self) -> None:
        [job] = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())["scrape_configs"]
        [found] = job["dns_sd_configs"]
        [name] = found["names"]
        # the address of a Service that is not headless is one for all
        [service] = [each for each in of_kind("Service") if each["metadata"]["name"] == name]
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"]
        [deployment] = of_kind("Deployment")
        [answers] = [each for each in deployment["spec"]["template"]["spec"]["containers"] if "ports" in each]
        opened = {each["name"]: each["containerPort"] for each in answers["ports"]}
        assert [(each["port"], opened[each["targetPort"]]) for each in service["spec"]["ports"]] == [(found["port"], found["port"])]
        within = compose()["services"]["ubiquo"]
        assert name in within["networks"]["default"]["aliases"]
        assert within["expose"] == [f"{found['port']}"]

    @staticmethod
    def expressions() -> list[str]:
        groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]
        panels = json.loads((DEPLOY / "grafana" / "ubiquo.json").read_text())["panels"]
        alerts = [rule["expr"] for group in groups for rule in group["rules"]]
        return alerts + [target["expr"] for panel in panels for target in panel["targets"]]

    def test_each_metric_is_served_with_the_labels_that_are_asked_for(self, service: Service) -> None:
        service.ask("recommendations", {"identifiers": {"loyalty_card": "nobody"}})
        text = service.get("/metrics")[1]
        served = {sample.name: set(sample.labels) for family in text_string_to_metric_families(text) for sample in family.samples}
        declared = {name + end for name, end in re.findall(r"^# TYPE (ubiquo_\w+?) (?:counter|gauge|histogram)()$", text, re.MULTILINE)}
        asked = self.expressions()
        assert len(asked) >= 20
        for expression in asked:
            for name, selected in re.findall(r"\b(ubiquo_\w+)(?:\{([^}]*)\})?", expression):
                assert name in declared | set(served), expression
                if name in served:
                    assert set(re.findall(r"(\w+)\s*=", selected)) <= served[name], expression

    def test_each_alert_is_told_with_what_to_do(self) -> None:
        text = (ROOT / "docs" / "operations.md").read_text()
        for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]:
            for rule in group["rules"]:
                assert f"`{rule['alert']}`" in text
                page, _, anchor = rule["annotations"]["runbook"].partition("#")
                assert f"## {anchor.replace('-', ' ').capitalize()}" in (ROOT / page).read_text()


def test_a_bento_is_built_whose_image_runs_our_server_as_nobody_special(tmp_path: Path) -> None:
    surroundings = {**os.environ, "BENTOML_HOME": str(tmp_path), "BENTOML_DO_NOT_TRACK": "True", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(Path(sys.executable).with_name("bentoml")), "build", "--output", "tag"],
        cwd=ROOT,
        env=surroundings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [bento] = (tmp_path / "bentos" / "ubiquo").glob("*/bento.yaml")
    lines = (bento.parent / "env" / "docker" / "Dockerfile").read_text().splitlines()
    said = [line.partition(" ")[::2] for line in lines if re.match(r"[A-Z]+ ", line)]
    assert [value for name, value in said if name == "USER"][-1] == "bentoml"
    assert f"ARG BENTO_USER_UID={USER}" in lines
    after = [name for name, _ in said[max(n for n, (name, _) in enumerate(said) if name == "USER") :]]
    assert "RUN" not in after, "nothing is done as root after the user was changed, and nothing by the user before"
    told = [value for name, value in said if name == "ENV" and value.startswith("UBIQUO_COMMIT=")]
    [argument] = [value.partition("=")[0] for name, value in said if name == "ARG" and value.startswith("UBIQUO_COMMIT=")]
    assert told == [f"UBIQUO_COMMIT=${{{argument}}}"], "the commit is given to the build, by the argument that is documented"
    assert f"--opt build-arg={argument}=" in (ROOT / "docs" / "operations.md").read_text()
    [command] = [value for name, value in said if name == "CMD"]
    check_command(json.loads(command))
    [health] = [value for name, value in said if name == "HEALTHCHECK"]
    assert "/livez" in health
    source = bento.parent / "src"
    assert {path.name for path in source.iterdir()} >= {"features", "models", "serving", "training", "mlflow.yaml"}
    packed = {**surroundings, "PYTHONPATH": str(source)}
    for package in ("features", "training", "serving"):
        code = f"import {package}.__main__ as m; assert m.__file__.startswith({str(source)!r}), m.__file__"
        ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=source, env=packed, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
