"""The tables of what was measured: each part declares its columns, and one renderer serves all."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import markdown as md
from benchmarks.contest import OURS
from benchmarks.load import TURNS, turn_key
from benchmarks.markdown import NOTHING, as_spread, bullets, number, table_of, with_range
from benchmarks.results import Row
from benchmarks.scale import CPU_AXES

Rows = dict[str, Row]


class Race(NamedTuple):
    """Contestants whose figures are compared."""

    part: str
    name: str
    row: Row  # Of the results.
    figures: Mapping[str, Row]  # By contestant.
    ratios: Mapping[str, Row]  # How many times as fast as each of the others ours is.

    @property
    def rival(self) -> str:
        """The contestant over which ours wins the least, or loses the most."""
        return min(self.ratios, key=lambda name: self.ratios[name]["median"])

    def faster(self, rival: str) -> str:
        """Who was faster in all rounds, ours or the rival, or neither."""
        ratio = self.ratios[rival]
        if ratio["min"] > 1:
            return OURS
        return f"**{proper(rival)}**" if ratio["max"] < 1 else "neither, within the spread"


class Column(NamedTuple):
    """A figure: its title, where it is among those of a contestant (a spread, a number, or words in place of it), how a
    number is written, and by which of min and max the best one is chosen, which is in bold."""

    title: str
    find: Callable[[Row], Any]
    write: Callable[[float], str] = number
    best: Callable[[Iterable[float]], float] | None = None

    def cell(self, race: Race, who: str) -> str:
        """What a contestant has there."""
        found = {name: self.find(figures) for name, figures in race.figures.items()}
        if isinstance(found[who], str | None):
            return found[who] or NOTHING
        text = with_range(as_spread(found[who]), self.write)
        medians = {name: as_spread(x)["median"] for name, x in found.items() if not isinstance(x, str | None)}
        is_best = self.best and len(medians) > 1 and medians[who] == self.best(medians.values())
        return f"**{text}**" if is_best else text


def figure(name: str) -> Callable[[Row], Any]:
    """Finds a figure by its name, where it was measured."""
    return lambda figures: figures.get(name)


def table(title: str, races: Sequence[Race], columns: Sequence[Column]) -> str:
    """A line for each contestant: its figures, and how many times as fast ours is. Empty where there are none."""
    compared = ["gpt_jax is times as fast", "faster"] if any(race.ratios for race in races) else []
    lines = [[title, "", *(column.title for column in columns), *compared]]
    for race in races:
        for i, who in enumerate(race.figures | race.row["failed"]):
            cells = ["failed"] + [NOTHING] * (len(columns) - 1)
            if who in race.figures:
                cells = [column.cell(race, who) for column in columns]
            result = [NOTHING for _ in compared]
            if who in race.ratios:
                result = [with_range(race.ratios[who]), race.faster(who)]
            lines.append(["" if i else race.name, proper(who), *cells, *result])
    return table_of(lines) if races else ""


def kind_of_memory(kind: str) -> Callable[[Row], int | None]:
    """Finds a kind of memory, where it was measured."""

    def find(figures: Row) -> int | None:
        kinds = dict(figures.get("memory") or {})
        if kinds:
            kinds["the rest"] = max(0, figures["peak_bytes"] - kinds["libraries"] - kinds["state"])
        return kinds.get(kind)

    return find


MEMORY = (
    Column("peak memory", figure("peak_bytes"), md.memory, min),
    *(Column(kind, kind_of_memory(kind), md.memory) for kind in ("libraries", "state", "the rest", "temporaries")),
)
MEANING_OF_MEMORY = (
    "peak memory is the whole process's, or on an accelerator what was allocated there; libraries: of the process when "
    "there were libraries and devices, and no arrays; state: weights and what the optimizer or the cache holds, on all "
    "devices; the rest: batches, temporaries, compiling, what was compiled, what the allocator keeps; temporaries: by "
    "XLA's own account"
)
MEANING_OF_COMPILING = (
    "compiling is what a first step takes longer than the others; that of gpt_jax's initial parameters is apart, and "
    "not counted"
)
COMPILING = Column("s to compile", figure("compile_seconds"))
SHARES_OF_A_STEP = {"answers": "rollout", "waiting for rewards": "judging", "training": "training"}
STEP = Column("ms a step", figure("step_ms"), best=min)


def of_part(rows: Rows, part: str) -> list[Race]:
    """The races of a part: a row each, and of decoding one for each mode of a row, the short prompts first."""
    found = [(name.removeprefix(f"{part}/"), row) for name, row in rows.items() if name.startswith(f"{part}/")]
    if part == "decode":
        found.sort(key=lambda item: (item[1]["prompt"], item[1]["batch"]))
        return [decoded(mode, row) for _, row in found for mode in row["modes"]]
    races = []
    for name, row in found:
        ratios = row.get("times_as_fast", {})
        races.append(
            Race(part, name, row, row["contestants"], {ratios["over"]: ratios} if "over" in ratios else ratios)
        )
    return races


def decoded(mode: str, row: Row) -> Race:
    """A mode of a row of decoding."""
    prompt = f", prompt {row['prompt']}" if row["prompt"] > 16 else ""
    name = f"batch {row['batch']}{prompt}, {mode.replace('top_', 'top-k ')}"
    found, kinds = row["modes"][mode], row.get("memory", {})
    figures = {
        who: {**rates, "peak_bytes": row["peak_bytes"][who], "memory": kinds.get(who)}
        for who, rates in found["contestants"].items()
    }
    return Race("decode", name, row, figures, found["times_as_fast"])


def of_axis(rows: Rows, axis: str) -> list[Race]:
    """The races of an axis of scaling, by size."""
    return sorted(of_part(rows, f"scale/{axis}"), key=lambda race: int(race.name))


FIGURES = {"train": ("step_ms", "ms a step"), "decode": ("tokens_per_second", "tokens/s"), "learn": ("seconds", "s")}
"""The figure that a part is about, and its unit."""

SUMMARY = {
    "nano": "training nano, 0.8 million parameters",
    "baby": "training baby, 10.7 million parameters",
    "gpt2": "training GPT-2 124M",
    "baby-bfloat16": "training baby in bfloat16",
    "batch 1, greedy": "decoding with GPT-2 124M, one sequence",
    "shakespeare-char": "learning tiny Shakespeare to a loss of 1.88",
}
"""The races that stand for all: their names, in words."""


def against_the_fastest(rows: Rows, words: Callable[[Race], str]) -> str:
    """The table of races, a line each in these words; those that have none are left out."""
    lines = [["", "gpt_jax", "best of PyTorch and transformers", "times as fast", "faster"]]
    for part, (name, unit) in FIGURES.items():
        for race in (race for race in of_part(rows, part) if race.ratios and words(race)):
            found = [race.figures[who][name] for who in (OURS, race.rival)]
            ours, theirs = (number(x["median"]) if x else "not reached" for x in found)
            result = [with_range(race.ratios[race.rival]), race.faster(race.rival)]
            lines.append([f"{words(race)}: {unit}", ours, f"{theirs}, {proper(race.rival)}", *result])
    return table_of(lines) if len(lines) > 1 else ""


def summary(rows: Rows) -> list[str]:
    """Some of the races."""
    return [against_the_fastest(rows, lambda race: SUMMARY.get(race.name, ""))]


def ratios(rows: Rows) -> list[str]:
    """All of the races, over the fastest of the others; and where PyTorch is the faster in scaling."""
    sizes = {
        f"{axis} {race.name}": race.ratios[race.rival]["median"]
        for axis in CPU_AXES
        for race in of_axis(rows, axis)
        if race.ratios
    }
    lost = [f"{name} ({number(ratio)} times as fast)" for name, ratio in sizes.items() if ratio < 1]
    result = f"gpt_jax is the faster at all {len(sizes)} sizes"
    if lost:
        result = f"**PyTorch, eager, is the faster** at {len(lost)} of {len(sizes)} sizes: {', '.join(lost)}"
    scaling = [f"step time against context, batch and depth: {result}"] if sizes else []
    return [against_the_fastest(rows, lambda race: f"{race.part} {race.name}"), bullets(scaling)]


def train(rows: Rows) -> list[str]:
    """Training steps."""
    columns = [
        STEP,
        Column("tokens/s", figure("tokens_per_second")),
        Column("MFU", figure("mfu"), md.percent),
        COMPILING,
        *MEMORY,
    ]
    races = of_part(rows, "train")
    return [table("training", races, columns), notes(races, MEANING_OF_COMPILING, MEANING_OF_MEMORY)]


def variants(rows: Rows) -> list[str]:
    """Ours with other settings, the fastest of a preset in bold."""
    races = of_part(rows, "variants")
    call = Column("ms until its call returns", figure("call_ms"))
    return [table("gpt_jax", races, [STEP, call, COMPILING, MEMORY[0]]), notes(races)]


def decode(rows: Rows) -> list[str]:
    """Decoding: tokens a second, the first token, and the share of the roofline."""
    races = of_part(rows, "decode")
    bandwidths = [race.row["bandwidth"] for race in races if race.row["bandwidth"]]
    best = max((found["max"] for found in bandwidths), default=0)
    for race in races if best else ():
        share = race.row["weight_bytes"] / race.row["batch"] / best
        rates = race.figures[OURS]["tokens_per_second"]
        race.figures[OURS]["roofline"] = {which: rate * share for which, rate in rates.items()}
    columns = [
        Column("tokens/s", figure("tokens_per_second"), best=max),
        Column("ms to the first token", figure("first_token_ms"), best=min),
        Column("of the roofline", figure("roofline"), md.percent),
        *MEMORY,
    ]
    remarks = ["peak memory is counted from when the weights are there, compiling included", MEANING_OF_MEMORY]
    if best:
        remarks.append(
            "the roofline of all rows is by the best bandwidth that was read from memory in any round, "
            f"{number(best / 1e9)} GB/s; the slowest round had {number(min(x['min'] for x in bandwidths) / 1e9)}"
        )
    return [table("decoding", races, columns), notes(races, *remarks)]


def serve(rows: Rows) -> list[str]:
    """Many requests, a long chat, and llama.cpp: tokens a second, or the first token."""
    columns = [
        Column("tokens/s", figure("tokens_per_second"), best=max),
        Column("ms to the first token", figure("first_token_ms"), best=min),
    ]
    races = of_part(rows, "serve")
    return [table("serving", races, columns), notes(races)]


def load(rows: Rows) -> list[str]:
    """Servers: requests at several rates, a chat that grows, and a start."""
    memory = Column("memory", figure("resident_bytes"), md.memory, min)
    kinds = {
        "requests": [
            Column("tokens/s", figure("tokens_per_second"), best=max),
            Column("ms to the first token", figure("first_token_ms"), best=min),
            Column("at the 99th percentile", figure("first_token_ms_p99"), best=min),
            Column("ms a token", figure("token_ms"), best=min),
            Column("at the 99th percentile", figure("token_ms_p99"), best=min),
            Column("s an answer", figure("answer_seconds"), best=min),
            Column("failed", lambda figures: figures["failed"]["max"], "{:.0f}".format),
            memory,
            Column("peak memory", figure("peak_bytes"), md.memory, min),
        ],
        "chat": [Column(f"turn {turn}", figure(turn_key(turn)), best=min) for turn in range(1, TURNS + 1)],
        "start": [
            Column("s until it is ready", figure("ready_seconds"), best=min),
            Column("s to its first token", figure("seconds"), best=min),
            memory,
        ],
    }
    titles = {"requests": "requests", "chat": "a chat, ms to the first token", "start": "starting"}
    found = {kind: of_part(rows, f"load/{kind}") for kind in kinds}
    tables = ((table(titles[kind], found[kind], columns), notes(found[kind])) for kind, columns in kinds.items())
    return [block for blocks in tables for block in blocks]


def tune(rows: Rows) -> list[str]:
    """Tokens learnt a second of conversations, and steps of tuning on rewards."""
    shares = [Column(title, figure(f"{name}_share"), md.percent) for title, name in SHARES_OF_A_STEP.items()]
    kinds = {
        "conversations": [
            Column("tokens learnt/s", figure("learnt_per_second"), best=max),
            Column("ms a step", figure("step_ms")),
            Column("learnt", figure("learnt_share"), md.percent),
            Column("text", figure("text_share"), md.percent),
        ],
        "rewards": [
            STEP,
            *shares,
            Column("tokens of answers/s", figure("answer_tokens_per_second")),
            Column("without judges", figure("answer_tokens_per_second_alone")),
        ],
    }
    found = {kind: of_part(rows, f"tune/{kind}") for kind in kinds}
    tables = ((table(f"tuning on {kind}", found[kind], columns), notes(found[kind])) for kind, columns in kinds.items())
    return [block for blocks in tables for block in blocks]


def learn(rows: Rows) -> list[str]:
    """Seconds to the loss aimed at, everything included."""
    parts: list[str] = []
    for race in of_part(rows, "learn"):
        columns = [
            Column(f"s to a loss of {race.row['target']:g}", lambda of: of["seconds"] or "not reached", best=min),
            Column("iterations until then", figure("iterations"), "{:,}".format),
            Column("tokens", figure("tokens"), "{:,}".format),
            Column("s in all", figure("total_seconds")),
            Column("loss at the end", figure("whole_val_loss"), "{:.3f}".format),
            *MEMORY,
        ]
        parts += [table("learning", [race], columns), notes([race], MEANING_OF_MEMORY)]
    return parts


def scale(rows: Rows) -> list[str]:
    """Step time against context, batch and depth, and compile time against depth."""
    tables = [table(axis, of_axis(rows, axis), [STEP]) for axis in CPU_AXES]
    tables.append(table("depth", of_axis(rows, "compile"), [COMPILING._replace(best=min)]))
    return [*tables, notes([race for axis in (*CPU_AXES, "compile") for race in of_axis(rows, axis)])]


def startup(rows: Rows) -> list[str]:
    """From starting `train.py` to the end of its first step."""
    return [table("starting `train.py`", of_part(rows, "startup"), [Column("s to its first step", figure("seconds"))])]


def data(rows: Rows) -> list[str]:
    """Preparing, making batches, many tiny documents, and how full packed rows are."""
    seconds = Column("s", figure("seconds"))
    memory = Column("memory, all processes", figure("peak_bytes"), md.memory)
    rate = Column("tokens/s", figure("tokens_per_second"))
    of_processes = [memory, Column("largest process", figure("largest_bytes"), md.memory)]
    counts = (Column(name, figure(name), "{:,}".format) for name in ("documents", "rows", "cut", "dropped"))
    shares = [Column(name, figure(key), "{:.2%}".format) for name, key in (("full", "fill"), ("next-fit", "next_fit"))]
    kinds = {
        "prepare": ("`prepare`", [rate, Column("MB/s", figure("mb_per_second")), *of_processes]),
        "memory": ("`prepare`, a long source", [seconds, *of_processes]),
        "loader": ("batches, by context", [rate, Column("times what training consumes", figure("times_consumed"))]),
        "tiny": ("tiny documents", [seconds, memory]),
        "fill": ("packing", [*shares, *counts]),
    }
    found = {kind: of_part(rows, f"data/{kind}") for kind in kinds}
    tables = ((table(title, found[kind], columns), notes(found[kind])) for kind, (title, columns) in kinds.items())
    return [block for blocks in tables for block in blocks]


def machine(rows: Rows) -> list[str]:
    """The machines, and what was installed when the rows were measured."""
    under = [row["under"] for row in rows.values()]

    def all_of(values: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(filter(None, values)))

    def described(of: Row) -> str:
        devices = "" if of["platform"] == "cpu" else f", {of['devices']} x {of['device']}"
        peak = f", {md.flops(of['peak_flops'])} in bfloat16 each" if of["peak_flops"] else ""
        return f"{of['cpu']}, {of['cores']} cores, {of['memory_gib']} GiB{devices}{peak}, Python {of['python']}"

    lines = {
        "machine": all_of(described(each["machine"]) for each in under),
        "packages": all_of(", ".join(f"{name} {of}" for name, of in each["versions"].items()) for each in under),
        "flags": all_of(f"`{name}={value}`" for each in under for name, value in each["flags"].items() if value),
        "measured at": all_of(each["commit"] for each in under),
    }
    return [table_of([("", ""), *lines.items()])] if under else []


PARTS = {
    make.__name__: make
    for make in (summary, ratios, train, variants, decode, serve, load, tune, learn, scale, startup, data, machine)
}
"""The tables of a machine's file of results."""


def notes(races: Sequence[Race], *remarks: str) -> str:
    """What stands below a part's table: what was noted on races, or failed there, and remarks."""
    named: dict[str, list[str]] = {}
    for race in races:
        for note in (*race.row["notes"], *(f"{proper(who)} failed: {why}" for who, why in race.row["failed"].items())):
            named.setdefault(note, []).append(race.name)
    merged = [note if len(of) == len(races) > 1 else f"{'; '.join(of)}: {note}" for note, of in named.items()]
    return bullets([*merged, *remarks]) if races else ""


def proper(name: str) -> str:
    """A contestant as it is written."""
    return name.replace("pytorch", "PyTorch")
