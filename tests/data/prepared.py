"""Small data folders, made of records."""

import json
from pathlib import Path
from typing import Any

from gpt_jax.data.prepare import PrepareArgs, prepare
from gpt_jax.data.shards import Dataset, open_dataset


def prepared(folder: Path, records: list[Any], **settings: Any) -> Dataset:
    """The data folder `folder`/out of records in `folder`/a.jsonl, in the tokens of bytes."""
    source, out = folder / "a.jsonl", folder / "out"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = dict[str, Any](tokenizer="bytes", val_fraction=0.3, force=True, workers=1) | settings
    prepare(PrepareArgs(source=(str(source),), out=out, **arguments))
    return open_dataset(out)
