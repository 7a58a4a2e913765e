"""Settings that contradict each other, refused before anything is run.

Types are checked where a recipe is read; here is what values say against each other.
"""

from __future__ import annotations

from collections.abc import Iterator

from mda_lightning.mechanisms import MECHANISMS
from mda_lightning.pretraining.sizes import PYTHIA_SIZES
from mda_lightning.recipes.studies.arm_contradictions import (
    arm_contradictions,
    unit_contradiction,
)
from mda_lightning.recipes.studies.pool_contradictions import pool_contradictions
from mda_lightning.recipes.studies.remarks import remarks_on
from mda_lightning.recipes.studies.settings import RANKINGS, StudySettings

__all__ = ["ContradictionError", "refuse_contradictions", "remarks_on"]

_SHORTEST_CONTEXT = 40


class ContradictionError(ValueError):
    """Settings that cannot hold together; the message names them and the way out."""


def refuse_contradictions(settings: StudySettings) -> None:
    """Check that a study can be run as its settings say.

    Raises:
        ContradictionError: it cannot; the message names the value, the limit and the way out of the
            first contradiction, and says how many there are.
    """
    found = list(dict.fromkeys(_contradictions(settings)))
    if found:
        more = f" ({len(found) - 1} more after that)" if len(found) > 1 else ""
        raise ContradictionError(f"{found[0]}{more}")


def _contradictions(settings: StudySettings) -> Iterator[str]:
    if settings.mechanism not in MECHANISMS:
        yield f"mechanism is {settings.mechanism!r}; there are: {', '.join(MECHANISMS)}"
    yield from _model(settings)
    yield from _corpus(settings)
    yield from _training(settings)
    yield from _window(settings)
    yield from _scoring(settings)
    yield from _intervention(settings)
    yield from _monitor(settings)
    if settings.model.size is None or _known_size(settings):
        yield from arm_contradictions(settings)
    yield from pool_contradictions(settings)
    yield from _subsets(settings)


def _known_size(settings: StudySettings) -> bool:
    size = settings.model.size
    return size is not None and size.lower().removeprefix("pythia-") in PYTHIA_SIZES


def _model(settings: StudySettings) -> Iterator[str]:
    model = settings.model
    if model.size is not None:
        if not _known_size(settings):
            yield f"model.size is {model.size!r}; Pythia has {', '.join(PYTHIA_SIZES)}"
        return
    for key in ("n_layers", "n_heads", "d_model", "d_mlp"):
        if getattr(model, key) < 1:
            yield f"model.{key} is {getattr(model, key)}; at least 1 is needed"
    if model.n_heads > 0 and model.d_model % model.n_heads:
        yield (
            f"model.d_model is {model.d_model} and model.n_heads {model.n_heads}, which does not "
            f"divide it; try d_model {model.d_model - model.d_model % model.n_heads}"
        )
    if not 0 < model.rotary_fraction <= 1:
        yield f"model.rotary_fraction is {model.rotary_fraction:g}; it is above 0 and at most 1"


