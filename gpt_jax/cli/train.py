"""`gpt-jax train`, and train.py."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from gpt_jax.cli.parse import Switch, default_config_path, flag_value, given_fields, parse
from gpt_jax.config import Config, check, load_config, load_saved_config
from gpt_jax.storage.remote import location
from gpt_jax.system import command_line


@dataclasses.dataclass(frozen=True)
class TrainArgs:
    """Train a GPT. The first argument may be a configuration file; configs/quickstart.py is the default."""

    resume: Switch = False  # Go on with the run in --out-dir, with its saved configuration and these flags.
    # Go on with the run in --out-dir if there is one, and start it if there is none: for jobs that may be restarted.
    auto_resume: Switch = False
    profile: Switch = False  # Write a JAX profiler trace of a few steps to the run's folder.
    # HOST:PORT of the first of several hosts, or auto on TPU pods, Slurm, Kubernetes, Open MPI; empty: one host only.
    coordinator: str = ""
    n_hosts: int = 0  # With HOST:PORT: number of hosts.
    host_id: int = 0  # With HOST:PORT: number of this host, from 0.
    join_timeout: int = 300  # Seconds to wait for the other hosts.
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)

    def __post_init__(self) -> None:
        check(self.join_timeout >= 1, "join_timeout", self.join_timeout, "1 second or more")
        if self.coordinator in ("", "auto"):
            given = "no coordinator" if not self.coordinator else "--coordinator auto"
            check(self.n_hosts == 0, "n_hosts", self.n_hosts, f"left out with {given}")
            return
        port = self.coordinator.rpartition(":")[2]
        check(port.isdecimal(), "coordinator", self.coordinator, "auto, or HOST:PORT such as 10.0.0.1:8476")
        check(self.n_hosts >= 1, "n_hosts", self.n_hosts, "the number of hosts")
        check(0 <= self.host_id < self.n_hosts, "host_id", self.host_id, f"0 to n_hosts - 1 = {self.n_hosts - 1}")


def command(argv: Sequence[str]) -> int:
    """Builds the configuration from file, saved run and flags; prepares the data if need be; trains."""
    config, args, given = train_arguments(list(argv))

    from gpt_jax import hosts, runtime
    from gpt_jax.run.folder import run_folder
    from gpt_jax.train.loop import Interrupted, train
    from gpt_jax.train.setup import set_up

    if args.coordinator:
        runtime.setup(config.parallel.devices or 1)
        hosts.join(args.coordinator, args.n_hosts, args.host_id, args.join_timeout)
        hosts.check_alike(**{"--resume": str(args.resume)})
        if not hosts.is_first():
            sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    folder = run_folder(config.out_dir)
    hosts.on_first(lambda: folder.check_usable(args.resume))  # Before data are prepared, which may take minutes.
    config, data = set_up(config, given, args.resume)
    if not args.coordinator:
        runtime.setup(runtime.choose_cpu_devices(config))
    try:
        train(config, data, resume=args.resume, profile=args.profile)
    except Interrupted as e:
        print(f"stopped, and saved; go on with: {command_line('train', '--resume', '--out-dir', config.out_dir)}")
        return 128 + e.signum
    return 0


def train_arguments(argv: list[str]) -> tuple[Config, TrainArgs, set[str]]:
    """The configuration with its out_dir, the other arguments, and the full names of the fields that flags set. A
    --data.dir that names the configuration's own folder is not among them: it asks for nothing else.

    The flags override the configuration of a file, which may be the first argument or follow a switch. With --resume,
    and with --auto-resume if there is a run, they override the configuration saved in the run.
    """
    switches = [a.replace("_", "-") for a in argv]
    positional = [
        i
        for i, a in enumerate(argv)
        if not a.startswith("-") and switches[i - 1 : i] in ([], ["--resume"], ["--auto-resume"], ["--profile"])
    ]
    path = Path(argv.pop(positional[0])) if positional else default_config_path()
    out_dir = flag_value(argv, "--out-dir") or load_config(path).out_dir or str(Path("runs") / path.stem)
    saved = location(out_dir) / "config.json"
    exists = saved.exists()  # Several hosts look before they meet, and the first writes the file after that.
    resumes = "--resume" in argv or ("--auto-resume" in switches and exists)
    config = load_saved_config(saved) if resumes and exists else load_config(path)
    config = dataclasses.replace(config, out_dir=out_dir)
    args = parse(TrainArgs, argv, "train", TrainArgs(config=config))
    given = given_fields(argv)
    if Path(args.config.data.dir).absolute() == Path(config.data.dir).absolute():
        given.discard("data.dir")
    return args.config, dataclasses.replace(args, resume=resumes), given
