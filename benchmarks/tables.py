"""The tables of what was measured: each declares its columns, and what is to be said below it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from benchmarks import markdown as md
from benchmarks.contest import OURS, PYTORCH, TRANSFORMERS
from benchmarks.markdown import NOTHING, Column, bullets, facts, number, table, with_range
from benchmarks.measure import spread
from benchmarks.results import Row

Rows = dict[str, Row]
Choice = Callable[[Iterable[float]], float]

CACHES = ("pytorch, cache", "pytorch, no cache")


class Line(NamedTuple):
    """A line of a table: its name, the same in words, the row of results that it is from, what the contestants came to,
    how many times as fast as each of the others ours is, and the contestant where each has a line of its own."""

    name: str
    words: str
    row: Row
    contestants: Mapping[str, Row]
    ratios: Mapping[str, Row]
    who: str = OURS

    @property
    def it(self) -> Row:
        """What the line's contestant came to."""
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
        """Who is faster, ours or the rival: who was so in all rounds, or else neither."""
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
    """A column for each contestant, whose name stands in the title, and in `cell` before the line."""
    return [Column(title.format(proper(name)), partial(cell, name)) for name in names]


FASTER = Column("faster", lambda line: line.faster)


def trained(name: str, row: Row) -> list[Line]:
    """A preset, with the ratio over the better of PyTorch's."""
    ratio = row.get("times_as_fast")
    words = f"train {name}, {row['dtype']}"
    return [Line(name, words, row, row["contestants"], {ratio["over"]: ratio} if ratio else {})]


def decoded(_: str, row: Row) -> list[Line]:
    """A line for each way to choose tokens."""
    lines = []
    for mode, found in row["modes"].items():
        name = f"{case_of(row)}, {mode.replace('top_', 'top-k ')}"
        words = f"decode GPT-2, {row['dtype']}, {name}"
        lines.append(Line(name, words, row, found["contestants"], found["times_as_fast"]))
    return lines


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
        failed = [who for name, who in SIZED.items() if f"{name} at {x}" in row["failed"]]
        ratio = {}
        if OURS in times and PYTORCH[0] in times:
            ratio = {PYTORCH[0]: {"median": times[PYTORCH[0]]["median"] / times[OURS]["median"]}}
        lines.append(Line(f"{x:,}", f"{axis} {x:,}", {"failed": failed}, figures, ratio))
    return lines


LINES: dict[str, Callable[[str, Row], list[Line]]] = {
    "train": trained,
    "variants": trained,
    "decode": decoded,
    "learn": learned,
    "scale": scaled,
}
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
"""The contests that stand for all, by the names of their lines: what they are in words, and the figure."""


def summary(_: Row, rows: Rows) -> list[str]:
    """Some of the contests, with the figures of both sides."""

    def median(line: Line, who: str) -> str:
        found = line.contestants[who][SUMMARY[line.name][1]]
        return number(found["median"]) if found else "not reached"

    columns = [
        Column("", lambda line: SUMMARY[line.name][0]),
        Column("gpt_jax", lambda line: median(line, OURS)),
        Column("best of PyTorch and transformers", lambda line: f"{median(line, line.rival)}, {proper(line.rival)}"),
        Column("times as fast", lambda line: with_range(line.ratio)),
        FASTER,
    ]
    return [table(columns, [line for line in contests(rows) if line.name in SUMMARY])]


def ratios(_: Row, rows: Rows) -> list[str]:
    """The ratio of every contest, over the fastest of the others; and where PyTorch is the faster in scaling."""
    columns = [
        Column("gpt_jax", lambda line: line.words),
        Column("against the fastest", lambda line: proper(line.rival)),
        Column("times as fast", lambda line: with_range(line.ratio)),
        FASTER,
    ]
    points = [line for line in of_part(rows, "scale") if line.ratio]
    said = f"gpt_jax is the faster at all {len(points)} sizes"
    if lost := [(line.words, line.ratio["median"]) for line in points if line.ratio["median"] < 1]:  # type: ignore[index]
        where = ", ".join(f"{words} ({number(ratio)} times as fast)" for words, ratio in lost)
        said = f"**PyTorch, eager, is the faster** at {len(lost)} of {len(points)} sizes: {where}"
    scaling = [f"step time against context, batch and depth: {said}"] if points else []
    return [table(columns, contests(rows)), bullets(scaling)]


