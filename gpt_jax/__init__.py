"""gpt_jax: text, tokens, model, training and sampling of a GPT in pure functional JAX.

The sub-packages follow the way data flows: `data`, `model`, `train`, `sample`. Importing this package starts no
device and reads no file.
"""

__version__ = "0.1.0"
