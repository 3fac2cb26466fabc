"""Setup, optimizer, step, state, evaluation, metrics, and the loop that joins them.

The package is callable: `gpt_jax.train(config)` trains. The module itself has to be, since importing a sub-package sets
the attribute `train` of the package, whatever it was before.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from gpt_jax.storage.remote import AnyPath, location


class _CallablePackage(ModuleType):
    """A module that trains when it is called."""

    def __call__(self, config: Any, resume: bool = False) -> AnyPath:
        """Trains, and returns the run's folder.

        config: a `Config` with an out_dir, or the path of a configuration file. Fields that differ from their defaults
        count as given by the user. resume: go on with the run in out_dir. Missing data are prepared from data.source.
        Raises UserError for errors that the user can fix, and `train.loop.Interrupted` after SIGINT or SIGTERM, when
        the state has been saved; before the first step, when there is nothing to save, KeyboardInterrupt after SIGINT.
        """
        from gpt_jax import runtime
        from gpt_jax.config import Config, load_config
        from gpt_jax.errors import UserError
        from gpt_jax.run.folder import run_folder
        from gpt_jax.train.loop import train
        from gpt_jax.train.setup import changed_fields, set_up

        if not isinstance(config, Config):
            config = load_config(Path(config))
        if not config.out_dir:
            raise UserError("out_dir is empty: name the run's folder, such as Config(out_dir='runs/mine', ...)")
        run_folder(config.out_dir).check_usable(resume)  # Before data are prepared, which may take minutes.
        config, data = set_up(config, changed_fields(config), resume)
        runtime.setup_once(runtime.choose_cpu_devices(config))
        with runtime.own_numerics():
            train(config, data, resume)
        return location(config.out_dir)


sys.modules[__name__].__class__ = _CallablePackage
