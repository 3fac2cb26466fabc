"""The tables of the rows of a machine: what `python -m benchmarks` measures side by side."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.markdown import NOTHING, bullets, flops, memory, number, percent, seconds, table, with_range
from benchmarks.results import Row

Rows = dict[str, Row]

OURS, TRANSFORMERS = "gpt_jax", "transformers"
PYTORCH = ("pytorch, eager", "pytorch, compiled")


def summary(_: Row, rows: Rows) -> list[str]:
    """The ratio of every row of training, decoding and learning, over the fastest of the others, with the winner; and
    where PyTorch is the faster in scaling."""
    found: list[tuple[str, str, Row]] = []
    for preset, row in of_part(rows, "train"):
        if "times_as_fast" in row:
            found.append((f"train {preset}, {row['dtype']}", row["times_as_fast"]["over"], row["times_as_fast"]))
    for row in decoding(rows):
        for mode, of_mode in row["modes"].items():
            ratios = of_mode["times_as_fast"]
            if ratios:
                fastest = min(ratios, key=lambda other: ratios[other]["median"])
                what = f"decode GPT-2, {row['dtype']}, {case_of(row)}, {named(mode)}"
                found.append((what, fastest, ratios[fastest]))
    for name, row in of_part(rows, "learn"):
        ratios = {other: row["times_as_fast"][other] for other in PYTORCH if other in row["times_as_fast"]}
        if ratios:
            fastest = min(ratios, key=lambda other: ratios[other]["median"])
            found.append((f"learn {name}, {until(row)}", fastest, ratios[fastest]))
    return [
        table(
            ["gpt_jax", "against the fastest", "times as fast", "faster"],
            [[what, proper(other), with_range(ratio), faster(ratio, other)] for what, other, ratio in found],
        ),
        bullets(lost_points(rows)),
    ]


def lost_points(rows: Rows) -> list[str]:
    """Where ours is not the faster in scaling, by the medians."""
    lost, n_points = [], 0
    for axis, row in of_part(rows, "scale"):
        for point in row["points"]:
            if "pytorch" in point and OURS in point:
                n_points += 1
                ratio = point["pytorch"]["median"] / point[OURS]["median"]
                if ratio < 1:
                    lost.append(f"{axis} {point['x']:,} ({number(ratio)} times as fast)")
    if not n_points:
        return []
    if not lost:
        return [f"step time against context, batch and depth: gpt_jax is the faster at all {n_points} sizes"]
    return [
        f"step time against context, batch and depth: **PyTorch, eager, is the faster** at {len(lost)} of {n_points} "
        f"sizes: {', '.join(lost)}"
    ]


def train(machine: Row, rows: Rows) -> list[str]:
    """Training steps: speed, then memory and compile time, then what is to be said of them."""
    presets = of_part(rows, "train")
    names = present(presets, (OURS, *PYTORCH, TRANSFORMERS))
    speed, costs, remarks = [], [], []
    for preset, row in presets:
        contestants = row["contestants"]
        ratio = row.get("times_as_fast")
        ours = contestants.get(OURS, {})
        speed.append(
            [
                f"{preset} ({size(row)})",
                *best(names, {name: contestants[name]["step_ms"] for name in contestants}, row, min),
                with_range(ratio) if ratio else NOTHING,
                faster(ratio, ratio["over"]) if ratio else NOTHING,
            ]
        )
        theirs = {name: contestants[name]["peak_bytes"] for name in PYTORCH if name in contestants}
        peaks = {**theirs, **({OURS: ours["peak_bytes"]} if ours else {})}
        remarks += more_memory(
            machine, preset, peaks, {name: found.get("memory") for name, found in contestants.items()}
        )
        costs.append(
            [
                preset,
                with_range(ours.get("tokens_per_second")),
                with_range(ours.get("mfu"), percent),
                marked(peaks, OURS),
                memory(min(theirs.values(), default=None)),
                seconds(ours.get("compile_seconds")),
                seconds(contestants.get(PYTORCH[1], {}).get("compile_seconds")),
            ]
        )
    if not presets:
        return []
    return [
        table(["preset", *(f"{proper(name)}, ms a step" for name in names), "times as fast", "faster"], speed),
        table(
            [
                "preset",
                "gpt_jax, tokens/s",
                "MFU",
                "peak memory",
                "PyTorch's, the less",
                "compiling",
                "PyTorch's",
            ],
            costs,
        ),
        bullets(
            [
                "a preset is layers/heads/width, context, batch, type; times as fast: than the better PyTorch",
                *peak_flops(presets),
                "compiling is what a first step takes longer than the others; that of gpt_jax's initial parameters is "
                "apart, and not counted",
                measure_of_memory(machine),
                *remarks,
                *notes(presets),
            ]
        ),
    ]


def variants(machine: Row, rows: Rows) -> list[str]:
    """Ours with other settings, a line each, the fastest of a preset in bold."""
    presets = of_part(rows, "variants")
    lines = []
    for preset, row in presets:
        contestants = row["contestants"]
        names = tuple(contestants)
        times = best(names, {name: contestants[name]["step_ms"] for name in names}, row, min)
        for name, time in zip(names, times, strict=True):
            against = contestants[OURS]["step_ms"]["median"] / contestants[name]["step_ms"]["median"]
            lines.append(
                [
                    preset if name == OURS else "",
                    "as chosen by itself" if name == OURS else name.removeprefix(f"{OURS}, "),
                    time,
                    number(against),
                    memory(contestants[name]["peak_bytes"]),
                    seconds(contestants[name]["compile_seconds"]),
                ]
            )
    head = ["preset", "gpt_jax", "ms a step", "times as fast as chosen", "peak memory", "compiling"]
    said = [measure_of_memory(machine), *notes(presets)] if presets else []
    return [table(head, lines), bullets(said)]


def decode(machine: Row, rows: Rows) -> list[str]:
    """Decoding: tokens a second and the ratios, then first tokens, the share of the roofline and memory."""
    measured = decoding(rows)
    if not measured:
        return []
    modes = [
        (f"{case_of(row)}, {named(mode)}", row, of_mode) for row in measured for mode, of_mode in row["modes"].items()
    ]
    names = present([(name, of_mode) for name, _, of_mode in modes], (OURS, TRANSFORMERS, *CACHES))
    others = [name for name in names if name != OURS and name != CACHES[1]]
    bandwidths = [row["bandwidth"] for row in measured if row["bandwidth"]]
    bandwidth = max((found["max"] for found in bandwidths), default=None)
    speed, costs, held, remarks = [], [], [], []
    if bandwidth:
        slowest = min(found["min"] for found in bandwidths)
        remarks.append(
            f"the roofline of all rows is by the best bandwidth that was read from memory in any round, "
            f"{number(bandwidth / 1e9)} GB/s; the slowest round had {number(slowest / 1e9)}"
        )
    for name, row, of_mode in modes:
        contestants, ratios = of_mode["contestants"], of_mode["times_as_fast"]
        hardest = min(ratios, key=lambda other: ratios[other]["median"], default="")
        speed.append(
            [
                name,
                *best(names, {n: contestants[n]["tokens_per_second"] for n in contestants}, row, max),
                *(with_range(ratios.get(other)) for other in others),
                faster(ratios[hardest], hardest) if hardest else NOTHING,
            ]
        )
        first = {n: contestants[n]["first_token_ms"] for n in contestants}
        rates = contestants.get(OURS, {}).get("tokens_per_second")
        share = None
        if rates and bandwidth:
            of_rate = row["weight_bytes"] / row["batch"] / bandwidth
            share = {which: rate * of_rate for which, rate in rates.items()}
        costs.append([name, *best(names, first, row, min), with_range(share, percent)])
    for row in measured:
        held.append([case_of(row), *(marked(row["peak_bytes"], name) for name in names)])
        remarks += more_memory(machine, case_of(row), row["peak_bytes"], row.get("memory", {}))
    as_fast = [f"times as fast as {proper(other)}" for other in others]
    return [
        table(["decoding", *(f"{proper(name)}, tokens/s" for name in names), *as_fast, "faster"], speed),
        table(["decoding", *(f"{proper(name)}, ms to the first token" for name in names), "of the roofline"], costs),
        table(["decoding", *(f"{proper(name)}, peak memory" for name in names)], held),
        bullets(
            [
                *(
                    f"{case_of(row)}: {row['new']} tokens after a prompt of {row['prompt']}, {row['dtype']}"
                    for row in measured
                ),
                measure_of_memory(machine, " once the weights are there, compiling included"),
                *remarks,
                *notes([(case_of(row), row) for row in measured]),
            ]
        ),
    ]


CACHES = ("pytorch, cache", "pytorch, no cache")


def decoding(rows: Rows) -> list[Row]:
    """The rows of decoding, the short prompts first, by batch."""
    return sorted((row for _, row in of_part(rows, "decode")), key=lambda row: (row["prompt"], row["batch"]))


def case_of(row: Row) -> str:
    """What a row of decoding measures."""
    return f"batch {row['batch']}" + (f", prompt {row['prompt']}" if row["prompt"] > 16 else "")


def named(mode: str) -> str:
    """How tokens are chosen."""
    return mode.replace("top_", "top-k ")


def marked(peak_bytes: Mapping[str, int | None], name: str) -> str:
    """A contestant's peak memory; ours says so where it is more than the least of the others."""
    return memory(peak_bytes.get(name)) + (", more" if least_of_others(peak_bytes, name) else "")


