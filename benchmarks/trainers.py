"""transformers' `Trainer` and TRL's `GRPOTrainer` as contestants."""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from benchmarks.contestants import Arrays, Conversations, Tuned
from benchmarks.letters import letters, share_of_letters
from benchmarks.machine import torch_device
from benchmarks.presets import Preset
from benchmarks.theirs import HuggingFace, load
from gpt_jax.tokenizer.bytes import ByteTokenizer
from gpt_jax.tokenizer.export import export_tokenizer

NOT_LEARNT = -100


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self, wait: Any) -> None:
        self.wait, self.ends = wait, list[float]()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.wait()
        self.ends.append(time.perf_counter())


class Tuning:
    """A model, and the settings that both trainers share."""

    def __init__(self, preset: Preset) -> None:
        self.preset = preset
        self.device, self.wait = torch_device()
        self.model = HuggingFace(preset.model).to(self.device)
        self.folder = tempfile.TemporaryDirectory()  # Which a trainer asks for.

    def start(self, parameters: Arrays) -> None:
        """Takes these parameters; each call of a trainer has an optimizer of its own."""
        load(self.model, parameters)

    def settings(self, batch_size: int, steps: int) -> dict[str, Any]:
        """Arguments of a trainer."""
        c = self.preset.optimizer
        return {
            "output_dir": self.folder.name,
            "per_device_train_batch_size": batch_size,
            "max_steps": steps,
            "learning_rate": c.learning_rate,
            "lr_scheduler_type": c.schedule,
            "adam_beta1": c.beta1,
            "adam_beta2": c.beta2,
            "adam_epsilon": c.eps,
            "weight_decay": c.weight_decay,
            "max_grad_norm": c.clip_norm,
            "bf16": self.preset.model.dtype == "bfloat16",
            "use_cpu": self.device == "cpu",
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }


class Conversing(Tuning):
    """Tunes on prepared conversations with `Trainer`, each batch padded to its longest row."""

    def __init__(self, preset: Preset, conversations: Conversations) -> None:
        """conversations: in the order in which they are trained on."""
        super().__init__(preset)
        self.conversations, self.at = conversations, 0  # The next batch.

    def rows(self, first: int, count: int) -> list[dict[str, torch.Tensor]]:
        """Those of so many batches, as the model takes them."""
        B = self.preset.batch_size
        return [
            {
                "input_ids": torch.from_numpy(tokens).long(),
                "labels": torch.from_numpy(np.where(learnt, tokens, NOT_LEARNT)).long(),
            }
            for tokens, learnt in self.conversations[first * B : (first + count) * B]
        ]

    def train(self, first: int, count: int, **settings: Any) -> tuple[Trainer, Clock]:
        """Trains on so many batches."""
        clock, B = Clock(self.wait), self.preset.batch_size
        arguments = TrainingArguments(**self.settings(B, count), train_sampling_strategy="sequential", **settings)
        rows = self.rows(first, count)
        trainer = Trainer(self.model.gpt2, arguments, data_collator=padded, train_dataset=rows, callbacks=[clock])
        trainer.train()
        return trainer, clock

    def warm(self) -> None:
        """Trains a batch; no shape is compiled."""
        self.train(0, 1, logging_strategy="no")

    def losses(self, parameters: Arrays, count: int) -> list[float]:
        """Those of the first steps; starts anew before and after."""
        self.start(parameters)
        trainer, _ = self.train(0, count, logging_steps=1)
        self.start(parameters)
        return [float(each["loss"]) for each in trainer.state.log_history if "loss" in each]

    def tune(self, count: int) -> Tuned:
        """Trains on the next batch, and then on so many, which alone are counted."""
        _, clock = self.train(self.at, 1 + count, logging_strategy="no")
        B, rows = self.preset.batch_size, self.rows(self.at + 1, count)
        self.at += 1 + count
        lengths = [len(row["labels"]) for row in rows]
        places = sum(B * max(lengths[at : at + B]) for at in range(0, len(rows), B))
        learnt = sum(int((row["labels"][1:] != NOT_LEARNT).sum()) for row in rows)
        return Tuned(clock.ends[-1] - clock.ends[0], learnt, sum(lengths), places)


class Rewards(Tuning):
    """Tunes on the rewards of its own answers with `GRPOTrainer`, which writes them with transformers' `generate`."""

    def __init__(self, preset: Preset, answers: int, new: int) -> None:
        """preset: its batch is of problems; answers: to each of them, of so many new tokens."""
        super().__init__(preset)
        self.answers, self.new, tokenizer = answers, new, ByteTokenizer()
        export_tokenizer(tokenizer, Path(self.folder.name), preset.model.context_length)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder.name)
        self.never = sorted(tokenizer.stop_ids)  # Every answer is as long as it may be.

    @torch.no_grad()
    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """The log-probabilities of all tokens but the first, float32 (B, T), of int32 (B, T + 1)."""
        tokens_BS = torch.from_numpy(tokens).to(self.device).long()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.preset.model.dtype == "bfloat16"):
            logits_BTV = self.model(tokens_BS[:, :-1]).float()
        return logits_BTV.log_softmax(-1).gather(-1, tokens_BS[:, 1:, None])[..., 0].cpu().numpy()

    def seconds(self, first: int, count: int) -> list[float]:
        """Seconds of each of so many steps, after one that is not timed."""
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        P, G, clock = self.preset.batch_size, self.answers, Clock(self.wait)
        arguments = GRPOConfig(
            **self.settings(P * G, 1 + count),
            num_generations=G,
            max_completion_length=self.new,
            generation_kwargs={"suppress_tokens": self.never},
            temperature=1.0,
            loss_type="dapo",
            scale_rewards="group",
            beta=0.0,
            epsilon=0.2,
            mask_truncated_completions=False,
            shuffle_dataset=False,
            logging_strategy="no",
        )
        trainer = GRPOTrainer(
            self.model.gpt2,
            lambda completions, **_: [share_of_letters(answer) for answer in completions],
            arguments,
            Dataset.from_dict({"prompt": [letters(f"train/{first * P + i}") for i in range((1 + count) * P)]}),
            processing_class=self.tokenizer,
            callbacks=[clock],
        )
        trainer.train()
        return np.diff(clock.ends).tolist()


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of rows, padded to the longest."""
    ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=NOT_LEARNT),
    }
