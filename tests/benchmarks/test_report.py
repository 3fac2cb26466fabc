"""The README's tables and the plots, from results that are made up."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots
from benchmarks.markdown import percent
from benchmarks.measure import spread
from benchmarks.report import BLOCK, DOCUMENTS, NOT_MEASURED, read_results, render, report, tables
from benchmarks.results import FOLDER
from benchmarks.tables import PARTS, SUMMARY
from gpt_jax.errors import UserError

MODEL = {"n_layer": 4, "n_head": 4, "d_model": 128, "context_length": 64, "vocab_size": 512, "dtype": "float32"}
SPEC = {"name": "nano", "model": MODEL, "batch_size": 12, "steps": 60, "hugging_face": False}
MACHINE = {
    "name": "A CPU, 2 cores",
    "cpu": "A CPU",
    "cores": 2,
    "memory_gib": 7.8,
    "platform": "cpu",
    "device": "cpu",
    "devices": 1,
    "peak_flops": None,
    "python": "3.11.9",
}
UNDER = {
    "commit": "abc",
    "versions": {"jax": "0.10.2", "torch": "2.13.0"},
    "flags": {"XLA_FLAGS": "", "A": "1"},
    "machine": MACHINE,
}
GIB = 2**30
OUT_OF_MEMORY = "OutOfMemoryError: tried to allocate 6.00 GiB"


def around(median: float) -> dict[str, float]:
    """A spread of three rounds, a tenth to each side."""
    return spread([0.9 * median, median, 1.1 * median])


def trained(step_ms: float, peak_bytes: int, mfu: float | None = 0.4) -> dict[str, Any]:
    """A contestant in training."""
    return {
        "how": {},
        "step_ms": around(step_ms),
        "tokens_per_second": around(768_000 / step_ms),
        "mfu": mfu and around(mfu),
        "peak_bytes": peak_bytes,
        "compile_seconds": 2.5,
    }


def train_row(contestants: dict[str, Any], times: float | None, notes: list[str], **more: Any) -> dict[str, Any]:
    """A row of train or variants."""
    row = {
        "preset": SPEC,
        "dtype": "float32",
        "rounds": 3,
        "parity": {},
        "flops_per_token": 1e6,
        "peak_flops": 2e11,
        "contestants": contestants,
        "failed": {},
        "notes": notes,
        "under": UNDER,
        **more,
    }
    return row if times is None else {**row, "times_as_fast": {"over": "pytorch, eager", **around(times)}}


def decoded(tokens_per_second: float) -> dict[str, Any]:
    """A contestant in decoding."""
    return {"first_token_ms": around(40), "tokens_per_second": around(tokens_per_second)}


def learned(seconds: float | None, offset: float) -> dict[str, Any]:
    """A contestant in learning."""
    return {
        "reached": seconds is not None,
        "seconds": seconds and around(seconds),
        "total_seconds": around(80),
        "tokens": 10,
        "iterations": 1750,
        "val_loss": 1.86,
        "whole_val_loss": 1.8765,
        "peak_bytes": None,
        "curve": [[5.0 + offset, 0, 4.2], [20.0 + offset, 250, 2.4], [60.0 + offset, 2000, 1.85]],
    }


def sized(figure: str, times: dict[str, Any], ratio: float | None = None) -> dict[str, Any]:
    """A row of scale: a contestant without a time failed."""
    row: dict[str, Any] = {
        "preset": SPEC,
        "dtype": "float32",
        "contestants": {name: {figure: time} for name, time in times.items() if time},
        "failed": {name: "out of memory" for name, time in times.items() if not time},
        "notes": ["where it is not varied: 4 layers"],
        "under": UNDER,
    }
    return row if ratio is None else {**row, "times_as_fast": {"over": "pytorch, eager", **around(ratio)}}


def axis(name: str, sizes: tuple[int, ...], ours: float, theirs: float) -> dict[str, Any]:
    """The rows of an axis of scale, whose times grow with the size, and PyTorch's with 20 ms more."""
    return {
        f"scale/{name}/{n}": sized(
            "step_ms",
            {"gpt_jax": around(ours * n), "pytorch, eager": around(theirs * n + 20)},
            (theirs * n + 20) / (ours * n),
        )
        for n in sizes
    }