def least_of_others(peak_bytes: Mapping[str, int | None], ours: str) -> str | None:
    """The contestant that needs the least memory; None where ours needs no more, or is not ours."""
    others = {name: peak for name, peak in peak_bytes.items() if peak is not None and not name.startswith(OURS)}
    least = min(others, key=lambda name: others[name], default=None)
    peak = peak_bytes.get(ours) if ours.startswith(OURS) else None
    return least if least is not None and peak is not None and peak > others[least] else None


def more_memory(
    machine: Row, what: str, peak_bytes: Mapping[str, int | None], held: Mapping[str, Row | None]
) -> list[str]:
    """Where ours needs more memory than the least of the others: what each holds, as it was measured."""

    def by_kind(name: str) -> str:
        peak, kinds = peak_bytes[name], held.get(name)
        assert peak is not None
        if not kinds:
            return f"{memory(peak)}, by kind not recorded"
        parts = {
            kind: kinds[kind] for kind in ("libraries", "state") if kind != "libraries" or machine["platform"] == "cpu"
        }
        said = [f"{kind} {memory(value)}" for kind, value in parts.items()]
        said.append(f"the rest {memory(max(0, peak - sum(parts.values())))}")
        if "temporaries" in kinds:
            said.append(f"XLA's own account of temporaries {memory(kinds['temporaries'])}")
        return f"{memory(peak)} ({', '.join(said)})"

    return [
        f"{what}: {ours} needs more memory, {by_kind(ours)}, than {proper(other)}, {by_kind(other)}"
        for ours in peak_bytes
        if (other := least_of_others(peak_bytes, ours))
    ]


