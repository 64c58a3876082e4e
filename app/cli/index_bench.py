"""`idem index bench`: the index beside exact scans, on drawn vectors; and the page that shows the figures."""

import importlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from app.devstack.index_bench import (
    FPIR,
    IMPOSTOR_DEVIATION,
    IMPOSTOR_MEAN,
    RECOGNISER,
    Figures,
    Machine,
    Measured,
    ScanFigures,
    measure,
    measure_scan,
    this_machine,
    working_folder,
)

SIZES: Final = "10000,100000,1000000"
SCAN_SIZE: Final = "100000"
#: The band above the threshold would hold the same pair too often in fewer.
SMALLEST: Final = 1_000
#: Rows of the table and of the page: what is said, and the figure that says it.
ROWS: Final[Sequence[tuple[str, Callable[[Figures], float | str | None]]]] = (
    ("threshold", lambda one: one.threshold),
    ("kind (scan)", lambda one: f"{one.kind} ({one.scan})"),
    ("query p50 ms, one thread", lambda one: one.p50_ms),
    ("query p99 ms", lambda one: one.p99_ms),
    ("exact fp32 scan p50 ms", lambda one: one.fp32_p50_ms),
    ("exact int8 scan p50 ms (FAISS SQ8)", lambda one: one.int8_p50_ms),
    (
        "usearch exact f16 / i8 p50 ms",
        lambda one: f"{_shown(one.usearch_f16_p50_ms)} / {_shown(one.usearch_i8_p50_ms)}",
    ),
    ("floor ms: one bit a dimension read once", lambda one: one.floor_ms),
    ("fp32 / ours", lambda one: _ratio(one.fp32_p50_ms, one.p50_ms)),
    ("int8 / ours", lambda one: _ratio(one.int8_p50_ms, one.p50_ms)),
    ("ours / floor", lambda one: _ratio(one.p50_ms, one.floor_ms)),
    ("missed of planted pairs", lambda one: f"{one.misses} of {one.pairs}"),
    ("queries a second, all cores", lambda one: one.qps_all_cores),
    ("50,000 rows of tail add ms", lambda one: one.tail_ms),
    ("build s", lambda one: one.build_s),
    ("calibrate and prove s", lambda one: one.calibrate_s),
    ("publish s (hashed, synced, renamed)", lambda one: one.publish_s),
    ("fetch s (copied and verified)", lambda one: one.fetch_s),
    ("open s, a new process", lambda one: one.open_s),
    ("first answer after that s", lambda one: one.first_query_s),
    ("private memory MiB", lambda one: one.private_mib),
    ("on disk MiB", lambda one: one.disk_mib),
)


def bench(
    size: Annotated[
        list[str] | None, typer.Option(help=f"How many vectors; several, or with commas. Default {SIZES}.")
    ] = None,
    dim: Annotated[int, typer.Option(min=64, max=1984)] = 512,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    resume: Annotated[
        Path | None, typer.Option(help="Results file: sizes in it are not measured again, new ones are added.")
    ] = None,
    work_dir: Annotated[
        Path | None, typer.Option(help="Where the files lie meanwhile: 2.5 KiB a vector. Default: the system's.")
    ] = None,
    *,
    scan: Annotated[
        bool, typer.Option("--scan", help=f"Measure a whole-gallery scan instead; default {SCAN_SIZE}.")
    ] = False,
    write_docs: Annotated[
        bool, typer.Option("--write-docs", help="Write the page and its plot beside the results file.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One object a size, each on one line, the last of the output.")
    ] = False,
) -> None:
    """Measure the index on drawn vectors beside exact scans: latency, misses, memory, all in one run."""
    console = Console(stderr=as_json, highlight=False)
    if write_docs and resume is None:
        raise typer.BadParameter("name the results file: --resume FILE", param_hint="--write-docs")
    known = _read(resume)
    machine = this_machine()
    asked: list[Measured] = []
    for count in _sizes(size or [SCAN_SIZE if scan else SIZES]):
        measured = _known(known, count, dim, seed, scan=scan)
        if measured is None:
            measured = _measure(machine, count, dim, seed, work_dir, console, scan=scan)
            known.append(measured)
            if resume is not None:
                _append(resume, measured)
        asked.append(measured)
    _show(console, asked)
    if write_docs and resume is not None:
        for written in _write_docs(resume, known):
            console.print(f"Written: {written}")
    if as_json:
        for one in asked:
            typer.echo((one.scan or one.figures or one).model_dump_json())


def _show(console: Console, asked: Sequence[Measured]) -> None:
    for one in asked:
        if one.scan is not None:
            console.print(_sentence(one.scan))
    if figures := [one.figures for one in asked if one.figures is not None]:
        console.print(_table(figures))


def _measure(
    machine: Machine, count: int, dim: int, seed: int, work_dir: Path | None, console: Console, *, scan: bool
) -> Measured:
    moment = datetime.now(UTC)
    with console.status("") as status:

        def say(what: str) -> None:
            status.update(what)
            if not console.is_terminal:
                console.print(what)

        if scan:
            return Measured(measured_at=moment, machine=machine, scan=measure_scan(count, dim, seed, say))
        with working_folder(work_dir) as folder:
            return Measured(measured_at=moment, machine=machine, figures=measure(count, dim, seed, folder, say))


def _sizes(asked: list[str]) -> list[int]:
    try:
        sizes = [int(one.replace("_", "")) for some in asked for one in some.split(",")]
    except ValueError:
        raise typer.BadParameter("give whole numbers, with commas between", param_hint="--size") from None
    if min(sizes) < SMALLEST:
        raise typer.BadParameter(f"at least {SMALLEST}", param_hint="--size")
    return sizes


