"""launch/kubernetes as kustomize builds it, against Kubernetes' own schemas: `bash tests/deploy/kubernetes.sh`.

An unknown or misspelt field is an error, as with `kubectl apply --validate=strict`. Then what no schema knows: that the
parts fit together, and that the exit codes and arguments are ca2cl's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from ca2cl.cli import main as ca2cl
from ca2cl.runtime.signals import EXIT_PREEMPTED

FOLDER = Path(__file__).parents[2] / "launch" / "kubernetes"
VERSIONS = ("1.29", "1.37")  # the oldest that values.yaml promises, and the newest schemas
KINDS = {
    "job": ["Service", "Job"],
    "kueue": ["Service", "Job"],
    "jobset": ["JobSet"],
    "storage": ["PersistentVolumeClaim"],
    "probe": ["Job"],
}


def build(folder: Path) -> list[Any]:
    """What `kubectl apply -k` would send."""
    command = ["kubectl", "kustomize"] if shutil.which("kubectl") else ["kustomize", "build"]
    built = subprocess.run([*command, str(folder)], check=True, stdout=subprocess.PIPE, text=True)
    return list(yaml.safe_load_all(built.stdout))


def validate(resource: dict[str, Any]) -> None:
    """Raise for a field that the schema of the resource's kind does not have, or a value of another type."""
    if resource["kind"] == "JobSet":
        # Its models leave out what they do not know: then something is missing from what comes back.
        known = JobsetV1alpha2JobSet.from_dict(resource)
        assert known is not None
        _contained(resource, known.to_dict(), "JobSet")
        for part in resource["spec"]["replicatedJobs"]:
            validate({"apiVersion": "batch/v1", "kind": "Job", "spec": part["template"]["spec"]})
        return
    for version in VERSIONS:
        kubernetes_validate.validate(resource, version, strict=True)


def _contained(ours: Any, theirs: Any, path: str) -> None:
    if isinstance(ours, dict):
        for key, value in ours.items():
            assert isinstance(theirs, dict) and key in theirs, f"{path}: unknown field {key}"
            _contained(value, theirs[key], f"{path}.{key}")
    elif isinstance(ours, list):
        for at, value in enumerate(ours):
            _contained(value, theirs[at], f"{path}[{at}]")
    else:
        assert ours == theirs, f"{path}: {ours!r} became {theirs!r}"


def exit_codes(spec: dict[str, Any]) -> dict[int, str]:
    """What a Job does about each exit code that it has a rule for."""
    rules = [rule for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    return {code: rule["action"] for rule in rules for code in rule["onExitCodes"]["values"]}


def check_pods(name: str, resources: list[Any]) -> None:
    """The parts of a job name each other, and nothing that values.yaml sets was left out."""
    job = next(resource for resource in resources if resource["kind"] in ("Job", "JobSet"))
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"] if name == "jobset" else job["spec"]
    template = spec["template"]
    pod, (container,) = template["spec"], template["spec"]["containers"]
    assert "unset" not in yaml.safe_dump(resources), "a value of values.yaml has no place any more"
    assert pod["restartPolicy"] == "Never" and spec["podReplacementPolicy"] == "Failed", "podFailurePolicy needs both"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    rules = exit_codes(spec)
    assert rules.get(2) == "FailJob", rules
    if name == "probe":
        return
    assert rules == {EXIT_PREEMPTED: "Ignore", 2: "FailJob"}, rules
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert int(variables["NODES"]) == spec["completions"] == spec["parallelism"] > 0
    assert int(variables["GPUS"]) == container["resources"]["limits"]["nvidia.com/gpu"] > 0
    assert spec["completionMode"] == "Indexed" and variables["SERVICE"] == pod["subdomain"]
    if name == "jobset":
        assert spec["backoffLimit"] == 0 < job["spec"]["failurePolicy"]["maxRestarts"]
        assert variables["SERVICE"] == job["spec"]["network"]["subdomain"]
        return
    service = next(resource for resource in resources if resource["kind"] == "Service")
    assert variables["SERVICE"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert spec["backoffLimit"] > 0
    if name == "kueue":
        assert spec["suspend"] is True and job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]


def check_misspellings(resource: dict[str, Any]) -> int:
    """Each field of ``resource``, misspelt, is refused; returns how many there are."""
    fields = list(_fields(resource))
    for holder, field in fields:
        before = dict(holder)
        holder[f"{field}s"] = holder.pop(field)
        try:
            validate(resource)
        except (kubernetes_validate.ValidationError, AssertionError, ValueError, KeyError):
            continue
        finally:
            holder.clear()
            holder.update(before)
        raise AssertionError(f"{resource['kind']}: {field}s for {field} was not noticed")
    return len(fields)


def _fields(node: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Every mapping and field in it, but those of mappings whose keys are a user's."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield node, key
            if key not in ("labels", "annotations", "matchLabels", "selector", "limits", "requests"):
                yield from _fields(value)
    elif isinstance(node, list):
        for value in node:
            yield from _fields(value)


def check_arguments(verb: str, resources: list[Any]) -> None:
    """ca2cl itself takes the container's arguments."""
    job = next(resource for resource in resources if resource["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    with redirect_stdout(StringIO()):
        code = ca2cl([verb, *container["args"], "--print_config"])
    assert code == 0, f"ca2cl {verb} {container['args']} --print_config: exit code {code}"


def main() -> int:
    for name, kinds in KINDS.items():
        resources = build(FOLDER / name)
        assert [resource["kind"] for resource in resources] == kinds, name
        for resource in resources:
            validate(resource)
        if name != "storage":
            check_pods(name, resources)
        if name in ("job", "probe"):
            check_arguments("pretrain" if name == "job" else name, resources)
        misspelt = sum(check_misspellings(resource) for resource in resources)
        sys.stdout.write(f"{name:8} {', '.join(kinds)}: valid; misspelt, each of {misspelt} fields is refused\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
