"""Checks of fields, with errors that name the field, its value and the allowed values."""

import sys
from typing import Literal, get_args, get_origin, get_type_hints

from gpt_jax.errors import UserError


def check(holds: bool, name: str, value: object, allowed: str) -> None:
    """Raises UserError naming the field, its value and the allowed values, unless `holds`."""
    if not holds:
        raise UserError(f"{name} = {value!r:.1000} is not possible: it must be {allowed}")


def check_types(section: object, prefix: str) -> None:
    """Raises UserError unless every field has its annotated type or Literal value. An int passes as a float, and no
    float is infinite, which JSON does not have; nan is not within any bounds, which are checked later. prefix: the
    section's name, which may be empty."""
    for name, annotation in get_type_hints(type(section)).items():
        value = getattr(section, name)
        full_name = f"{prefix}.{name}".removeprefix(".")
        if get_origin(annotation) is Literal:
            check(value in get_args(annotation), full_name, value, " or ".join(get_args(annotation)))
            continue
        expected = get_origin(annotation) or annotation
        good = type(value) is expected or (expected is float and type(value) is int)
        check(good, full_name, value, f"of type {expected.__name__}")
        if expected is float:
            check(not abs(value) > sys.float_info.max, full_name, value, "a finite number")
