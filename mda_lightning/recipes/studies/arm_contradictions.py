"""What arms and rankings say against themselves, each other, or the rest of a study."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from itertools import combinations

from mda_lightning.corpora.inserted import GENERATORS
from mda_lightning.pretraining.sizes import pythia_size
from mda_lightning.recipes.studies.arm_settings import RANKINGS, ArmSettings, Position
from mda_lightning.recipes.studies.settings import ModelSettings, StudySettings
from mda_lightning.units import parse_unit

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_PERCENT = re.compile(r"\s*-?\d+(\.\d+)?\s*%\s*")
WINDOW: tuple[Position, Position] = ("0%", "100%")
_RELATIVE_UNITS = ("target", "second", "lowest")

#: Which ``do`` takes a setting, for those that not all of them take.
_TAKEN_BY: dict[str, tuple[str, ...]] = {
    "by": ("mask", "insert", "replace"),
    "unit": ("mask", "insert", "replace", "steer"),
    "which": ("mask", "insert", "replace", "steer"),
    "generator": ("insert",),
    "count": ("mask", "insert", "replace"),
    "from_steps": ("mask", "insert", "replace"),
    "mode": ("insert",),
    "placement": ("insert",),
    "copies": ("insert",),
    "weight": ("mask", "prune", "steer"),
    "policy": ("steer",),
    "refresh_every": ("steer",),
}


def arm_contradictions(settings: StudySettings) -> Iterator[str]:
    """What is wrong with the arms and rankings, a message each."""
    yield from _rankings(settings)
    yield from _names(settings)
    for name, arm in settings.arms.items():
        yield from _controls(name, arm, settings)
        if arm.control_of is None:
            yield from _fields(name, arm)
            yield from _amounts(name, arm)
            yield from _choices(name, arm, settings)
            yield from _steps(name, arm, settings)
    yield from _equal_arms(settings)
    if settings.scoring.estimator == "in_run" and not settings.window.is_fixed:
        yield from _in_run(settings)


def unit_contradiction(where: str, unit: str, model: ModelSettings) -> str | None:
    """What is wrong with a head's name, or None."""
    try:
        head = parse_unit(unit)
    except ValueError:
        return f"{where} is {unit!r}, no head; one is written L3H0 (layer 3, head 0, from 0)"
    if model.size is None:
        layers, heads, called = model.n_layers, model.n_heads, "the model"
    else:
        size = pythia_size(model.size)
        layers, heads, called = size.n_layers, size.n_heads, f"Pythia {model.size}"
    if head.layer < layers and head.head < heads:
        return None
    return (
        f"{where} is {unit}, and {called} has layers 0..{layers - 1} of heads 0..{heads - 1}; name "
        "one of these"
    )


def _names(settings: StudySettings) -> Iterator[str]:
    lower: dict[str, str] = {}
    for name in settings.arms:
        if name.lower() == "baseline":
            yield (
                f"arms.{name}: 'baseline' is the base run gone on unchanged, which every study "
                "has; give the arm another name"
            )
        elif not _NAME.fullmatch(name):
            yield (
                f"arms.{name!r} cannot be a folder's name; use letters, digits and . _ + -, at "
                "most 100, beginning with a letter or digit"
            )
        elif name.lower() in lower:
            yield (
                f"arms.{name} and arms.{lower[name.lower()]} differ only in capitals, and some "
                "file systems hold them to be one; rename one"
            )
        lower[name.lower()] = name


