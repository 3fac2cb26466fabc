"""The tables of what was measured: each declares its columns, and the notes below it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from benchmarks import markdown as md
from benchmarks.contest import OURS, PYTORCH, TRANSFORMERS
from benchmarks.markdown import NOTHING, Column, bullets, facts, number, table, with_range
from benchmarks.measure import spread
from benchmarks.results import Row

Rows = dict[str, Row]
Choice = Callable[[Iterable[float]], float]

CACHES = ("pytorch, cache", "pytorch, no cache")
RIVALS = (*PYTORCH, TRANSFORMERS, *CACHES)


class Line(NamedTuple):
    """What the cells of a line are computed from."""

    name: str
    words: str  # The name in a table of several parts.
    row: Row  # Of the results.
    contestants: Mapping[str, Row]  # The figures of each.
    ratios: Mapping[str, Row]  # How many times as fast as each of the others ours is.
    who: str = OURS  # The contestant, in a table with a line for each.

    @property
    def it(self) -> Row:
        """The figures of the line's contestant."""
        return self.contestants.get(self.who, {})

    @property
    def rival(self) -> str:
        """The contestant over which ours wins the least, or loses the most; empty where there is none."""
        return min(self.ratios, key=lambda name: self.ratios[name]["median"], default="")

    @property
    def ratio(self) -> Row | None:
        """How many times as fast as the rival ours is."""
        return self.ratios.get(self.rival)

    @property
    def faster(self) -> str:
        """Who was faster in all rounds, ours or the rival, or neither."""
        if self.ratio is None:
            return NOTHING
        if self.ratio["min"] > 1:
            return OURS
        return f"**{proper(self.rival)}**" if self.ratio["max"] < 1 else "neither, within the spread"

    def best(self, who: str, figure: str, choose: Choice = min) -> str:
        """A contestant's figure, in bold where it is the best (choose: min or max); one that failed says so."""
        medians = {name: found[figure]["median"] for name, found in self.contestants.items() if found.get(figure)}
        if who not in medians:
            return "failed" if who in self.row["failed"] else NOTHING
        text = with_range(self.contestants[who][figure])
        return f"**{text}**" if len(medians) > 1 and medians[who] == choose(medians.values()) else text


def of_each(names: Iterable[str], title: str, cell: Callable[[str, Line], str]) -> list[Column]:
    """A column for each contestant, whose name stands in the title."""
    return [Column(title.format(proper(name)), partial(cell, name)) for name in names]


TIMES_AS_FAST = Column("times as fast", lambda line: with_range(line.ratio))
FASTER = Column("faster", lambda line: line.faster)


def trained(name: str, row: Row) -> list[Line]:
    """A preset, with the ratio over the better of PyTorch's."""
    ratio = row.get("times_as_fast")
    ratios = {ratio["over"]: ratio} if ratio else {}
    return [Line(name, f"train {name}, {row['dtype']}", row, row["contestants"], ratios)]


def decoded(_: str, row: Row) -> list[Line]:
    """A line for each choice of tokens, greedy and top-k."""
    names = {mode: f"{case_of(row)}, {mode.replace('top_', 'top-k ')}" for mode in row["modes"]}
    return [
        Line(
            names[mode],
            f"decode GPT-2, {row['dtype']}, {names[mode]}",
            row,
            found["contestants"],
            found["times_as_fast"],
        )
        for mode, found in row["modes"].items()
    ]


def learned(name: str, row: Row) -> list[Line]:
    """A recipe."""
    return [Line(name, f"learn {name}, {until(row)}", row, row["contestants"], row["times_as_fast"])]


SIZED = {OURS: OURS, "pytorch": PYTORCH[0], "scan": "layers scanned", "unroll": "layers unrolled"}
"""The contestants of scaling, by their names in the points."""


