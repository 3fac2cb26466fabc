"""Checkpoints: parameters, optimizer state and a JSON of facts, each an item of its own, written by orbax.

Saving is asynchronous and atomic. A checkpoint is restored into abstract targets, so any number of devices can read it.
orbax notices missing and truncated files, but no changed byte inside an array. The checksums of all arrays, which are
saved with the facts, show that.
"""

import gc
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gpt_jax import hosts
from gpt_jax.data.shards import Meta
from gpt_jax.errors import UserError
from gpt_jax.interop.layout import ReadPart
from gpt_jax.run.checksums import leaf_shapes, named_checksums, named_checksums_of_parts
from gpt_jax.run.object_storage import COMMITTED, orbax_path
from gpt_jax.run.stored import StoredArrays
from gpt_jax.storage.folders import move
from gpt_jax.storage.remote import AnyPath, RemotePath

CHUNK_BYTES = 8 * 2**20
"""Size of the chunks in which arrays are written. A chunk is always read whole: if each array were one chunk, every
device that restores a shard of an array would have to read all of it."""

READ_AT_ONCE_GB = 1
"""Gigabytes of arrays that are read at the same time. The host holds them in addition to the restored arrays. The size
of the largest array is added to it, since that may be one chunk."""


class DamagedCheckpointError(UserError):
    """A checkpoint that cannot be read, or whose arrays are not those that were saved."""


def data_facts(*metas: Meta) -> dict[str, Any]:
    """The facts of a checkpoint that say which data it was trained on, and in which order they come: those of one
    folder, or of a mixture of several."""
    meta, *others = metas
    splits: dict[str, Any] = {
        name: {"tokens": s.tokens, "fingerprint": s.fingerprint} for name, s in meta.splits.items()
    }
    for number, other in enumerate(others, 2):
        splits |= {f"{name} ({number})": split for name, split in data_facts(other)["splits"].items()}
    fingerprints = [meta.source_fingerprint for meta in metas]
    return {"tokenizer": meta.tokenizer_fingerprint, "data": " ".join(fingerprints), "splits": splits}


