"""Serves a run on the GPUs of a Ray cluster: replicas of `gpt-jax serve` behind Ray's proxy, more where more is asked.

serve start --http-host 0.0.0.0            once, on a node of the cluster; without it, only that node can ask
serve run --working-dir . launch.ray_serve:app

It assumes that all nodes see /shared, with the run and the file of keys, and have the project's dependencies (`pip
install ".[cuda12,ray-serve]"`); Ray sends them this folder. Ctrl-C ends it; with --non-blocking, `serve shutdown` does.
`serve build` makes of it the file that `serve deploy` and KubeRay's RayService take; there, add to `runtime_env` the
address of a zip file with this folder, as `working_dir`.
Clients ask http://NODE:8000/v1, on any node that has a replica. /metrics tells of the replica that happens to answer. A
replica that is to end gets no new requests, and has the time of --grace for those that run; then they are cut.
"""

import asyncio

from ray import serve

from gpt_jax.cli.parse import parse
from gpt_jax.cli.serve import ServeArgs, service

FLAGS = ["--run", "/shared/runs/gpt2", "--slots", "16", "--grace", "30"]  # EDIT
# Ray's proxy listens, and not the replicas. For them, this means that clients may call them by any name, with a key.
FLAGS += ["--host", "0.0.0.0", "--api-key-file", "/shared/keys"]
FLAGS += ["--queue", "16"]  # Small, since what waits in one replica cannot go to another one.
GPUS = 1  # EDIT: of each replica; for 2, add --parallel.tensor 2.
MOST_REPLICAS = 4  # EDIT
MOST_WAITING = 256  # Requests that wait for a replica, at each proxy; more are refused, by Ray, with status 503.

args = parse(ServeArgs, FLAGS, "serve")


@serve.deployment(
    ray_actor_options={"num_gpus": GPUS},
    # Another replica where, on average, all slots are busy.
    autoscaling_config={"min_replicas": 1, "max_replicas": MOST_REPLICAS, "target_ongoing_requests": args.slots},
    max_ongoing_requests=args.slots + args.queue,  # Beyond that, the replica would refuse what another may answer.
    max_queued_requests=MOST_WAITING,
    graceful_shutdown_timeout_s=args.grace,
)
@serve.ingress()
class Server:
    async def __init__(self, args: ServeArgs) -> None:
        """Loads and compiles; Ray sends no request before that is done."""
        self.service = service(args)
        changed = asyncio.Event()
        self.service.worker.start(changed.set)
        await changed.wait()
        self.check_health()

    def __serve_build_asgi_app__(self) -> object:
        return self.service.application()

    def check_health(self) -> None:
        """Raises once the engine's thread has failed: Ray then starts another replica."""
        if self.service.worker.failure:
            raise RuntimeError("the engine's thread has failed") from self.service.worker.failure


app = Server.bind(args)
