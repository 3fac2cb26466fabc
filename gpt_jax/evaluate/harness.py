"""gpt_jax as a model of EleutherAI's lm_eval, whose tasks then run on it as on any other model.

    python -m gpt_jax.evaluate run --model gpt_jax --model_args run=runs/quickstart --tasks lambada_openai

is lm_eval's own command line. Its `--model_args` takes run=, checkpoint=, model= and context_length=, like the options
of `gpt-jax eval`, and data=, fsdp=, context= and tensor= for its mesh. Texts become tokens and windows as in lm_eval's
own `hf` model, so that results can be compared.
"""

import collections
import functools
import json
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from gpt_jax.config import ParallelConfig, check
from gpt_jax.errors import UserError
from gpt_jax.evaluate.score import Scorer
from gpt_jax.evaluate.windows import Window, windows
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.sharding import MESH_AXES
from gpt_jax.placement import Placement, choose_placement
from gpt_jax.run.load import choose_source, config_to_load, load_model
from gpt_jax.runtime import choose_devices, local_devices
from gpt_jax.sample.engine import ALL_CHUNKS, Engine
from gpt_jax.sample.generate import Row, write
from gpt_jax.sample.replicas import Replicas, engine_on
from gpt_jax.sample.settings import Filters, Settings
from gpt_jax.tokenizer.tokenizer import Tokenizer

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import simple_parse_args_string
except ImportError:
    raise UserError("the tasks of lm_eval need the package lm_eval: pip install 'gpt-jax[lm-eval]'") from None

MAX_GEN_TOKS = 256
"""Limit on generated tokens in tasks that set none, as in lm_eval's `hf` model."""

PREFIX_BYTES = 2**28
"""Memory for the keys and values of beginnings that prompts have in common."""

FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")
"""Arguments of generation that are fields of Filters, too."""


