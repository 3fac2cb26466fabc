"""gpt_jax: text, tokens, model, training and sampling of a GPT in pure functional JAX.

    import gpt_jax

    model = gpt_jax.load("runs/mine")            # a run's folder, or a published model
    print(model.generate("Once upon a time").text)
    print(model.score("Once upon a time").perplexity)

    run = gpt_jax.train(gpt_jax.Config(...))     # or "configs/quickstart.py"; returns the run's folder

Importing this package starts no device, imports no JAX and reads no file.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pathlib import Path

    from gpt_jax.api import Model
    from gpt_jax.config import Config, QuantizeName

    def train(config: Config | str | Path, resume: bool = False) -> Path: ...


def load(
    name: "str | Path", checkpoint: str = "latest", context_length: int = 0, quantize: "QuantizeName" = "none"
) -> "Model":
    """A model on this machine's first device, with its tokenizer.

    name: the folder of a run, or of a published model; a .gguf file; or a name on the hub. checkpoint: of a run,
    "latest", "best" (the lowest validation loss) or a step. context_length: in tokens; 0: the model's own.
    quantize: "int8" rounds the matrices to 8 bits, for a quarter of the memory. Raises
    `gpt_jax.errors.UserError`, with a message of one line, for errors that the user can fix.
    """
    from gpt_jax.api import load_named

    return load_named(name, checkpoint, context_length, quantize)


def __getattr__(name: str) -> Any:
    """Imports on first use what needs JAX or takes time. `train` is the sub-package, which can be called."""
    if name == "Config":
        from gpt_jax.config import Config

        return Config
    if name == "Model":
        from gpt_jax.api import Model

        return Model
    if name == "train":
        import importlib

        return importlib.import_module("gpt_jax.train")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