def _controls(name: str, arm: ArmSettings, settings: StudySettings) -> Iterator[str]:
    arms, listed = settings.arms, ", ".join(settings.arms)
    if (owner := arm.control_of) is not None:
        if owner not in arms:
            yield (
                f"arms.{name}.control_of is {owner!r}, and there is no such arm; there are: "
                f"{listed}"
            )
        elif arms[owner].control_of is not None:
            yield (
                f"arms.{name}.control_of is {owner!r}, which is itself a control (of "
                f"{arms[owner].control_of!r}); name the arm that is treated"
            )
        given = [
            field.name
            for field in dataclasses.fields(arm)
            if field.name not in ("control_of", "draw")
            and getattr(arm, field.name) != field.default
        ]
        if given:
            yield (
                f"arms.{name} is the control of {owner!r} and takes everything but its draw from "
                f"it, and {', '.join(given)} is given; leave it out, or leave out control_of"
            )
    elif (control := arm.control) is not None:
        if control == "baseline":
            yield (
                f"arms.{name}.control is 'baseline', with which every arm is compared anyway; "
                "leave it out"
            )
        elif control not in arms:
            yield (
                f"arms.{name}.control is {control!r}, and there is no such arm; there are: {listed}"
            )
        elif control == name:
            yield f"arms.{name}.control is the arm itself; name another one"
        elif (does := operation_of(control, settings)) not in (arm.do, None):
            yield (
                f"arms.{name}.control is {control!r}, which does {does!r}, and the arm {arm.do!r}: "
                "their difference would be that of the operations; name an arm that does the same, "
                "or leave it out"
            )


def operation_of(name: str, settings: StudySettings) -> str | None:
    """What an arm does, a control that for which it is drawn; None without such an arm."""
    arm = settings.arms[name]
    owner = arm if arm.control_of is None else settings.arms.get(arm.control_of)
    return None if owner is None else owner.do


def _fields(name: str, arm: ArmSettings) -> Iterator[str]:
    for field in dataclasses.fields(arm):
        taken, value = _TAKEN_BY.get(field.name), getattr(arm, field.name)
        if taken is None or arm.do in taken or value == field.default:
            continue
        yield (
            f"arms.{name}.{field.name} is {value!r}, and {arm.do!r} has no {field.name} (only "
            f"{', '.join(taken)}); leave it out"
        )
    if arm.generator is not None:
        for key in ("by", "unit", "which", "from_steps", "fraction"):
            if getattr(arm, key) != getattr(ArmSettings(), key):
                yield (
                    f"arms.{name} inserts what the generator {arm.generator!r} makes, and {key} "
                    f"chooses samples; leave {key} or generator out"
                )
        if arm.generator not in GENERATORS and not re.fullmatch(r"[\w.]+:[\w.]+", arm.generator):
            yield (
                f"arms.{name}.generator is {arm.generator!r}; there are {', '.join(GENERATORS)}, "
                "and 'package.module:function' for one of your own"
            )
        if arm.count is None:
            yield f"arms.{name} has a generator and no count; say how many samples it makes"


def _amounts(name: str, arm: ArmSettings) -> Iterator[str]:
    if arm.fraction is not None and arm.count is not None:
        yield (
            f"arms.{name} gives fraction {arm.fraction:g} and count {arm.count}; give one of "
            "the two"
        )
    if arm.fraction is not None and not 0 < arm.fraction <= 1:
        yield f"arms.{name}.fraction is {arm.fraction:g}; it is a share, above 0 and at most 1"
    for key, least in (("count", 1), ("copies", 1), ("refresh_every", 1), ("draw", 0)):
        value = getattr(arm, key)
        if value is not None and value < least:
            yield f"arms.{name}.{key} is {value}; at least {least} is allowed"
    if not (math.isfinite(arm.weight) and arm.weight >= 0):
        yield f"arms.{name}.weight is {arm.weight:g}; a weight is finite and at least 0"
    elif arm.do in ("mask", "prune") and arm.weight == 1:
        yield f"arms.{name}.weight is 1, which changes nothing; 0 takes samples out"


def _choices(name: str, arm: ArmSettings, settings: StudySettings) -> Iterator[str]:
    if arm.do in ("prune", "steer"):
        known = True
    elif known := arm.by in settings.rankings or arm.by in RANKINGS:
        ranking = settings.ranking(arm.by)
        if ranking.method != "influence" and arm.unit != "target":
            yield (
                f"arms.{name}.unit is {arm.unit}, and the ranking {arm.by!r} is of samples, the "
                "same for every head; leave unit out"
            )
    if not known:
        yield (
            f"arms.{name}.by is {arm.by!r}, and there is no such ranking; there are: "
            f"{', '.join({**RANKINGS, **settings.rankings})}; others are defined under rankings"
        )
    if arm.unit not in _RELATIVE_UNITS:
        wrong = unit_contradiction(f"arms.{name}.unit", arm.unit, settings.model)
        if wrong is not None:
            yield f"{wrong}, or target, second or lowest"
    if arm.do == "replace" and arm.from_steps == arm.steps:
        yield (
            f"arms.{name} replaces the best samples of its steps by themselves; give from_steps "
            "other than steps"
        )


