"""The index benchmark's arithmetic, its data, and what it writes."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import app.cli.index_bench as command
from app.cli.index import app
from app.devstack import index_bench
from app.devstack.index_bench import (
    IMPOSTOR_DEVIATION,
    IMPOSTOR_MEAN,
    Crowd,
    Effort,
    Figures,
    Machine,
    Measured,
    ScanFigures,
    measure,
    measure_scan,
    threshold_for,
)

#: What those who read `--json` were promised.
PROMISED = {
    "n", "dim", "kind", "p50_ms", "p99_ms", "fp32_p50_ms", "int8_p50_ms", "floor_ms", "pairs", "misses", "private_mib",
    "disk_mib", "build_s", "open_s", "qps_all_cores",
}  # fmt: skip
MACHINE = Machine(processor="Abacus", cores=2, memory_gib=24.0, python="3.11.0", versions={"numpy": "2.4"})


def figures(count: int, **changes: object) -> Figures:
    """Made-up figures of one size."""
    usual = {
        "n": count, "dim": 512, "kind": "faiss", "p50_ms": 1.5, "p99_ms": 2.0, "fp32_p50_ms": 15.0, "int8_p50_ms": 6.0,
        "floor_ms": 0.5, "pairs": 6000, "misses": 0, "private_mib": 80.0, "disk_mib": 100.0, "build_s": 1.0,
        "open_s": 0.1, "qps_all_cores": 1000.0, "scan": "compiled", "seed": 0, "threshold": 0.46, "fp32_by": "FAISS",
        "usearch_i8_p50_ms": None, "usearch_f16_p50_ms": 20.0, "calibrate_s": 2.0, "publish_s": 0.5, "fetch_s": 0.5,
        "first_query_s": 0.2, "tail_rows": 50_000, "tail_ms": 0.3,
    }  # fmt: skip
    return Figures.model_validate(usual | changes)


def scan_figures(count: int) -> ScanFigures:
    """Made-up figures of a scan."""
    return ScanFigures(
        n=count, dim=512, seed=0, threshold=0.46, planted=1000, found=1000, pairs=1051,
        join_s=8.0, products_s=64.0, products_timed=0.1,
    )  # fmt: skip


def measured(one: Figures | ScanFigures) -> Measured:
    """As a line of the results file."""
    return Measured(
        measured_at=datetime(2026, 1, 2, tzinfo=UTC),
        machine=MACHINE,
        figures=one if isinstance(one, Figures) else None,
        scan=one if isinstance(one, ScanFigures) else None,
    )


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that were measured; the measuring itself is made up."""
    sizes: list[int] = []

    def made_up(count: int, dimension: int, seed: int, folder: Path, say: index_bench.Say) -> Figures:
        sizes.append(count)
        return figures(count, dim=dimension, seed=seed)

    monkeypatch.setattr(command, "measure", made_up)
    return sizes


def test_strangers_are_as_much_alike_as_real_ones() -> None:
    drawn = Crowd(512, 3).draw(3000)
    among = (drawn @ drawn.T)[np.triu_indices(len(drawn), 1)]
    assert abs(among.mean() - IMPOSTOR_MEAN) < 0.003
    assert abs(among.std() - IMPOSTOR_DEVIATION) < 0.004
    assert np.allclose(np.linalg.norm(drawn, axis=1), 1, atol=1e-5)