def measured_data() -> dict[str, Any]:
    """The rows of data."""
    prepared = {
        "tokens_per_second": around(4e6),
        "mb_per_second": around(14),
        "peak_bytes": GIB,
        "largest_bytes": GIB / 2,
    }
    packed = {"fill": 0.99961, "next_fit": 0.87642, "documents": 7741, "rows": 640, "cut": 38, "dropped": 0}
    rows: dict[str, dict[str, Any]] = {
        "prepare/text": {"2 processes": prepared},
        "memory/text, 2.00 GiB": {"gpt_jax": {**prepared, "seconds": 150.0}},
        "loader/64": {"stream": {"tokens_per_second": around(2e6), "times_consumed": around(60)}},
        "tiny/1,000,000 documents": {"`prepare`": {**prepared, "seconds": around(9)}},
        "fill/docstrings": {"best-fit decreasing": packed},
    }
    found = {
        f"data/{name}": {"contestants": of, "failed": {}, "notes": [f"how {name.partition('/')[0]}"], "under": UNDER}
        for name, of in rows.items()
    }
    found["data/tiny/1,000,000 documents"]["failed"] = {"`inspect`": "there is no command 'inspect'"}
    return found


def made_up() -> dict[str, Any]:
    """A file of results: wins, losses, and what failed."""
    nano = {
        "gpt_jax": trained(20, GIB),
        "pytorch, eager": trained(30, 2 * GIB),
        "pytorch, compiled": trained(40, 3 * GIB),
    }
    gpt2 = {
        "gpt_jax": trained(2000, 5 * GIB, None),
        "pytorch, eager": trained(1000, 4 * GIB),
        "transformers": trained(900, GIB),
    }
    greedy = {
        "contestants": {"gpt_jax": decoded(50), "transformers": decoded(25)},
        "times_as_fast": {"transformers": around(2)},
    }
    depths = {n: (2 + 0.01 * n, 1 + 0.7 * n) for n in (1, 2, 4, 8, 16)}
    return {
        "machine": MACHINE,
        "rows": {
            "train/nano": train_row(nano, 1.5, []),
            "train/gpt2": train_row(
                gpt2, 0.5, ["attention keeps its scores"], failed={"pytorch, compiled": OUT_OF_MEMORY}, peak_flops=None
            ),
            "variants/nano": train_row({"gpt_jax": trained(20, GIB), "attention xla": trained(16, GIB)}, None, []),
            "decode/8": {
                "preset": "gpt2",
                "dtype": "float32",
                "batch": 8,
                "prompt": 16,
                "new": 128,
                "rounds": 3,
                "parity": {},
                "bandwidth": around(2e10),
                "weight_bytes": 5e8,
                "notes": ["no cache: greedy only"],
                "failed": {},
                "modes": {"greedy": greedy},
                "peak_bytes": {"gpt_jax": 3 * GIB, "transformers": GIB},
                "under": UNDER,
            },
            "serve/requests": {
                "contestants": {
                    "gpt_jax": {"tokens_per_second": around(90)},
                    "gpt_jax, in batches": {"tokens_per_second": around(45)},
                },
                "times_as_fast": {"gpt_jax, in batches": around(2)},
                "failed": {},
                "notes": ["64 requests"],
                "under": UNDER,
            },
            "serve/chat": {
                "contestants": {
                    "gpt_jax": {"first_token_ms": around(200)},
                    "gpt_jax, nothing cached": {"first_token_ms": around(2400)},
                },
                "times_as_fast": {"gpt_jax, nothing cached": around(12)},
                "failed": {},
                "notes": [],
                "under": UNDER,
            },
            "learn/shakespeare-char": {
                "target": 1.88,
                "rounds": 3,
                "notes": [],
                "failed": {},
                "contestants": {
                    "gpt_jax": learned(40, 0),
                    "pytorch, eager": learned(50, 10),
                    "pytorch, compiled": learned(None, 30),
                },
                "times_as_fast": {"pytorch, eager": around(1.05), "pytorch, compiled": around(2)},
                "under": UNDER,
            },
            **axis("context", (1024, 64, 128, 256, 512), 0.3, 0.4),
            "scale/context/1024": sized("step_ms", {"gpt_jax": around(300), "pytorch, eager": None}),
            **axis("batch", (1, 2, 4, 8), 30, 40),
            **axis("depth", (1, 2, 4, 8, 16), 30, 40),
            **{
                f"scale/compile/{n}": sized("compile_seconds", {"layers scanned": scan, "layers unrolled": unroll})
                for n, (scan, unroll) in depths.items()
            },
            "startup/shakespeare-char": {
                "contestants": {
                    "empty compile cache": {"seconds": around(5)},
                    "warm compile cache": {"seconds": around(2)},
                },
                "failed": {},
                "notes": [],
                "under": UNDER,
            },
            **measured_data(),
        },
    }