def _steps(name: str, arm: ArmSettings, settings: StudySettings) -> Iterator[str]:
    for key in ("steps", "from_steps"):
        positions = getattr(arm, key)
        if positions is not None:
            yield from _interval(f"arms.{name}.{key}", positions, settings, done=key == "steps")
    if arm.do == "mask" and arm.from_steps is not None:
        steps, chosen = (
            [_placed(one, settings) for one in pair or WINDOW]
            for pair in (arm.steps, arm.from_steps)
        )
        if steps != chosen:
            yield (
                f"arms.{name}.from_steps is {_pair(arm.from_steps)} and its steps are "
                f"{_pair(arm.steps or WINDOW)}: a mask can only take what stands in its steps, and "
                "chooses from them; leave from_steps out"
            )


def _interval(
    where: str, positions: tuple[Position, Position], settings: StudySettings, *, done: bool
) -> Iterator[str]:
    """What is wrong with an interval; ``done`` where something is done in it."""
    window, last = settings.window, settings.training.max_steps
    bad = [one for one in positions if isinstance(one, str) and not _PERCENT.fullmatch(one)]
    if bad:
        yield (
            f"{where} has {bad[0]!r}; a position is a step such as 900, or a place in the window "
            "such as '50%'"
        )
        return
    fixed = window.start is not None and window.end is not None
    start, end = (known_step(one, settings) for one in positions)
    if start is None or end is None:  # a found window: percentages compare with each other
        parts = [float(one.strip(" %")) for one in positions if isinstance(one, str)]
        if len(parts) == 2 and parts[0] >= parts[1]:
            yield f"{where} is {_pair(positions)}; the start comes before the end"
        if done and parts and isinstance(positions[0], str) and parts[0] < 0:
            yield (
                f"{where} begins at {positions[0]}, before the window, and arms branch at the "
                "start of a window that is found; begin at 0%, or fix it (window.start, .end)"
            )
        if done and parts and isinstance(positions[0], str) and parts[0] >= 100:
            yield (
                f"{where} begins at {positions[0]}, and arms are compared at the window's end; "
                "begin before 100%"
            )
        start = end = None
    for one in positions:
        if isinstance(one, int) and not 0 <= one <= last:
            yield (
                f"{where} is {_pair(positions)}: step {one} is not among the 0 to {last} of "
                "training.max_steps; choose others, or train longer"
            )
            return
    if start is None or end is None:
        return
    meant = "" if all(isinstance(one, int) for one in positions) else f" (steps {start} to {end})"
    if start >= end:
        yield f"{where} is {_pair(positions)}{meant}; the start comes before the end"
    elif start < 0 or end > last:
        yield (
            f"{where} is {_pair(positions)}{meant}, and training has steps 0 to {last}; choose "
            "others"
        )
    elif done and fixed and window.end is not None and start >= window.end:
        yield (
            f"{where} begins at step {start}, and arms are compared at the window's end, step "
            f"{window.end}; begin earlier"
        )


def known_step(position: Position, settings: StudySettings) -> int | None:
    """A position's step, where the recipe says it; None of a place in a window yet to be found."""
    if isinstance(position, int):
        return position
    start, end = settings.window.start, settings.window.end
    if start is None or end is None or not _PERCENT.fullmatch(position):
        return None
    return start + round(float(position.strip(" %")) / 100 * (end - start))


def _placed(position: Position, settings: StudySettings) -> Position:
    at = known_step(position, settings)
    return position if at is None else at


def _pair(positions: tuple[Position, Position]) -> str:
    return f"[{positions[0]}, {positions[1]}]"


