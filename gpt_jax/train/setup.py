"""Completes a `Config` with the architecture of the model to start from and a vocabulary size, and prepares its data.

`given` holds the full names of the fields that the user gave a value, such as "model.n_layer" or "data.vocab_size".
The value of a field does not show that it was given, since it may be the default. Given values must hold; the other
fields may follow from the model to start from, or from data that exist already.
"""

import dataclasses
from collections.abc import Set
from typing import Any, NamedTuple

from gpt_jax import hosts
from gpt_jax.config import Config, DataConfig, ModelConfig, check, with_vocabulary
from gpt_jax.data.folders import together
from gpt_jax.data.preferences import PairFolder
from gpt_jax.data.prepare import PrepareArgs, prepare, print_summary
from gpt_jax.data.shards import Dataset, missing, open_dataset
from gpt_jax.environments.environment import Problems, open_environment
from gpt_jax.errors import UserError
from gpt_jax.interop.load import named_tokenizer
from gpt_jax.run.folder import run_folder
from gpt_jax.run.load import KEPT_FIELDS, adopt, open_source, stands_for
from gpt_jax.storage.remote import location
from gpt_jax.tokenizer.tokenizer import Tokenizer
from gpt_jax.train.tasks import RewardSource, Source


class Setup(NamedTuple):
    """A complete configuration, and what to learn from."""

    config: Config
    data: Source


def set_up(config: Config, given: Set[str] = frozenset(), resume: bool = False) -> Setup:
    """The configuration, with the architecture of the model in `init_from` and a vocabulary size, and the data, which
    are prepared if they are missing. No device is used.

    Raises UserError when the model or the data are missing, or differ from what the user asked for.
    """
    check_warmup(config, given)
    tokenizer = None
    if config.init_from and resume:
        run = run_folder(config.out_dir)
        tokenizer = run.load_tokenizer()
        saved = run.load_config().init_from
        if stands_for(saved, config.init_from):
            config = dataclasses.replace(config, init_from=saved)
    elif config.init_from:
        config, tokenizer = start_from(config, given)
    if config.objective.name == "grpo":
        data: Source = open_environment_of(config, given, tokenizer, resume)
    elif config.objective.name == "dpo":
        check(not config.data.mixture, "data.mixture", config.data.mixture, "empty with dpo, which takes one folder")
        data = PairFolder(open_or_prepare(config.data, given, tokenizer, config.init_from, resume))
    elif config.data.mixture:
        data = together([open_folder(folder, tokenizer) for folder in config.data.folders], config.data)
    else:
        data = together([open_or_prepare(config.data, given, tokenizer, config.init_from, resume)], config.data)
    return Setup(with_vocabulary(config, data.tokenizer.vocab_size), data)


def check_warmup(config: Config, given: Set[str]) -> None:
    """Prints that the warmup is shortened, when it does not end before the run; raises UserError if it was given."""
    asked, steps = config.optimizer.warmup_steps, config.train.steps
    possible = config.optimizer.warmup_of(steps)
    if asked != possible:
        check(
            "optimizer.warmup_steps" not in given, "optimizer.warmup_steps", asked, f"less than train.steps = {steps}"
        )
        print(f"the warmup of {asked:,} steps is shortened to {possible:,}, since train.steps = {steps:,}")


def start_from(config: Config, given: Set[str] = frozenset()) -> tuple[Config, Tokenizer]:
    """The configuration with the architecture of the model in `init_from`, and that model's tokenizer.

    Raises UserError when the model is not supported, its files do not fit its configuration, or the user asked for
    another architecture.
    """
    for name in sorted(given):
        section, _, field = name.partition(".")
        if section == "model" and field.partition(".")[0] not in KEPT_FIELDS:
            raise UserError(f"{name} cannot be given with init_from: the model there decides it")
    source = open_source(config.init_from)
    is_default = config.model.context_length == ModelConfig().context_length
    model = adopt(source, config.model, asks_context=not is_default or "model.context_length" in given)
    own_context = source.config.context_length
    if model.context_length < own_context:
        print(f"the context of {own_context:,} tokens is shortened to model.context_length = {model.context_length:,}")
    tokenizer = source.tokenizer()
    source.check()
    return dataclasses.replace(config, model=model, init_from=source.pinned), tokenizer


def open_environment_of(config: Config, given: Set[str], tokenizer: Tokenizer | None, resume: bool) -> RewardSource:
    """The environment of a run with rewards. Of a prepared problem set, the folder is `data.dir`. Raises UserError when
    it cannot be opened."""
    grpo, folder = config.objective.grpo, ""
    assert tokenizer is not None  # There is a model to start from.
    metas = []
    if grpo.environment == "problems":
        data = open_or_prepare(config.data, given, tokenizer, config.init_from, resume)
        data.check_format("grpo")
        tokenizer, metas, folder = data.tokenizer, [data.meta], config.data.dir
    environment = open_environment(grpo.environment, grpo.options, folder)
    return RewardSource(grpo, Problems(environment, grpo.environment), tokenizer, metas, folder)


def open_or_prepare(
    config: DataConfig,
    given: Set[str] = frozenset(),
    tokenizer: Tokenizer | None = None,
    model: str = "",
    resume: bool = False,
) -> Dataset:
    """The data folder, prepared from `data.source` if it is missing; with `tokenizer`, that of `model`, if given.

    A folder that was named without a source, or that a run to resume was trained on, is not prepared: it is mistyped,
    or was moved, and what the configuration would put there is another text than the one that is meant.

    Raises UserError when the folder is missing and not prepared, and when it was prepared with other settings than the
    given ones, or with another tokenizer than `tokenizer`.
    """
    check(bool(config.dir), "data.dir", config.dir, "a folder made by gpt-jax prepare")
    folder = location(config.dir)

    def prepare_if_missing() -> None:
        if not config.source or folder.exists():
            return
        if "data.source" not in given and (resume or "data.dir" in given):
            whose = ", on which the run was trained" if resume and "data.dir" not in given else ""
            raise missing(folder, f"{whose}; name it by --data.dir, or the text to prepare by --data.source")
        args = PrepareArgs(
            source=config.source,
            out=folder,
            tokenizer=model if tokenizer else config.tokenizer,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            val_fraction=config.val_fraction,
        )
        print_summary(folder, prepare(args, tokenizer=tokenizer or named_tokenizer(config.tokenizer)))

    hosts.on_first(prepare_if_missing)
    data = open_folder(config.dir, tokenizer)
    for name in ("tokenizer", "model_type", "vocab_size", "val_fraction"):
        asked, prepared = getattr(config, name), data.meta.settings[name]
        if f"data.{name}" in given and asked != prepared:
            raise UserError(
                f"data.{name} = {asked}, but {folder} was prepared with {prepared}; another --data.dir is prepared anew"
            )
    return data


def open_folder(folder: str, tokenizer: Tokenizer | None) -> Dataset:
    """A data folder. Raises UserError when it is missing, and when it was prepared with another tokenizer than that of
    the model to start from."""
    data = open_dataset(location(folder))
    if tokenizer and tokenizer.fingerprint != data.tokenizer.fingerprint:
        raise UserError(
            f"{folder} was not prepared with the tokenizer of the model in init_from; prepare it with "
            "--tokenizer MODEL, or name another --data.dir and a --data.source"
        )
    return data


def changed_fields(config: Any, prefix: str = "") -> set[str]:
    """The full names of the fields that differ from their defaults, and so must have been given."""
    default, names = type(config)(), set()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            names |= changed_fields(value, f"{prefix}{field.name}.")
        elif value != getattr(default, field.name):
            names.add(f"{prefix}{field.name}")
    return names
