"""Tasks of lm_eval, defined here: one of each kind."""

import json
from pathlib import Path
from typing import Any

TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["yes", "no", "maybe so", "语言"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{question}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 10},
        "metric_list": [{"metric": "exact_match"}],
    },
}
DOCUMENTS: list[dict[str, Any]] = [
    {"question": "is it", "answer": 0, "text": "short"},
    {"question": "", "answer": 1, "text": "of one window and a bit, so the last window overlaps"},
    {"question": "does a question that is long fit into the window of the model?  ", "answer": 2, "text": "t" * 32},
    {"question": "trailing space ", "answer": 3, "text": "语言 and rain " * 12},
]


def write_tasks(folder: Path) -> Path:
    """Writes TASKS to a folder as lm_eval's users write them, and their documents; returns the folder."""
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, task in TASKS.items():
        where = {"data_files": {"test": str(folder / "documents.jsonl")}, "cache_dir": str(folder / "cache")}
        definition = {"task": name, "dataset_path": "json", "dataset_kwargs": where, "test_split": "test", **task}
        (folder / f"{name}.yaml").write_text(json.dumps(definition))  # JSON is YAML.
    return folder
