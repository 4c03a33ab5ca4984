"""What schedulers are given: job scripts that put themselves back, and a manifest of the operator's form."""

# ruff: noqa: N815 - Kubernetes' own names

import os
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from amclr_scale.config.load import load

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "cluster"
FAKES = {
    "srun": '#!/bin/bash\necho "srun $@" >> "$SAID"\n[ -z "$TOLD" ] || kill "$PPID"\nexit "$CODE"\n',
    "scontrol": '#!/bin/bash\necho "scontrol $@" >> "$SAID"\n[ "$1" = show ] && printf "node1\\nnode2\\n"; exit 0\n',
}


def ran(tmp_path, script, code, *words, restarts=0, told=""):
    """What a job script asks SLURM for, whose step ends with a code; and its own exit code."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    said = tmp_path / "said"
    said.unlink(missing_ok=True)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SAID": str(said), "CODE": str(code), "SLURM_JOB_ID": "12",
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_RESTART_COUNT": str(restarts), "TOLD": told,
    }  # fmt: skip
    done = subprocess.run(["bash", str(FOLDER / script), *words], env=environment, check=False, timeout=20)
    return said.read_text().splitlines(), done.returncode


@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False), (75, True), (1, True), (137, True)])
def test_job_scripts_put_back_what_can_go_on(tmp_path, code, again):
    words = ["--config", "configs/quickstart.yaml", "run.name=first"]
    said, ended = ran(tmp_path, "train.sbatch", code, *words)
    assert ended == code
    assert ("scontrol requeue 12" in said) == again
    said, ended = ran(tmp_path, "array.sbatch", code, "seed", *words)
    assert ended == code
    step = next(line for line in said if line.startswith("srun"))
    assert step.endswith("train --config configs/quickstart.yaml run.name=first-2 seed=2 resume=auto")
    assert ("scontrol requeue 10_2" in said) == again
    if again:
        assert not any("requeue" in line for line in ran(tmp_path, "array.sbatch", code, "seed", restarts=50)[0])


@pytest.mark.parametrize("script", ["train.sbatch", "array.sbatch"])
@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False), (75, True)])
def test_a_job_script_that_is_told_to_end_goes_by_its_step_s_code(tmp_path, code, again, script):
    """Also where the step ends in the moment in which the signal comes."""
    said, ended = ran(tmp_path, script, code, "seed", told="yes")
    assert ended == code
    assert any("requeue" in line for line in said) == again


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Container(Strict):
    name: Literal["pytorch"]
    image: str
    workingDir: str
    command: list[str]
    args: list[str]
    resources: dict[Literal["limits", "requests"], dict[str, int | str]]
    volumeMounts: list[dict[Literal["name", "mountPath"], str]]


class Pod(Strict):
    terminationGracePeriodSeconds: Annotated[int, Field(gt=0)]
    containers: Annotated[list[Container], Field(min_length=1, max_length=1)]
    volumes: list[dict[str, Any]]


class Replica(Strict):
    replicas: Annotated[int, Field(ge=1)]
    restartPolicy: Literal["Always", "OnFailure", "Never", "ExitCode"]
    template: dict[Literal["spec"], Pod]


class RunPolicy(Strict):
    cleanPodPolicy: Literal["Running", "All", "None"]
    backoffLimit: Annotated[int, Field(ge=0)]


class Spec(Strict):
    nprocPerNode: Annotated[str, Field(pattern=r"^([0-9]+|auto|gpu|cpu)$", strict=True)]
    runPolicy: RunPolicy
    pytorchReplicaSpecs: dict[Literal["Master", "Worker"], Replica]


class PyTorchJob(Strict):
    """The part of kubeflow.org/v1 that the manifest uses, as its CustomResourceDefinition has it."""

    apiVersion: Literal["kubeflow.org/v1"]
    kind: Literal["PyTorchJob"]
    metadata: dict[Literal["name"], str]
    spec: Spec


def test_the_manifest_has_the_operator_s_form_and_a_command_that_can_go_on():
    job = PyTorchJob.model_validate(yaml.safe_load((FOLDER / "pytorchjob.yaml").read_text()))
    assert job.spec.pytorchReplicaSpecs["Master"].replicas == 1  # more are refused
    for node in job.spec.pytorchReplicaSpecs.values():
        pod = node.template["spec"]
        container = pod.containers[0]
        names = [volume["name"] for volume in pod.volumes]
        assert [mount["name"] for mount in container.volumeMounts] == names
        assert int(container.resources["limits"]["nvidia.com/gpu"]) == int(job.spec.nprocPerNode)
        script, _, configuration, *words = container.args
        assert (ROOT / script).exists()
        config = load(configuration, words, 16)
        assert (config.resume, config.run.name) == ("auto", "first")
        assert config.run.folder in [mount["mountPath"] for mount in container.volumeMounts]
        assert container.command[:2] == ["amclr-scale", "supervise"]