def scaled(axis: str, row: Row) -> list[Line]:
    """A line for each size."""
    lines = []
    for point in row["points"]:
        x = point["x"]
        times = {who: point[name] for name, who in SIZED.items() if name in point}
        figures = {who: {"time": time if isinstance(time, dict) else {"median": time}} for who, time in times.items()}
        medians = {who: found["time"]["median"] for who, found in figures.items()}
        failed = [who for name, who in SIZED.items() if f"{name} at {x}" in row["failed"]]
        compared = [who for who in (PYTORCH[0],) if who in medians and OURS in medians]
        ratios = {who: {"median": medians[who] / medians[OURS]} for who in compared}
        lines.append(Line(f"{x:,}", f"{axis} {x:,}", {"failed": failed}, figures, ratios))
    return lines


LINES: dict[str, Callable[[str, Row], list[Line]]]
LINES = {"train": trained, "variants": trained, "decode": decoded, "learn": learned, "scale": scaled}
"""How a row of a part is read."""


def of_part(rows: Rows, part: str) -> list[Line]:
    """The lines of a part. Those of decoding are sorted: the short prompts first, by batch."""
    found = [(name.partition("/")[2], row) for name, row in rows.items() if name.startswith(f"{part}/")]
    if part == "decode":
        found.sort(key=lambda item: (item[1]["prompt"], item[1]["batch"]))
    return [line for name, row in found for line in LINES[part](name, row)]


def contests(rows: Rows) -> list[Line]:
    """What was compared in training, decoding and learning."""
    return [line for part in ("train", "decode", "learn") for line in of_part(rows, part) if line.ratios]


SUMMARY = {
    "nano": ("training nano, 0.8 million parameters: ms a step", "step_ms"),
    "baby": ("training baby, 10.7 million parameters: ms a step", "step_ms"),
    "gpt2": ("training GPT-2 124M: ms a step", "step_ms"),
    "baby-bfloat16": ("training baby in bfloat16: ms a step", "step_ms"),
    "batch 1, greedy": ("decoding with GPT-2 124M, one sequence: tokens/s", "tokens_per_second"),
    "shakespeare-char": ("learning tiny Shakespeare to a loss of 1.88: s", "seconds"),
}
"""The contests that stand for all, by the names of their lines: their words in the table, and the figure."""


def summary(_: Row, rows: Rows) -> list[str]:
    """Some of the contests, with the figures of both sides."""

    def median(line: Line, who: str) -> str:
        found = line.contestants[who][SUMMARY[line.name][1]]
        return number(found["median"]) if found else "not reached"

    columns = [
        Column("", lambda line: SUMMARY[line.name][0]),
        Column("gpt_jax", lambda line: median(line, OURS)),
        Column("best of PyTorch and transformers", lambda line: f"{median(line, line.rival)}, {proper(line.rival)}"),
        TIMES_AS_FAST,
        FASTER,
    ]
    return [table(columns, [line for line in contests(rows) if line.name in SUMMARY])]


def ratios(_: Row, rows: Rows) -> list[str]:
    """The ratio of every contest, over the fastest of the others; and where PyTorch is the faster in scaling."""
    columns = [
        Column("gpt_jax", lambda line: line.words),
        Column("against the fastest", lambda line: proper(line.rival)),
        TIMES_AS_FAST,
        FASTER,
    ]
    points = [(line.words, line.ratio["median"]) for line in of_part(rows, "scale") if line.ratio]
    result = f"gpt_jax is the faster at all {len(points)} sizes"
    if lost := [f"{words} ({number(ratio)} times as fast)" for words, ratio in points if ratio < 1]:
        result = f"**PyTorch, eager, is the faster** at {len(lost)} of {len(points)} sizes: {', '.join(lost)}"
    scaling = [f"step time against context, batch and depth: {result}"] if points else []
    return [table(columns, contests(rows)), bullets(scaling)]


