"""The package's layers: who may import whom, read from the source without running it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mda_lightning"

#: Outermost last. A part imports parts before its own row, never one beside it or after it;
#: whatever is not listed is the core, which imports none of these.
OUTER_LAYERS = (
    ("pretraining",),
    ("datamodules",),
    ("callbacks",),
    ("recipes",),
    ("cli",),
    ("__main__",),
)

#: The core's order where it has one. A part imports its own row or one before it.
CORE_ORDER = (
    ("units", "files"),
    ("architectures",),
    ("attention", "taps", "probes"),
    ("metrics", "mechanisms"),
    ("gradients",),
    ("curvature",),
    ("influence",),
)
STREAM_ORDER = (
    ("files", "sample_ids"),
    ("shuffling",),
    ("base_order",),
    ("corpora", "store"),
    ("interventions",),
    ("schedule",),
)

#: May be had, and tested, without a model: no torch, directly or through anything they import.
TORCH_FREE = {
    "files",
    "base_order",
    "window",
    "interventions",
    "schedule",
    "checkpoint_steps",
    "store",
    "corpora",
    "analysis",
}

LOGGERS = {"wandb", "tensorboard", "mlflow", "comet_ml", "neptune"}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """Dotted names a module imports anywhere in its text; inside the package, modules."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively; write the whole name"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in SOURCES else node.module)
    return found


GRAPH = {name: imports_of(name) for name in SOURCES}


def part_of(name: str) -> str:
    """`mda_lightning.metrics.attention_score` is of the part `metrics`."""
    return name.split(".")[1] if "." in name else ""


def inside(names: set[str]) -> set[str]:
    return {name for name in names if name in SOURCES}


def reached_from(name: str) -> set[str]:
    """Everything a module imports, through the package's own modules, those of the package too.

    Importing a module also runs the packages it lies in.
    """
    reached: set[str] = set()
    waiting = [name]
    while waiting:
        module = waiting.pop()
        if module in reached:
            continue
        reached.add(module)
        if module in SOURCES:
            waiting += GRAPH[module]
            waiting += [module.rpartition(".")[0]] if "." in module else []
    return reached


def test_no_module_imports_itself_through_others() -> None:
    # A package's __init__ gathers names from its modules and they may name each other, not it.
    try:
        TopologicalSorter({name: inside(names) - {name} for name, names in GRAPH.items()}).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(error.args[1]))


def test_outer_layers_import_inwards_only() -> None:
    row = {part: i for i, parts in enumerate(OUTER_LAYERS) for part in parts}
    wrong = [
        f"{name} imports {other}"
        for name, names in GRAPH.items()
        for other in inside(names)
        if part_of(other) in row
        and part_of(other) != part_of(name)
        and row[part_of(other)] >= row.get(part_of(name), -1)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("order", [CORE_ORDER, STREAM_ORDER], ids=["engine", "stream"])
def test_core_imports_downwards_only(order: tuple[tuple[str, ...], ...]) -> None:
    row = {part: i for i, parts in enumerate(order) for part in parts}
    wrong = [
        f"{name} imports {other}"
        for name, names in GRAPH.items()
        for other in inside(names)
        if part_of(name) in row and row.get(part_of(other), -1) > row[part_of(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_core_knows_no_lightning_and_no_logger() -> None:
    outer = {part for parts in OUTER_LAYERS for part in parts}
    core = [name for name in SOURCES if part_of(name) not in outer]
    wrong = [
        f"{name} imports {other}"
        for name in core
        for other in GRAPH[name]
        if other.split(".")[0] in LIGHTNING | LOGGERS
    ]
    assert not wrong, "\n".join(wrong)


def test_only_one_of_lightnings_names_is_used() -> None:
    """Mixing `lightning.pytorch` and `pytorch_lightning` makes isinstance checks fail."""
    wrong = [
        f"{name} imports {other}"
        for name, names in GRAPH.items()
        for other in names
        if other.split(".")[0] in LIGHTNING - {"lightning"}
    ]
    assert not wrong, "\n".join(wrong)


def test_what_needs_no_model_reaches_no_torch() -> None:
    heavy = {"torch", "lightning", "transformers"}
    wrong = [
        f"{name} reaches {other}"
        for name in SOURCES
        if part_of(name) in TORCH_FREE
        for other in reached_from(name)
        if other.split(".")[0] in heavy
    ]
    assert not wrong, "\n".join(wrong)


def test_what_needs_no_model_loads_no_torch() -> None:
    """The same at run time, for what third parties bring along."""
    modules = [f"mda_lightning.{part}" for part in ("files", "window", "interventions", "schedule")]
    code = f"import {', '.join(modules)}, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["callbacks", "datamodules", "recipes"])
def test_top_level_links_lead_into_the_package(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert os.readlink(link) == f"mda_lightning/{name}"
    assert (PACKAGE / name).is_dir() and not (PACKAGE / name).is_symlink()


def written_files() -> list[Path]:
    """The repository's own text files; without git, everything but hidden and built folders."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        skipped = {"build", "dist", "site", "runs", "wandb"}
        paths = [
            path
            for path in ROOT.rglob("*")
            if not any(p.startswith(".") or p in skipped for p in path.relative_to(ROOT).parts)
        ]
    suffixes = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".html", ".css", ".cff", ".in", ""}
    return [path for path in paths if path.is_file() and path.suffix in suffixes]


def test_no_file_names_a_machine() -> None:
    folders = "work|tmp|home|root|Users|mnt|opt|var|scratch|content"
    machine_path = re.compile(rf"(?<![\w./~}}\])*-])/(?:{folders})/\w")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in written_files()
        for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1)
        if machine_path.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_files_stay_short_and_are_named_for_what_they_hold() -> None:
    for name, path in SOURCES.items():
        lines = len(path.read_text("utf-8").splitlines())
        assert lines <= 400, f"{name} has {lines} lines; a file is one idea, at most 400"
        assert not re.search(r"util|helper|manager|misc|common", path.stem), name
