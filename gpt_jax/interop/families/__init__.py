"""The families of published models that can be loaded and exported, each a table of its own."""

from gpt_jax.config import ModelConfig
from gpt_jax.errors import UserError
from gpt_jax.interop.families import gemma3, gpt2, llama, mistral, qwen2, qwen3
from gpt_jax.interop.families.family import Family, Settings

FAMILIES = {
    family.model_type: family
    for family in (gpt2.FAMILY, llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, gemma3.FAMILY)
}


def family_of(settings: Settings, where: str) -> Family:
    """The family that a config.json names. Raises UserError when it names none of FAMILIES."""
    name = settings.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{where}: models of type {name!r} are not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_for(config: ModelConfig) -> Family | None:
    """The first family with a model that computes the same as this one, or None."""
    return next((family for family in FAMILIES.values() if family.can_express(config)), None)