def cells(text: str, begins: str, who: str = "") -> list[str]:
    """The cells of the first line of a table that begins with a text, or of that of a contestant below it."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {begins}"))
    line = next(line for line in lines[at:] if not who or f"| {who} |" in line)
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_a_win_and_a_loss_are_told_alike() -> None:
    found = tables(made_up())
    text = found["train"]
    assert cells(text, "nano |")[1:5] == [
        "gpt_jax",
        "**20.0 (18.0 to 22.0)**",
        "38,400 (34,600 to 42,200)",
        "40% (36% to 44%)",
    ]
    assert cells(text, "nano |")[-2:] == ["–", "–"]  # noqa: RUF001
    assert cells(text, "nano |", "PyTorch, eager")[2] == "30.0 (27.0 to 33.0)"
    assert cells(text, "nano |", "PyTorch, eager")[-2:] == ["1.50 (1.35 to 1.65)", "gpt_jax"]
    assert cells(text, "nano |", "PyTorch, compiled")[2] == "40.0 (36.0 to 44.0)"
    assert cells(text, "gpt2 |", "PyTorch, eager")[-2:] == ["0.50 (0.45 to 0.55)", "**PyTorch, eager**"]
    assert cells(text, "gpt2 |", "transformers")[2] == "**900 (810 to 990)**"
    assert cells(text, "gpt2 |", "PyTorch, compiled")[2:4] == ["failed", "–"]  # noqa: RUF001
    lost = ["2,000", "1,000, PyTorch, eager", "0.50 (0.45 to 0.55)", "**PyTorch, eager**"]
    assert cells(found["ratios"], "train gpt2: ms a step")[1:] == lost
    assert cells(found["ratios"], "learn")[3:] == ["1.05 (0.95 to 1.16)", "neither, within the spread"]
    assert cells(found["ratios"], "decode batch 8, greedy: tokens/s")[4] == "gpt_jax"
    assert found["ratios"].endswith("gpt_jax is the faster at all 13 sizes")
    slower = made_up()
    slower["rows"]["scale/batch/2"]["times_as_fast"] |= around(0.89)
    lost_at = "**PyTorch, eager, is the faster** at 1 of 13 sizes: batch 2 (0.89 times as fast)"
    assert tables(slower)["ratios"].endswith(lost_at)


def test_failures_and_notes_stand_below_the_table() -> None:
    found = tables(made_up())
    assert f"- gpt2: PyTorch, compiled failed: {OUT_OF_MEMORY}" in found["train"].splitlines()
    assert "- gpt2: attention keeps its scores" in found["train"].splitlines()
    assert "- batch 8, greedy: no cache: greedy only" in found["decode"].splitlines()
    assert "- 1024: PyTorch, eager failed: out of memory" in found["scale"].splitlines()
    assert "- where it is not varied: 4 layers" in found["scale"].splitlines()  # Of all rows, so that none is named.
    assert cells(found["scale"], "1024", "PyTorch, eager")[2:] == ["failed", "–", "–"]  # noqa: RUF001


def test_serving_has_a_rate_or_a_first_token() -> None:
    text = tables(made_up())["serve"]
    unknown = "–"  # noqa: RUF001
    assert cells(text, "requests")[:4] == ["requests", "gpt_jax", "**90.0 (81.0 to 99.0)**", unknown]
    assert cells(text, "requests", "gpt_jax, in batches")[-2:] == ["2.00 (1.80 to 2.20)", "gpt_jax"]
    assert cells(text, "chat")[:4] == ["chat", "gpt_jax", unknown, "**200 (180 to 220)**"]
    assert "- requests: 64 requests" in text.splitlines()


def test_sizes_are_in_their_order() -> None:
    lines = tables(made_up())["scale"].splitlines()
    assert [line.split(" | ")[0] for line in lines[2:12:2]] == ["| 64", "| 128", "| 256", "| 512", "| 1024"]


def test_compiling_is_told_for_both_kinds_of_layers() -> None:
    text = tables(made_up())["scale"]
    assert [cells(text[text.rindex("| depth") :], "8 |", who)[2] for who in ("layers scanned", "layers unrolled")] == [
        "**2.08**",
        "6.60",
    ]


def test_memory_is_told_by_kind_and_the_least_is_bold() -> None:
    results = made_up()
    text = tables(results)["train"]
    unknown = ["–"] * 4  # noqa: RUF001
    assert cells(text, "gpt2 |")[6:11] == ["5.00 GiB", *unknown]
    assert cells(text, "gpt2 |", "transformers")[6:11] == ["**1.00 GiB**", *unknown]
    assert cells(text, "nano |")[6] == "**1.00 GiB**"
    assert cells(text, "nano |", "PyTorch, eager")[6] == "2.00 GiB"
    results["rows"]["decode/8"]["memory"] = {
        "gpt_jax": {"libraries": GIB / 4, "state": GIB, "temporaries": GIB / 2},
        "transformers": {"libraries": GIB / 4, "state": GIB / 2},
    }
    text = tables(results)["decode"]
    assert cells(text, "batch 8, greedy")[5:10] == ["3.00 GiB", "256 MiB", "1.00 GiB", "1.75 GiB", "512 MiB"]
    theirs = ["**1.00 GiB**", "256 MiB", "512 MiB", "256 MiB", "–"]  # noqa: RUF001
    assert cells(text, "batch 8, greedy", "transformers")[5:10] == theirs


def test_one_bandwidth_is_the_roofline_of_all_rows() -> None:
    """Eight tokens of 0.5 GB at 50 / 8 a second are 3.125 GB/s of the 25 that another row has read at best."""
    results = made_up()
    results["rows"]["decode/1"] = {**results["rows"]["decode/8"], "batch": 1, "bandwidth": spread([1e10, 2.5e10])}
    text = tables(results)["decode"]
    assert cells(text, "batch 8, greedy")[4] == "12% (11% to 14%)"
    assert "in any round, 25.0 GB/s; the slowest round had 10.0" in text


def test_the_fastest_of_our_settings_is_bold() -> None:
    results = made_up()
    results["rows"]["variants/nano"]["contestants"]["attention xla"]["call_ms"] = around(0.25)
    text = tables(results)["variants"]
    unknown = "–"  # noqa: RUF001
    assert cells(text, "nano") == ["nano", "gpt_jax", "20.0 (18.0 to 22.0)", unknown, "2.50", "**1.00 GiB**"]
    assert "| attention xla | **16.0 (14.4 to 17.6)** | 0.25 (0.23 to 0.28) |" in text


def test_a_loss_that_was_not_reached_is_told() -> None:
    text = tables(made_up())["learn"]
    assert cells(text, "shakespeare-char", "PyTorch, compiled")[2] == "not reached"
    assert cells(text, "shakespeare-char", "PyTorch, eager")[-2:] == [
        "1.05 (0.95 to 1.16)",
        "neither, within the spread",
    ]


def test_data_is_told_in_five_tables() -> None:
    text = tables(made_up())["data"]
    rate, memory = ["4,000,000 (3,600,000 to 4,400,000)", "14.0 (12.6 to 15.4)"], ["1.00 GiB", "512 MiB"]
    assert cells(text, "text |") == ["text", "2 processes", *rate, *memory]
    assert cells(text, "text, 2.00 GiB") == ["text, 2.00 GiB", "gpt_jax", "150", *memory]
    assert cells(text, "64 |")[1:] == ["stream", "2,000,000 (1,800,000 to 2,200,000)", "60.0 (54.0 to 66.0)"]
    assert cells(text, "1,000,000")[1:] == ["`prepare`", "9.00 (8.10 to 9.90)", "1.00 GiB"]
    assert cells(text, "1,000,000", "`inspect`")[2:] == ["failed", "–"]  # noqa: RUF001
    assert cells(text, "docstrings")[2:] == ["99.96%", "87.64%", "7,741", "640", "38", "0"]
    lines = text.splitlines()
    assert "- 1,000,000 documents: `inspect` failed: there is no command 'inspect'" in lines
    assert [line.split()[-1] for line in lines if ": how " in line] == ["prepare", "memory", "loader", "tiny", "fill"]


def test_starting_and_the_machine_are_told() -> None:
    found = tables(made_up())
    assert cells(found["startup"], "shakespeare-char")[1:] == ["empty compile cache", "5.00 (4.50 to 5.50)"]
    assert cells(found["startup"], "", "warm compile cache") == ["", "warm compile cache", "2.00 (1.80 to 2.20)"]
    assert cells(found["machine"], "machine")[1] == "A CPU, 2 cores, 7.8 GiB, Python 3.11.9"
    assert cells(found["machine"], "packages")[1] == "jax 0.10.2, torch 2.13.0"
    assert cells(found["machine"], "flags")[1] == "`A=1`"
    results = made_up()
    gpu = {**MACHINE, "platform": "gpu", "device": "A GPU", "devices": 2, "peak_flops": 1e15}
    results["rows"]["startup/shakespeare-char"]["under"] = {**UNDER, "commit": "def", "machine": gpu}
    told = tables(results)["machine"]
    assert "; A CPU, 2 cores, 7.8 GiB, 2 x A GPU, 1,000 TFLOP/s in bfloat16 each, Python 3.11.9 |" in told
    assert "| measured at | abc; def |" in told


def test_parts_without_rows_are_not_measured_yet() -> None:
    empty = {**made_up(), "rows": {}}
    assert set(tables(empty).values()) == {NOT_MEASURED}
    assert tables(made_up()).keys() == PARTS.keys()


def test_every_table_has_as_many_cells_in_each_line() -> None:
    for text in tables(made_up()).values():
        for block in text.split("\n\n"):
            lines = [line for line in block.splitlines() if line.startswith("|")]
            assert len({line.count(" | ") for line in lines}) <= 1, block


def test_render_replaces_what_is_between_its_markers_only_and_is_stable() -> None:
    readme = (
        "# Title\n<!-- tests -->\nkeep me\n<!-- end -->\n\n"
        "<!-- benchmarks: a-cpu train -->\noutdated\n\n| table |\n<!-- end -->\nbetween\n"
        "<!-- benchmarks: other scale -->\n<!-- end -->\nlast\n"
    )
    files = {"a-cpu": made_up(), "other": {**made_up(), "rows": {}}}
    rendered = render(readme, files, "README.md")
    assert rendered.startswith(
        "# Title\n<!-- tests -->\nkeep me\n<!-- end -->\n\n<!-- benchmarks: a-cpu train -->\n| training |"
    )
    assert rendered.endswith(
        f"\n<!-- end -->\nbetween\n<!-- benchmarks: other scale -->\n{NOT_MEASURED}\n<!-- end -->\nlast\n"
    )
    assert "outdated" not in rendered
    assert render(rendered, files, "README.md") == rendered


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        ("<!-- benchmarks: gpu train -->\n<!-- end -->\n", "'gpu train' names no file of results; there are: a-cpu"),
        (
            "<!-- benchmarks: a-cpu speed -->\n<!-- end -->\n",
            "'a-cpu speed' names no part; there are: summary, ratios, train",
        ),
        ("<!-- benchmarks: a-cpu -->\n<!-- end -->\n", "'a-cpu' names no part"),
        ("<!-- benchmarks: a-cpu train -->\n\n<!-- tests -->\n<!-- end -->\n", "'a-cpu train' has no <!-- end -->"),
    ],
)
def test_a_wrong_marker_is_refused(readme: str, message: str) -> None:
    with pytest.raises(UserError, match=r"README\.md: the marker") as error:
        render(readme, {"a-cpu": made_up()}, "README.md")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_percent_keeps_a_digit_of_small_shares() -> None:
    assert [percent(0.613), percent(0.0317)] == ["61%", "3.2%"]


def test_the_summary_has_both_figures_of_six_contests_and_says_who_wins() -> None:
    text = tables(made_up())["summary"]
    assert cells(text, "training nano, 0.8 million parameters: ms a step")[1:] == [
        "20.0",
        "30.0, PyTorch, eager",
        "1.50 (1.35 to 1.65)",
        "gpt_jax",
    ]
    lost = ["2,000", "1,000, PyTorch, eager", "0.50 (0.45 to 0.55)", "**PyTorch, eager**"]
    assert cells(text, "training GPT-2")[1:] == lost
    assert cells(text, "learning")[1:4] == ["40.0", "50.0, PyTorch, eager", "1.05 (0.95 to 1.16)"]
    written = tables(read_results(FOLDER)["amd-epyc-2-cores"])["summary"].splitlines()
    assert len(written) == 2 + len(SUMMARY) == 8


def test_the_documents_have_every_table() -> None:
    """Each table of one machine at least, and those that are of no machine."""
    markers = {name for path in DOCUMENTS for _, name, _ in BLOCK.findall(path.read_text(encoding="utf-8"))}
    files = read_results(FOLDER)
    alone = {name for name, content in files.items() if "table" in content}
    assert markers >= alone == {"arithmetic", "prepare", "restore", "smollm2-preferences", "smollm2-rewards"}
    machines = files.keys() - alone
    assert all(markers & {f"{name} {part}" for name in machines} for part in PARTS)


def test_a_file_may_have_a_table_of_its_own() -> None:
    measured = {"table": [["what", "how much"], ["one | two", "3"]]}
    assert tables(measured) == {"": "| what | how much |\n| --- | --- |\n| one \\| two | 3 |"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_documents_agree_with_the_results(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    written = render(text, read_results(FOLDER), document.name)
    assert written == text, "python -m benchmarks report writes the documents' tables"


def test_report_writes_tables_and_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import image

    (tmp_path / "a-cpu.json").write_text(json.dumps(made_up()))
    (tmp_path / "startup.json").write_text('{"seconds": 5}')
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmarks: a-cpu summary -->\n<!-- end -->\n")
    report(tmp_path, [readme])
    assert readme.read_text() == render(readme.read_text(), {"a-cpu": made_up()}, "README.md")
    assert "training nano" in readme.read_text()
    drawn = sorted(tmp_path.glob("*.png"))
    assert [path.name for path in drawn] == ["a-cpu-learning.png", "a-cpu-scaling.png"]
    for path in drawn:
        pixels = image.imread(path)[..., :3]
        assert min(pixels.shape[:2]) > 400
        # Ours is blue, and PyTorch's is orange.
        for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):
            assert (abs(pixels * 255 - colour).max(-1) < 2).sum() > 200

    before = [path.read_bytes() for path in drawn]
    report(tmp_path, [readme])
    assert [path.read_bytes() for path in drawn] == before


def test_plots_of_half_a_machine(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = made_up()
    results["rows"] = {f"scale/context/{n}": sized("step_ms", {"gpt_jax": around(n)}) for n in (64, 128)}
    assert [path.name for path in plots.draw(results, tmp_path / "a-tpu")] == ["a-tpu-scaling.png"]
    assert plots.draw({**results, "rows": {}}, tmp_path / "none") == []


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[bench\]"'):
        plots.draw(made_up(), tmp_path / "a-cpu")
