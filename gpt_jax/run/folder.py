"""The layout of a run's folder, and the lock that keeps other processes from writing to it.

    config.json      the configuration, every field spelled out
    tokenizer.*      the tokenizer's files
    metrics.jsonl    one JSON object a logged step
    loss.png         the loss curve
    checkpoints/     STEP/{params,opt_state,meta}; checkpoints that cannot be read are moved to damaged/ beside it
    profile/         a profiler trace, with --profile
    tensorboard/     event files, with train.tensorboard
    wandb_id         the id of the run at Weights & Biases, with train.wandb_project
    .lock            keeps the folder to one process; the file stays and means nothing

`sample.py` needs the first two and a checkpoint. The checkpoints of a run at a remote address are written there;
its other files are written to a local copy, and uploaded before each checkpoint and at the end.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_jax import hosts
from gpt_jax.config import Config, config_to_dict, load_saved_config
from gpt_jax.errors import UserError
from gpt_jax.run.object_storage import check_reachable
from gpt_jax.run.records import read_records
from gpt_jax.storage.files import check_writable, is_utf8, locked, save_json
from gpt_jax.storage.folders import Mirror, check_remote_writable, named
from gpt_jax.storage.remote import AnyPath, is_remote, location
from gpt_jax.system import command_line
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, which may not exist yet."""

    path: Path  # Of the files, but not the checkpoints of a remote run.
    mirror: Mirror | None = None  # Of a remote run: what uploads the files.

    def __str__(self) -> str:
        return str(self.place)

    @property
    def place(self) -> AnyPath:
        """The folder that the user knows."""
        return self.mirror.folder if self.mirror else self.path

    @property
    def config_file(self) -> Path:
        """The configuration. A folder is a run if it has this file."""
        return self.path / "config.json"

    @property
    def metrics_file(self) -> Path:
        """The records of the logged steps."""
        return self.path / "metrics.jsonl"

    @property
    def loss_curve(self) -> Path:
        """The plot of the losses."""
        return self.path / "loss.png"

    @property
    def checkpoints(self) -> AnyPath:
        """The folder of the checkpoints."""
        return self.place / "checkpoints"

    @property
    def profile(self) -> Path:
        """The folder of a profiler trace."""
        return self.path / "profile"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def wandb_id(self) -> Path:
        """The file with the id of this run at Weights & Biases."""
        return self.path / "wandb_id"

    def load_config(self) -> Config:
        """The saved configuration. Raises UserError when the folder is not a run, or the file is damaged."""
        with self.named():
            return load_saved_config(self.config_file)

    def load_tokenizer(self) -> Tokenizer:
        """The saved tokenizer. Raises UserError when it is missing or damaged."""
        with self.named():
            return load_tokenizer(self.path)

    def named(self) -> AbstractContextManager[None]:
        """Lets errors name the folder that the user knows."""
        return named(self.mirror.folder, self.path) if self.mirror else nullcontext()

    def upload(self) -> None:
        """Uploads what has changed in a remote run. Raises UserError, also when another process writes there."""
        if self.mirror:
            self.mirror.upload(last=self.config_file.name)

    def records(self) -> list[dict[str, Any]]:
        """The records written so far."""
        return read_records(self.metrics_file)

    def check_usable(self, resume: bool) -> None:
        """Raises UserError when a new run would overwrite the one in the folder, or there is no run to resume, and when
        nothing could be written there, before that is noticed after hours."""
        exists = self.config_file.exists()
        if exists and not resume:
            raise UserError(f"{self} holds a run already; go on with it by --resume, or choose another --out-dir")
        if resume and not exists:
            raise UserError(f"{self} holds no run that could be resumed; leave out --resume to start one there")
        if self.mirror:
            check_remote_writable(self.mirror.folder)
            check_reachable(self.mirror.folder)
            return
        path = self.path.absolute()
        if not is_utf8(str(path)):
            raise UserError(f"{str(path)!r} is not UTF-8, which names of checkpoints must be; choose another --out-dir")
        try:
            check_writable(path)
        except OSError as e:
            raise UserError(f"the run's folder {self} cannot be written: {e.strerror}") from e

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder if need be, and keeps it to this process. With several hosts, the first one locks it.

        Raises UserError on all hosts when another process holds the lock. Nothing locks a remote run; see `upload`.
        """
        if self.mirror:
            yield
            return
        with ExitStack() as stack:
            message = f"another process is training in {self}"
            hosts.on_first(lambda: stack.enter_context(locked(self.path / ".lock", message)))
            yield

    def write(self, config: Config, tokenizer: Tokenizer) -> None:
        """Writes the tokenizer and the configuration, which `sample` needs besides a checkpoint. Their folders are
        saved in full, so that they hold from any working folder."""
        data = config.data.with_folders(lambda folder: folder if is_remote(folder) else str(Path(folder).absolute()))
        place = self.mirror.folder if self.mirror else self.path.absolute()
        config = dataclasses.replace(config, out_dir=str(place), data=data)
        try:
            tokenizer.save(self.path)
            save_json(self.config_file, config_to_dict(config))
        except OSError as e:
            raise UserError(f"the run's folder {self} cannot be written: {e.strerror}") from e
        self.upload()


def run_folder(name: str | AnyPath) -> RunFolder:
    """The folder of a run, whose name may be an address. Raises UserError when that cannot be reached."""
    place = location(name) if isinstance(name, str) else name
    if isinstance(place, Path):
        return RunFolder(place)
    mirror = Mirror(place)
    return RunFolder(mirror.local, mirror)


def newest_run(folder: Path = Path("runs")) -> RunFolder:
    """The run in `folder` whose metrics were written last. Raises UserError when there is none."""
    runs = [run for run in map(RunFolder, folder.glob("*")) if run.metrics_file.exists()]
    if not runs:
        raise UserError(
            f"there is no run in {folder.absolute()}; train one with {command_line('train')}, or name one with --run"
        )
    return max(runs, key=lambda run: run.metrics_file.stat().st_mtime)
