"""The README's tables and the plots, from results that are made up."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots
from benchmarks.markdown import percent
from benchmarks.measure import spread
from benchmarks.report import DOCUMENTS, MARKER, NOT_MEASURED, read_results, render, report, tables
from benchmarks.results import FOLDER
from benchmarks.tables import ALONE, PARTS, SUMMARY
from gpt_jax.errors import UserError

MODEL = {"n_layer": 4, "n_head": 4, "d_model": 128, "context_length": 64, "vocab_size": 512, "dtype": "float32"}
SPEC = {"name": "nano", "model": MODEL, "batch_size": 12, "steps": 60, "hugging_face": False}
UNDER = {"commit": "abc", "versions": {"jax": "0.10.2", "torch": "2.13.0"}, "flags": {"XLA_FLAGS": ""}}
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
        "peak_source": "a product",
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


def scaled(x: str, points: list[dict[str, Any]], failed: dict[str, str]) -> dict[str, Any]:
    """A row of scale."""
    return {"base": SPEC, "rounds": 3, "x": x, "points": points, "failed": failed, "under": UNDER}


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
    step = [{"x": n, "gpt_jax": around(0.3 * n), "pytorch": around(0.4 * n + 20)} for n in (64, 128, 256, 512, 1024)]
    del step[-1]["pytorch"]
    depth = [{"x": n, "gpt_jax": around(30 * n), "pytorch": around(45 * n)} for n in (1, 2, 4, 8, 16)]
    return {
        "machine": {
            "name": "A CPU, 2 cores",
            "cpu": "A CPU",
            "cores": 2,
            "memory_gib": 7.8,
            "platform": "cpu",
            "device": "cpu",
            "devices": 1,
            "peak_flops": None,
            "python": "3.11.9",
        },
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
            "learn/shakespeare-char": {
                "recipe": "4 layers",
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
            "scale/context": scaled("context", step, {"pytorch at 1024": "out of memory"}),
            "scale/batch": scaled("batch", [{**point, "x": 2**i} for i, point in enumerate(step[:-1])], {}),
            "scale/depth": scaled("depth", depth, {}),
            "scale/compile": scaled(
                "depth", [{"x": n, "scan": 2 + 0.01 * n, "unroll": 1 + 0.7 * n} for n in (1, 2, 4, 8, 16)], {}
            ),
        },
    }


def cells(text: str, begins: str) -> list[str]:
    """The cells of the first line of a table that begins with a text."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {begins}"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_a_win_and_a_loss_are_told_alike() -> None:
    found = tables(made_up())
    assert cells(found["train"], "nano (")[1:] == [
        "**20.0 (18.0 to 22.0)**",
        "30.0 (27.0 to 33.0)",
        "40.0 (36.0 to 44.0)",
        "–",  # noqa: RUF001
        "1.50 (1.35 to 1.65)",
        "gpt_jax",
    ]
    gpt2 = cells(found["train"], "gpt2 (4/4/128, 64, 12, float32)")
    assert gpt2[3:] == ["failed", "**900 (810 to 990)**", "0.50 (0.45 to 0.55)", "**PyTorch, eager**"]
    assert cells(found["ratios"], "train gpt2")[1:] == ["PyTorch, eager", "0.50 (0.45 to 0.55)", "**PyTorch, eager**"]
    assert cells(found["ratios"], "learn")[2:] == ["1.05 (0.95 to 1.16)", "neither, within the spread"]
    assert cells(found["ratios"], "decode GPT-2, float32, batch 8, greedy")[3] == "gpt_jax"
    assert found["ratios"].endswith("gpt_jax is the faster at all 13 sizes")
    slower = made_up()
    slower["rows"]["scale/batch"]["points"][1]["gpt_jax"] = around(80)
    lost = "**PyTorch, eager, is the faster** at 1 of 13 sizes: batch 2 (0.89 times as fast)"
    assert tables(slower)["ratios"].endswith(lost)


def test_failures_and_notes_stand_below_the_table() -> None:
    found = tables(made_up())
    assert f"- gpt2: PyTorch, compiled failed: {OUT_OF_MEMORY}" in found["train"].splitlines()
    assert "- gpt2: attention keeps its scores" in found["train"].splitlines()
    assert "- nano: MFU is of 200 GFLOP/s in float32: a product" in found["train"].splitlines()
    assert "- batch 8: no cache: greedy only" in found["decode"].splitlines()
    assert "- PyTorch at 1024: out of memory" in found["scale"].splitlines()
    assert cells(found["scale"], "1,024")[2:] == ["failed", "–"]  # noqa: RUF001


