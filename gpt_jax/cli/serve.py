"""`gpt-jax serve`."""

import asyncio
import ipaddress
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_jax.cli.parse import ModelArgs, Switch, parse
from gpt_jax.config import CacheDTypeName, ParallelConfig, QuantizeName, check
from gpt_jax.errors import UserError
from gpt_jax.tokenizer.chat_template import syntax_error

if TYPE_CHECKING:
    from gpt_jax.sample.engine import Engine
    from gpt_jax.sample.replicas import Replicas
    from gpt_jax.serve.http import Service
    from gpt_jax.tokenizer.tokenizer import Tokenizer

BLOCK = 4
"""The most tokens that are decoded in one call. On a CPU, where a step of eight texts may take 60 ms, the first token
of a request comes two seconds sooner than with 32, and tokens/s are the same."""

MOST_TEXTS = 2**31
"""For `engine_on`: there is always more to write than there are slots."""


@dataclass(frozen=True)
class ServeArgs(ModelArgs):
    """Serve a trained GPT by OpenAI's protocol, with a chat page at its root."""

    host: str = "127.0.0.1"  # Address to listen at; others than this machine's own need --api-key-file, or --open.
    port: int = 8000  # 0: any that is free.
    name: str = ""  # What clients call the model; empty: the last part of the run's or the model's name.
    adapter: tuple[str, ...] = ()  # Runs of adapters on the model, to be served beside it: NAME=RUN, one or more.
    slots: int = 8  # Texts that each device writes at the same time; on a mesh, each data part of it.
    chunks_a_turn: int = 4  # Chunks of prompts, of 128 tokens on a CPU, that are read between two blocks of new tokens.
    queue: int = 256  # Texts that may wait for a slot; more are refused, with status 429.
    prefix_cache: int = 512  # Memory for prompts that were read, in MiB, so that those that begin alike are read once.
    api_key_file: str = ""  # File with the keys of which clients must send one, one a line; # begins a comment.
    open: Switch = False  # Let everybody ask who reaches --host, without a key.
    cors_origin: tuple[str, ...] = ()  # Other servers whose pages may ask, such as https://chat.example; *: any.
    grace: int = 30  # Seconds that running requests get when the server is told to stop.
    log_texts: Switch = False  # Write what was asked and answered to the log, too.
    quantize: QuantizeName = "none"  # int8: round the matrices to 8 bits, with a scale a row; docs/sample.md.
    cache_dtype: CacheDTypeName = "auto"  # int8: round the keys and values of what was read; auto: as the model says.
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.port < 2**16, "port", self.port, "0 to 65535")
        check(self.slots >= 1, "slots", self.slots, "1 or more")
        check(self.chunks_a_turn >= 1, "chunks_a_turn", self.chunks_a_turn, "1 or more")
        check(self.queue >= 0, "queue", self.queue, "0 or more")
        check(self.prefix_cache >= 0, "prefix_cache", self.prefix_cache, "0 (MiB) or more")
        check(self.grace >= 0, "grace", self.grace, "0 (seconds) or more")
        if self.api_key_file and self.open:
            raise UserError("--api-key-file asks for keys, and --open for none; use one of them")
        if not is_loopback(self.host) and not self.api_key_file and not self.open:
            raise UserError(
                f"--host {self.host} can be reached from elsewhere: add --api-key-file FILE, or --open, without a key"
            )


