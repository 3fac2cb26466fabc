"""The engine that everything that writes text runs on: requests come and go, while the device decodes all slots.

A turn of the engine reads at most one chunk of a prompt, starts one block of tokens on the device, and takes the tokens
of the block before, while the device works on the new one. What is to be done is the scheduler's to say; what is
computed is in decode.py. One thread uses an engine.

While a request with a constraint writes, what may come next depends on the token before, for which the host waits: then
a turn takes the tokens of the block before first, and a block is one token for all.
"""

import math
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from gpt_jax.errors import TooLongError, UserError
from gpt_jax.model import cache as kv
from gpt_jax.model.gpt import GPT, Params
from gpt_jax.model.lora import Adapters, join
from gpt_jax.model.sharding import BATCH_AXES, mesh_of
from gpt_jax.runtime import platform_name
from gpt_jax.sample.constraint import Constraint
from gpt_jax.sample.decode import (
    BLOCK,
    STOP_IDS,
    Block,
    Scores,
    bucket,
    chunk_sizes,
    decode_n,
    init_prompts,
    init_slots,
    init_state,
    insert,
    make_row,
    move_chunks,
    part_sizes,
    prefill_chunk,
    prefill_short,
    prepare_params,
    score_chunk,
)
from gpt_jax.sample.prefixes import Prefixes
from gpt_jax.sample.scheduler import Scheduler, Ticket
from gpt_jax.sample.settings import Filters

MOVES = 64
"""Chunks that are copied in one call."""

ALL_CHUNKS = 2**31
"""For `chunks_a_turn`: prompts are read as long as there are slots."""

SHORT_BLOCK = 8
"""The most tokens of a block while requests wait, since a slot that becomes free in its midst is idle to its end."""

Result = TypeVar("Result")
Arrays = TypeVar("Arrays")

Seed = tuple[int, int, int]
"""A seed, and two numbers that tell sequences of the same seed apart; less than 2**32 each."""


@dataclass(frozen=True, eq=False)
class Request:
    """A sequence to go on with, and how."""

    tokens: Sequence[int]  # Those of the prompt, then those drawn for it earlier, if any.
    max_new_tokens: int
    filters: Filters = field(default_factory=Filters)
    stop_ids: Collection[int] = ()  # Tokens that end the sequence.
    seed: Seed | None = None  # With the number of tokens drawn, it decides each draw; None: one that nobody knows.
    n_prompt: int | None = None  # Number of tokens that are the prompt; None: all. Penalties tell the two apart.
    start: int = 0  # The first token that the model reads.
    alternatives: int = 0  # Most probable tokens whose log-probabilities are wanted, at each step.
    client: str = ""  # Clients take turns.
    adapter: int = 0  # The number of the adapters to write with, those of the engine; 0: the model without any.
    constraint: Constraint | None = None  # Which tokens may come next; it has taken those that were drawn earlier.

    @property
    def places(self) -> int:
        """The places of a cache that the sequence needs at most."""
        return len(self.tokens) - self.start - 1 + self.max_new_tokens


class Prompt(NamedTuple):
    """What is read before a sequence writes: all its tokens but the last, which the first block reads."""

    tokens: list[int]
    adapter: int = 0


class Progress(NamedTuple):
    """The next tokens of a request, one or more, or none at its end. The token that ends a text is one of them.

    logprobs: under the model, in nats. drawn_logprobs: under the distribution that the token was drawn from. Both are
    float32. alternatives: for each token the most probable ones, with their log-probabilities under the model. error:
    with "constraint", what the request's constraint raised, or a UserError when it allowed no token.
    """

    id: int
    tokens: list[int]
    logprobs: list[float]
    drawn_logprobs: list[float]
    alternatives: list[list[tuple[int, float]]]
    finish_reason: str  # "": it goes on; "length"; "end_of_text", by a token of its stop_ids; "constraint".
    reused_tokens: int  # Tokens of the prompt whose keys and values were there.
    error: Exception | None = None