def train(machine: Row, rows: Rows) -> list[str]:
    """Training steps: speed, then memory and compile time."""
    lines = of_part(rows, "train")
    names = present(lines, (OURS, *PYTORCH, TRANSFORMERS))
    speed = [
        Column("preset", lambda line: f"{line.name} ({size(line.row)})"),
        *of_each(names, "{}, ms a step", lambda name, line: line.best(name, "step_ms")),
        Column("times as fast", lambda line: with_range(line.ratio)),
        FASTER,
    ]
    costs = [
        Column("preset", lambda line: line.name),
        Column("gpt_jax, tokens/s", lambda line: with_range(line.it.get("tokens_per_second"))),
        Column("MFU", lambda line: with_range(line.it.get("mfu"), md.percent)),
        Column("peak memory", lambda line: marked(peaks(line, *PYTORCH, OURS), OURS)),
        Column(
            "PyTorch's, the less",
            lambda line: md.memory(min(peaks(line, *PYTORCH).values(), default=None)),
        ),
        Column("compiling", lambda line: md.seconds(line.it.get("compile_seconds"))),
        Column("PyTorch's", lambda line: md.seconds(line.contestants.get(PYTORCH[1], {}).get("compile_seconds"))),
    ]
    remarks = [
        "a preset is layers/heads/width, context, batch, type; times as fast: than the better PyTorch",
        *said_once(
            (line.name, f"MFU is of {md.flops(row['peak_flops'])} in {row['dtype']}: {row['peak_source']}")
            for line in lines
            if (row := line.row)["peak_flops"]
        ),
        "compiling is what a first step takes longer than the others; that of gpt_jax's initial parameters is apart, "
        "and not counted",
        measure_of_memory(machine),
        *(said for line in lines for said in more_memory(machine, line, peaks(line, *PYTORCH, OURS))),
        *notes(lines),
    ]
    return [table(speed, lines), table(costs, lines), bullets(remarks)] if lines else []


def variants(machine: Row, rows: Rows) -> list[str]:
    """Ours with other settings, a line each, the fastest of a preset in bold."""
    presets = of_part(rows, "variants")
    columns = [
        Column("preset", lambda line: line.name if line.who == OURS else ""),
        Column("gpt_jax", lambda line: "as chosen by itself" if line.who == OURS else line.who),
        Column("ms a step", lambda line: line.best(line.who, "step_ms")),
        Column("times as fast as chosen", lambda line: number(median_ms(line, OURS) / median_ms(line, line.who))),
        Column("peak memory", lambda line: md.memory(line.it["peak_bytes"])),
        Column("compiling", lambda line: md.seconds(line.it["compile_seconds"])),
    ]

    def median_ms(line: Line, who: str) -> float:
        return float(line.contestants[who]["step_ms"]["median"])

    said = [measure_of_memory(machine), *notes(presets)] if presets else []
    return [
        table(columns, [preset._replace(who=who) for preset in presets for who in preset.contestants]),
        bullets(said),
    ]


def decode(machine: Row, rows: Rows) -> list[str]:
    """Decoding: tokens a second and the ratios, then first tokens and the share of the roofline, then memory."""
    lines = of_part(rows, "decode")
    by_case = {case_of(line.row): line.row for line in lines}
    cases = [
        Line(name, name, row, {n: {"memory": x} for n, x in row.get("memory", {}).items()}, {})
        for name, row in by_case.items()
    ]
    names = present(lines, (OURS, TRANSFORMERS, *CACHES))
    bandwidths = [line.row["bandwidth"] for line in cases if line.row["bandwidth"]]
    best = max((found["max"] for found in bandwidths), default=0)
    slowest = min((found["min"] for found in bandwidths), default=0)

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
    held = [what, *of_each(names, "{}, peak memory", lambda name, line: marked(line.row["peak_bytes"], name))]
    measured_by = (
        "the roofline of all rows is by the best bandwidth that was read from memory in any round, "
        f"{number(best / 1e9)} GB/s; the slowest round had {number(slowest / 1e9)}"
    )
    remarks = [
        *(
            f"{name}: {row['new']} tokens after a prompt of {row['prompt']}, {row['dtype']}"
            for name, row in by_case.items()
        ),
        measure_of_memory(machine, " once the weights are there, compiling included"),
        *([measured_by] if best else []),
        *(said for line in cases for said in more_memory(machine, line, line.row["peak_bytes"])),
        *notes(cases),
    ]
    tables = [table(speed, lines), table(first, lines), table(held, cases)]
    return [*tables, bullets(remarks)] if lines else []


