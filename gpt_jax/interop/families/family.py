"""A family of models: the names of settings, the values that all its models share, the layout of its tensors."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.interop.families.rope import read_rope, write_rope
from gpt_jax.interop.layout import Layout

Settings = dict[str, Any]
"""The content of a config.json."""

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


@dataclass(frozen=True)
class Family:
    """One family. Its defaults are those of transformers, for settings that a config.json lacks."""

    model_type: str  # Its name in config.json.
    architecture: str  # Its class in transformers.
    activation: tuple[str, str]  # The setting for our activation, and its default.
    settings: Mapping[str, tuple[str, Any]]  # By the family's setting: ours, and the family's default.
    shared: Mapping[str, Any]  # Our settings that are the same for all models of the family.
    tensors: Mapping[str, Layout]  # Layouts by our leaf; those of each layer begin with "layers/".
    prefix: str  # Prefix of the names in files, which some files leave out.
    rope_theta: float = 10_000.0  # The family's default.
    rope_local_theta: float = 0.0  # The default in sliding-window layers; 0: they rotate as the others.
    aliases: Mapping[str, str] = field(default_factory=dict)  # Other names of settings, with the family's own.
    only: Mapping[str, Any] = field(default_factory=dict)  # Settings that must have this value if they are present.
    not_weights: tuple[str, ...] = ()  # Patterns of names in older files that are constants.
    read_more: Callable[[Settings], Settings] = lambda theirs: {}  # Our settings that are not one of theirs each.
    write_more: Callable[[ModelConfig], Settings] = lambda config: {}  # Inverse of it.

    def named(self, ours: str) -> str:
        """The family's name of our setting."""
        return next(theirs for theirs, (name, _) in self.settings.items() if name == ours)

    def value(self, settings: Settings, ours: str) -> Any:
        """The value of our setting in a config.json, or the family's default."""
        theirs = self.named(ours)
        return settings.get(theirs, self.settings[theirs][1])

    def to_config(self, settings: Settings, where: str) -> ModelConfig:
        """Our configuration of a model. Raises UserError naming a setting that is not supported."""
        with self.reading(where):
            return self._to_config(settings)

    @contextmanager
    def reading(self, where: str) -> Iterator[None]:
        """Errors in the block, which reads a config.json, become a UserError with the name of the file or folder."""
        try:
            yield
        except UserError as e:
            raise UserError(f"{where}: {e}") from e
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:  # A value of the wrong type.
            raise UserError(
                f"{where} has a configuration that is no {self.model_type}'s ({type(e).__name__}: {e})"
            ) from e

    def _to_config(self, settings: Settings) -> ModelConfig:
        for name, value in self.only.items():
            if settings.get(name, value) not in (value, None):
                raise UserError(
                    f"{name} = {settings[name]!r} is not supported for {self.model_type}; only {value!r} is"
                )
        name, default = self.activation
        activation = settings.get(name) or default
        if activation not in ACTIVATIONS:
            raise UserError(f"{name} = {activation!r} is not known; known are {', '.join(ACTIVATIONS)}")
        ours: Settings = dict(self.shared)
        for theirs, (name, default) in self.settings.items():
            value = settings.get(theirs, default)
            ours[name] = 0 if value is None else value
        ours["activation"] = ACTIVATIONS[activation]
        ours |= self.read_more(settings)
        if self.shared["positions"] == "rotary":
            context = ours["context_length"]
            ours["rope"] = read_rope(settings, context, self.rope_theta, self.rope_local_theta)
        floats = {f.name for f in fields(ModelConfig) if f.type is float}
        values: Any = {k: float(v) if k in floats and type(v) is int else v for k, v in ours.items()}
        return ModelConfig(**values)

    def to_settings(self, config: ModelConfig) -> Settings:
        """The settings of config.json that decide the architecture, as `to_config` reads them."""
        config = config.architecture()
        theirs = {name: getattr(config, ours) for name, (ours, _) in self.settings.items()}
        names = (self.activation[1], *ACTIVATIONS)  # The family's own name first: some programs know no other.
        theirs[self.activation[0]] = next(name for name in names if ACTIVATIONS[name] == config.activation)
        if config.positions == "rotary":
            theirs |= write_rope(config, self.rope_local_theta > 0)
        return {"model_type": self.model_type, "architectures": [self.architecture]} | theirs | self.write_more(config)

    def can_express(self, config: ModelConfig) -> bool:
        """True when a model of this family computes the same as ours."""
        try:
            read_back = self.to_config(self.to_settings(config), "")
        except UserError:
            return False
        return read_back.architecture() == config.architecture()