def train(machine: Row, rows: Rows) -> list[str]:
    """Training steps: speed, then memory and compile time."""
    lines = of_part(rows, "train")

    def preset(line: Line) -> str:
        c = line.row["preset"]["model"]
        sizes = f"{c['n_layer']}/{c['n_head']}/{c['d_model']}, {c['context_length']}"
        return f"{line.name} ({sizes}, {line.row['preset']['batch_size']}, {line.row['dtype']})"

    names = present(lines, OURS, *PYTORCH, TRANSFORMERS)
    speed = [
        Column("preset", preset),
        *of_each(names, "{}, ms a step", lambda name, line: line.best(name, "step_ms")),
        TIMES_AS_FAST,
        FASTER,
    ]
    costs = [
        Column("preset", lambda line: line.name),
        Column("gpt_jax, tokens/s", lambda line: with_range(line.it.get("tokens_per_second"))),
        Column("MFU", lambda line: with_range(line.it.get("mfu"), md.percent)),
        Column("peak memory", lambda line: peak_memory(OURS, line, PYTORCH)),
        Column("PyTorch's, the less", lambda line: md.memory(min(peaks(line, PYTORCH).values(), default=None))),
        Column("compiling", lambda line: md.seconds(line.it.get("compile_seconds"))),
        Column("PyTorch's", lambda line: md.seconds(line.contestants.get(PYTORCH[1], {}).get("compile_seconds"))),
    ]
    mfu = [
        (line.name, f"MFU is of {md.flops(line.row['peak_flops'])} in {line.row['dtype']}: {line.row['peak_source']}")
        for line in lines
        if line.row["peak_flops"]
    ]
    remarks = [
        "a preset is layers/heads/width, context, batch, type; times as fast: than the better PyTorch",
        *merged(mfu),
        "compiling is what a first step takes longer than the others; that of gpt_jax's initial parameters is apart, "
        "and not counted",
    ]
    return [table(speed, lines), table(costs, lines), notes(machine, lines, remarks, rivals=PYTORCH)]


def variants(machine: Row, rows: Rows) -> list[str]:
    """Ours with other settings, a line each, the fastest of a preset in bold."""
    presets = of_part(rows, "variants")

    def median_ms(line: Line, who: str) -> float:
        return float(line.contestants[who]["step_ms"]["median"])

    columns = [
        Column("preset", lambda line: line.name if line.who == OURS else ""),
        Column("gpt_jax", lambda line: "as chosen by itself" if line.who == OURS else line.who),
        Column("ms a step", lambda line: line.best(line.who, "step_ms")),
        Column("times as fast as chosen", lambda line: number(median_ms(line, OURS) / median_ms(line, line.who))),
        Column("peak memory", lambda line: peak_memory(line.who, line)),
        Column("compiling", lambda line: md.seconds(line.it["compile_seconds"])),
    ]
    lines = [preset._replace(who=who) for preset in presets for who in preset.contestants]
    return [table(columns, lines), notes(machine, presets)]


def decode(machine: Row, rows: Rows) -> list[str]:
    """Decoding: tokens a second and the ratios, then first tokens and the share of the roofline, then memory."""
    lines = of_part(rows, "decode")
    cases = []
    for name, row in {case_of(line.row): line.row for line in lines}.items():
        kinds = row.get("memory", {})
        held = {who: {"peak_bytes": peak, "memory": kinds.get(who)} for who, peak in row["peak_bytes"].items()}
        cases.append(Line(name, name, row, held, {}))
    names = present(lines, OURS, TRANSFORMERS, *CACHES)
    bandwidths = [line.row["bandwidth"] for line in cases if line.row["bandwidth"]]
    best = max((found["max"] for found in bandwidths), default=0)

    def roofline(line: Line) -> str:
        if not best or OURS not in line.contestants:
            return NOTHING
        share = line.row["weight_bytes"] / line.row["batch"] / best
        return with_range({which: rate * share for which, rate in line.it["tokens_per_second"].items()}, md.percent)

    what = Column("decoding", lambda line: line.name)
    others = [name for name in names if name not in (OURS, CACHES[1])]
    speed = [
        what,
        *of_each(names, "{}, tokens/s", lambda name, line: line.best(name, "tokens_per_second", max)),
        *of_each(others, "times as fast as {}", lambda name, line: with_range(line.ratios.get(name))),
        FASTER,
    ]
    first = [
        what,
        *of_each(names, "{}, ms to the first token", lambda name, line: line.best(name, "first_token_ms")),
        Column("of the roofline", roofline),
    ]
    memory = [what, *of_each(names, "{}, peak memory", peak_memory)]
    remarks = [
        f"{line.name}: {line.row['new']} tokens after a prompt of {line.row['prompt']}, {line.row['dtype']}"
        for line in cases
    ]
    if best:
        remarks.append(
            "the roofline of all rows is by the best bandwidth that was read from memory in any round, "
            f"{number(best / 1e9)} GB/s; the slowest round had {number(min(x['min'] for x in bandwidths) / 1e9)}"
        )
    below = notes(machine, cases, remarks, when=" once the weights are there, compiling included")
    return [table(speed, lines), table(first, lines), table(memory, cases), below]