def _in_run(settings: StudySettings) -> Iterator[str]:
    """In-run scores are of samples of the window, which is not known when they are chosen from."""
    for name, arm in settings.arms.items():
        if arm.control_of is not None or arm.do not in ("mask", "insert", "replace"):
            continue
        asked = {"steps" if arm.do == "mask" else "from_steps": chosen_from(arm)}
        if arm.do == "replace":
            asked["steps"] = arm.steps
        for key, positions in asked.items():
            if positions is not None and not all(map(_is_inside, positions)):
                yield (
                    f"arms.{name}.{key} is {_pair(positions)} and scoring.estimator 'in_run', "
                    "whose scores are of samples of the window that is found; choose from 0% to "
                    "100% of it, or use scoring.estimator=replay"
                )


def _is_inside(position: Position) -> bool:
    """Whether a position is in the window wherever that is."""
    if isinstance(position, int) or not _PERCENT.fullmatch(position):
        return False
    return 0 <= float(position.strip(" %")) <= 100


def _equal_arms(settings: StudySettings) -> Iterator[str]:
    contents = {name: settled(arm, settings) for name, arm in settings.arms.items()}
    for first, second in combinations(contents, 2):
        if contents[first] == contents[second]:
            way_out = "leave one out"
            if settings.arms[first].control_of is not None or settings.arms[first].do == "prune":
                way_out += ", or give one another draw"
            yield f"arms.{first} and arms.{second} are the same; {way_out}"


def chosen_from(arm: ArmSettings) -> tuple[Position, Position] | None:
    """Where an arm's samples are chosen from: those of a mask, from the steps it is done in."""
    return arm.steps if arm.do == "mask" else arm.from_steps


def settled(arm: ArmSettings, settings: StudySettings) -> dict[str, str]:
    """What an arm does, with the settings that it takes from elsewhere; equal of equal arms."""
    if arm.control_of is not None:
        return {"control_of": arm.control_of, "draw": str(arm.draw)}
    what = settings.intervention
    values = dataclasses.asdict(arm) | {"control": None}
    if arm.count is None and arm.fraction is None:
        values["fraction"] = what.fraction
    if arm.do == "insert":
        for key in ("mode", "placement", "copies"):
            values[key] = getattr(arm, key) if getattr(arm, key) is not None else getattr(what, key)
    if arm.do != "prune" and arm.generator is None:
        values["draw"] = 0  # which nothing but random choices goes by
    for key in ("steps", "from_steps"):
        values[key] = tuple(_placed(one, settings) for one in values[key] or WINDOW)
    return {key: str(value) for key, value in values.items()}


def _rankings(settings: StudySettings) -> Iterator[str]:
    for name, ranking in settings.rankings.items():
        if ranking.method != "influence":
            for key in ("curvature", "probe_function"):
                if getattr(ranking, key) is not None:
                    yield (
                        f"rankings.{name}.{key} is {getattr(ranking, key)}, and the method "
                        f"{ranking.method!r} has none; leave it out, or rank by influence"
                    )
        row = settings.corpus.sequence_length + 1
        if ranking.n < 1:
            yield f"rankings.{name}.n is {ranking.n}; an n-gram has at least 1 token"
        elif (
            ranking.method == "repeated_ngrams"
            and settings.corpus.kind != "rows"
            and row < ranking.n
        ):
            yield (
                f"rankings.{name}.n is {ranking.n}, and a row has {row} tokens "
                f"(corpus.sequence_length and one more); give at most {row}"
            )
    used = {arm.by for arm in settings.arms.values() if arm.control_of is None}
    used |= set(settings.subsets.rankings) if settings.subsets.count else set()
    for name in sorted(used | set(settings.rankings)):
        if name not in settings.rankings and name not in RANKINGS:
            continue
        if (
            settings.mechanism == "previous_token"
            and settings.ranking(name).probe_function == "copy_logprob"
        ):
            yield (
                f"the ranking {name!r} is by the probe function copy_logprob, which is of "
                "induction heads; use attention or log_attention for previous_token"
            )