def learn(machine: Row, rows: Rows) -> list[str]:
    """Seconds to the loss aimed at, everything included."""
    recipes = of_part(rows, "learn")
    parts = []
    for name, row in recipes:
        contestants = row["contestants"]
        names = tuple(contestants)
        reached = {n: contestants[n]["seconds"] for n in names if contestants[n]["seconds"]}
        late = "where the loss is not reached, times as fast is by the seconds in all"
        unreached = [] if len(reached) == len(names) else [late]
        peaks = {n: contestants[n]["peak_bytes"] for n in names}
        lines = []
        for n, time in zip(names, best(names, reached, row, min), strict=True):
            found, ratio = contestants[n], row["times_as_fast"].get(n)
            lines.append(
                [
                    proper(n),
                    time if n in reached else "not reached",
                    f"{found['iterations']:,}",
                    f"{found['tokens']:,}",
                    with_range(found["total_seconds"]),
                    f"{found['whole_val_loss']:.3f}",
                    marked(peaks, n),
                    with_range(ratio),
                    faster(ratio, n) if ratio else NOTHING,
                ]
            )
        parts += [
            table(
                [
                    name,
                    f"s {until(row)}",
                    "iterations until then",
                    "tokens",
                    "s in all",
                    "loss at the end",
                    "peak memory",
                    "gpt_jax is times as fast",
                    "faster",
                ],
                lines,
            ),
            bullets(
                [
                    row["recipe"],
                    *unreached,
                    measure_of_memory(machine),
                    *more_memory(machine, name, peaks, {n: contestants[n].get("memory") for n in names}),
                    *notes([(name, row)]),
                ]
            ),
        ]
    return parts


