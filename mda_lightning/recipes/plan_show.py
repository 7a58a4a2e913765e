"""``mda-lightning plan show``: a plan on its stream, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from mda_lightning.corpora import JoinedRows, TokenRows
from mda_lightning.files import atomic_path
from mda_lightning.interventions import Plan
from mda_lightning.interventions.operations import Steps
from mda_lightning.interventions.sources import Source, describe_id
from mda_lightning.recipes.plan_numbers import counted, numbers_of, spans_of, warnings_of, words_of
from mda_lightning.recipes.plan_rates import Rates, rates_of
from mda_lightning.recipes.plan_stream import BaseStream, base_stream, of_plan
from mda_lightning.schedule import Schedule
from mda_lightning.schedule.ledger import PLAN_FILE, Ledger
from mda_lightning.schedule.strip import KINDS, Kind, Strip, strip_of

__all__ = ["Rates", "show"]

_SHADES = "·░▒▓█"
_PLAIN_SHADES = " .-+#"  # where these cannot be printed
_LABEL, _LEGEND = 11, 24  # columns beside the strip
_LEAST, _MOST = 20, 120
_SAMPLES, _OPERATIONS = 3, 6  # of which examples are shown
_STYLES: dict[Kind, str] = {
    "masked": "red",
    "reweighted": "magenta",
    "pruned": "yellow",
    "inserted": "blue",
    "replaced": "green",
}


def show(
    path: Path,
    stream: BaseStream,
    *,
    console: Console | None = None,
    rates: Rates | None = None,
    figure: Path | None = None,
) -> dict[str, Any]:
    """Print what a plan does; returns the numbers behind it, JSON values.

    Args:
        path: a plan file, or the folder of a run: its plan as it was run.
        stream: corpus and order, where they are given; else those the plan is tied to.
        console: where to print; None prints nothing.
        rates: a learning-rate schedule to compare before and after.
        figure: a ``.png`` to write the strip to.

    Raises:
        FileNotFoundError: no plan there.
        ValueError: the plan does not fit the stream; a figure or rates without an order.
    """
    plan, stream = _opened(path, stream)
    schedule = None if stream.order is None else Schedule(stream.order, plan)
    if schedule is None and (rates is not None or figure is not None):
        raise ValueError(
            f"plan {plan.name!r} is not tied to a base order, so where it acts in the run is not "
            "known; give --run, or --corpus with --batch-size and --n-steps"
        )
    width = min(max((console.width if console else 100) - _LABEL - _LEGEND, _LEAST), _MOST)
    with progress_bar(None if console is None else Console(stderr=True)) as progress:
        numbers, strip = numbers_of(plan, schedule, n_spans=width, progress=progress)
        zoomed = _zoomed(schedule, strip, width, progress)
    numbers["path"] = str(path)
    numbers["warnings"] = warnings_of(numbers)
    if strip is not None:
        numbers["strip"] = spans_of(strip)
    if zoomed is not None:
        numbers["zoom"] = spans_of(zoomed)
    if schedule is not None:
        numbers["rates"] = _rates(schedule, rates)
    rows = _with_sources(stream.rows, plan.sources)
    numbers["examples"] = _examples(plan, rows)
    if console is not None:
        _print(console, numbers, strip, zoomed, plan)
    if figure is not None and strip is not None:
        _draw(figure, strip, zoomed)
        numbers["figure"] = str(figure)
        if console is not None:
            console.print(Text(f"{figure}: the strip as a figure"), soft_wrap=True)
    return numbers


def strip_lines(strip: Strip, shades: str = _SHADES) -> list[Text]:
    """The strip as text: a line a kind, a character a span, and an axis of steps.

    Shades are shares of the line's fullest span, which is named at its end; of what is as in the
    base order, they are shares of all places.
    """
    n = len(strip.places)
    left = 1.0 - sum(strip.counts.values()) / strip.places
    line = Text(f"{'as it was':<{_LABEL}}")
    line.append("".join(_shade(share, shades) for share in left))
    line.append(f"  {shades[-1]} all of a span", "dim")
    lines = [line]
    for kind in KINDS:
        share = strip.counts[kind] / strip.places
        most = float(share.max())
        if not most:
            continue
        line = Text(f"{kind:<{_LABEL}}")
        line.append("".join(_shade(value / most, shades) for value in share), _STYLES[kind])
        line.append(f"  {shades[-1]} {most:.3g} of a span", "dim")
        lines.append(line)
    first, middle, last = (int(strip.edges[i]) for i in (0, n // 2, n))
    axis = str(first)
    if len(axis) < n // 2 and n // 2 + len(str(middle)) < n:
        axis = f"{axis:<{n // 2}}{middle}"
    lines.append(Text(f"{'step':<{_LABEL}}{axis:<{n - 1}} {last}", "dim"))
    return lines


def _opened(path: Path, stream: BaseStream) -> tuple[Plan, BaseStream]:
    if not path.is_dir():
        plan = Plan.load(path)
        return plan, of_plan(plan, stream)
    ledger = Ledger.open(path)
    plan = Plan.load(ledger.folder / PLAN_FILE)
    if stream.order is None:
        corpus = None if stream.rows is None else stream.rows.folder
        stream = base_stream(run=path, corpus=corpus)
    return plan, of_plan(plan, stream)


@contextmanager
def progress_bar(console: Console | None) -> Iterator[Any]:
    """Called with steps done and steps to do."""
    if console is None:
        yield None
        return
    bar = Progress(
        TextColumn("counting steps"),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _zoomed(
    schedule: Schedule | None, strip: Strip | None, width: int, progress: Any
) -> Strip | None:
    """The strip of the touched steps, where they are a small part of the run."""
    if schedule is None or strip is None or strip.touched is None:
        return None
    first, last = strip.touched
    margin = max(1, (last - first) // 10)
    around: Steps = (max(0, first - margin), min(len(schedule), last + margin))
    if 3 * (around[1] - around[0]) > len(schedule):
        return None
    return strip_of(schedule, steps=around, n_spans=width, progress=progress)


def _rates(schedule: Schedule, rates: Rates | None) -> dict[str, Any]:
    added = len(schedule) - schedule.order.n_steps
    told: dict[str, Any] = {"later_by": added}
    if rates is not None:
        whole = (0, schedule.order.n_steps)
        windows = sorted({op.steps or whole for op in schedule.plan.operations}) or [whole]
        told["schedule"] = rates.schedule
        told["total_steps"] = rates.total_steps
        told["windows"] = [
            rates_of(schedule, window, rates)
            for window in windows[:_OPERATIONS]
            if window[1] <= schedule.order.n_steps
        ]
    return told


def _rate_lines(told: Mapping[str, Any], numbers: Mapping[str, Any]) -> list[str]:
    added = told["later_by"]
    if not added:
        lines = ["learning rate: data keeps its steps, and so its rates"]
    else:
        lines = [
            f"learning rate: it follows the optimizer step, so the last data comes {added:,} steps "
            "later, at the rate of a later step; a schedule that ends with the run (PythiaModule "
            f"without total_steps) is stretched over {numbers['run']['steps']:,} steps"
        ]
    for one in told.get("windows", []):
        start, end = one["window"]
        ends = told["total_steps"] or "the run's"
        lines.append(
            f"learning rate ({told['schedule']}, total steps {ends}): base samples of steps "
            f"{start}:{end} {one['before']:.4g} -> {one['after']:.4g}, the run's last "
            f"{one['at_the_end_before']:.4g} -> {one['at_the_end_after']:.4g}"
        )
    return lines


def _state(source: Source) -> str:
    """Where a source lies, and whether it is what the plan was made with."""
    if source.path is None:
        return "no folder known"
    if not (Path(source.path) / "meta.json").is_file():
        return (
            f"not at {source.path}; TokenDataModule(sources={{{source.name!r}: ...}}) tells where"
        )
    own = TokenRows.open(source.path).content_hash
    if own != source.content_hash:
        return f"{source.path} holds other rows: {own[:12]} instead of {source.content_hash[:12]}"
    return source.path


def _with_sources(rows: TokenRows | None, sources: tuple[Source, ...]) -> TokenRows | None:
    """The corpus with the plan's sources that lie where the plan says."""
    if rows is None:
        return None
    others = {}
    for source in sources:
        if source.path is None or not (Path(source.path) / "meta.json").is_file():
            continue
        own = TokenRows.open(source.path)
        if own.content_hash == source.content_hash:
            others[source.namespace] = own
    return JoinedRows(rows, others)