def learn(machine: Row, rows: Rows) -> list[str]:
    """Seconds to the loss aimed at, everything included."""
    parts: list[str] = []

    def until_then(line: Line) -> str:
        return line.best(line.who, "seconds") if line.it["seconds"] else "not reached"

    for recipe in of_part(rows, "learn"):
        columns = [
            Column(recipe.name, lambda line: proper(line.who)),
            Column(f"s {until(recipe.row)}", until_then),
            Column("iterations until then", lambda line: f"{line.it['iterations']:,}"),
            Column("tokens", lambda line: f"{line.it['tokens']:,}"),
            Column("s in all", lambda line: with_range(line.it["total_seconds"])),
            Column("loss at the end", lambda line: f"{line.it['whole_val_loss']:.3f}"),
            Column("peak memory", lambda line: peak_memory(line.who, line)),
            Column("gpt_jax is times as fast", lambda line: with_range(line.ratio)),
            FASTER,
        ]
        lines = [
            recipe._replace(who=who, ratios={who: recipe.ratios[who]} if who in recipe.ratios else {})
            for who in recipe.contestants
        ]
        remarks = [recipe.row["recipe"]]
        if not all(line.it["seconds"] for line in lines):
            remarks.append("where the loss is not reached, times as fast is by the seconds in all")
        parts += [table(columns, lines), notes(machine, [recipe], remarks)]
    return parts


def scale(_: Row, rows: Rows) -> list[str]:
    """Step time against context, batch and depth, and compile time against depth."""
    parts: list[str] = []
    for name, row in rows.items():
        if not name.startswith("scale/"):
            continue
        spec, model = row["base"], row["base"]["model"]
        where = (
            f"Where it is not varied: {model['n_layer']} layers, {model['n_head']} heads, width {model['d_model']}, "
            f"context {model['context_length']}, batch {spec['batch_size']}, vocabulary {model['vocab_size']}, "
            f"{model['dtype']}."
        )
        columns = [Column(row["x"], lambda line: line.name)]
        if name == "scale/compile":
            columns += of_each(list(SIZED.values())[2:], "compiling, {}, s", lambda who, line: line.best(who, "time"))
        else:
            columns += of_each(list(SIZED.values())[:2], "{}, ms a step", lambda who, line: line.best(who, "time"))
            columns.append(TIMES_AS_FAST)
        failed = bullets(f"{proper(who)}: {why}" for who, why in row["failed"].items())
        parts += [*([] if parts else [where]), table(columns, scaled(row["x"], row)), failed]
    return parts


