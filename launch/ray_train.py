"""Trains on the GPUs of all nodes of a Ray cluster, one process a node.

ray job submit --working-dir . --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}}' \
    -- python launch/ray_train.py

It assumes that all nodes see /shared, with the prepared data, and have the project's dependencies (`pip install
".[cuda12]"`) and Ray. `ray job stop ID` lets all nodes save a checkpoint and end; without that variable it would give
them three seconds. The same command goes on with the run, from the last checkpoint if a node has died.
TPU slices have recipes of their own, since the order of their hosts cannot be chosen.
"""

import signal
import subprocess
import sys

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

TRAIN = ["configs/gpt2_124m.py", "--data.dir", "/shared/data/web", "--out-dir", "/shared/runs/gpt2"]  # EDIT
TRAIN += ["--parallel.fsdp", "8", "--auto-resume"]  # EDIT


@ray.remote(max_concurrency=2)  # So that stop() runs while train() waits.
class Host:
    def address(self) -> str:
        return ray.util.get_node_ip_address()

    def train(self, args: list[str]) -> int:
        self.process = subprocess.Popen([sys.executable, "train.py", *args])
        return self.process.wait()

    def stop(self) -> None:
        self.process.terminate()


def start_host(node: dict) -> "ray.actor.ActorHandle":
    """A host with all GPUs of its node. Ray hides GPUs that are not asked for."""
    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return Host.options(num_gpus=node["Resources"].get("GPU", 0), scheduling_strategy=strategy).remote()


def main() -> int:
    ray.init()
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [node for node in alive if node["Resources"].get("GPU")] or alive  # The head node may have none.
    hosts = [start_host(node) for node in nodes]
    signal.signal(signal.SIGTERM, lambda *_: [host.stop.remote() for host in hosts])
    args = [*TRAIN, "--coordinator", f"{ray.get(hosts[0].address.remote())}:8476", "--n-hosts", str(len(hosts))]
    statuses = ray.get([host.train.remote([*args, "--host-id", str(i)]) for i, host in enumerate(hosts)])
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
