"""Export of a run as a folder that transformers loads."""

from pathlib import Path

from gpt_jax.config import StoredDType
from gpt_jax.errors import UserError
from gpt_jax.export.model_card import model_card
from gpt_jax.interop.families.family import Family
from gpt_jax.interop.save import generation_settings, in_a_family, model_settings, write_model
from gpt_jax.run.checkpoint import Checkpoints, choose_step
from gpt_jax.run.folder import RunFolder
from gpt_jax.run.load import config_to_load, open_run
from gpt_jax.storage.files import check_replaceable, replacing, save_json, whole_folder
from gpt_jax.tokenizer.export import as_hugging_face, export_tokenizer
from gpt_jax.tokenizer.published import encodes_as_qwen2


def export(
    run: RunFolder,
    out: Path,
    checkpoint: str = "latest",
    dtype: StoredDType = "float32",
    context_length: int = 0,
    force: bool = False,
) -> tuple[Family, int]:
    """Writes the model of a run, adapters merged, to a folder that transformers loads. Returns the model's family and
    its number of parameters. One tensor is in memory at a time.

    The arguments are those of the command. Raises UserError when the run cannot be read, no family of models computes
    what its model does, or the folder exists already.
    """
    config = run.load_config()
    if (out / "checkpoints").exists() or (config.init_from and out.resolve() == Path(config.init_from).resolve()):
        raise UserError(f"{out} is a run, or the model that this one began with; choose another --out")
    check_replaceable(out, "generation_config.json", force)
    with Checkpoints(run.checkpoints, read_only=True) as checkpoints:
        step = choose_step(checkpoints, checkpoint)
    source = open_run(run, str(step))
    model, tokenizer = config_to_load(source, context_length), source.tokenizer()
    exported, read, family = in_a_family(model, source.open_params(model))
    if family.model_type == "qwen2" and not encodes_as_qwen2(as_hugging_face(tokenizer)):
        raise UserError(
            f"{run} has Qwen2's architecture, for which transformers has fixed rules of cutting text into tokens; its "
            "tokenizer has others, so that transformers would read texts in another way"
        )
    try:
        with whole_folder(out) as folder:
            write_model(folder, family, exported, read, dtype)
            save_json(folder / "config.json", model_settings(family, exported, tokenizer, dtype))
            save_json(folder / "generation_config.json", generation_settings(tokenizer))
            export_tokenizer(tokenizer, folder, exported.context_length)
            records = [record for record in run.records() if record["step"] <= step]
            card = model_card(out.name, config, records, exported)
            with replacing(folder / "README.md") as temporary:
                temporary.write_text(card, encoding="utf-8", errors="replace")  # It has names of files.
    except OSError as e:
        raise UserError(f"{out} could not be written ({e.strerror or e}); it is as it was before") from e
    return family, exported.n_params
