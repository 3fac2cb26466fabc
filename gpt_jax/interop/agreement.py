"""What a published model says in two places: which of the two counts, and a line for the user where they differ.

The weights decide what is in the weights. Of two settings, the one counts that counts in transformers 5 or, for GGUF
files, in llama.cpp. What neither of them loads is refused, here or when the tensors' shapes are compared with the
configuration: another vocabulary, another width of a head, other biases.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpt_jax.interop.families import family_of
from gpt_jax.interop.families.family import ACTIVATIONS, Family, Settings
from gpt_jax.interop.families.rope import NUMBERS, ORIGINAL, kind_of, rotary_settings
from gpt_jax.interop.families.windows import LAYER_TYPES
from gpt_jax.interop.load import name_in_files, their_config
from gpt_jax.interop.model_files import ModelFiles

ACTIVATION_NAMES = ("hidden_act", "hidden_activation", "activation_function")


def agreeing(files: ModelFiles) -> tuple[ModelFiles, list[str]]:
    """The files with a configuration that says each thing once, and a line for each two places that differ.

    Raises UserError when the configuration is not supported, or when tensors that must be compared cannot be read.
    """
    family = family_of(files.config, files.where)
    settings, notes = dict(files.config), list(files.notes)
    for alias, name in family.aliases.items():
        if settings.get(alias) is not None:
            if settings.get(name, settings[alias]) != settings[alias]:
                notes.append(f"{alias} = {settings[alias]!r} counts, not {name} = {settings[name]!r}")
            settings[name] = settings[alias]
    files = dataclasses.replace(files, config=settings)
    their_config(files)  # Raises when the configuration is not supported, before anything is said of it.
    with family.reading(files.where):
        notes += settings_that_differ(settings, family)
    said = settings.get("dtype") or settings.get("torch_dtype")
    if isinstance(said, str) and files.weights.types and said not in files.weights.types:
        stored = ", ".join(sorted(files.weights.types))
        notes.append(f"the tensors are of the type {stored}, and are read as they are, not as {said}")
    if heads_differ(files, family):
        tie = family.named("tied_head")
        settings[tie] = False
        notes.append(f"{tie} is true, but the head has other values than the embeddings; it is taken as it is, untied")
    return files, notes


def heads_differ(files: ModelFiles, family: Family) -> bool:
    """True when the configuration ties the head to the embeddings, and the files have both, with other values."""
    embeddings, head = (
        name_in_files(files, family, family.tensors[leaf].names[0]) for leaf in ("tokens_VD", "head_VD")
    )
    shapes = files.weights.shapes
    if not (family.value(files.config, "tied_head") and embeddings in shapes and head in shapes):
        return False
    read = files.weights.read
    return shapes[embeddings] != shapes[head] or not np.array_equal(read(embeddings), read(head))


def settings_that_differ(settings: Settings, family: Family) -> Iterator[str]:
    """A line for each two settings of a config.json that say the same thing in different ways."""

    def pair(name: str, value: Any, other: str, other_value: Any) -> Iterator[str]:
        if value is not None and other_value is not None and value != other_value:
            yield f"{name} = {value!r} counts, not {other} = {other_value!r}"

    architectures = settings.get("architectures")
    if architectures and family.architecture not in architectures:
        yield f"model_type = {family.model_type!r} counts, not architectures = {architectures!r:.80}"
    own = family.activation[0]
    for other in ACTIVATION_NAMES:
        activations = [settings.get(name) for name in (own, other)]
        if ACTIVATIONS.get(str(activations[0])) != ACTIVATIONS.get(str(activations[1])):
            yield from pair(own, activations[0] or family.activation[1], other, activations[1])
    yield from pair("n_positions", settings.get("n_positions"), "n_ctx", settings.get("n_ctx"))
    if family.shared["positions"] == "rotary":
        yield from rotary_settings_that_differ(settings, family, pair)
    yield from windows_that_differ(settings, family)


def rotary_settings_that_differ(settings: Settings, family: Family, pair: Any) -> Iterator[str]:
    """A line for each two settings of rotary positions that differ."""
    older, newer = settings.get("rope_scaling"), settings.get("rope_parameters")
    rope, local = rotary_settings(older or newer)
    if older and newer:
        other, other_local = rotary_settings(newer)
        yield from pair("rope_scaling", stretching(rope), "rope_parameters", stretching(other))
        yield from pair("rope_theta", settings.get("rope_theta"), "that of rope_parameters", other.get("rope_theta"))
        local_theta = settings.get("rope_local_base_freq")
        yield from pair("rope_local_base_freq", local_theta, "that of rope_parameters", other_local.get("rope_theta"))
    where = "rope_scaling" if older else "rope_parameters"
    for name in ("rope_theta", ORIGINAL, "partial_rotary_factor"):
        yield from pair(f"{name} of {where}", rope.get(name), name, settings.get(name))
    yield from pair("rope_type", rope.get("rope_type"), "type", rope.get("type"))
    theirs = settings.get("rope_local_base_freq")
    yield from pair("rope_theta of the sliding layers", local.get("rope_theta"), "rope_local_base_freq", theirs)
    if kind_of(rope) == "yarn" and rope.get("factor") and (original := rope.get(ORIGINAL) or settings.get(ORIGINAL)):
        ratio = family.value(settings, "context_length") / original
        if ratio != 1:  # Where the context was left as it was before, the factor alone says how far it goes.
            yield from pair("factor", float(rope["factor"]), f"the context over {ORIGINAL}", ratio)


def stretching(rope: Settings) -> Settings:
    """The settings that say how rotary positions are stretched."""
    kind = kind_of(rope)
    return {"rope_type": kind} | {name: rope[name] for name in NUMBERS.get(kind, ()) if rope.get(name) is not None}


def windows_that_differ(settings: Settings, family: Family) -> Iterator[str]:
    """A line where two settings name different layers as those with a sliding window."""
    types, window = settings.get("layer_types"), settings.get("sliding_window", 4096)
    if family.model_type == "mistral" and types:
        alike = {"sliding_attention" if window else "full_attention"}
        if set(types) - alike:
            yield f"sliding_window = {window!r} counts for all layers, not layer_types"
    if settings.get("use_sliding_window") and not window and family.model_type in ("qwen2", "qwen3"):
        yield f"sliding_window = {window!r} counts, not use_sliding_window = True: no layer has a window"
    first, period = settings.get("max_window_layers"), settings.get("sliding_window_pattern")
    if not types or family.model_type not in ("qwen2", "qwen3", "gemma3_text"):
        return
    if family.model_type == "gemma3_text":
        rule, sliding = "sliding_window_pattern", [period and (i + 1) % period != 0 for i in range(len(types))]
        said = period
    else:
        rule, sliding = "max_window_layers", [first is not None and i >= first for i in range(len(types))]
        said = first if settings.get("use_sliding_window") else None
    if said is not None and sliding != [LAYER_TYPES[t] == "s" for t in types]:
        yield f"layer_types counts, not {rule} = {said!r}"
