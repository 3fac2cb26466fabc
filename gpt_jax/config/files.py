"""Configuration files: the Python that a user writes, and the JSON saved with a run, also by older versions."""

import dataclasses
import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from gpt_jax.config.config import Config
from gpt_jax.errors import UserError
from gpt_jax.storage.remote import AnyPath, is_remote


def load_config(path: Path) -> Config:
    """The `config` that a Python file defines. Raises UserError when the file is missing, fails or lacks that name."""
    if not path.is_file():
        raise UserError(f"no configuration file {path}; those that come with the project are in configs/")
    spec = importlib.util.spec_from_file_location(f"gpt_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; a configuration is one that defines `config = Config(...)`")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    except (Exception, SystemExit) as e:
        raise UserError(f"{path} could not be run: {type(e).__name__}: {e}") from e
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise UserError(f"{path} does not define `config = Config(...)`")
    return config


RENAMED: tuple[dict[str, str], ...] = ({},)
"""Entry i has the fields renamed between format versions i and i + 1, from the full old name to the full new name, such
as {"train.steps": "train.n_steps"}: to rename one, append a table. Version 0 is the format that had no version."""

FORMAT_VERSION = len(RENAMED)


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as JSON types (tuples become lists), with the format version."""
    return {"format_version": FORMAT_VERSION, **json.loads(json.dumps(dataclasses.asdict(config)))}


def migrated(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values that `config_to_dict` of this or an older version wrote, under current names, without the version.

    Raises UserError naming `where` when a newer version wrote them.
    """
    sections = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    version: Any = sections.pop("format_version", 0)
    if version not in range(FORMAT_VERSION + 1):
        raise UserError(
            f"{where} is of format {version!r}, and this version reads {FORMAT_VERSION} at most; update gpt_jax"
        )
    for renamed in RENAMED[version:]:
        for old, new in renamed.items():
            (section, _, name), (new_section, _, new_name) = old.rpartition("."), new.rpartition(".")
            holder = sections.get(section) if section else sections
            if isinstance(holder, dict) and name in holder:
                target = sections.setdefault(new_section, {}) if new_section else sections
                target[new_name] = holder.pop(name)
    optimizer = sections.get("optimizer")
    if isinstance(optimizer, dict) and optimizer.get("clip_norm") == math.inf:
        optimizer["clip_norm"] = 0.0  # Also no clipping. Older versions took the number that JSON does not have.
    return sections


def config_from_dict(values: dict[str, Any], where: str) -> Config:
    """The inverse of `config_to_dict` of this or an older version.

    Missing fields take their defaults, so that a run saved by an older version can be read. Raises UserError naming
    `where` and the field that is unknown or of the wrong type.
    """

    def build(cls: type, values: Any, prefix: str) -> Any:
        if not isinstance(values, dict):
            raise UserError(f"{where}: {prefix or 'the configuration'} must be an object, not {values!r}")
        defaults = cls()
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise UserError(f"{where}: unknown field {prefix}{unknown[0]}; was it saved by a newer version?")
        built = {}
        for name, value in values.items():
            default = getattr(defaults, name)
            if dataclasses.is_dataclass(default):
                built[name] = build(type(default), value, f"{prefix}{name}.")
                continue
            if isinstance(default, tuple) and isinstance(value, list):
                value = tuple(value)
            if isinstance(default, float) and type(value) is int:
                value = float(value)
            if type(value) is not type(default):
                raise UserError(f"{where}: {prefix}{name} = {value!r} must be of type {type(default).__name__}")
            built[name] = value
        try:
            return cls(**built)
        except UserError as e:
            raise UserError(f"{where}: {e}") from e

    return build(Config, migrated(values, where) if isinstance(values, dict) else values, "")


def load_saved_config(path: AnyPath) -> Config:
    """Reads a run's `config.json`, and finds its data folder. Raises UserError when the file is missing, damaged or
    holds an impossible value."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a run: it has no {path.name}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e})") from e
    config = config_from_dict(values, str(path))
    data = config.data.with_folders(lambda folder: _find_data(folder, Path(config.out_dir), path.parent))
    return dataclasses.replace(config, data=data)


def _find_data(folder: str, out: Path, run: AnyPath) -> str:
    """Where a data folder of a saved run is: at the saved place if that is absolute, or as far from the run's folder as
    it was, where both were moved together; else the saved place.

    Older versions saved paths as they were given. A relative one means a folder beside the run before one of the same
    name below the working folder, which may be another.
    """
    saved = Path(folder)
    if is_remote(folder) or not isinstance(run, Path):
        return folder
    if (saved.is_absolute() and saved.exists()) or saved.anchor != out.anchor:
        return folder
    beside = Path(os.path.normpath(run.absolute() / os.path.relpath(saved, out)))
    return str(beside) if beside.exists() else folder