def _corpus(settings: StudySettings) -> Iterator[str]:
    corpus = settings.corpus
    if corpus.kind == "embedded":
        if corpus.path is not None:
            yield (
                f"corpus.path is {corpus.path!r}, and an embedded corpus comes from the running "
                "Python; leave it out, or say what lies there (corpus.kind)"
            )
        if corpus.n_rows is None:
            yield "corpus.n_rows is null, and an embedded corpus is made to size; try 45000"
    elif corpus.path is None:
        yield (
            f"corpus.kind is {corpus.kind!r} and corpus.path is missing; say where it lies, or use "
            "corpus.kind=embedded, which needs no file"
        )
    if corpus.tokenizer is not None and corpus.kind in ("embedded", "rows"):
        yield (
            f"corpus.tokenizer is {corpus.tokenizer!r}, and a corpus of kind {corpus.kind!r} has "
            "its own; leave it out"
        )
    if corpus.n_rows is not None and corpus.n_rows < 1:
        yield f"corpus.n_rows is {corpus.n_rows}; at least 1 is needed, null takes all"
    if corpus.held_out_rows < 0:
        yield f"corpus.held_out_rows is {corpus.held_out_rows}; 0 holds none out"
    if corpus.held_out is not None and corpus.held_out_rows:
        yield (
            f"corpus.held_out_rows is {corpus.held_out_rows} and corpus.held_out names "
            f"{corpus.held_out!r}; give one of the two"
        )
    if corpus.kind == "megatron" and corpus.held_out_rows and corpus.n_rows is None:
        yield (
            f"corpus.held_out_rows is {corpus.held_out_rows}: of a Megatron corpus the rows after "
            "the training rows are held out; give corpus.n_rows"
        )
    if corpus.kind != "rows" and corpus.sequence_length < _SHORTEST_CONTEXT:
        yield (
            f"corpus.sequence_length is {corpus.sequence_length}; at least {_SHORTEST_CONTEXT} is "
            "needed: the longest sequence of the induction score has 20 tokens, twice"
        )
    if not 0 <= corpus.records_share <= 1:
        yield f"corpus.records_share is {corpus.records_share:g}; it is a share, 0 to 1"
    for key in ("pieces_per_name", "lines_per_record"):
        low, high = getattr(corpus, key)
        if not 1 <= low <= high:
            yield f"corpus.{key} is [{low}, {high}]; fewest and most, at least 1"


def _training(settings: StudySettings) -> Iterator[str]:
    training = settings.training
    for key, least in (
        ("batch_size", 1),
        ("max_steps", 1),
        ("margin_steps", 0),
        ("checkpoint_every_n_steps", 0),
    ):
        if getattr(training, key) < least:
            yield f"training.{key} is {getattr(training, key)}; at least {least} is allowed"
    micro = training.micro_batch
    if micro is not None and (micro < 1 or training.batch_size % micro):
        yield (
            f"training.micro_batch is {micro}, which does not divide training.batch_size "
            f"{training.batch_size}; every forward pass holds as many samples: give a divisor"
        )
    if training.learning_rate is None and settings.model.size is None:
        yield (
            "training.learning_rate is null, which takes that of a Pythia size, and model.size is "
            "not given; give one of the two"
        )
    elif training.learning_rate is not None and training.learning_rate <= 0:
        yield f"training.learning_rate is {training.learning_rate:g}; it is above 0"
    length = training.schedule_steps
    if length is not None and length < 1:
        yield f"training.schedule_steps is {length}; at least 1 is needed"
        return
    whole = training.max_steps if length is None else length
    called = "training.max_steps" if length is None else "training.schedule_steps"
    if training.warmup_steps is not None and not 0 <= training.warmup_steps <= whole:
        yield (
            f"training.warmup_steps is {training.warmup_steps}, the schedule has {whole} "
            f"({called}); the warmup is a part of it"
        )


def _window(settings: StudySettings) -> Iterator[str]:
    window, training = settings.window, settings.training
    start, end = window.start, window.end
    if (start is None) != (end is None):
        given, missing = ("start", "end") if end is None else ("end", "start")
        yield (
            f"window.{given} is {start if end is None else end} and window.{missing} is missing; "
            "give both, or neither and the base run finds the window"
        )
    if start is not None and start < 0:
        yield f"window.start is {start}; steps count from 0"
    if start is not None and end is not None:
        if start >= end:
            yield f"the window is [{start}, {end}); its start comes before its end"
        if end > training.max_steps:
            yield (
                f"window.end is {end}, training.max_steps {training.max_steps}; train longer, or "
                "end the window earlier"
            )
        if settings.scoring.estimator == "in_run":
            yield (
                "scoring.estimator is 'in_run', which is not supported with a fixed window "
                "(window.start, .end); use 'replay', or let the base run find the window"
            )
    if window.target is None:
        return
    if start is None and end is None:
        yield (
            f"window.target is {window.target}, and a base run that finds its window finds the "
            "head too; leave it out, or give window.start and window.end"
        )
    if settings.model.size is None or _known_size(settings):
        wrong = unit_contradiction("window.target", window.target, settings.model)
        if wrong is not None:
            yield wrong