def test_the_drawn_vectors_are_turned_so_that_no_dimension_stands_out() -> None:
    strengths = Crowd(256, 1).draw(4000).std(axis=0)
    assert strengths.max() < 2.5 * strengths.min()


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), dimension=st.sampled_from([64, 128, 512]), count=st.integers(1, 50_000))
def test_the_same_seed_draws_the_same_vectors(seed: int, dimension: int, count: int) -> None:
    count = min(count, 40_000 // (dimension // 64))
    one, other = Crowd(dimension, seed), Crowd(dimension, seed)
    blocks = list(one.blocks(count))
    assert sum(map(len, blocks)) == count
    assert np.array_equal(blocks[0], next(other.blocks(count)))


def test_a_larger_gallery_asks_for_a_higher_threshold() -> None:
    thresholds = [threshold_for(count) for count in (10_000, 100_000, 1_000_000)]
    assert thresholds == sorted(thresholds)
    assert 0.4 < thresholds[0] < thresholds[2] < 0.55


def test_reading_more_takes_longer() -> None:
    assert 0 < index_bench._floor_ms(10_000) < index_bench._floor_ms(30_000_000)


def test_a_small_run_finds_every_pair_and_every_figure(tmp_path: Path) -> None:
    said: list[str] = []
    found = measure(10_500, 128, 5, tmp_path, said.append, effort=Effort(400, 6_000, 40, 0.5))
    assert (found.n, found.dim, found.kind) == (10_500, 128, "faiss")
    assert found.misses < 0.02 * found.pairs  # so few pairs choose a margin that the next ones may miss by
    assert found.pairs == 400
    assert found.scan in {"compiled", "faiss"}
    assert found.disk_mib == pytest.approx(10_500 * (2 * 128 + 16 + 8 + 16) / 2**20, rel=0.1)
    numbers = [value for value in found.model_dump().values() if isinstance(value, float)]
    assert all(math.isfinite(number) for number in numbers)
    assert min(found.p50_ms, found.floor_ms, found.open_s, found.qps_all_cores) > 0
    assert any(str(found.threshold) in line for line in said)


def test_a_small_scan_finds_every_planted_duplicate() -> None:
    found = measure_scan(9_000, 128, 6, lambda _: None)
    assert found.planted == found.found
    assert found.planted >= 85
    assert found.pairs >= found.found
    assert found.products_s > 0


def test_json_is_one_object_on_one_line_for_each_size_and_the_last_of_the_output(measurements: list[int]) -> None:
    ran = CliRunner().invoke(app, ["bench", "--size", "1000,2000", "--size", "3000", "--json"])
    assert ran.exit_code == 0
    objects = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [one["n"] for one in objects] == measurements == [1000, 2000, 3000]
    assert all(one.keys() >= PROMISED for one in objects)


def test_a_run_that_is_resumed_measures_only_what_is_missing(measurements: list[int], tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    for sizes in ("1000", "1000,2000", "2000"):
        ran = CliRunner().invoke(app, ["bench", "--size", sizes, "--resume", str(results), "--json"])
        assert ran.exit_code == 0
    assert measurements == [1000, 2000]
    assert json.loads(ran.stdout)["n"] == 2000
    CliRunner().invoke(app, ["bench", "--size", "1000", "--dim", "128", "--resume", str(results)])
    assert measurements == [1000, 2000, 1000]
    assert len(results.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "arguments",
    [["--size", "many"], ["--size", "10"], ["--dim", "8"], ["--write-docs"]],
    ids=" ".join,
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], measurements: list[int]) -> None:
    assert CliRunner().invoke(app, ["bench", *arguments]).exit_code == 2
    assert not measurements


def test_a_file_of_something_else_is_not_added_to(measurements: list[int], tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("buy bread\n")
    assert CliRunner().invoke(app, ["bench", "--size", "1000", "--resume", str(other)]).exit_code == 2
    assert other.read_text() == "buy bread\n"


def test_the_page_tells_ratios_machine_date_and_what_was_missed(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks.jsonl"
    page, plot = command._write_docs(
        results, [measured(figures(100_000)), measured(figures(1_000_000, misses=2)), measured(scan_figures(100_000))]
    )
    text = page.read_text()
    for told in (
        "10.0 x",
        "4.0 x",
        "3.0 x",
        "0 of 6000",
        "2 of 6000",
        "Abacus",
        "2026-01-02",
        "numpy 2.4",
        "8.0 times",
    ):
        assert told in text
    assert "1000 of 1000 planted duplicates" in text
    assert f"({plot.name})" in text
    assert plot.read_text().lstrip().startswith("<?xml")


def test_of_two_measurements_of_a_size_the_page_tells_the_later(tmp_path: Path) -> None:
    old, new = figures(100_000, p50_ms=1.25), figures(100_000, p50_ms=0.75)
    page, _ = command._write_docs(tmp_path / "b.jsonl", [measured(old), measured(new)])
    assert "0.75" in page.read_text()
    assert "1.25" not in page.read_text()


def test_the_same_figures_draw_the_same_plot(tmp_path: Path) -> None:
    known = [measured(figures(10_000, fp32_p50_ms=None)), measured(figures(100_000))]
    first = command._write_docs(tmp_path / "one.jsonl", known)[1].read_bytes()
    second = command._write_docs(tmp_path / "two.jsonl", known)[1].read_bytes()
    assert first == second
