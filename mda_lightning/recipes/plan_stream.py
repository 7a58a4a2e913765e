"""The corpus and the base order that a plan is made for, as a command is told them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mda_lightning.corpora import TokenRows
from mda_lightning.interventions import Plan
from mda_lightning.schedule import BaseOrder
from mda_lightning.schedule.ledger import Ledger


@dataclass(frozen=True)
class BaseStream:
    """What is known of the stream that a plan changes.

    Attributes:
        rows: the corpus, where it is at hand.
        order: the base order.
        corpus_hash: content hash of the corpus.
        added_steps: by which insertions made the run longer that this was read from; its own
            steps are then not those of the base order.
    """

    rows: TokenRows | None = None
    order: BaseOrder | None = None
    corpus_hash: str | None = None
    added_steps: int = 0


def base_stream(
    *,
    run: Path | None = None,
    corpus: Path | None = None,
    batch_size: int | None = None,
    n_steps: int | None = None,
    seed: int | None = None,
    shuffle: bool | None = None,
) -> BaseStream:
    """Corpus and order from the folder of a run, or given one by one.

    Args:
        run: folder of a run with a ledger; its corpus is opened where it still lies there.
        corpus: folder of token rows.
        batch_size, n_steps, seed, shuffle: of the order; the first two make one, with a corpus.

    Raises:
        FileNotFoundError: no ledger, or no corpus, there.
        ValueError: an order by halves, or twice, or a corpus that the run was not trained on.
    """
    rows = None if corpus is None else TokenRows.open(corpus)
    given = [one is not None for one in (batch_size, n_steps, seed, shuffle)]
    if run is not None:
        if any(given):
            raise ValueError(
                f"--run {run} tells the base order; leave --batch-size, --n-steps, --seed and "
                "--no-shuffle out, or leave --run out"
            )
        return _of_run(run, rows)
    if not any(given):
        return BaseStream(rows, None, None if rows is None else rows.content_hash)
    if rows is None:
        raise ValueError("which samples a step holds depends on the corpus; add --corpus FOLDER")
    if batch_size is None or n_steps is None:
        raise ValueError("the base order takes both --batch-size and --n-steps; give the other too")
    order = BaseOrder(len(rows), batch_size, n_steps, seed or 0, shuffle is not False)
    return BaseStream(rows, order, rows.content_hash)


def of_plan(plan: Plan, stream: BaseStream) -> BaseStream:
    """The stream to show a plan on: what was given, else what the plan is tied to.

    Raises:
        ValueError: it is tied to another corpus or order.
    """
    theirs, given = plan.corpus_hash, stream.corpus_hash
    if theirs is not None and given is not None and theirs != given:
        raise ValueError(
            f"plan {plan.name!r} was made for corpus {theirs[:12]}, the one given is {given[:12]}: "
            "its sample ids mean other text there; give its corpus, or build the plan again for "
            "this one"
        )
    return BaseStream(
        stream.rows, stream.order or plan.order, stream.corpus_hash or plan.corpus_hash
    )


def _of_run(run: Path, rows: TokenRows | None) -> BaseStream:
    ledger = Ledger.open(run)
    told = ledger.provenance
    corpus_hash = str(told["corpus_hash"])
    if rows is None and (Path(str(told["corpus"])) / "meta.json").is_file():
        there = TokenRows.open(told["corpus"])
        # Another corpus may lie there by now; then the hash alone is known.
        rows = there if there.content_hash == corpus_hash else None
    if rows is not None and rows.content_hash != corpus_hash:
        raise ValueError(
            f"{run} was trained on corpus {corpus_hash[:12]} ({told['corpus']}), {rows.folder} is "
            f"{rows.content_hash[:12]}; give the corpus of the run, or leave --corpus out"
        )
    return BaseStream(rows, ledger.order, corpus_hash, int(told.get("added_steps", 0)))