def _scoring(settings: StudySettings) -> Iterator[str]:
    scoring = settings.scoring
    if scoring.n_curvature < 1:
        yield f"scoring.n_curvature is {scoring.n_curvature}; at least 1 sequence is needed"
    if not scoring.damping > 0:
        yield f"scoring.damping is {scoring.damping:g}; it is above 0"
    if not scoring.replay_at or len(set(scoring.replay_at)) < len(scoring.replay_at):
        yield (
            f"scoring.replay_at is {list(scoring.replay_at)}; give start, mid or end, each at most "
            "once, and at least one"
        )
    if settings.mechanism == "previous_token" and scoring.probe_function == "copy_logprob":
        yield (
            "scoring.probe_function is copy_logprob, which is of induction heads; use attention or "
            "log_attention for previous_token"
        )


def _intervention(settings: StudySettings) -> Iterator[str]:
    what = settings.intervention
    if not 0 < what.fraction <= 1:
        yield f"intervention.fraction is {what.fraction:g}; it is a share, above 0 and at most 1"
    if what.copies < 1:
        yield f"intervention.copies is {what.copies}; at least 1 is allowed"


def _monitor(settings: StudySettings) -> Iterator[str]:
    monitor, window = settings.monitor, settings.window
    for key in (
        "every_n_steps",
        "quiet_every_n_steps",
        "companions_every_n_steps",
        "n_sequences",
        "averaged_evaluations",
    ):
        if getattr(monitor, key) < 1:
            yield f"monitor.{key} is {getattr(monitor, key)}; at least 1 is allowed"
    for threshold in monitor.thresholds:
        if not 0 < threshold < 1:
            yield f"monitor.thresholds holds {threshold:g}; μ is an attention, between 0 and 1"
    every, quiet = monitor.every_n_steps, monitor.quiet_every_n_steps
    if not window.is_fixed and every > 0 and quiet > 0 and (quiet < every or quiet % every):
        yield (
            f"monitor.quiet_every_n_steps is {quiet}, no multiple of monitor.every_n_steps, "
            f"{every}: both share one grid of steps; give a multiple, such as "
            f"{max(1, round(quiet / every)) * every}"
        )
    averaged = monitor.averaged_evaluations * monitor.every_n_steps
    if window.start is not None and window.end is not None:
        length = window.end - window.start
        if 0 < length < averaged:
            yield (
                f"monitor.averaged_evaluations is {monitor.averaged_evaluations}, every "
                f"{monitor.every_n_steps} steps: {averaged} steps, and the window has {length}; "
                "measure more often, or average fewer"
            )


def _subsets(settings: StudySettings) -> Iterator[str]:
    subsets, window = settings.subsets, settings.window
    if subsets.count < 0:
        yield f"subsets.count is {subsets.count}; 0 trains none"
    if not subsets.count:
        return
    if not 0 < subsets.keep < 1:
        yield f"subsets.keep is {subsets.keep:g}; it is a share between 0 and 1"
    if subsets.steps < 1:
        yield f"subsets.steps is {subsets.steps}; at least 1 is needed"
    for name in subsets.rankings:
        if name not in settings.rankings and name not in RANKINGS:
            yield (
                f"subsets.rankings holds {name!r}, and there is no such ranking; there are: "
                f"{', '.join({**RANKINGS, **settings.rankings})}"
            )
    if window.start is not None and window.end is not None:
        middle = (window.start + window.end) // 2
        if middle + subsets.steps > window.end:
            yield (
                f"subsets.steps is {subsets.steps}: from the window's midpoint, step {middle}, "
                f"they go beyond its end, step {window.end}, and later samples have no score; at "
                f"most {window.end - middle}"
            )
    elif subsets.steps > settings.training.max_steps:
        yield (
            f"subsets.steps is {subsets.steps}, training.max_steps {settings.training.max_steps}; "
            "subsets are trained on inside the window, for fewer steps"
        )
