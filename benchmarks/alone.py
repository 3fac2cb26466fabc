"""The tables of what is measured by itself, and has a file of results of its own."""

from collections.abc import Callable

from benchmarks.markdown import table, with_range
from benchmarks.results import Row, spread


def startup(measured: Row) -> str:
    """What `benchmarks.startup` measured."""
    kinds = (("cold", "empty compile cache"), ("warm", "warm compile cache"))
    lines = [[what, f"{with_range(spread(measured['seconds'][kind]))} s"] for kind, what in kinds]
    return table(["from starting `train.py` to the end of the first step (`python -m benchmarks.startup`)", ""], lines)


def prepare(measured: Row) -> str:
    """What `benchmarks.prepare` measured."""
    found, alone, on = (measured[name] for name in ("prepare", "sentencepiece_alone_on_one_core", "machine"))
    rate = f"{found['mb_per_second']:.1f} MB/s, {found['tokens_per_second'] / 1e6:.1f} million tokens/s"
    lines = [
        ["time", f"{found['seconds']:.0f} s: {rate}"],
        ["cores busy, reading twice included", f"{found['cores_busy']:.2f} of {on['cores']}"],
        ["memory at most, all processes", f"{found['peak_mib_all_processes']:.0f} MiB"],
        ["SentencePiece alone on one core", f"{alone['tokens_per_second'] / 1e6:.1f} million tokens/s"],
    ]
    return table([f"`prepare` of {found['text_bytes'] / 2**30:.1f} GiB of text (`{measured['command']}`)", ""], lines)


def placement(measured: Row) -> str:
    """What `benchmarks.placement` measured."""
    one = [(name, measured[name]) for name in ("nano", "baby")]
    lines = [
        [
            f"{name}, one device: a step by jit, and on a mesh of one",
            f"{with_range(row['step_ms']['jit'])} and {with_range(row['step_ms']['mesh'])} ms: "
            f"{with_range(row['second_over_first'])} times as long",
        ]
        for name, row in one
    ]
    call = measured["tiny"]["call_ms"]
    lines.append(
        [
            "two devices: the call of a step by pmap, and on a mesh",
            f"{with_range(call['pmap'])} and {with_range(call['mesh'])} ms",
        ]
    )
    return table(["what a placement costs (`python -m benchmarks.placement`)", ""], lines)


def restore(measured: Row) -> str:
    """What `benchmarks.restore` measured."""
    lines = []
    for row in measured["rows"]:
        if row["freed_memory_is_kept"]:
            lines.append([f"{row['written_by']} to {row['restored_to']}"])
        lines[-1].append(with_range(row["times_the_state"]))
    command = "`python -m benchmarks.restore`"
    return table(
        [
            f"memory to restore GPT-2 124M, times its state ({command})",
            "as in training",
            "if all that is freed goes back",
        ],
        lines,
    )


ALONE: dict[str, Callable[[Row], str]] = {
    "startup": startup,
    "prepare": prepare,
    "placement": placement,
    "restore": restore,
}
"""The files that hold one measurement, and what writes it."""