@register_model("gpt_jax")
class HarnessModel(TemplateLM):
    """A model, its parameters and its tokenizer, with the interface that lm_eval asks for.

    Windows are scored in `placement`, by default on one device: `batch_size` at the same time in each of its shares of
    a batch, and as many texts written in each replica of the parameters.
    """

    def __init__(
        self,
        model: GPT,
        params: Params,
        tokenizer: Tokenizer,
        batch_size: int = 8,
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        self.model, self.params, self.tokenizer, self.batch_size = model, params, tokenizer, batch_size
        self.context_length = model.config.context_length
        self.scorer = Scorer(model, params, placement or Placement(local_devices()[:1]), batch_size)

    @functools.cached_property
    def engine(self) -> Engine | Replicas:
        """What answers. It keeps beginnings that prompts have in common, such as examples."""
        return engine_on(
            self.scorer.placement,
            self.model,
            self.scorer.params,
            2**31,  # As many texts as there are.
            self.batch_size,
            n_tokens=self.tokenizer.vocab_size,
            prefix_bytes=PREFIX_BYTES,
            chunks_a_turn=ALL_CHUNKS,
        )

    @classmethod
    def from_names(
        cls,
        run: str,
        checkpoint: str,
        model: str,
        context_length: int,
        batch_size: int,
        parallel: ParallelConfig = ParallelConfig(),  # noqa: B008
    ) -> Self:
        """The model that `gpt-jax eval` loads for these arguments, on all devices of this machine."""
        source = choose_source(run, model, checkpoint)
        placement = choose_placement(parallel, config_to_load(source, context_length), choose_devices(parallel))
        loaded = load_model(source, context_length, placement if parallel.uses_mesh else None)
        return cls(*loaded, batch_size, placement)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Self:
        """Like from_names, from lm_eval's `--model_args`; its `--batch_size` and `--device` are in additional_config.

        JAX chooses the device. Raises UserError naming an unknown argument.
        """
        batch_size = str((additional_config or {}).get("batch_size", "auto"))
        given = {"batch_size": int(batch_size)} if batch_size.isdecimal() else {}
        named: dict[str, Any] = {"run": "", "checkpoint": "latest", "model": "", "context_length": 0, "batch_size": 8}
        named |= dict.fromkeys(MESH_AXES, 0)
        for name, value in (given | arg_dict).items():
            if name not in named:
                raise UserError(f"there is no model argument {name}; there are {', '.join(named)}")
            kind = type(named[name])
            check(kind is str or type(value) is int, name, value, "a whole number")
            named[name] = kind(value)  # lm_eval reads a checkpoint's step, or a folder of digits, as a number.
        check(named["batch_size"] >= 1, "batch_size", named["batch_size"], "1 or more")
        parallel = ParallelConfig(**{axis: named.pop(axis) for axis in MESH_AXES})
        return cls.from_names(**named, parallel=parallel)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Self:
        """Like create_from_arg_obj, from "name=value,name=value"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def max_length(self) -> int:
        """Number of tokens that the model sees at once."""
        return self.context_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """The token from which the first token of a text is predicted."""
        begin = self.tokenizer.begin_of_text
        return self.tokenizer.end_of_text if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """The name of this tokenizer in lm_eval's caches."""
        return self.tokenizer.fingerprint

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises UserError, since tasks are asked as plain text."""
        raise UserError("gpt_jax answers the tasks of lm_eval as plain text; leave out --apply_chat_template")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text, after the token that starts every document, if the tokenizer has one and
        add_special_tokens is not False."""
        begin = self.tokenizer.begin_of_text
        start = [] if begin is None or add_special_tokens is False else [begin]
        return start + self.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation after its context, both in tokens, and True when greedy decoding
        would give the continuation. A context that is too long loses its beginning."""
        T = self.context_length
        pending = []
        for _, context, continuation in requests:
            if len(continuation) > T:
                raise UserError(f"a continuation has {len(continuation)} tokens, and the model's context_length is {T}")
            tokens = np.array((context + continuation)[-(T + 1) :], np.int32)
            pending.append(Window(tokens, len(tokens) - 1 - len(continuation)))
        answers = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for score in self.scorer(pending):
                answers[score.number] = answer = (-score.nats, score.greedy)
                if requests[score.number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[score.number][0], answer)
                bar.update()
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, with each of its tokens predicted exactly once.

        As in lm_eval's `hf`, the token that the tokenizer puts before every text is predicted, too, from itself.
        """
        owners, pending = [], []
        for number, request in enumerate(requests):
            tokens = np.array([self.prefix_token_id, *self.tok_encode(request.args[0])], np.int32)
            for window in rolling_windows(tokens, self.context_length):
                owners.append(number)
                pending.append(window)
        sums = [0.0] * len(requests)
        for score in tqdm(self.scorer(pending), total=len(pending), desc="loglikelihood_rolling", disable=disable_tqdm):
            sums[owners[score.number]] -= score.nats
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text generated after each context, up to a stop string; greedy unless `do_sample` is set.

        A repeated request gets another sample. Raises UserError naming an unknown argument of generation.
        """
        seen: collections.Counter[str] = collections.Counter()
        rows = []
        for request in requests:
            name = json.dumps(request.args)
            settings = generation_settings(request.args[1], seed=seen[name])
            seen[name] += 1
            T, n = self.context_length, settings.max_new_tokens
            room = T - n if n < T else T // 2  # If the answer alone fills the context, that slides.
            prompt = self.tok_encode(request.args[0])[-room:] or [self.prefix_token_id]
            rows.append(Row(prompt, self.tokenizer, settings))
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for number, row in write(self.engine, rows):
                text = row.result.text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update()
        return [row.result.text for row in rows]


def rolling_windows(tokens: np.ndarray, context_length: int) -> Iterator[Window]:
    """Windows that do not overlap, except the last one, which reaches back until it is full, as in lm_eval."""
    for window in windows([tokens], context_length, context_length):
        reaching_back = tokens[-(context_length + 1) :]
        whole = len(window.tokens) == context_length + 1
        yield window if whole else Window(reaching_back, len(reaching_back) - 1 - window.n_scored)


def generation_settings(arguments: dict[str, Any], seed: int) -> Settings:
    """The settings in a task's generation_kwargs. Raises UserError naming an unknown one."""
    options = dict(normalize_gen_kwargs(arguments, MAX_GEN_TOKS))
    stop = tuple(string for string in options.pop("until") if string)
    max_new_tokens = options.pop("max_gen_toks")
    sampled = options.pop("do_sample")
    temperature = float(options.pop("temperature", 1.0)) if sampled else 0.0
    options.pop("temperature", None)
    # Where a task does not set top_p, it is 1, as in transformers.
    filters = {"top_p": 1.0} | {name: options.pop(name) for name in FILTERS if name in options}
    if options:
        raise UserError(f"the task asks for {', '.join(options)} in generation, which gpt_jax does not have")
    return Settings(max_new_tokens, seed, stop, filters=Filters(temperature, **filters))


def command_line() -> None:
    """Runs lm_eval's command line, which knows the model gpt_jax once this module is imported."""
    cli_evaluate()
