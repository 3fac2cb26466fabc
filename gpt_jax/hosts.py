"""Several hosts on JAX's distributed runtime: joining them, agreeing, and doing a thing on one of them only.

Every host runs the same program. On one host that did not `join`, nothing here waits or tells.
"""

import hashlib
import os
import re
import sys
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt_jax.errors import UserError

HEARTBEAT_SECONDS = 30
"""After this time without a sign of life from a host, the others end; at once, where a collective notices it."""

LONGEST_MESSAGE = 2000  # Bytes of an error that the other hosts receive.


def join(coordinator: str, n_hosts: int, host_id: int, timeout: int) -> None:
    """Joins the hosts of a run. Call it before any device is used.

    coordinator: HOST:PORT of the first host, or "auto" on TPU pods, Slurm, Kubernetes and Open MPI, which tell who is
    there. timeout: seconds until it is an error, which ends the process, that some are not.
    """
    address = None if coordinator == "auto" else coordinator

    def give_up() -> None:  # JAX's own end of waiting is the abort of the process, with a trace of its stack.
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
    try:
        jax.distributed.initialize(
            address,
            n_hosts if address else None,
            host_id if address else None,
            cluster_detection_method="deactivate" if address else None,  # Slurm's would leave each host one GPU.
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            local_device_ids=None if address else gpus_of_slurm(),
        )
    except (ValueError, RuntimeError) as e:
        first_line = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"the hosts could not be joined by --coordinator {coordinator}: {first_line}") from e
    finally:
        timer.cancel()


def gpus_of_slurm() -> list[int] | None:
    """All GPUs of the node, under Slurm with one process a node: JAX would take the first alone."""
    one_a_node = re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    n = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if not one_a_node or not n.isdecimal() or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    return list(range(int(n)))


def several() -> bool:
    """Whether more hosts than this one have joined. Without `join`, it does not start the devices to find out."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the host that writes what is written once, and prints what is printed once."""
    return not several() or jax.process_index() == 0


def lost(e: BaseException | None) -> bool:
    """Whether an exception says that another host has gone, so that nothing can be done together any more."""
    names = ("Gloo", "NCCL", "coordination service", "distributed service")
    return isinstance(e, (RuntimeError, ValueError)) and any(name in str(e) for name in names)


def on_first(do: Callable[[], object]) -> None:
    """Does something on the first host, while the others wait. Where it raises, the others do, too: UserError."""
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
    """Whether the flag is set on any host."""
    return bool(np.any(multihost_utils.process_allgather(np.array(flag)))) if several() else flag


def broadcast(message: str) -> str:
    """The first host's message, on all hosts."""
    buffer = np.zeros(LONGEST_MESSAGE, np.uint8)
    encoded = message.encode()[:LONGEST_MESSAGE]
    buffer[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(buffer)).rstrip(b"\0").decode(errors="replace")


def check_alike(**facts: str) -> None:
    """Raises UserError on all hosts, naming the first of the facts that is not the same on each of them."""
    if not several():
        return
    digests = np.stack([np.frombuffer(hashlib.sha256(fact.encode()).digest(), np.uint8) for fact in facts.values()])
    everywhere = np.asarray(multihost_utils.process_allgather(digests))
    for i, name in enumerate(facts):
        different = [host for host, those in enumerate(everywhere) if not np.array_equal(those[i], everywhere[0][i])]
        if different:
            raise UserError(
                f"host {different[0]} has another {name} than host 0; all hosts must see the same data and run the "
                "same command"
            )
