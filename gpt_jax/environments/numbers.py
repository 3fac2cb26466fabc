"""Numbers in texts."""

import re
from decimal import Decimal

# A minus sign after a digit, a letter or a bracket is an operation. Commas may stand before groups of three digits.
NUMBER = re.compile(r"(?:(?<![\w)\]])-)?[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:\.[0-9]+)?")


def last_number(text: str) -> Decimal | None:
    """The last number of a text, exactly; None when it has none. A currency sign may stand between a minus and it."""
    found = NUMBER.findall(text.replace("$", ""))
    return Decimal(found[-1].replace(",", "")) if found else None