def _read(results: Path | None) -> list[Measured]:
    if results is None or not results.exists():
        return []
    try:
        return [Measured.model_validate_json(line) for line in results.read_text().splitlines() if line.strip()]
    except ValidationError as problem:
        raise typer.BadParameter(f"{results} is no results file: {problem}", param_hint="--resume") from None


def _append(results: Path, measured: Measured) -> None:
    with results.open("a") as file:
        file.write(measured.model_dump_json() + "\n")


def _known(known: list[Measured], count: int, dim: int, seed: int, *, scan: bool) -> Measured | None:
    for one in known:
        figures = one.scan if scan else one.figures
        if figures is not None and (figures.n, figures.dim, figures.seed) == (count, dim, seed):
            return one
    return None


def _table(shown: Sequence[Figures]) -> Table:
    table = Table(title=f"Drawn vectors of {shown[0].dim} dimensions", title_justify="left")
    table.add_column("")
    for one in shown:
        table.add_column(f"{one.n:,}", justify="right")
    for label, figure in ROWS:
        table.add_row(label, *(_shown(figure(one)) for one in shown))
    return table


def _sentence(scan: ScanFigures) -> str:
    part = "" if scan.products_timed == 1 else f" ({scan.products_timed:.0%} timed, the rest extrapolated)"
    return (
        f"Everything against everything, {scan.n:,} x {scan.dim} at {scan.threshold}: {scan.join_s:g} s on all cores; "
        f"{scan.found} of {scan.planted} planted duplicates found ({scan.pairs} pairs in all). Blocked float32 products without "
        f"symmetry: {scan.products_s:g} s{part}, {scan.products_s / scan.join_s:.1f} times as long."
    )


def _shown(figure: float | str | None) -> str:
    if figure is None:
        return "-"
    return figure if isinstance(figure, str) else f"{figure:.4g}" if abs(figure) < 1000 else f"{figure:,.0f}"  # noqa: PLR2004


def _ratio(one: float | None, other: float) -> str:
    return "-" if one is None or not other else f"{one / other:.1f} x"


def _write_docs(results: Path, known: Sequence[Measured]) -> list[Path]:
    """The page and its plot, of the latest measurement of each size."""
    latest = {one.figures.n: one for one in known if one.figures is not None}
    scans = {one.scan.n: one for one in known if one.scan is not None}
    measured = [latest[count] for count in sorted(latest)]
    figures = [one.figures for one in measured if one.figures is not None]
    page, plot = results.with_suffix(".md"), results.with_suffix(".svg")
    page.write_text(_page(measured, [scans[count] for count in sorted(scans)], plot.name, results.name))
    _plot(figures, plot)
    return [page, plot]


def _page(measured: Sequence[Measured], scans: Sequence[Measured], plot: str, results: str) -> str:
    figures = [one.figures for one in measured if one.figures is not None]
    head = "| | " + " | ".join(f"{one.n:,}" for one in figures) + " |"
    table = [head, "|---|" + "---:|" * len(figures)]
    table += [f"| {label} | " + " | ".join(_shown(figure(one)) for one in figures) + " |" for label, figure in ROWS]
    machines = sorted({_machine_line(one) for one in (*measured, *scans)})
    return "\n".join(
        [
            "# Benchmarks of the index",
            "",
            f'Written by `make bench-index ARGS="--resume docs/{results} --write-docs"` from [{results}]({results}).',
            "",
            *(f"- {line}" for line in machines),
            "",
            "Vectors are drawn: unit vectors whose impostor cosines have the mean and the standard deviation that real",
            f"embeddings were measured to have ({IMPOSTOR_MEAN}, {IMPOSTOR_DEVIATION}), turned by a random rotation, as float16.",
            f"The threshold is what the card of {RECOGNISER} asks at an FPIR of {FPIR:g} in a gallery of that size. Queries lie",
            "up to 0.1 above it from a vector of the gallery, where an index misses first. Times are of one query on one thread,",
            "medians unless said otherwise, all in one run; the fp32 scan is the faster one of FAISS's flat index and numpy.",
            "A dash: not installed, or not enough memory.",
            "",
            *table,
            "",
            f"![Latency over size]({plot})",
            "",
            *(f"{_sentence(one.scan)}\n" for one in scans if one.scan is not None),
        ]
    )


def _machine_line(one: Measured) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(one.machine.versions.items()))
    return (
        f"{one.measured_at:%Y-%m-%d}: {one.machine.processor}, {one.machine.cores} cores, {one.machine.memory_gib:g} GiB; "
        f"Python {one.machine.python}, {versions}"
    )


def _plot(figures: Sequence[Figures], path: Path) -> None:
    if find_spec("matplotlib") is None:
        typer.echo("idem index bench: the plot needs matplotlib (a development dependency)", err=True)
        raise typer.Exit(1)
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "idem"  # the same figures, the same file
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    canvas, axes = pyplot.subplots(figsize=(7, 4.5))
    curves: tuple[tuple[str, str, Callable[[Figures], float | None]], ...] = (
        ("exact fp32", "tab:red", lambda one: one.fp32_p50_ms),
        ("exact int8 (SQ8)", "tab:orange", lambda one: one.int8_p50_ms),
        ("this index", "tab:blue", lambda one: one.p50_ms),
        ("floor: one bit a dimension read", "tab:gray", lambda one: one.floor_ms),
    )
    for label, colour, figure in curves:
        points = [(one.n, figure(one)) for one in figures if figure(one) is not None]
        if points:
            counts, times = zip(*points, strict=True)
            axes.plot(counts, times, marker="o", color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="vectors", ylabel="ms a query, one thread (median)")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend()
    canvas.tight_layout()
    canvas.savefig(path, metadata={"Date": None})
    pyplot.close(canvas)
