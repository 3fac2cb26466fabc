"""A trained model from its run's folder, which is all that sampling needs."""

import dataclasses
from pathlib import Path

import jax

from gpt_jax.checkpoint import Checkpoints
from gpt_jax.config import load_saved_config
from gpt_jax.data.tokenizer import Tokenizer, load_tokenizer
from gpt_jax.errors import UserError
from gpt_jax.model.backend import resolve
from gpt_jax.model.gpt import GPT, Params, init_params
from gpt_jax.runtime import local_devices, platform_name


def newest_run(folder: Path = Path("runs")) -> Path:
    """The run below `folder` that was written to last. Raises UserError when there is none."""
    runs = [path.parent for path in folder.glob("*/metrics.jsonl")]
    if not runs:
        raise UserError(f"there is no run in {folder.absolute()}; train one with train.py, or name one with --run")
    return max(runs, key=lambda run: (run / "metrics.jsonl").stat().st_mtime)


def load_run(run: Path, checkpoint: str = "latest") -> tuple[GPT, Params, Tokenizer]:
    """The model, its parameters on this machine's first device, and the tokenizer.

    checkpoint: "latest", "best" (the lowest validation loss) or a step. Raises UserError when the folder is no run,
    has no such checkpoint, or its parts do not belong together.
    """
    config = load_saved_config(run / "config.json")
    tokenizer = load_tokenizer(run)
    device = local_devices()[0]
    # Whatever it was trained with: decoding reads from a cache, and has a way of its own to attend to it.
    model = GPT(resolve(dataclasses.replace(config.model, attention="auto"), platform_name(device)))
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        step = choose_step(checkpoints, checkpoint)
        if checkpoints.meta(step)["tokenizer"] != tokenizer.fingerprint:
            raise UserError(f"the tokenizer in {run} is not the one that checkpoint {step} was trained with")
        sharding = jax.sharding.SingleDeviceSharding(device)
        shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
        return model, checkpoints.restore(step, "params", target), tokenizer


def choose_step(checkpoints: Checkpoints, name: str) -> int:
    """The step that "latest", "best" or a number stands for. Raises UserError when there is no such checkpoint."""
    steps = checkpoints.steps()
    if not steps:
        raise UserError(f"{checkpoints.folder} has no checkpoint yet; train for longer")
    if name == "latest":
        return steps[-1]
    if name == "best":
        best = checkpoints.best_step()
        return steps[-1] if best is None else best
    if not name.isdecimal() or int(name) not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"there is no checkpoint {name} in {checkpoints.folder}; there are latest, best, {there}")
    return int(name)
