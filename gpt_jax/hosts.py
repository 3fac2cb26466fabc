"""Several hosts on JAX's distributed runtime: joining them, agreeing, and running code on the first one only.

Every host runs the same program. On a single host, which did not `join`, nothing here waits or communicates.
"""

import hashlib
import os
import re
import sys
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax._src import distributed  # What `jax.distributed` does not offer: to begin sharing preemptions later.
from jax.experimental import multihost_utils

from gpt_jax.errors import UserError

HEARTBEAT_SECONDS = 30
"""The other hosts end after this time without a heartbeat from a host, or as soon as a collective notices it."""

LONGEST_MESSAGE = 2000  # Bytes of an error message that the other hosts receive.


def join(coordinator: str, n_hosts: int, host_id: int, timeout: int) -> None:
    """Joins the hosts of a run. Call it before any device is used.

    coordinator: HOST:PORT of the first host, or "auto" on TPU pods, Slurm, Kubernetes and Open MPI, which name the
    hosts. timeout: seconds to wait for all hosts; after that, the process ends with an error.
    """
    address = None if coordinator == "auto" else coordinator

    def give_up() -> None:  # JAX's own timeout aborts the process, with a stack trace.
        who = f"host {host_id} of {n_hosts}" if address else "this host"
        print(
            f"error: after {timeout} s, {who} has not met the others at {coordinator}; is the address that of host 0, "
            "may its port be reached, and did every host start?",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    jax.config.update("jax_enable_preemption_service", False)  # Until `share_preemptions`.
    try:
        jax.distributed.initialize(
            address,
            n_hosts if address else None,
            host_id if address else None,
            cluster_detection_method="deactivate" if address else None,  # Detecting Slurm leaves a host one GPU.
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            local_device_ids=None if address else gpus_of_slurm(),
        )
    except (ValueError, RuntimeError) as e:
        first_line = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"the hosts could not be joined by --coordinator {coordinator}: {first_line}") from e
    finally:
        timer.cancel()


def share_preemptions() -> None:
    """Gives SIGTERM to the distributed runtime, which passes it on to all hosts at a step that it finds for them.

    It would take SIGTERM as soon as the hosts are joined, and nothing would come of it until the first step is done.
    """
    if distributed.global_state.preemption_sync_manager is None:
        jax.config.update("jax_enable_preemption_service", True)
        distributed.global_state.initialize_preemption_sync_manager()


def gpus_of_slurm() -> list[int] | None:
    """All GPUs of the node, under Slurm with one process per node, where JAX would take only the first; else None."""
    one_a_node = re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    n = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if not one_a_node or not n.isdecimal() or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    return list(range(int(n)))


def several() -> bool:
    """True when more hosts than this one have joined. Without `join`, this does not start the devices."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """True on the host that writes and prints for all hosts."""
    return not several() or jax.process_index() == 0


def lost(e: BaseException | None) -> bool:
    """True when an exception says that another host is gone, so that collectives can no longer succeed."""
    names = ("Gloo", "NCCL", "coordination service", "distributed service")
    return isinstance(e, (RuntimeError, ValueError)) and any(name in str(e) for name in names)


def on_first(do: Callable[[], object]) -> None:
    """Calls `do` on the first host, while the others wait. If it raises, the others raise UserError."""
    failure: Exception | None = None
    if is_first():
        try:
            do()
        except Exception as e:
            failure = e
    if several():
        message = broadcast("" if failure is None else str(failure) or type(failure).__name__)
        if message and not is_first():
            raise UserError(message)
    if failure is not None:
        raise failure


def any_of(flag: bool) -> bool:
    """True when the flag is set on any host."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag)))) if several() else flag


def broadcast(message: str) -> str:
    """The first host's message, on all hosts."""
    buffer = np.zeros(LONGEST_MESSAGE, np.uint8)
    encoded = message.encode(errors="backslashreplace")[:LONGEST_MESSAGE]
    buffer[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(buffer)).rstrip(b"\0").decode(errors="replace")


def check_alike(**facts: str) -> None:
    """Raises UserError on all hosts, naming the first fact that differs between them."""
    if not several():
        return
    digests = np.stack([np.frombuffer(hashlib.sha256(fact.encode()).digest(), np.uint8) for fact in facts.values()])
    gathered = np.asarray(multihost_utils.process_allgather(digests))
    for i, name in enumerate(facts):
        different = [host for host, digest in enumerate(gathered) if not np.array_equal(digest[i], gathered[0][i])]
        if different:
            raise UserError(
                f"host {different[0]} has another {name} than host 0; all hosts must see the same data and run the "
                "same command"
            )