def learn(machine: Row, rows: Rows) -> list[str]:
    """Seconds to the loss aimed at, everything included."""
    parts: list[str] = []
    for recipe in of_part(rows, "learn"):
        found, row = recipe.contestants, recipe.row
        columns = [
            Column(recipe.name, lambda line: proper(line.who)),
            Column(
                f"s {until(row)}", lambda line: line.best(line.who, "seconds") if line.it["seconds"] else "not reached"
            ),
            Column("iterations until then", lambda line: f"{line.it['iterations']:,}"),
            Column("tokens", lambda line: f"{line.it['tokens']:,}"),
            Column("s in all", lambda line: with_range(line.it["total_seconds"])),
            Column("loss at the end", lambda line: f"{line.it['whole_val_loss']:.3f}"),
            Column("peak memory", lambda line: marked(peaks(line, *line.contestants), line.who)),
            Column("gpt_jax is times as fast", lambda line: with_range(line.ratio)),
            FASTER,
        ]
        lines = [
            recipe._replace(who=who, ratios={n: ratio for n, ratio in recipe.ratios.items() if n == who})
            for who in found
        ]
        late = "where the loss is not reached, times as fast is by the seconds in all"
        remarks = [
            row["recipe"],
            *([] if all(it["seconds"] for it in found.values()) else [late]),
            measure_of_memory(machine),
            *more_memory(machine, recipe, peaks(recipe, *found)),
            *notes([recipe]),
        ]
        parts += [table(columns, lines), bullets(remarks)]
    return parts


def scale(_: Row, rows: Rows) -> list[str]:
    """Step time against context, batch and depth, and compile time against depth."""
    parts: list[str] = []
    for name, row in rows.items():
        if not name.startswith("scale/"):
            continue
        model = row["base"]["model"]
        where = (
            f"Where it is not varied: {model['n_layer']} layers, {model['n_head']} heads, width {model['d_model']}, "
            f"context {model['context_length']}, batch {row['base']['batch_size']}, vocabulary {model['vocab_size']}, "
            f"{model['dtype']}."
        )
        columns = [Column(row["x"], lambda line: line.name)]
        if name == "scale/compile":
            columns += of_each(list(SIZED.values())[2:], "compiling, {}, s", lambda who, line: line.best(who, "time"))
        else:
            columns += of_each(list(SIZED.values())[:2], "{}, ms a step", lambda who, line: line.best(who, "time"))
            columns.append(Column("times as fast", lambda line: with_range(line.ratio)))
        failed = bullets(f"{proper(who)}: {why}" for who, why in row["failed"].items())
        parts += [*([] if parts else [where]), table(columns, scaled(row["x"], row)), failed]
    return parts


def machine(machine: Row, rows: Rows) -> list[str]:
    """The machine, and what was installed when its rows were measured."""
    under = [row["under"] for row in rows.values() if "under" in row]

    def all_of(values: Iterable[str], between: str = " and ") -> str:
        return between.join(dict.fromkeys(filter(None, values)))

    def fact(write: Callable[[Row], str]) -> str:
        return all_of(write(each.get("machine", machine)) for each in under) or write(machine)

    lines = {
        "machine": machine["name"],
        "processor": fact(lambda of: f"{of['cpu']}, {of['cores']} cores, {of['memory_gib']} GiB"),
    }
    if machine["platform"] != "cpu":
        lines["accelerator"] = fact(lambda of: f"{of['devices']} x {of['device']}")
    if machine.get("peak_flops"):
        lines["peak of a device"] = f"{md.flops(machine['peak_flops'])} in bfloat16"
    lines["Python"] = fact(lambda of: of["python"])
    for package in dict.fromkeys(package for each in under for package in each["versions"]):
        lines[package] = all_of(each["versions"].get(package, "") for each in under)
    flags = sorted({f"`{name}={value}`" for each in under for name, value in each["flags"].items() if value})
    lines["flags"], lines["measured at"] = ", ".join(flags), all_of((each["commit"] for each in under), ", ")
    return [facts("", {name: fact for name, fact in lines.items() if fact})]


PARTS: dict[str, Callable[[Row, Rows], list[str]]] = {
    "summary": summary,
    "ratios": ratios,
    "train": train,
    "variants": variants,
    "decode": decode,
    "learn": learn,
    "scale": scale,
    "machine": machine,
}
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
        lines[f"{name}, one device: a step by jit, and on a mesh of one"] = (
            f"{jit} and {mesh} ms: {ratio} times as long"
        )
    pmap, mesh = (with_range(measured["tiny"]["call_ms"][kind]) for kind in ("pmap", "mesh"))
    lines["two devices: the call of a step by pmap, and on a mesh"] = f"{pmap} and {mesh} ms"
    return facts("what a placement costs (`python -m benchmarks placement --rounds 9`)", lines)


