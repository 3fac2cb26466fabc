"""Several hosts, as processes that talk by gloo: they train as one does, stop together, and none waits for the dead."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from gpt_jax import hosts
from tests.cases import cases
from tests.commands import TINY, records, refused, refused_here, run, run_here, start

pytestmark = pytest.mark.usefixtures("quick_commands")

ARGS = [
    *TINY,
    "--model.no-bias",  # The gradient of a key's bias is rounding alone, which Adam would blow up.
    "--model.vocab-multiple=8",
    "--optimizer.eps=1e-4",
    "--optimizer.schedule=constant",
]
MESH_2 = ["--parallel.devices=2", "--parallel.fsdp=2", "--parallel.tensor=2"]  # Two hosts of two devices.
CONTEXT_2 = ["--parallel.devices=2", "--parallel.context=4"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def start_hosts(n: int, *args: object, first: str = "") -> list[subprocess.Popen[str]]:
    """Starts `gpt-jax train ARGS` on n hosts, on each after the statement `first`."""
    args = ("train", *ARGS, *args, f"--coordinator=localhost:{free_port()}", f"--n-hosts={n}")
    return [start(*args, f"--host-id={i}", first=first) for i in range(n)]


def finish(processes: list[subprocess.Popen[str]], status: int = 0) -> list[str]:
    """Waits for all of them, expects that exit status of each, and returns what each wrote to standard error."""
    outputs = [process.communicate(timeout=300) for process in processes]
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
    return [err for _, err in outputs]


def losses(run: Path) -> np.ndarray:
    """Loss, gradient norm and validation loss of every step."""
    return np.array([[r["loss"], r["grad_norm"], r.get("val_loss", 0)] for r in records(run)])


def wait_for_steps(run: Path, n: int) -> None:
    for _ in range(1200):
        if len(records(run)) >= n:
            return
        time.sleep(0.1)
    raise AssertionError(f"{run} has not come to step {n}")


@pytest.fixture(scope="module")
def mixture(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A text, and conversations that lie side by side in windows, with weights that change."""
    folder = tmp_path_factory.mktemp("chat")
    rows = [{"prompt": "why?" * (1 + i % 3), "completion": "ab" * (1 + i % 7)} for i in range(60)]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_here("prepare", folder / "chat.jsonl", "--out", folder / "chat", "--tokenizer", "bytes")
    return ["--data.mixture", f"{tiny_data}=2", f"{folder / 'chat'}=1", "--data.curriculum", "4:1,2"]


@pytest.fixture(scope="module")
def alone(mixture: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps on one device of one host."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run("train", *ARGS, *mixture, f"--out-dir={out}", "--train.steps=6", "--parallel.devices=1")
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placement", "n_hosts"),
    cases([(["--parallel.devices=2"], 1), (CONTEXT_2, 1), (MESH_2, 4)], standing=[(CONTEXT_2, 1)]),
    ids=["pmap to one", "context to one", "mesh to four"],
)
def test_a_run_moves_from_two_hosts_to_one_or_four(
    alone: Path, mixture: list[str], tmp_path: Path, placement: list[str], n_hosts: int
) -> None:
    """Its losses, on a mixture, are those of one host throughout. Hosts with parts of the same parameters write samples
    together."""
    out = tmp_path / "run"
    args = [*mixture, f"--out-dir={out}"]
    finish(start_hosts(2, *args, "--train.steps=4", "--train.sample-every=2", *placement))
    np.testing.assert_allclose(losses(out)[:3], losses(alone)[:3], rtol=1e-5)  # The fourth has an evaluation.
    args += ["--resume", "--train.steps=6", "--parallel.devices=1"]
    if n_hosts == 1:
        without_mesh = ["--parallel.fsdp=0", "--parallel.context=0", "--parallel.tensor=0"]
        run_here("train", *ARGS, *args, *without_mesh)
    else:
        fsdp = [f"--parallel.fsdp={n_hosts}", "--parallel.context=1", "--parallel.tensor=1"]
        finish(start_hosts(n_hosts, *args, *fsdp))
    np.testing.assert_allclose(losses(out)[4:], losses(alone)[4:], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "signum"), cases([(0, signal.SIGINT), (1, signal.SIGTERM)], [(0, signal.SIGINT)]))
def test_a_signal_to_one_host_saves_and_ends_all(tiny_data: Path, tmp_path: Path, asked: int, signum: int) -> None:
    out = tmp_path / "run"
    processes = start_hosts(2, f"--data.dir={tiny_data}", f"--out-dir={out}", "--train.steps=1000000")
    wait_for_steps(out, 3)
    processes[asked].send_signal(signum)
    finish(processes, status=128 + signal.SIGTERM)
    step = records(out)[-1]["step"]
    assert [int(p.name) for p in (out / "checkpoints").iterdir()] == [step]
    run_here("train", "--resume", *ARGS, f"--data.dir={tiny_data}", f"--out-dir={out}", f"--train.steps={step + 1}")
    assert records(out)[-1]["step"] == step + 1