def _examples(plan: Plan, rows: TokenRows | None) -> list[dict[str, Any]]:
    """The first samples of each operation, with their text where it is at hand."""
    found = []
    for op in plan.operations[:_OPERATIONS]:
        ids = op.named_ids[:_SAMPLES]
        for sample in ids.tolist():
            found.append(
                {
                    "operation": op.describe()["operation"],
                    "sample_id": sample,
                    "sample": describe_id(sample, plan.sources),
                    "text": _text(rows, sample),
                }
            )
    return found


def _text(rows: TokenRows | None, sample: int) -> str:
    if rows is None:
        return ""
    try:
        return " ".join(rows.decode(rows.get([sample])[0]).split())
    except (ValueError, IndexError):  # no tokenizer, or a source that is not at hand
        return ""


def _print(
    console: Console,
    numbers: Mapping[str, Any],
    strip: Strip | None,
    zoomed: Strip | None,
    plan: Plan,
) -> None:
    def line(text: str | Text, style: str = "") -> None:
        shown = text if isinstance(text, Text) else Text(text, style)
        console.print(shown, highlight=False, soft_wrap=True)

    line(f"{numbers['path']}: plan {plan.name!r}, content {plan.content_hash[:12]}", "bold")
    tied = [
        f"{what} {str(value)[:12]}" if value else f"any {what}"
        for what, value in (("corpus", plan.corpus_hash), ("order", plan.order_hash))
    ]
    line(f"  for {', '.join(tied)}; seed of what is drawn: {plan.seed or 0}")
    for words in words_of(numbers):
        line(f"  {words}")
    for words in _rate_lines(numbers["rates"], numbers) if "rates" in numbers else ():
        line(f"  {words}")
    for source in plan.sources:
        line(f"  source {source.name!r}: {counted(source.n_rows, 'row')}, {_state(source)}")
    for words in numbers["warnings"]:
        line(f"  ! {words}", "bold red")
    for part in (strip, zoomed):
        if part is not None and part.touched is not None:
            line("")
            for text in strip_lines(part, _shades(console.encoding)):
                line(text)
    if strip is None:
        line(
            "  (not tied to a base order: give --run, or --corpus with --batch-size and --n-steps)"
        )
    elif strip.touched is None:
        line("  no place of the run is changed")
    shown = [one for one in numbers["examples"] if one["text"]] or numbers["examples"]
    if shown:
        line("")
    if shown and not any(one["text"] for one in shown):
        line("  some of the samples; --run or --corpus shows their texts", "dim")
    room = max(console.width - 30, _LEAST)
    for one in shown:
        cut = one["text"] if len(one["text"]) <= room else f"{one['text'][: room - 3]}..."
        line(f"  {one['operation']:<8} {one['sample']:>12}  {cut}")


def _shade(share: float, shades: str) -> str:
    """Blank for nothing, and for anything at least the faintest shade."""
    if share <= 0:
        return shades[0]
    return shades[min(4, 1 + int(share * 4 * (1 - 1e-9)))]


def _shades(encoding: str) -> str:
    try:
        _SHADES.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return _PLAIN_SHADES
    return _SHADES


def _draw(path: Path, strip: Strip, zoomed: Strip | None) -> None:
    from mda_lightning.analysis.figures import png_bytes
    from mda_lightning.analysis.figures.plan_strip import plan_strip

    if path.suffix != ".png":
        raise ValueError(f"{path}: the figure is a .png file")
    with atomic_path(path) as part:
        part.write_bytes(png_bytes(plan_strip(zoomed or strip, whole=strip)))
