"""The state that training starts from: a first one, or that of a checkpoint that fits the run."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpt_jax import hosts
from gpt_jax.config import Config, config_from_dict
from gpt_jax.errors import UserError
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.placement import Placement
from gpt_jax.run.checkpoint import Checkpoints, DamagedCheckpointError, check_data
from gpt_jax.run.checksums import tree_fingerprint
from gpt_jax.run.load import open_source
from gpt_jax.storage.remote import AnyPath
from gpt_jax.train.step import TrainState, init_state


def first_state(
    model: GPT,
    optimizer: optax.GradientTransformation,
    seed: int,
    placement: Placement,
    pretrained: Params | None,
) -> TrainState:
    """The state before the first step: random parameters, pretrained ones, or these with random adapters."""
    if pretrained is None or model.config.lora.rank:
        state = placement.make(lambda: init_state(model, optimizer, seed))
        return state._replace(frozen=pretrained or {})
    opt_state = placement.make(optimizer.init, pretrained)
    return TrainState(placement.make(lambda: jnp.int32(0)), pretrained, opt_state, {})


def restore(
    checkpoints: Checkpoints,
    model: GPT,
    optimizer: optax.GradientTransformation,
    placement: Placement,
    meta: dict[str, Any],
    pretrained: Params | None,
) -> TrainState | None:
    """The state of the newest undamaged checkpoint, on this run's devices; None when there is no checkpoint yet.

    pretrained: the parameters that adapters are trained on, which are not in the checkpoint. meta: takes over what the
    checkpoint says of the model to start from, if that is not loaded.

    Damaged checkpoints are reported and skipped. Raises UserError when one does not fit the configuration or the
    tokenizer, or all are damaged.
    """
    target = placement.abstract(jax.eval_shape(lambda: init_state(model, optimizer, seed=0)))
    damaged = []
    for step in reversed(checkpoints.steps()):
        try:
            saved = checkpoints.meta(step)
            check_fits(checkpoints.folder / str(step), saved, meta, pretrained)
            params = placement.from_checkpoint(checkpoints.restore(step, "params", target.params))
            opt_state = placement.from_checkpoint(checkpoints.restore(step, "opt_state", target.opt_state))
        except DamagedCheckpointError as e:
            print(f"{e}; going back to the one before", file=sys.stderr)
            damaged.append(step)
            continue
        for later in damaged:
            hosts.on_first(functools.partial(checkpoints.set_aside, later))
            checkpoints.reload()
        print(f"resuming after step {step}")
        if pretrained is None and "base" in saved:
            meta["base"] = saved["base"]
        frozen = (pretrained or {}) if model.config.lora.rank else {}
        return TrainState(placement.make(jnp.int32, step), params, opt_state, frozen)
    if damaged:
        raise UserError(f"no checkpoint in {checkpoints.folder} is whole; train anew in another --out-dir")
    print("no checkpoint yet: starting from the first step")
    return None


def load_pretrained_params(config: Config, model: GPT, placement: Placement, resumes: bool) -> Params | None:
    """The parameters of the model in `config.init_from`, on this run's devices; None when there is no such model, or a
    checkpoint has all parameters."""
    if not config.init_from or (resumes and not model.config.lora.rank):
        return None
    return open_source(config.init_from).load_params(model.config, placement)


DECIDE_THE_DATA_ORDER = (
    *("data.batch_size", "data.packing", "data.mixture", "data.curriculum", "train.seed"),
    *("objective.name", "objective.grpo.iterations"),
)


def check_fits(where: AnyPath, saved: dict[str, Any], meta: dict[str, Any], pretrained: Params | None = None) -> None:
    """Raises UserError when the facts of a checkpoint and of this run differ in what must be equal, naming it. Prints
    the other differences. pretrained: the parameters that adapters are trained on."""
    check_data(where, saved, meta)
    # Earlier versions always saved the fingerprint of the values.
    if pretrained and saved.get("base") != meta.get("base") and saved.get("base") != tree_fingerprint(pretrained):
        raise UserError(f"the adapters in checkpoint {where} were trained on another model than init_from now is")
    configs = [config_from_dict(facts["config"], str(where)) for facts in (saved, meta)]
    deciding = [config.model.deciding() for config in configs]
    for (name, before), value in zip(deciding[0].items(), deciding[1].values(), strict=True):
        if before != value:
            raise UserError(
                f"checkpoint {where} does not fit the configuration: model.{name} is {before} there and {value} here"
            )
    then, now = configs
    if then.init_from != now.init_from:
        raise UserError(
            f"init_from is {then.init_from!r} in checkpoint {where} and {now.init_from!r} here; a run that goes on "
            "cannot begin with another model"
        )
    # Where the data lie does not matter; they were compared.
    then, now = (dataclasses.replace(config, data=config.data.with_folders(lambda _: "")) for config in configs)
    saved_values, values = (full_names(dataclasses.asdict(config)) for config in (then, now))
    for name, value in values.items():
        before = saved_values[name]
        if before == value or "." not in name:  # out_dir may be another, and init_from was compared.
            continue
        if name in DECIDE_THE_DATA_ORDER:
            raise UserError(f"{name} is {before} in checkpoint {where} and {value} here: another order of the data")
        print(f"changed since step {where.name}: {name} from {before} to {value}")


def full_names(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of nested sections by their full names, such as model.lora.rank."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        full = f"{prefix}{name}"
        found |= full_names(value, f"{full}.") if isinstance(value, dict) else {full: value}
    return found