@pytest.mark.slow
@pytest.mark.parametrize("killed", cases([0, 1], [1]))
def test_a_host_that_dies_ends_the_others(tiny_data: Path, tmp_path: Path, killed: int) -> None:
    """Soon, with a message that says so, and what was saved is whole. A missing heartbeat counts sooner than in use."""
    out, heartbeat = tmp_path / "run", hosts.HEARTBEAT_SECONDS // 3
    shorter = f"from gpt_jax import hosts; hosts.HEARTBEAT_SECONDS = {heartbeat}"
    args = [f"--data.dir={tiny_data}", f"--out-dir={out}", "--train.steps=1000000", "--train.checkpoint-every=2"]
    processes = start_hosts(2, *args, "--train.eval-every=0", first=shorter)
    wait_for_steps(out, 5)
    processes[killed].kill()
    begin = time.monotonic()
    _, err = processes[1 - killed].communicate(timeout=2 * hosts.HEARTBEAT_SECONDS)
    assert time.monotonic() - begin < heartbeat + 10
    assert processes[1 - killed].returncode not in (0, None)
    assert "another host has gone" in err or "another task died" in err
    assert "Traceback" not in err
    processes[killed].communicate()
    last = records(out)[-1]["step"]
    run_here("train", "--resume", *ARGS, f"--data.dir={tiny_data}", f"--out-dir={out}", f"--train.steps={last + 1}")


@pytest.mark.slow
def test_what_one_host_cannot_read_is_passed_over_by_all(tiny_data: Path, tmp_path: Path) -> None:
    """Also by the one that can read its own part."""
    args = [f"--data.dir={tiny_data}", f"--out-dir={tmp_path / 'run'}", "--train.checkpoint-every=2", *MESH_2]
    finish(start_hosts(2, *args, "--train.steps=4"))
    folder = tmp_path / "run" / "checkpoints" / "4" / "params"
    parts = [path for path in (folder / "ocdbt.process_1").rglob("*") if path.is_file()]
    assert parts, sorted(folder.iterdir())
    for path in parts:
        path.write_bytes(b"")
    errors = finish(start_hosts(2, "--resume", *args, "--train.steps=6"))
    assert "params cannot be read (another host failed)" in errors[0]
    assert "params cannot be read" in errors[1]
    assert all("Traceback" not in err for err in errors)
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_host_with_other_data_is_refused_by_all(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("another text " * 400)
    run_here("prepare", tmp_path / "other.txt", "--out", tmp_path / "other", "--tokenizer", "bytes")
    coordinator = f"--coordinator=localhost:{free_port()}"
    processes = [
        start(
            "train",
            *ARGS,
            f"--data.dir={data}",
            f"--out-dir={tmp_path / 'run'}",
            coordinator,
            "--n-hosts=2",
            f"--host-id={i}",
        )
        for i, data in enumerate([tiny_data, tmp_path / "other"])
    ]
    for err in finish(processes, status=1):
        told = [line for line in err.splitlines() if line.startswith("error: ")]
        assert told == [
            "error: host 1 has another data than host 0; all hosts must see the same data and run the same command"
        ]
        assert "Traceback" not in err


def test_hosts_of_which_one_alone_resumes_are_refused(alone: Path, tiny_data: Path) -> None:
    args = ["train", *ARGS, f"--data.dir={tiny_data}", f"--out-dir={alone}", f"--coordinator=localhost:{free_port()}"]
    processes = [
        start(*args, "--n-hosts=2", "--host-id=0", "--resume"),
        start(*args, "--n-hosts=2", "--host-id=1"),
    ]
    for err in finish(processes, status=1):
        assert "host 1 has another --resume than host 0" in err
        assert "Traceback" not in err


def test_a_run_that_is_there_is_refused_by_all(alone: Path, tiny_data: Path) -> None:
    for err in finish(start_hosts(2, f"--data.dir={tiny_data}", f"--out-dir={alone}"), status=1):
        assert "holds a run already; go on with it by --resume" in err
        assert "Traceback" not in err


@pytest.mark.parametrize("host", cases([0, 1], [0]))
def test_hosts_that_do_not_meet_give_up_in_time(tiny_data: Path, tmp_path: Path, host: int) -> None:
    begin = time.monotonic()
    error = refused(
        "train",
        *ARGS,
        f"--data.dir={tiny_data}",
        f"--out-dir={tmp_path / 'run'}",
        f"--coordinator=localhost:{free_port()}",
        "--n-hosts=2",
        f"--host-id={host}",
        "--join-timeout=3",
    )
    assert f"after 3 s, host {host} of 2 has not met the others at localhost:" in error
    assert time.monotonic() - begin < 60
    assert not (tmp_path / "run").exists()


def test_a_signal_while_it_waits_for_others_ends_a_host(tiny_data: Path, tmp_path: Path) -> None:
    port, args = free_port(), [f"--data.dir={tiny_data}", f"--out-dir={tmp_path / 'run'}", "--n-hosts=2", "--host-id=0"]
    process = start("train", *ARGS, *args, f"--coordinator=localhost:{port}")
    for _ in range(600):
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("localhost", port)):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (128 + signal.SIGTERM, "\ninterrupted\n")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4"}, [0, 1, 2, 3]),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_GPUS_ON_NODE": "4"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, None),
        ({}, None),
    ],
)
def test_one_process_a_node_takes_all_its_gpus(
    environment: dict[str, str], expected: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_GPUS_ON_NODE", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts.gpus_of_slurm() == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--coordinator=here"], "coordinator = 'here' is not possible: it must be auto, or HOST:PORT"),
        (["--coordinator=here:80"], "n_hosts = 0 is not possible: it must be the number of hosts"),
        (["--coordinator=here:80", "--n-hosts=2", "--host-id=2"], "host_id = 2 is not possible: it must be 0 to"),
        (["--n-hosts=2"], "n_hosts = 2 is not possible: it must be left out with no coordinator"),
        (["--coordinator=auto"], "the hosts could not be joined by --coordinator auto"),
    ],
)
def test_impossible_hosts(args: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "TPU_"))]:
        monkeypatch.delenv(name)
    joins = args == ["--coordinator=auto"]  # What it begins cannot be undone in a process.
    assert message in (refused if joins else refused_here)("train", *args)
