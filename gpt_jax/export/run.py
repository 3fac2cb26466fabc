"""`python -m gpt_jax export`: a run as a folder that transformers loads."""

from dataclasses import dataclass
from pathlib import Path

from gpt_jax.config import check
from gpt_jax.errors import UserError
from gpt_jax.export.model_card import model_card
from gpt_jax.files import check_replaceable, replacing, save_json, whole_folder
from gpt_jax.interop.save import StoredDType, generation_settings, in_a_family, model_settings, write_model
from gpt_jax.run.checkpoint import Checkpoints, choose_step
from gpt_jax.run.folder import RunFolder, newest_run
from gpt_jax.run.load import load_model, open_run
from gpt_jax.tokenizer.export import as_hugging_face, export_tokenizer
from gpt_jax.tokenizer.published import encodes_as_qwen2


@dataclass(frozen=True)
class ExportArgs:
    """Write the model of a run, adapters merged, as a folder that transformers loads."""

    run: str = ""  # Folder of the run; empty: the newest under runs/.
    out: str = ""  # The folder to write, whole or not at all.
    checkpoint: str = "latest"  # latest, best (lowest validation loss), or a step.
    dtype: StoredDType = "float32"  # What the numbers are rounded to.
    # Longest text in tokens, where positions are rotary: a run fine-tuned on shorter ones may have its model's; 0: the
    # run's own.
    context_length: int = 0
    force: bool = False  # Replace an exported model that is in the folder.

    def __post_init__(self) -> None:
        check(bool(self.out), "out", self.out, "the folder to write: --out FOLDER")


def run_export(args: ExportArgs) -> None:
    """The command. Raises UserError when the run cannot be read, no family of models computes what its model does, or
    the folder is there already."""
    run, out = RunFolder(Path(args.run)) if args.run else newest_run(), Path(args.out)
    config = run.load_config()
    if (out / "checkpoints").exists() or (config.init_from and out.resolve() == Path(config.init_from).resolve()):
        raise UserError(f"{out} is a run, or the model that this one began with; choose another --out")
    check_replaceable(out, "generation_config.json", args.force)
    with Checkpoints(run.checkpoints, read_only=True) as checkpoints:
        step = choose_step(checkpoints, args.checkpoint)
    model, params, tokenizer = load_model(open_run(run, str(step)), args.context_length)
    exported, params, family = in_a_family(model.config, params)
    if family.model_type == "qwen2" and not encodes_as_qwen2(as_hugging_face(tokenizer)):
        raise UserError(
            f"{run} has Qwen2's architecture, for which transformers has fixed rules of cutting text into tokens; its "
            "tokenizer has others, so that transformers would read texts in another way"
        )
    try:
        with whole_folder(out) as folder:
            write_model(folder, family, exported, params, args.dtype)
            save_json(folder / "config.json", model_settings(family, exported, tokenizer, args.dtype))
            save_json(folder / "generation_config.json", generation_settings(tokenizer))
            export_tokenizer(tokenizer, folder, exported.context_length)
            records = [record for record in run.records() if record["step"] <= step]
            card = model_card(out.name, config, records, exported)
            with replacing(folder / "README.md") as temporary:
                temporary.write_text(card, encoding="utf-8")
    except OSError as e:
        raise UserError(f"{out} could not be written ({e.strerror or e}); it is as it was before") from e
    print(f"{out}: {family.architecture}, {exported.n_params:,} parameters in {args.dtype}")
    print(f"load it: transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}); python sample.py --model {out}")