def scale(_: Row, rows: Rows) -> list[str]:
    """Step time against context, batch and depth, and compile time against depth."""
    axes = of_part(rows, "scale")
    if not axes:
        return []
    model, batch = axes[0][1]["base"]["model"], axes[0][1]["base"]["batch_size"]
    parts = [
        f"Where it is not varied: {model['n_layer']} layers, {model['n_head']} heads, width {model['d_model']}, "
        f"context {model['context_length']}, batch {batch}, vocabulary {model['vocab_size']}, {model['dtype']}."
    ]
    for axis, row in axes:
        names = ("scan", "unroll") if axis == "compile" else (OURS, "pytorch")
        lines = []
        for point in row["points"]:
            x = point["x"]
            values = {n: {"median": value} if axis == "compile" else value for n, value in point.items() if n != "x"}
            gaps = {n: "" for n in names if f"{n} at {x}" in row["failed"]}
            line = [f"{x:,}", *best(names, values, {"failed": gaps}, min)]
            if axis != "compile":
                both = all(n in values for n in names)
                line.append(number(values["pytorch"]["median"] / values[OURS]["median"]) if both else NOTHING)
            lines.append(line)
        titles = [f"layers {n}{'n' if n == 'scan' else ''}ed, s" for n in names]
        if axis == "compile":
            head = ["depth", *(f"compiling, {title}" for title in titles)]
        else:
            head = [axis, "gpt_jax, ms a step", "PyTorch, eager, ms a step", "times as fast"]
        parts += [table(head, lines), bullets([f"{proper(where)}: {why}" for where, why in row["failed"].items()])]
    return parts


def machine(machine: Row, rows: Rows) -> list[str]:
    """The machine, and what was installed when its rows were measured."""
    under = [row["under"] for row in rows.values() if "under" in row]

    def all_of(values: Iterable[str]) -> str:
        return " and ".join(dict.fromkeys(values))

    def fact(write: Callable[[Row], str]) -> str:
        return all_of(write(each.get("machine", machine)) for each in under) or write(machine)

    packages = dict.fromkeys(package for each in under for package in each["versions"])
    flags = sorted({f"{name}={value}" for each in under for name, value in each["flags"].items() if value})
    lines = [
        ["machine", machine["name"]],
        ["processor", fact(lambda of: f"{of['cpu']}, {of['cores']} cores, {of['memory_gib']} GiB")],
    ]
    if machine["platform"] != "cpu":
        lines.append(["accelerator", fact(lambda of: f"{of['devices']} x {of['device']}")])
    if machine.get("peak_flops"):
        lines.append(["peak of a device", f"{flops(machine['peak_flops'])} in bfloat16"])
    lines.append(["Python", fact(lambda of: of["python"])])
    for package in packages:
        lines.append([package, all_of(each["versions"][package] for each in under if package in each["versions"])])
    if flags:
        lines.append(["flags", ", ".join(f"`{flag}`" for flag in flags)])
    commits = list(dict.fromkeys(each["commit"] for each in under if each["commit"]))
    if commits:
        lines.append(["measured at", ", ".join(commits)])
    return [table(["", ""], lines)]