def restore(measured: Row) -> str:
    """What tests/benchmarks/restoring.py measured: a line for each writer and reader, which has two rows."""
    lines: dict[str, dict[bool, str]] = {}
    for row in measured["rows"]:
        line = lines.setdefault(f"{row['written_by']} to {row['restored_to']}", {})
        line[row["freed_memory_is_kept"]] = with_range(row["times_the_state"])
    title = "memory to restore GPT-2 124M, times its state (`python -m tests.benchmarks.restoring`)"
    columns = [
        Column(title, lambda line: line[0]),
        Column("as in training", lambda line: line[1][True]),
        Column("if all that is freed goes back", lambda line: line[1][False]),
    ]
    return table(columns, lines.items())


ALONE: dict[str, Callable[[Row], str]] = {
    "startup": startup,
    "prepare": prepare,
    "placement": placement,
    "restore": restore,
}
"""The files that hold one measurement, and its table."""


def present(lines: Sequence[Line], names: Sequence[str]) -> list[str]:
    """Those of the contestants that are in a line, or failed there."""
    return [n for n in names if any(n in line.contestants or n in line.row["failed"] for line in lines)]


def peaks(line: Line, *names: str) -> dict[str, Any]:
    """The peak memory of those of the contestants that are there."""
    return {name: line.contestants[name]["peak_bytes"] for name in names if name in line.contestants}


def least_of_others(peaks: Mapping[str, int | None], ours: str) -> str:
    """The contestant that needs the least memory; empty where ours needs no more, or is not ours."""
    others = {name: peak for name, peak in peaks.items() if peak is not None and not name.startswith(OURS)}
    least = min(others, key=lambda name: others[name], default="")
    return least if ours.startswith(OURS) and least and (peaks.get(ours) or 0) > others[least] else ""


def marked(peaks: Mapping[str, int | None], name: str) -> str:
    """A contestant's peak memory; ours says so where it is more than the least of the others."""
    return md.memory(peaks.get(name)) + (", more" if least_of_others(peaks, name) else "")


def more_memory(machine: Row, line: Line, peaks: Mapping[str, int | None]) -> list[str]:
    """Where ours needs more memory than the least of the others: what each holds, as it was measured."""

    def by_kind(name: str) -> str:
        peak, kinds = peaks[name] or 0, line.contestants.get(name, {}).get("memory")
        if not kinds:
            return f"{md.memory(peak)}, by kind not recorded"
        parts = {kind: kinds[kind] for kind in ("libraries", "state")[machine["platform"] != "cpu" :]}
        parts["the rest"] = max(0, peak - sum(parts.values()))
        if "temporaries" in kinds:
            parts["XLA's own account of temporaries"] = kinds["temporaries"]
        return f"{md.memory(peak)} ({', '.join(f'{kind} {md.memory(value)}' for kind, value in parts.items())})"

    return [
        f"{line.name}: {ours} needs more memory, {by_kind(ours)}, than {proper(other)}, {by_kind(other)}"
        for ours in peaks
        if (other := least_of_others(peaks, ours))
    ]


def measure_of_memory(machine: Row, when: str = "") -> str:
    """What peak memory is, and its kinds."""
    kinds = "state: weights and what the optimizer or the cache holds, on all devices; the rest: temporaries"
    if machine["platform"] != "cpu":
        return f"peak memory is what was allocated on the device; {kinds} and batches"
    return (
        f"peak memory is the whole process's{when}; libraries: what it held with its devices started, before there was "
        f"any array; {kinds}, compiling, what was compiled, and what the allocator keeps"
    )


def notes(lines: Sequence[Line]) -> list[str]:
    """What was noted, and who failed for what reason."""
    return said_once(
        (line.name, said)
        for line in lines
        for said in (*line.row["notes"], *(f"{proper(who)} failed: {why}" for who, why in line.row["failed"].items()))
    )


def said_once(said: Iterable[tuple[str, str]]) -> list[str]:
    """What is said of names: a line for all of which the same is said."""
    names: dict[str, list[str]] = {}
    for name, line in said:
        names.setdefault(line, []).append(name)
    return [f"{', '.join(of)}: {line}" for line, of in names.items()]


def case_of(row: Row) -> str:
    """What a row of decoding measures."""
    return f"batch {row['batch']}" + (f", prompt {row['prompt']}" if row["prompt"] > 16 else "")


def until(row: Row) -> str:
    """The goal of learning."""
    return f"to a loss of {row['target']:g}"


def size(row: Row) -> str:
    """A preset in short."""
    c = row["preset"]["model"]
    sizes = f"{c['n_layer']}/{c['n_head']}/{c['d_model']}, {c['context_length']}"
    return f"{sizes}, {row['preset']['batch_size']}, {row['dtype']}"


def proper(name: str) -> str:
    """A contestant as it is written."""
    return name.replace("pytorch", "PyTorch")