def test_more_memory_than_pytorch_is_marked() -> None:
    results = made_up()
    text = tables(results)["train"]
    assert cells(text, "gpt2 |")[3:5] == ["5.00 GiB, more", "4.00 GiB"]
    assert cells(tables(results)["train"], "nano |")[3:5] == ["1.00 GiB", "2.00 GiB"]
    assert "- gpt2: gpt_jax needs more memory, 5.00 GiB, by kind not recorded, than PyTorch, eager" in text
    assert cells(tables(results)["decode"], "batch 8 |")[1:] == ["3.00 GiB, more", "1.00 GiB"]
    decoded_8 = results["rows"]["decode/8"]
    decoded_8["memory"] = {
        "gpt_jax": {"libraries": GIB / 4, "state": GIB, "temporaries": GIB / 2},
        "transformers": {"libraries": GIB / 4, "state": GIB / 2},
    }
    assert (
        "- batch 8: gpt_jax needs more memory, 3.00 GiB (libraries 256 MiB, state 1.00 GiB, the rest 1.75 GiB, XLA's "
        "own account of temporaries 512 MiB), than transformers, 1.00 GiB (libraries 256 MiB, state 512 MiB, the rest "
        "256 MiB)"
    ) in tables(results)["decode"].splitlines()


def test_one_bandwidth_is_the_roofline_of_all_rows() -> None:
    """Eight tokens of 0.5 GB at 50 / 8 a second are 3.125 GB/s of the 25 that another row has read at best."""
    results = made_up()
    results["rows"]["decode/1"] = {**results["rows"]["decode/8"], "batch": 1, "bandwidth": spread([1e10, 2.5e10])}
    text = tables(results)["decode"]
    line = [line for line in text.splitlines() if line.startswith("| batch 8, greedy")][1]
    assert line.endswith("| 12% (11% to 14%) |")
    assert "in any round, 25.0 GB/s; the slowest round had 10.0" in text


def test_the_fastest_of_our_settings_is_bold() -> None:
    text = tables(made_up())["variants"]
    assert cells(text, "nano") == ["nano", "as chosen by itself", "20.0 (18.0 to 22.0)", "1.00", "1.00 GiB", "2.50 s"]
    assert "| attention xla | **16.0 (14.4 to 17.6)** | 1.25 |" in text


def test_a_loss_that_was_not_reached_is_told() -> None:
    text = tables(made_up())["learn"]
    assert cells(text, "PyTorch, compiled")[1] == "not reached"
    assert "- where the loss is not reached, times as fast is by the seconds in all" in text


def test_parts_without_rows_are_not_measured_yet() -> None:
    empty = {**made_up(), "rows": {}}
    assert {part: text for part, text in tables(empty).items() if text != NOT_MEASURED}.keys() == {"machine"}
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
        "# Title\n<!-- tests -->\nkeep me\n<!-- end -->\n\n<!-- benchmarks: a-cpu train -->\n| preset |"
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
    assert cells(text, "training nano")[1:] == ["20.0", "30.0, PyTorch, eager", "1.50 (1.35 to 1.65)", "gpt_jax"]
    lost = ["2,000", "1,000, PyTorch, eager", "0.50 (0.45 to 0.55)", "**PyTorch, eager**"]
    assert cells(text, "training GPT-2")[1:] == lost
    assert cells(text, "learning")[1:4] == ["40.0", "50.0, PyTorch, eager", "1.05 (0.95 to 1.16)"]
    written = tables(read_results(FOLDER)["amd-epyc-2-cores"])["summary"].splitlines()
    assert len(written) == 2 + len(SUMMARY) == 8


def test_the_documents_have_every_table() -> None:
    """All tables of one machine at least, and those that are of no machine."""
    markers = {marker for document in DOCUMENTS for marker in MARKER.findall(document.read_text(encoding="utf-8"))}
    files = read_results(FOLDER)
    assert markers >= ALONE.keys() & files.keys() == ALONE.keys()
    assert any(markers >= {f"{name} {part}" for part in PARTS} for name in files if name not in ALONE)


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
    results["rows"] = {
        "scale/context": scaled("context", [{"x": 64, "gpt_jax": around(1)}, {"x": 128, "gpt_jax": around(2)}], {})
    }
    assert [path.name for path in plots.draw(results, tmp_path / "a-tpu")] == ["a-tpu-scaling.png"]
    assert plots.draw({**results, "rows": {}}, tmp_path / "none") == []


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[bench\]"'):
        plots.draw(made_up(), tmp_path / "a-cpu")