def check_data(where: AnyPath, saved: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises UserError naming what differs between the data of a checkpoint and those of a data folder."""
    for name in ("tokenizer", "data"):
        if saved[name] != facts[name]:
            raise UserError(f"checkpoint {where} was trained with another {name} than that of the data folder")
    for name, split in saved.get("splits", {}).items():  # Older versions saved none.
        now = facts["splits"][name]
        other_count = split["tokens"] != now["tokens"]
        if other_count or (split["fingerprint"] and now["fingerprint"] not in ("", split["fingerprint"])):
            counts = f"{split['tokens']:,} tokens there and {now['tokens']:,} here" if other_count else "other tokens"
            raise UserError(
                f"checkpoint {where} was trained with another division of the text than that of the data folder: the "
                f"{name} split has {counts}; prepare the data as they were"
            )


def in_chunks(tree: Any) -> ocp.args.StandardSave:
    """The arguments with which orbax writes a tree of arrays in chunks. No chunk of a large stack of matrices spans
    layers, so that a layer can be read alone."""

    def chunks(x: jax.Array) -> ocp.SaveArgs:
        by_layers = x.ndim > 2 and x.nbytes > CHUNK_BYTES
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if by_layers else ())

    return ocp.args.StandardSave(tree, jax.tree.map(chunks, tree))


def not_of_orbax(record: logging.LogRecord) -> bool:
    """A filter of logs that leaves out what orbax logs, and what asyncio logs of its tasks and tensorstore's."""
    return not any(name in text for name in ("orbax", "tensorstore") for text in (record.pathname, record.getMessage()))


def ignore_abandoned(unraisable: Any) -> None:
    """An `unraisablehook` that ignores the errors of tasks that orbax abandoned."""
    of_orbax = "orbax" in getattr(getattr(unraisable.object, "cr_code", None), "co_filename", "")
    loop_is_gone = isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(unraisable.exc_value)
    if not (of_orbax or loop_is_gone):
        _quiet.hook(unraisable)


@dataclass
class _Quiet:
    """The users of orbax now, in all threads, and the hook that was there before the first of them."""

    lock: Any = field(default_factory=threading.Lock)
    users: int = 0
    hook: Callable[[Any], None] = sys.__unraisablehook__


_quiet = _Quiet()


@contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keeps from the terminal what orbax and its threads print beside the one exception that says what went wrong.

    orbax logs its progress as warnings, and each error, which it also raises, with a traceback for each thread. When
    one array cannot be read or written, it abandons the threads and coroutines of the others, whose tracebacks asyncio
    logs and Python's `unraisablehook` prints. All else is logged as before; the last of several users restores all.
    """
    loggers = (logging.getLogger("absl"), logging.getLogger("asyncio"))
    with _quiet.lock:
        _quiet.users += 1
        if _quiet.users == 1:
            _quiet.hook, sys.unraisablehook = sys.unraisablehook, ignore_abandoned
            for logger in loggers:
                logger.addFilter(not_of_orbax)
    try:
        yield
    finally:
        with _quiet.lock:
            _quiet.users -= 1
            if not _quiet.users:
                sys.unraisablehook = _quiet.hook
                for logger in loggers:
                    logger.removeFilter(not_of_orbax)


class Checkpoints:
    """The checkpoints of one run, in `folder`/STEP/{params,opt_state,meta}. A context manager: leaving it waits for the
    last save, and inside it, orbax is quiet. The `keep` latest checkpoints and the one with the lowest validation loss
    are kept."""

    def __init__(self, folder: AnyPath, keep: int = 2, read_only: bool = False) -> None:
        self.folder = folder
        self.quiet, self.failed = ExitStack(), False
        with quiet_orbax():
            if isinstance(folder, Path):
                self.manager = self.make_manager(keep, read_only)
            else:  # Its errors are those of requests.
                self.manager = folder.request("opened", lambda fs, name: self.make_manager(keep, read_only))

    def make_manager(self, keep: int, read_only: bool) -> ocp.CheckpointManager:
        """orbax's manager of the folder."""
        policies = ocp.checkpoint_managers
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["val_loss"],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            best_fn=lambda metrics: metrics["val_loss"],  # Without it, orbax does not write the metrics.
            best_mode="min",
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "opt_state": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        return ocp.CheckpointManager(orbax_path(self.folder), options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        self.quiet.enter_context(quiet_orbax())
        return self

    def __exit__(self, exception_type: type | None, exception: BaseException | None, *traceback: object) -> None:
        with self.quiet:
            if hosts.lost(exception):
                return  # Closing would wait for the lost host's part of a save.
            failure = self.attempt(self.manager.close)
            if self.failed:  # What orbax abandoned is reported when it ends or is collected: now, while it is quiet.
                gc.collect()
                time.sleep(0.2)
        failed_before = exception_type is not None and issubclass(exception_type, Exception)
        if failure and not failed_before:  # It must not replace the first error.
            raise failure

    def attempt(self, saving: Callable[[], object]) -> UserError | None:
        """Runs a part of saving. Returns the error for the user when it fails, else None."""
        try:
            saving()
        except Exception as e:
            if hosts.lost(e):
                raise
            self.failed = True
            return UserError(
                f"{self.folder}: the checkpoint could not be saved ({first_line(e)}); older ones are intact"
            )
        return None

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        return sorted(self.manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the lowest validation loss; None when no checkpoint was evaluated."""
        evaluated = [s for s in self.steps() if self.manager.metrics(s)]
        return min(evaluated, key=lambda s: self.manager.metrics(s)["val_loss"], default=None)

    def save(self, step: int, params: Any, opt_state: Any, meta: dict[str, Any], val_loss: float | None) -> None:
        """Starts a save, and returns once the arrays are copied. Raises UserError when this or the last save failed."""
        facts = {**meta, "checksums": {"params": named_checksums(params), "opt_state": named_checksums(opt_state)}}
        items = ocp.args.Composite(
            params=in_chunks(params), opt_state=in_chunks(opt_state), meta=ocp.args.JsonSave(facts)
        )
        metrics = None if val_loss is None else {"val_loss": val_loss}
        failure = self.attempt(lambda: self.manager.save(step, args=items, metrics=metrics, force=True))
        if failure:
            raise failure

    def set_aside(self, step: int) -> None:
        """Moves a checkpoint that could not be read to damaged/, beside the checkpoints, so that its step can be saved
        again. It is not deleted, since it may be whole: reading may have failed on a bad network file system."""
        aside = self.folder.parent / "damaged" / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
        move(self.folder / str(step), aside)

    def reload(self) -> None:
        """Reads the list of checkpoints again, after one was set aside."""
        self.manager.reload()

    def meta(self, step: int) -> dict[str, Any]:
        """The facts saved with a step. Raises DamagedCheckpointError."""
        facts = self.restore_item(step, "meta", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
        sums = facts.get("checksums") if isinstance(facts, dict) else None
        has_sums = isinstance(sums, dict) and all(isinstance(sums.get(item), dict) for item in ("params", "opt_state"))
        if not has_sums or not facts.keys() >= {"config", "tokenizer", "data"}:
            raise DamagedCheckpointError(f"checkpoint {self.folder / str(step)} is damaged: meta is not whole")
        return facts

    def restore(self, step: int, item: str, target: Any) -> Any:
        """The item "params" or "opt_state" of a step, with the shardings of the abstract `target`.

        Raises UserError naming the first leaf whose shape differs from the target's, and DamagedCheckpointError
        naming the item or leaf that is not as it was saved.
        """
        self.check_shapes(step, item, target)
        largest = max((math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(target)), default=0)
        handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=READ_AT_ONCE_GB + largest // 10**9)
        tree = self.restore_item(step, item, handler, ocp.args.StandardRestore(target))
        self.check_values(step, item, named_checksums(tree))
        return tree

    def open_parts(self, step: int, item: str, target: Any) -> ReadPart:
        """The item of a step, to be read part by part, without a device. All of it is read once now, to compare it with
        its checksums. target: the shapes of its leaves, which are float32. Raises as `restore` does, and so does the
        reader, which may outlive this object."""
        self.check_shapes(step, item, target)
        stored = StoredArrays(self.folder / str(step) / item)

        def read_part(leaf: str, i: int) -> np.ndarray:
            return self.read(step, item, lambda: stored(leaf, i))

        self.check_values(step, item, named_checksums_of_parts(read_part, leaf_shapes(target)))
        return read_part

    def check_shapes(self, step: int, item: str, target: Any) -> None:
        """Raises UserError naming the first leaf of an item that has another shape than in `target`."""
        saved, asked = leaf_shapes(self.restore_metadata(step, item)), leaf_shapes(target)
        for name in sorted(saved.keys() | asked.keys()):
            if saved.get(name) != asked.get(name):
                raise UserError(
                    f"checkpoint {self.folder / str(step)} does not fit the configuration: {item}/{name} has shape "
                    f"{saved.get(name, 'none')} in the checkpoint and {asked.get(name, 'none')} in the model"
                )

    def check_values(self, step: int, item: str, checksums: dict[str, int]) -> None:
        """Raises DamagedCheckpointError naming the first leaf of an item that has another checksum than was saved."""
        expected = self.meta(step)["checksums"][item]
        for name, actual in checksums.items():
            if actual != expected.get(name):
                where = f"checkpoint {self.folder / str(step)}"
                raise DamagedCheckpointError(f"{where} is damaged: {item}/{name} is not as it was saved")

    def restore_metadata(self, step: int, item: str) -> Any:
        """Shapes and dtypes of a saved item."""
        return self.read(step, item, lambda: self.manager.item_metadata(step)[item].tree)

    def restore_item(self, step: int, item: str, handler: Any, args: Any) -> Any:
        """One item, read by its orbax handler. Raises DamagedCheckpointError. With orbax's manager, a host that can
        read its part would wait for one that cannot."""
        folder = self.manager.directory / str(step) / item
        return self.read(step, item, lambda: handler.restore(folder, args=args))

    def read(self, step: int, item: str, reading: Callable[[], Any]) -> Any:
        """The result of `reading` an item. Raises DamagedCheckpointError on all hosts when one of them cannot read."""
        value, failure = None, None
        try:
            value = reading()
        except Exception as e:
            of_this_machine = MemoryError if isinstance(self.folder, RemotePath) else (MemoryError, PermissionError)
            if hosts.lost(e) or isinstance(e, of_this_machine):
                raise
            failure, self.failed = e, True
        if hosts.any_of(failure is not None):
            self.folder.exists()  # Raises UserError if it was the network that failed, or the permission.
            why = first_line(failure) if failure else "another host failed"
            raise DamagedCheckpointError(
                f"checkpoint {self.folder / str(step)} is damaged: {item} cannot be read ({why})"
            ) from failure
        return value


def latest_step(folder: AnyPath) -> int:
    """The last step that has a complete checkpoint in `folder`, found without orbax, which would start the devices.

    Raises UserError when there is none.
    """
    paths = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    steps = [int(path.name) for path in paths if isinstance(path, Path) or (path / COMMITTED).is_file()]
    if not steps:
        raise UserError(f"{folder} has no checkpoint yet; train for longer")
    return max(steps)


def choose_step(checkpoints: Checkpoints, name: str) -> int:
    """The step that "latest", "best" or a number stands for. Raises UserError when there is no such checkpoint."""
    latest, steps = latest_step(checkpoints.folder), checkpoints.steps()
    if name == "latest":
        return latest
    if name == "best":
        best = checkpoints.best_step()
        return latest if best is None else best
    if not name.isdecimal() or int(name) not in steps:
        known = ", ".join(map(str, steps))
        raise UserError(f"there is no checkpoint {name} in {checkpoints.folder}; there are latest, best, {known}")
    return int(name)


def first_line(e: BaseException) -> str:
    """The type and the start of the message of a library's exception, in one line."""
    lines = str(e).splitlines() or [""]
    text = lines[0] if len(lines[0]) <= 160 else lines[0][:160] + "..."
    return f"{type(e).__name__}: {text}" if text else type(e).__name__