PARTS: dict[str, Callable[[Row, Rows], list[str]]] = {
    "summary": summary,
    "train": train,
    "variants": variants,
    "decode": decode,
    "learn": learn,
    "scale": scale,
    "machine": machine,
}


def of_part(rows: Rows, part: str) -> list[tuple[str, Row]]:
    """The rows of a part, by the rest of their names."""
    return [(name.partition("/")[2], row) for name, row in rows.items() if name.startswith(f"{part}/")]


def present(rows: Sequence[tuple[str, Row]], names: Sequence[str]) -> list[str]:
    """Those of the contestants that are in a row, or failed there."""
    return [n for n in names if any(n in row["contestants"] or n in row.get("failed", {}) for _, row in rows)]


def best(
    names: Sequence[str], spreads: Mapping[str, Row], row: Row, choose: Callable[[Iterable[float]], float]
) -> list[str]:
    """A cell for each contestant, the best in bold (choose: min or max); one that failed says so."""
    chosen = choose(value["median"] for value in spreads.values()) if len(spreads) > 1 else None
    cells = []
    for name in names:
        if name in spreads:
            text = with_range(spreads[name])
            cells.append(f"**{text}**" if spreads[name]["median"] == chosen else text)
        else:
            cells.append("failed" if name in row["failed"] else NOTHING)
    return cells


def faster(ratio: Row, other: str) -> str:
    """Who is faster, ours where the ratio is above 1, or the other; neither where the rounds contradict each other."""
    if ratio["min"] > 1:
        return OURS
    return f"**{proper(other)}**" if ratio["max"] < 1 else "neither, within the spread"


def until(row: Row) -> str:
    """The goal of learning."""
    return f"to a loss of {row['target']:g}"


def size(row: Row) -> str:
    """A preset in short."""
    model = row["preset"]["model"]
    return (
        f"{model['n_layer']}/{model['n_head']}/{model['d_model']}, {model['context_length']}, "
        f"{row['preset']['batch_size']}, {row['dtype']}"
    )


def peak_flops(presets: Sequence[tuple[str, Row]]) -> list[str]:
    """What MFU is measured by, a line for the presets that have it in common."""
    lines: dict[str, list[str]] = {}
    for preset, row in presets:
        if row["peak_flops"]:
            line = f"MFU is of {flops(row['peak_flops'])} in {row['dtype']}: {row['peak_source']}"
            lines.setdefault(line, []).append(preset)
    return [f"{', '.join(names)}: {line}" for line, names in lines.items()]


def measure_of_memory(machine: Row, when: str = "") -> str:
    """What peak memory is, and its kinds."""
    kinds = "state: weights and what the optimizer or the cache holds, on all devices; the rest: temporaries"
    if machine["platform"] == "cpu":
        return (
            f"peak memory is the whole process's{when}; libraries: what it held with its devices started, before there "
            f"was any array; {kinds}, compiling, what was compiled, and what the allocator keeps"
        )
    return f"peak memory is what was allocated on the device; {kinds} and batches"


def notes(rows: Sequence[tuple[str, Row]]) -> list[str]:
    """What was noted, and who failed for what reason; a line that holds for several rows once."""
    lines: dict[str, list[str]] = {}
    for name, row in rows:
        for line in (*row["notes"], *(f"{proper(who)} failed: {why}" for who, why in row["failed"].items())):
            lines.setdefault(line, []).append(name)
    return [f"{', '.join(names)}: {line}" for line, names in lines.items()]


def proper(name: str) -> str:
    """A contestant as it is written."""
    return name.replace("pytorch", "PyTorch")
