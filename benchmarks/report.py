"""The README's tables and the plots, from what was measured: python -m benchmarks report

A table stands in the README between the markers `<!-- benchmarks: FILE PART -->` and `<!-- end -->`: FILE is a file of
results without its .json, and PART one of those of `tables`. What stands there is replaced by what was measured.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import plots
from benchmarks.results import Row
from gpt_jax.errors import UserError
from gpt_jax.files import replacing

Rows = dict[str, Row]

OURS, TRANSFORMERS = "gpt_jax", "transformers"
PYTORCH = ("pytorch, eager", "pytorch, compiled")
NOT_MEASURED = "not measured yet"
NOTHING = "–"  # noqa: RUF001

MARKER = re.compile(r"^<!-- benchmarks: ([^\n]*?) -->$", re.MULTILINE)
BLOCK = re.compile(r"^(<!-- benchmarks: ([^\n]*?) -->\n)(?:(?!<!--).)*?(^<!-- end -->$)", re.MULTILINE | re.DOTALL)


def report(results_folder: Path, readme: Path) -> None:
    """Regenerates the tables of the README, and draws the plots into the folder of results.

    Raises UserError where a marker in the README is wrong, or matplotlib is missing; the README is unchanged then.
    """
    files = read_results(results_folder)
    text = readme.read_text(encoding="utf-8")
    rendered = render(text, files)
    for name, measured in files.items():
        for path in plots.draw(measured, results_folder / name):
            print(f"{path} drawn", flush=True)
    if rendered != text:
        with replacing(readme) as temporary:
            temporary.write_text(rendered, encoding="utf-8")
    print(f"{readme}: {'tables written' if rendered != text else 'up to date'}", flush=True)


def read_results(folder: Path) -> dict[str, Row]:
    """The files of results, by their names without .json; other JSON in the folder is passed over."""
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {name: content for name, content in files.items() if "rows" in content}


def render(readme_text: str, files: Mapping[str, Row]) -> str:
    """The README with its tables regenerated; files: the content of each file of results, by name.

    Raises UserError for a marker that names no file or part, or has no end.
    """

    def block(match: re.Match[str]) -> str:
        marker, name, end = match.groups()
        file, _, part = name.partition(" ")
        if file not in files:
            raise UserError(f"README: the marker {name!r} names no file of results; there are: {', '.join(files)}")
        if part not in PARTS:
            raise UserError(f"README: the marker {name!r} names no part; there are: {', '.join(PARTS)}")
        return f"{marker}{tables(files[file])[part]}\n{end}"

    ended = {match.start() for match in BLOCK.finditer(readme_text)}
    for marker in MARKER.finditer(readme_text):
        if marker.start() not in ended:
            raise UserError(f"README: the marker {marker[1]!r} has no <!-- end -->")
    return BLOCK.sub(block, readme_text)


def tables(rows_file: Row) -> dict[str, str]:
    """The markdown of each part, from the content of a file of results; "not measured yet" where there is no row."""
    rows = rows_file["rows"]
    return {
        part: "\n\n".join(filter(None, make(rows_file["machine"], rows))) or NOT_MEASURED
        for part, make in PARTS.items()
    }


def summary(_: Row, rows: Rows) -> list[str]:
    """The headline ratios: training, decoding against transformers, learning, each with its winner."""
    found = []
    for preset, row in of_part(rows, "train"):
        if "times_as_fast" in row:
            found.append((f"train {preset}, {row['dtype']}", row["times_as_fast"]["over"], row["times_as_fast"]))
    for batch, row in of_part(rows, "decode"):
        ratio = row["modes"]["greedy"]["times_as_fast"].get(TRANSFORMERS)
        if batch in ("1", "8") and ratio:
            found.append((f"decode GPT-2, {row['dtype']}, batch {batch}, greedy", TRANSFORMERS, ratio))
    for name, row in of_part(rows, "learn"):
        others = [other for other in PYTORCH if other in row["times_as_fast"]]
        if others:
            better = min(others, key=lambda other: row["times_as_fast"][other]["median"])
            found.append((f"learn {name}, {until(row)}", better, row["times_as_fast"][better]))
    return [
        table(
            ["gpt_jax", "against", "times as fast", "faster"],
            [[what, proper(other), with_range(ratio), faster(ratio, other)] for what, other, ratio in found],
        )
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
        least = min(theirs.values(), default=None)
        more = bool(ours) and least is not None and ours["peak_bytes"] > least
        if more and not row["notes"]:
            remarks.append(f"{preset}: gpt_jax needs more memory than PyTorch, for a reason that is not noted")
        costs.append(
            [
                preset,
                with_range(ours.get("tokens_per_second")),
                with_range(ours.get("mfu"), percent),
                memory(ours.get("peak_bytes")) + (", more" if more else ""),
                memory(least),
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
                *peaks(row for _, row in presets),
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
    batches = sorted(of_part(rows, "decode"), key=lambda item: int(item[0]))
    modes = [
        (f"{batch}, {mode.replace('top_', 'top-k ')}", row, of_mode)
        for batch, row in batches
        for mode, of_mode in row["modes"].items()
    ]
    names = present([(name, of_mode) for name, _, of_mode in modes], (OURS, TRANSFORMERS, *CACHES))
    others = [name for name in names if name != OURS and name != CACHES[1]]
    speed, costs = [], []
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
        costs.append(
            [
                name,
                *best(names, first, row, min),
                with_range(contestants.get(OURS, {}).get("roofline"), percent),
            ]
        )
    if not batches:
        return []
    peaks = [
        [batch, *(memory(row["peak_bytes"].get(name)) for name in names)] for batch, row in batches if row["peak_bytes"]
    ]
    as_fast = [f"times as fast as {proper(other)}" for other in others]
    return [
        table(["batch, choice", *(f"{proper(name)}, tokens/s" for name in names), *as_fast, "faster"], speed),
        table(
            ["batch, choice", *(f"{proper(name)}, ms to the first token" for name in names), "of the roofline"], costs
        ),
        table(["batch", *(f"{proper(name)}, peak memory" for name in names)], peaks),
        bullets(
            [
                *(
                    f"batch {batch}: {row['new']} tokens after a prompt of {row['prompt']}, {row['dtype']}"
                    + (f", memory read at {number(row['bandwidth']['median'] / 1e9)} GB/s" if row["bandwidth"] else "")
                    for batch, row in batches
                ),
                *more_memory(batches),
                measure_of_memory(machine),
                *notes(batches, "batch "),
            ]
        ),
    ]


CACHES = ("pytorch, cache", "pytorch, no cache")


def more_memory(batches: Sequence[tuple[str, Row]]) -> list[str]:
    """Where ours needs more memory in decoding than the least of the others."""
    found = []
    for batch, row in batches:
        others = {name: value for name, value in row["peak_bytes"].items() if name != OURS}
        if others and row["peak_bytes"].get(OURS, 0) > min(others.values()):
            least = min(others, key=lambda name: others[name])
            found.append(f"batch {batch}: gpt_jax needs more memory than {proper(least)}")
    return found


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
        lines = []
        for n, time in zip(names, best(names, reached, row, min), strict=True):
            found, ratio = contestants[n], row["times_as_fast"].get(n)
            lines.append(
                [
                    proper(n),
                    time if n in reached else "not reached",
                    f"{found['iterations']:,}",
                    with_range(found["total_seconds"]),
                    f"{found['whole_val_loss']:.3f}",
                    memory(found["peak_bytes"]),
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
                    "s in all",
                    "loss at the end",
                    "peak memory",
                    "gpt_jax is times as fast",
                    "faster",
                ],
                lines,
            ),
            bullets([row["recipe"], *unreached, measure_of_memory(machine), *notes([(name, row)])]),
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
    versions: dict[str, list[str]] = {}
    for each in under:
        for package, version in each["versions"].items():
            if version not in versions.setdefault(package, []):
                versions[package].append(version)
    flags = sorted({f"{name}={value}" for each in under for name, value in each["flags"].items() if value})
    peak = machine.get("peak_flops")
    lines = [
        ["machine", machine["name"]],
        ["processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"],
    ]
    if machine["platform"] != "cpu":
        lines.append(["accelerator", f"{machine['devices']} x {machine['device']}"])
    if peak:
        lines.append(["peak of a device", f"{flops(peak)} in bfloat16"])
    lines.append(["Python", machine["python"]])
    lines += [[package, " and ".join(found)] for package, found in versions.items()]
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


def peaks(rows: Iterable[Row]) -> list[str]:
    """What MFU is measured by."""
    known = {
        f"MFU is of {flops(row['peak_flops'])} in {row['dtype']}: {row['peak_source']}"
        for row in rows
        if row["peak_flops"]
    }
    return sorted(known)


def measure_of_memory(machine: Row) -> str:
    """What peak memory is."""
    if machine["platform"] == "cpu":
        return "peak memory is the whole process's, the libraries included"
    return "peak memory is what was allocated on the device"


def notes(rows: Sequence[tuple[str, Row]], prefix: str = "") -> list[str]:
    """What was noted, and who failed for what reason; a line that holds for several rows once."""
    lines: dict[str, list[str]] = {}
    for name, row in rows:
        for line in (*row["notes"], *(f"{proper(who)} failed: {why}" for who, why in row["failed"].items())):
            lines.setdefault(line, []).append(name)
    return [f"{prefix}{', '.join(names)}: {line}" for line, names in lines.items()]


def proper(name: str) -> str:
    """A contestant as it is written."""
    return name.replace("pytorch", "PyTorch")


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown; empty where there are no lines."""
    if not lines:
        return ""
    rows = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def bullets(lines: Iterable[str]) -> str:
    """Markdown of a list; no two are the same, and none opens or closes a marker."""
    return "\n".join(f"- {line.replace('<!--', '')}" for line in dict.fromkeys(lines))


def number(value: float) -> str:
    """Three digits of a number, or two decimals of one below 1."""
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def percent(value: float) -> str:
    """A share."""
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def with_range(spread: Row | None, write: Callable[[float], str] = number) -> str:
    """Median (min to max), or the median where there is no more to tell."""
    if spread is None:
        return NOTHING
    median = write(spread["median"])
    if "min" not in spread:
        return median
    return f"{median} ({write(spread['min'])} to {write(spread['max'])})"


def flops(per_second: float) -> str:
    """FLOP/s, in units that people read."""
    return f"{number(per_second / 1e12)} TFLOP/s" if per_second >= 1e12 else f"{number(per_second / 1e9)} GFLOP/s"


def memory(n_bytes: float | None) -> str:
    """Bytes, in units that people read."""
    if n_bytes is None:
        return NOTHING
    return f"{number(n_bytes / 2**30)} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def seconds(value: float | None) -> str:
    """Seconds, or a dash."""
    return NOTHING if value is None else f"{number(value)} s"