def machine(machine: Row, rows: Rows) -> list[str]:
    """The machine, and what was installed when its rows were measured."""
    under = [row["under"] for row in rows.values() if "under" in row]
    machines = [each.get("machine", machine) for each in under] or [machine]

    def all_of(values: Iterable[str], between: str = " and ") -> str:
        return between.join(dict.fromkeys(filter(None, values)))

    packages = dict.fromkeys(package for each in under for package in each["versions"])
    flags = sorted({f"`{name}={value}`" for each in under for name, value in each["flags"].items() if value})
    on_cpu, peak = machine["platform"] == "cpu", machine.get("peak_flops")
    lines = {
        "machine": machine["name"],
        "processor": all_of(f"{of['cpu']}, {of['cores']} cores, {of['memory_gib']} GiB" for of in machines),
        "accelerator": "" if on_cpu else all_of(f"{of['devices']} x {of['device']}" for of in machines),
        "peak of a device": f"{md.flops(peak)} in bfloat16" if peak else "",
        "Python": all_of(of["python"] for of in machines),
        **{package: all_of(each["versions"].get(package, "") for each in under) for package in packages},
        "flags": ", ".join(flags),
        "measured at": all_of((each["commit"] for each in under), ", "),
    }
    return [facts("", {name: fact for name, fact in lines.items() if fact})]


PARTS = {make.__name__: make for make in (summary, ratios, train, variants, decode, learn, scale, machine)}
"""The tables of a machine's file of results."""


def startup(measured: Row) -> str:
    """What `alone.startup` measured."""
    title = "from starting `train.py` to the end of the first step (`python -m benchmarks startup`)"
    kinds = {"empty compile cache": "cold", "warm compile cache": "warm"}
    return facts(title, {what: f"{with_range(spread(measured['seconds'][kind]))} s" for what, kind in kinds.items()})


def prepare(measured: Row) -> str:
    """What `alone.prepare` measured."""
    found, alone = measured["prepare"], measured["sentencepiece_alone_on_one_core"]
    rate = f"{found['mb_per_second']:.1f} MB/s, {found['tokens_per_second'] / 1e6:.1f} million tokens/s"
    title = f"`prepare` of {found['text_bytes'] / 2**30:.1f} GiB of text (`python -m benchmarks prepare`)"
    lines = {
        "time": f"{found['seconds']:.0f} s: {rate}",
        "cores busy, reading twice included": f"{found['cores_busy']:.2f} of {measured['machine']['cores']}",
        "memory at most, all processes": f"{found['peak_mib_all_processes']:.0f} MiB",
        "SentencePiece alone on one core": f"{alone['tokens_per_second'] / 1e6:.1f} million tokens/s",
    }
    return facts(title, lines)


def placement(measured: Row) -> str:
    """What `train.placement` measured."""
    lines = {}
    for name in ("nano", "baby"):
        jit, mesh = (with_range(measured[name]["step_ms"][kind]) for kind in ("jit", "mesh"))
        ratio = with_range(measured[name]["second_over_first"])
        what = f"{name}, one device: a step by jit, and on a mesh of one"
        lines[what] = f"{jit} and {mesh} ms: {ratio} times as long"
    pmap, mesh = (with_range(measured["tiny"]["call_ms"][kind]) for kind in ("pmap", "mesh"))
    lines["two devices: the call of a step by pmap, and on a mesh"] = f"{pmap} and {mesh} ms"
    return facts("what a placement costs (`python -m benchmarks placement --rounds 9`)", lines)


def restore(measured: Row) -> str:
    """What tests/benchmarks/restoring.py measured: a line for each writer and reader, which has two rows."""
    lines: dict[str, list[str]] = {}
    for row in sorted(measured["rows"], key=lambda row: not row["freed_memory_is_kept"]):
        lines.setdefault(f"{row['written_by']} to {row['restored_to']}", []).append(with_range(row["times_the_state"]))
    title = "memory to restore GPT-2 124M, times its state (`python -m tests.benchmarks.restoring`)"
    columns = [
        Column(title, lambda line: line[0]),
        Column("as in training", lambda line: line[1][0]),
        Column("if all that is freed goes back", lambda line: line[1][1]),
    ]
    return table(columns, lines.items())


ALONE = {make.__name__: make for make in (startup, prepare, placement, restore)}
"""The files that hold one measurement, and its table."""