def is_loopback(host: str) -> bool:
    """True for addresses that this machine alone can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(file: str) -> tuple[str, ...]:
    """The keys in a file. Raises UserError when there are none, or one is not of printable ASCII."""
    lines = (line.partition("#")[0].strip() for line in Path(file).read_text(errors="replace").splitlines())
    keys = tuple(line for line in lines if line)
    if not keys:
        raise UserError(f"{file} has no keys; write one a line")
    if bad := [n for n, key in enumerate(keys, 1) if not (key.isascii() and key.isprintable()) or " " in key]:
        raise UserError(f"{file}: key {bad[0]} has characters that no header can carry; use letters and digits")
    return keys


def named(adapters: Sequence[str], name: str) -> dict[str, str]:
    """The runs by the names that clients give them. name: that of the model. Raises UserError."""
    found = {name: ""}
    for given in adapters:
        own, equals, run = given.partition("=")
        if not (own and equals and run):
            raise UserError(f"--adapter {given} is not of the form NAME=RUN, such as --adapter bard=runs/bard")
        if own in found:
            raise UserError(f"--adapter {given}: another model is called {own} already; choose another name")
        found[own] = run
    return found


def load(args: ServeArgs) -> "tuple[Engine | Replicas, dict[str, Tokenizer]]":
    """The engine, with room for whole contexts in all slots; and by name, the model's tokenizer, and those of adapters
    in the order of their numbers."""
    from gpt_jax import runtime
    from gpt_jax.model.cache import cache_bytes
    from gpt_jax.placement import choose_placement
    from gpt_jax.run.adapters import load_adapters
    from gpt_jax.run.load import config_to_load, load_model
    from gpt_jax.sample.decode import prepare_params
    from gpt_jax.sample.replicas import engine_on

    source = args.source()
    name = args.name or Path(args.model or source.where).name.removesuffix(".gguf")
    runs = named(args.adapter, name)
    runtime.setup(args.parallel.n_asked or 1)
    devices = runtime.choose_devices(args.parallel)
    placement = choose_placement(args.parallel, config_to_load(source, args.context_length), devices)
    model, params, tokenizer = load_model(source, args.context_length, placement, args.quantize, args.cache_dtype)
    params = prepare_params(params, model.config, donate=True)  # The first copy is freed.
    T = model.config.context_length
    tokenizers, adapters = {name: tokenizer}, None
    if args.adapter:
        adapters, theirs = load_adapters(source, list(runs.values())[1:])
        tokenizers |= zip(list(runs)[1:], theirs, strict=True)
    options: dict[str, Any] = {"adapters": adapters, "n_tokens": tokenizer.vocab_size}
    options |= {"prefix_bytes": args.prefix_cache * 2**20, "most_waiting": args.queue}
    options |= {"chunks_a_turn": args.chunks_a_turn, "block": BLOCK}
    engine = engine_on(placement, model, params, MOST_TEXTS, args.slots, **options)
    each = cache_bytes(model.config, T)
    where = f"{engine.n_slots} slots of {T:,} tokens take {engine.n_slots * each / 2**30:,.1f} GiB"
    print(f"{name}: {where} on {devices[0].device_kind}; compiling", file=sys.stderr, flush=True)
    engine.reserve(T)
    return engine, tokenizers


def service(args: ServeArgs) -> "Service":
    """What answers requests: the models, loaded, and who may ask. Its worker is still to be started."""
    from gpt_jax.serve.answers import Served  # Here, since these need the extra.
    from gpt_jax.serve.gate import Rules
    from gpt_jax.serve.http import Service
    from gpt_jax.serve.worker import Worker

    keys = read_keys(args.api_key_file) if args.api_key_file else ()
    hosts = ("localhost", "127.0.0.1", "[::1]", args.host) if is_loopback(args.host) and not keys else ()
    rules = Rules(keys, hosts, args.cors_origin, args.log_texts)
    engine, tokenizers = load(args)
    worker = Worker(engine)
    served = [Served(name, tokenizer, worker, i) for i, (name, tokenizer) in enumerate(tokenizers.items())]
    return Service(worker, served, rules)


def what_of_chats(tokenizer: "Tokenizer") -> str:
    """What keeps a model from chatting, to be said after its name. Compiles its template, for which no request waits
    then."""
    if not tokenizer.chat_template:
        return ", which has no chat template: it continues texts"
    error = syntax_error(tokenizer.chat_template)
    return f", whose chat template cannot be used ({error}): it continues texts" if error else ""


def command(argv: Sequence[str]) -> int:
    """Loads a model, and serves it until a signal."""
    args = parse(ServeArgs, argv, "serve")
    from gpt_jax.serve.server import listen, serve  # Here, since it needs the extra.

    bound = listen(args.host, args.port)  # Before the model is loaded, which takes longer.
    served = service(args)

    def say(address: str) -> None:
        for name, model in served.served.items():
            print(f"{name}{what_of_chats(model.tokenizer)}: ready at {address}", file=sys.stderr, flush=True)

    return asyncio.run(serve(served, bound, args.grace, say))
