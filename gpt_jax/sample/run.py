"""A trained model from its run's folder, which is all that sampling needs."""

import dataclasses
from pathlib import Path

import jax

from gpt_jax.checkpoint import Checkpoints, tree_fingerprint
from gpt_jax.config import LoraConfig, check, load_saved_config
from gpt_jax.errors import UserError
from gpt_jax.model.backend import resolve
from gpt_jax.model.gpt import GPT, Params, init_params
from gpt_jax.model.lora import fold, join, split
from gpt_jax.runtime import local_devices, platform_name
from gpt_jax.tokenizer.load import load_tokenizer
from gpt_jax.tokenizer.tokenizer import Tokenizer


def newest_run(folder: Path = Path("runs")) -> Path:
    """The run below `folder` that was written to last. Raises UserError when there is none."""
    runs = [path.parent for path in folder.glob("*/metrics.jsonl")]
    if not runs:
        raise UserError(f"there is no run in {folder.absolute()}; train one with train.py, or name one with --run")
    return max(runs, key=lambda run: (run / "metrics.jsonl").stat().st_mtime)


def load_model(run: Path | None, checkpoint: str, name: str, context_length: int = 0) -> tuple[GPT, Params, Tokenizer]:
    """The model of a run; without one, the published model called `name`.

    context_length: in tokens; 0: the model's own. Raises UserError when it cannot be loaded, or has not learned so many
    positions.
    """
    if run is not None:
        model, params, tokenizer = load_run(run, checkpoint)
        if context_length:
            learned = model.config.positions == "learned" and context_length != model.config.context_length
            allowed = f"{model.config.context_length}: the run's positions are learned"
            check(not learned, "context_length", context_length, allowed)
            model = with_context(model, context_length)
        return model, params, tokenizer
    from gpt_jax.interop.load import load_pretrained  # Not needed by those who train their own.

    return load_pretrained(name, context_length)


def with_context(model: GPT, context_length: int) -> GPT:
    """The model, fit for texts of so many tokens. Raises UserError when it has not learned so many positions."""
    c = model.config
    check(context_length >= 1, "context_length", context_length, "1 or more")
    if c.positions == "learned":
        allowed = f"at most {c.context_length}, the positions that the model has"
        check(context_length <= c.context_length, "context_length", context_length, allowed)
        return model
    rope = dataclasses.replace(c.rope, original_context=c.rope.original_context or c.context_length)
    return GPT(dataclasses.replace(c, context_length=context_length, rope=rope))


def load_run(run: Path, checkpoint: str = "latest") -> tuple[GPT, Params, Tokenizer]:
    """The model, its parameters on this machine's first device, and the tokenizer.

    checkpoint: "latest", "best" (the lowest validation loss) or a step. Raises UserError when the folder is no run,
    has no such checkpoint, or its parts do not belong together.
    """
    config = load_saved_config(run / "config.json")
    lora = config.model.lora
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
        if lora.rank:
            shapes, _ = split(shapes)
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
        params = checkpoints.restore(step, "params", target)
        if lora.rank:
            base = load_base(config.init_from, model, device)
            if tree_fingerprint(base) != checkpoints.meta(step).get("base"):
                raise UserError(f"the adapters in {run} were trained on another model than {config.init_from} now is")
            params = jax.jit(lambda params: fold(params, lora))(join(params, base))
            model = GPT(dataclasses.replace(model.config, lora=LoraConfig()))
        return model, params, tokenizer


def load_base(name: str, model: GPT, device: jax.Device) -> Params:
    """The parameters that a run's adapters stand beside. Raises UserError when they are no longer where they were."""
    from gpt_jax.interop.load import load_params, on_device, open_named

    try:
        return load_params(open_named(name), model.config, on_device(device))
    except UserError as e:
        raise UserError(f"the run's adapters need the model that they were trained on: {e}") from e


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