def notes(
    machine: Row, lines: Sequence[Line], remarks: Sequence[str] = (), rivals: Sequence[str] = RIVALS, when: str = ""
) -> str:
    """What stands below a part's tables: remarks, what peak memory is, where ours needs more, notes and failures.

    when: the time in which peak memory was counted.
    """
    if not lines:
        return ""
    kinds = "state: weights and what the optimizer or the cache holds, on all devices; the rest: temporaries"
    measure_of_memory = (
        f"peak memory is the whole process's{when}; libraries: what it held with its devices started, before there was "
        f"any array; {kinds}, compiling, what was compiled, and what the allocator keeps"
        if machine["platform"] == "cpu"
        else f"peak memory is what was allocated on the device; {kinds} and batches"
    )
    more_memory = [
        f"{line.name}: {ours} needs more memory, {memory_by_kind(machine, line, ours)}, than {proper(other)}, "
        f"{memory_by_kind(machine, line, other)}"
        for line in lines
        for ours in line.contestants
        if (other := lighter(line, ours, rivals))
    ]
    noted = [(line.name, note) for line in lines for note in line.row["notes"]]
    failed = [(line.name, f"{proper(who)} failed: {why}") for line in lines for who, why in line.row["failed"].items()]
    return bullets([*remarks, measure_of_memory, *more_memory, *merged([*noted, *failed])])


def merged(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Notes on names: a line for all names that have the same note."""
    names: dict[str, list[str]] = {}
    for name, note in notes:
        names.setdefault(note, []).append(name)
    return [f"{', '.join(of)}: {note}" for note, of in names.items()]


def peaks(line: Line, names: Iterable[str]) -> dict[str, int]:
    """The peak memory in bytes of those contestants of whom it is known."""
    found = {name: line.contestants.get(name, {}).get("peak_bytes") for name in names}
    return {name: peak for name, peak in found.items() if peak is not None}


def lighter(line: Line, ours: str, rivals: Sequence[str]) -> str:
    """The rival that needs the least memory, where a contestant of ours needs more; empty where there is none."""
    others, peak = peaks(line, rivals), peaks(line, [ours]).get(ours, 0)
    least = min(others, key=lambda name: others[name], default="")
    return least if ours.startswith(OURS) and least and peak > others[least] else ""


def peak_memory(name: str, line: Line, rivals: Sequence[str] = RIVALS) -> str:
    """A contestant's peak memory; ours says so where it is more than the least of the rivals'."""
    return md.memory(peaks(line, [name]).get(name)) + (", more" if lighter(line, name, rivals) else "")


def memory_by_kind(machine: Row, line: Line, name: str) -> str:
    """A contestant's peak memory, and what it is made up of."""
    peak, kinds = line.contestants[name]["peak_bytes"], line.contestants[name].get("memory")
    if not kinds:
        return f"{md.memory(peak)}, by kind not recorded"
    # On an accelerator the libraries hold nothing on the device.
    parts = {kind: kinds[kind] for kind in (("libraries", "state") if machine["platform"] == "cpu" else ("state",))}
    parts["the rest"] = max(0, peak - sum(parts.values()))
    if "temporaries" in kinds:
        parts["XLA's own account of temporaries"] = kinds["temporaries"]
    return f"{md.memory(peak)} ({', '.join(f'{kind} {md.memory(value)}' for kind, value in parts.items())})"


def present(lines: Sequence[Line], *names: str) -> list[str]:
    """Those of the contestants that are in a line, or failed there."""
    return [n for n in names if any(n in line.contestants or n in line.row["failed"] for line in lines)]


def case_of(row: Row) -> str:
    """What a row of decoding measures."""
    return f"batch {row['batch']}" + (f", prompt {row['prompt']}" if row["prompt"] > 16 else "")


def until(row: Row) -> str:
    """The goal of learning."""
    return f"to a loss of {row['target']:g}"


def proper(name: str) -> str:
    """A contestant as it is written."""
    return name.replace("pytorch", "PyTorch")