@dataclass
class Task:
    """A request that is not done."""

    request: Request
    ticket: Ticket
    prompt: Prompt
    left: int  # Tokens that are still to come, at most.
    computed: int = 0  # Tokens of the prompt that were read for it.

    @property
    def reused(self) -> int:
        """Tokens of the prompt whose keys and values were there."""
        return len(self.prompt.tokens) - self.computed


@dataclass
class Counts:
    """What an engine has done so far, or several have together."""

    requests: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0  # Of requests whose prompt was read, or found.
    reused_tokens: int = 0  # Of these, those whose keys and values were there.
    drawn_tokens: int = 0
    chunks: int = 0  # Computed.
    blocks: int = 0


class Engine:
    """A model with `n_slots` slots for sequences.

    n_tokens: the size of the tokenizer's vocabulary; None: the model's. prefix_bytes: memory for the keys and values of
    prompts that were read, besides the last one, which is always kept. most_waiting, most_waiting_tokens: bounds on the
    requests that wait, and on their tokens. chunks_a_turn: chunks that are read between two blocks; with 1, those who
    write are held up least, and with more, all are done sooner, since a block takes as long for few as for many.
    block: the most tokens of a block, up to BLOCK; with fewer, new requests begin sooner, which wait for two blocks.
    adapters: of which each request names its own, or none.

    The caches grow with the longest sequence that was asked for, up to the model's context, by powers of two; `reserve`
    makes room at once.

    All that it has is where the parameters are, on one device or on a mesh, see `Placement.replicas`; a mesh divides
    the slots, whose number is rounded up to that end, and the heads.
    """

    def __init__(
        self,
        model: GPT,
        params: Params,
        n_slots: int,
        *,
        n_tokens: int | None = None,
        prefix_bytes: int = 0,
        chunks_a_turn: int = 1,
        block: int = BLOCK,
        most_waiting: int = 2**31,
        most_waiting_tokens: int = 2**31,
        adapters: Adapters | None = None,
    ) -> None:
        c = model.config
        self.model, self.adapters, self.n_adapters = model, adapters, 0 if adapters is None else adapters.n
        self.mesh = mesh_of(params)
        self.device = next(iter(jax.tree.leaves(params)[0].devices()))
        self.params = self._prepared(params)
        parts = 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        self.n_slots, self.n_tokens = -(-n_slots // parts) * parts, n_tokens or c.vocab_size
        self.chunk = chunk_sizes(c)[-1]
        self.places = self.chunk // 2
        self.n_kept = prefix_bytes // kv.cache_bytes(c, self.chunk)  # Chunks.
        self.limits, self.chunks_a_turn = (most_waiting, most_waiting_tokens), chunks_a_turn
        self.block = block
        self.counts = Counts()
        self.next_id = 0
        # The requests that were forgotten when something was raised last, and those that it may have been because of.
        self.lost: list[int] = []
        self.suspects: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Forgets all requests, and all that was read, and makes its arrays anew."""
        c = self.model.config
        self._forget_requests()
        self.forget()
        with self._where_it_is():
            self.prompt_cache = self._placed(init_prompts(c, 1, max(self.places, self.chunk)))
            self.kept = self._placed(init_prompts(c, self.n_kept, self.chunk)) if self.n_kept else ()
            self.state = self._placed(init_state(c, self.n_slots, self.places))

    def _forget_requests(self) -> None:
        """Forgets all requests. What their slots hold is never read again, and the next block makes them idle."""
        self.scheduler = Scheduler(self.n_slots, *self.limits)
        self.tasks: dict[int, Task] = {}  # By id.
        self.dropped = np.ones(self.n_slots, bool)  # Slots that the device has to make idle.
        self.adapter_S = np.zeros(self.n_slots, np.int64)  # The number of the adapters of the sequence in a slot.
        self.is_new = False  # True when a sequence was inserted since the last block.
        self.pending: tuple[Block, list[Task]] | None = None

    def forget(self) -> None:
        """Forgets what was read, so that prompts are read anew."""
        self.held = Prompt([])  # What is in the cache of a prompt.
        self.short_held: list[Prompt] = []  # The short prompts that were read together last,
        self.short_cache: kv.Cache = ()  # and their cache.
        self.prefixes = Prefixes(self.n_kept, self.chunk)

    def submit(self, request: Request, is_new: bool = True) -> int:
        """Lets a request wait for its turn; returns its id. Raises UserError when it cannot be answered, and
        QueueFullError when it is new, and too many wait."""
        check_request(request, self.model, self.n_tokens, self.n_adapters)
        ticket = Ticket(self.next_id, request.places, request.client)
        prompt = Prompt(list(request.tokens[request.start : -1]), request.adapter)
        with self._or_reset():
            self.scheduler.add(ticket, is_new)
            self.tasks[ticket.id] = Task(request, ticket, prompt, request.max_new_tokens)
            self.next_id += 1
            self.counts.requests += 1
        return ticket.id

    def cancel(self, id: int) -> None:
        """Ends a request, of which nothing more will be heard. One that has ended may be cancelled, too."""
        with self._or_reset():
            if id in self.tasks:
                self._end(self.tasks[id])
                self.counts.cancelled += 1

    @property
    def is_idle(self) -> bool:
        """True when there is nothing to do."""
        return not self.tasks and self.pending is None

    @property
    def is_reading(self) -> bool:
        """True when a part of a prompt has been read, which `score` would forget."""
        return bool(self.scheduler.reading)

    @property
    def occupancy(self) -> tuple[int, int]:
        """How many requests wait, and how many slots are taken."""
        return self.scheduler.n_waiting, len(self.scheduler.reading) + len(self.scheduler.writing)

    def turn(self) -> list[Progress]:
        """Goes on with all requests, and returns what has become of them since the last turn."""
        with self._or_reset():
            self._read()
            before, self.pending = self.pending, None
            if self._constrained():
                taken = [*self._take(before), *self._mask()]
                self.pending = self._decode()
            else:
                self.pending = self._decode()
                taken = list(self._take(before))
            return taken

    def read(self, tokens: Sequence[int], adapter: int = 0) -> None:
        """Reads the whole chunks of a prompt to come, as far as they fit into the context, while nothing else is to be
        done. Does not wait for the device."""
        n = min(len(tokens), self.model.config.context_length)
        prompt = Prompt(list(tokens[: n // self.chunk * self.chunk]), adapter)
        with self._or_reset():
            self.reserve(len(prompt.tokens))
            while not self._holds(prompt):
                self._read_chunk(prompt)

    def score(self, tokens: Sequence[int], adapter: int = 0) -> Scores:
        """What the model says of each token's successor, which is unknown after the last: NumPy arrays.

        Reads them as prompts are read, but anew, and waits for the device. What was read of a prompt to come is lost.
        """
        check_request(Request(tokens, 1, adapter=adapter), self.model, self.n_tokens, self.n_adapters)
        T, params = self.chunk, self._params_for([adapter])
        found: list[Scores] = []
        with self._or_reset():
            self.reserve(len(tokens))
            self.held = Prompt([])
            for n in range(0, len(tokens), T):
                chunk, following = (list(tokens[i : i + T]) for i in (n, n + 1))
                padded = np.array([chunk + [0] * (T - len(chunk))], np.int32)
                next_T = np.array(following + [0] * (T - len(following)), np.int32)
                self.prompt_cache, scores = self._call(
                    score_chunk, params, self.prompt_cache, padded, next_T, np.int32(n), self.n_tokens
                )
                found.append(jax.tree.map(lambda x: x[: len(chunk)], jax.device_get(scores)))  # noqa: B023
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    def compile(self) -> None:
        """Compiles all that requests may need within the room that was reserved, and runs it at the end of that room,
        so that none of them waits for it: XLA:CPU makes some kernels when they are first run. No request is there."""
        c = self.model.config
        most = min(self.places, c.context_length)
        row = make_row(c, [0], 0, 1, Filters(), ())._replace(length=jnp.int32(most - 1))

        def put(cache: kv.Cache) -> None:
            self.state = self._call(insert, self.state, np.int32(0), row, cache, np.int32(0))

        with self._or_reset():
            self.held = Prompt([])
            for size in chunk_sizes(c):
                tokens_1T, params = np.zeros((1, size), np.int32), self._params_for([0])
                last = np.int32(max(0, most - size))
                self.prompt_cache = self._call(prefill_chunk, params, self.prompt_cache, tokens_1T, last)
                if (rows := self._rows(size)) > 1:
                    tokens_PT, params = np.zeros((rows, size), np.int32), self._params_for([0] * rows)
                    put(self._call(prefill_short, params, tokens_PT))
            put(self.prompt_cache)
            if self.kept:
                for target, source in (("kept", "prompt_cache"), ("prompt_cache", "kept")):
                    self._move(target, source, [(0, 0, 0, 0)])
            keep_S, params = np.ones(self.n_slots, bool), self._params_for(self.adapter_S)
            self.state, _ = self._call(decode_n, params, self.state, keep_S, np.int32(1), self.n_tokens)
        self.score([0])

    @contextmanager
    def _or_reset(self) -> Iterator[None]:
        """Whatever is raised inside, such as KeyboardInterrupt, leaves the engine as `reset` does, since arrays that
        were donated are gone, or a request is known to a part of it only. A UserError comes before anything changes."""
        try:
            with self._where_it_is():
                yield
        except UserError:
            raise
        except BaseException:
            reading = [ticket.id for ticket in self.scheduler.reading]
            self.suspects = reading or [ticket.id for ticket in self.scheduler.writing.values()]
            self.lost = list(self.tasks)
            self.reset()
            raise

    def _placed(self, arrays: Arrays) -> Arrays:
        """The arrays, bound to the engine's device as what programs return is. JAX would compile programs for both."""
        return arrays if self.mesh is not None else jax.device_put(arrays, self.device)

    def _where_it_is(self) -> AbstractContextManager[object]:
        """Inside, programs run on the engine's devices."""
        return jax.default_device(self.device) if self.mesh is None else jax.set_mesh(self.mesh)

    def _call(self, program: Callable[..., Result], *args: object) -> Result:
        """The result of a program of the model's. Several CPU devices can deadlock when programs with sums queue up."""
        result = program(self.model, *args)
        must_wait = self.mesh is not None and platform_name(self.device) == "cpu"
        return jax.block_until_ready(result) if must_wait else result

    def _prepared(self, params: Params) -> Params:
        """The parameters, prepared for decoding, and the adapters beside the matrices; on a mesh, whole everywhere."""
        c = self.model.config
        prepared = prepare_params(params, c)
        if self.adapters is None:
            return prepared
        where = SingleDeviceSharding(self.device) if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        layers = jax.tree.map(lambda x: jax.device_put(x.astype(c.dtype), where), self.adapters.layers)
        return prepared | {"layers": tuple(map(join, prepared["layers"], layers))}

    def _params_for(self, adapters: Sequence[int] | np.ndarray) -> Params:
        """The parameters for rows with these adapters."""
        return self.params if self.adapters is None else self.params | {"scales_BR": self.adapters.scales_AR[adapters]}

    def replace_params(self, params: Params) -> None:
        """Takes other weights, placed like those before. Forgets all requests, and all that was read."""
        self.params = self._prepared(params)
        self._forget_requests()
        self.forget()

    def reserve(self, places: int) -> None:
        """Makes room for sequences of so many tokens."""
        wanted = self._rounded(places)
        if wanted <= self.places:
            return

        def grow(x_XSK: jax.Array) -> jax.Array:
            return jnp.pad(x_XSK, ((0, 0), (0, wanted - x_XSK.shape[1]), (0, 0)))

        with self._where_it_is():
            if wanted > self.chunk:
                self.prompt_cache = jax.tree.map(grow, self.prompt_cache)
            sizes = part_sizes(self.model.config, wanted)[len(self.state.cache[0]) :]
            more = self._placed(init_slots(self.model.config, self.n_slots, sizes))
            cache = tuple(parts + new for parts, new in zip(self.state.cache, more, strict=True))
            self.state = self.state._replace(cache=cache)
        self.places = wanted

    def _read(self) -> None:
        """Reads a chunk, or short prompts that make up one, as often as it may. What was read is put into its slot."""
        n_chunks = 0
        while ticket := self.scheduler.next_to_read():
            task = self.tasks[ticket.id]
            if not self._is_read(task.prompt):
                if n_chunks == self.chunks_a_turn:
                    return
                if self._rows(len(task.prompt.tokens)) > 1:
                    self._read_short(task)
                else:
                    self.reserve(len(task.prompt.tokens))
                    task.computed += self._read_chunk(task.prompt)
                n_chunks += 1
            for ticket in list(self.scheduler.reading):
                if self._is_read(self.tasks[ticket.id].prompt):
                    self._insert(self.tasks[ticket.id])

    def _is_read(self, prompt: Prompt) -> bool:
        """True when the prompt is in the cache of prompts of its length."""
        return prompt in self.short_held if self._rows(len(prompt.tokens)) > 1 else self._holds(prompt)

    def _size(self, n: int) -> int:
        """The least size of a chunk for n tokens."""
        return next(size for size in chunk_sizes(self.model.config) if size >= n)

    def _rows(self, n: int) -> int:
        """How many prompts of n tokens are read at once: as many as make up a chunk, if there are slots for them."""
        return min(self.n_slots, self.chunk // self._size(n)) if 0 < n < self.chunk else 1

    def _read_short(self, task: Task) -> None:
        """Reads a short prompt, and those behind it that are as short."""
        n = len(task.prompt.tokens)
        size, rows = self._size(n), self._rows(n)
        self.short_held = [task.prompt]
        task.computed = n

        def fits(ticket: Ticket) -> bool:
            prompt = self.tasks[ticket.id].prompt
            if prompt in self.short_held:
                return True
            n = len(prompt.tokens)
            return len(self.short_held) < rows and 0 < n < self.chunk and self._size(n) == size

        while ticket := self.scheduler.take(fits):
            other = self.tasks[ticket.id]
            if other.prompt not in self.short_held:
                self.short_held.append(other.prompt)
                other.computed = len(other.prompt.tokens)
        tokens_PT, adapter_P = np.zeros((rows, size), np.int32), np.zeros(rows, np.int64)
        for i, prompt in enumerate(self.short_held):
            tokens_PT[i, : len(prompt.tokens)], adapter_P[i] = prompt
        self.short_cache = self._call(prefill_short, self._params_for(adapter_P), tokens_PT)
        self.counts.chunks += 1

    def _holds(self, prompt: Prompt) -> bool:
        """True when all of the prompt has been read, as it is read when nothing is there."""
        tokens, held = prompt.tokens, self._held_by(prompt.adapter)
        n = len(tokens) // self.chunk * self.chunk  # The rest is padded by itself, and so must be the same.
        return held[:n] == tokens[:n] and (len(tokens) == n or held == tokens)

    def _held_by(self, adapter: int) -> list[int]:
        """The tokens in the cache of a prompt, if they were read with these adapters."""
        return self.held.tokens if self.held.adapter == adapter else []

    def _read_chunk(self, prompt: Prompt) -> int:
        """Reads the chunk after the longest prefix that is there; returns the number of tokens that were computed."""
        tokens, adapter = prompt
        n = whole_chunks_alike(self._held_by(adapter), tokens, self.chunk)
        places = self.prefixes.find(adapter, tokens)
        if len(places) * self.chunk > n:
            first, n = n // self.chunk, len(places) * self.chunk
            self._move("prompt_cache", "kept", [(0, i * self.chunk, places[i], 0) for i in range(first, len(places))])
            self.held = Prompt(tokens[:n], adapter)
            if self._holds(prompt):
                return 0
        part = tokens[n : n + self.chunk]
        padded = np.zeros((1, self._size(len(part))), np.int32)
        padded[0, : len(part)] = part
        params = self._params_for([adapter])
        self.prompt_cache = self._call(prefill_chunk, params, self.prompt_cache, padded, np.int32(n))
        self.held = Prompt(tokens[: n + len(part)], adapter)
        self.counts.chunks += 1
        if len(part) == self.chunk and self.kept:
            place = self.prefixes.add(adapter, self.held.tokens)
            if place is not None:
                self._move("kept", "prompt_cache", [(place, 0, 0, n)])
        return len(part)

    def _move(self, target: str, source: str, moves: list[tuple[int, int, int, int]]) -> None:
        """Copies chunks between the caches of these names."""
        for start in range(0, len(moves), MOVES):
            moves_N4 = np.zeros((MOVES, 4), np.int32)
            some = moves[start : start + MOVES]
            moves_N4[: len(some)] = some
            moved = self._call(move_chunks, getattr(self, target), getattr(self, source), moves_N4, len(some))
            setattr(self, target, moved)

    def _insert(self, task: Task) -> None:
        """Puts the sequence that was read into its slot, to write."""
        request, slot = task.request, task.ticket.slot
        row = make_row(
            self.model.config,
            request.tokens,
            len(request.tokens) if request.n_prompt is None else request.n_prompt,
            request.max_new_tokens,
            request.filters,
            sorted(request.stop_ids),
            start=request.start,
            seed=fresh_seed() if request.seed is None else request.seed,
            alternatives=request.alternatives,
            is_masked=request.constraint is not None,
        )
        length = int(row.length)
        self.reserve(request.places)
        cache, at = self.prompt_cache, 0
        if self._rows(length) > 1:
            cache, at = self.short_cache, self.short_held.index(task.prompt)
        self.state = self._call(insert, self.state, np.int32(slot), row, cache, np.int32(at))
        self.adapter_S[slot], self.dropped[slot], self.is_new = request.adapter, False, True
        self.counts.prompt_tokens += length
        self.counts.reused_tokens += task.reused
        self.scheduler.write(task.ticket)

    def _writing(self) -> list[Task]:
        return [self.tasks[ticket.id] for ticket in self.scheduler.writing.values()]

    def _constrained(self) -> list[tuple[Task, Constraint]]:
        """Those that write and have a constraint."""
        return [(task, c) for task in self._writing() if (c := task.request.constraint) is not None]

    def _mask(self) -> Iterator[Progress]:
        """Puts the tokens that are allowed next into the slots; ends the requests whose constraints allow none."""
        rows = self.state.rows
        allowed_SW = np.zeros(rows.allowed.shape, np.uint32)
        for task, constraint in self._constrained():
            try:
                bits_W = constraint.allowed()
                allowed_SW[task.ticket.slot, : len(bits_W)] = bits_W
                if not bits_W.any():
                    raise UserError("the answer's constraint allows no token here")
            except Exception as e:
                self._end(task)
                yield Progress(task.ticket.id, [], [], [], [], "constraint", task.reused, e)
        rows = rows._replace(allowed=jax.device_put(allowed_SW, rows.allowed.sharding))
        self.state = self.state._replace(rows=rows)

    def _end(self, task: Task) -> None:
        """Forgets a request, whatever its state."""
        del self.tasks[task.ticket.id]
        if task.ticket.state == "writing":
            self.dropped[task.ticket.slot] = True
        self.scheduler.end(task.ticket)

    def _decode(self) -> tuple[Block, list[Task]] | None:
        """Starts a block on the device, if someone writes."""
        writing = self._writing()
        if not writing:
            return None
        # The first token of a sequence is waited for; after it, a call for more tokens costs less.
        n = SHORT_BLOCK if self.scheduler.n_waiting or self.scheduler.reading else BLOCK
        n = 1 if self.is_new or self._constrained() else min(n, self.block)
        params = self._params_for(self.adapter_S)
        self.state, block = self._call(decode_n, params, self.state, ~self.dropped, np.int32(n), self.n_tokens)
        self.dropped[:], self.is_new = False, False
        self.counts.blocks += 1
        return block, writing

    def _rounded(self, places: int) -> int:
        """The least number of places that is at least so many, of those that caches have: half a chunk, chunks times a
        power of two, and what the whole context takes."""
        if places <= self.chunk // 2:
            return self.chunk // 2
        most = -(-self.model.config.context_length // self.chunk)
        return bucket(-(-places // self.chunk), most, 1) * self.chunk

    def _take(self, pending: tuple[Block, list[Task]] | None) -> Iterator[Progress]:
        """The tokens of a block that was started, once the device has them."""
        if pending is None:
            return
        block, writing = pending
        wanted = [task for task in writing if task.ticket.state == "writing"]  # The others were cancelled or are done.
        asks = any(task.request.alternatives for task in wanted)
        host = jax.device_get(block if asks else block[:4])
        for task in wanted:
            request, slot = task.request, task.ticket.slot
            n = int(host[0][:, slot].sum())
            if not n:
                continue
            tokens, logprobs, drawn_logprobs = (x_NS[:n, slot].tolist() for x_NS in host[1:4])
            alternatives: list[list[tuple[int, float]]] = []
            if request.alternatives:
                ids_NC, logprobs_NC = (x_NSC[:n, slot, : request.alternatives].tolist() for x_NSC in host[4:])
                alternatives = [list(zip(*step, strict=True)) for step in zip(ids_NC, logprobs_NC, strict=True)]
            task.left -= n
            self.counts.drawn_tokens += n
            reason = "end_of_text" if tokens[-1] in request.stop_ids else "" if task.left else "length"
            error = None if request.constraint is None else error_of(request.constraint, tokens)
            reason = reason if error is None else "constraint"
            if reason:
                self._end(task)
            yield Progress(task.ticket.id, tokens, logprobs, drawn_logprobs, alternatives, reason, task.reused, error)


def error_of(constraint: Constraint, tokens: Iterable[int]) -> Exception | None:
    """What a constraint raises when it takes the tokens."""
    try:
        for token in tokens:
            constraint.take(token)
    except Exception as e:
        return e
    return None


def check_request(request: Request, model: GPT, n_tokens: int, n_adapters: int = 0) -> None:
    """Raises UserError when a request cannot be answered."""
    c, n = model.config, len(request.tokens) - request.start
    if n < 1:
        raise UserError("a request has no tokens; it takes one at least, such as the one that begins a text")
    if unknown := [token for token in request.tokens if not 0 <= token < c.vocab_size]:
        raise UserError(f"the model knows {c.vocab_size} tokens, and {unknown[0]} is none of them")
    if request.max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {request.max_new_tokens} is not possible: it must be 1 or more")
    if n + request.max_new_tokens > c.context_length + 1:  # The last token that is drawn is never read.
        raise TooLongError(
            f"{n} tokens and {request.max_new_tokens} new ones are more than the model's context_length, "
            f"{c.context_length}, has room for; shorten the prompt or the answer"
        )
    if len(request.stop_ids) > STOP_IDS:
        raise UserError(f"{len(request.stop_ids)} tokens are to end a text, and {STOP_IDS} may; leave some out")
    if unknown := [token for token in request.stop_ids if not 0 <= token < 2**31]:
        raise UserError(f"{unknown[0]} is to end a text, and is no token")
    if unknown := [number for number in request.seed or () if not 0 <= number < 2**32]:
        raise UserError(f"a seed of {unknown[0]} is not possible: it is at least 0, and less than 2**32")
    if not 0 <= request.adapter <= n_adapters:
        raise UserError(f"adapter = {request.adapter} is not possible: it must be 0 (none) to {n_adapters}")
    for token, _ in request.filters.logit_bias:
        if token >= n_tokens:
            raise UserError(f"logit_bias names token {token}, and the tokenizer has {n_tokens}, from 0 on")


def whole_chunks_alike(first: Sequence[int], second: Sequence[int], size: int) -> int:
    """The number of tokens in the whole chunks with which both begin."""
    n = 0
    while n + size <= min(len(first), len(second)) and first[n : n + size] == second[n : n + size]:
        n += size
    return n


def fresh_seed() -> Seed:
    """A seed that nobody knows."""
    return secrets.randbits(32), secrets.randbits(32), secrets.randbits(32)
