"""The folder of a ledger, changed so that what is left by a process that is killed agrees."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mda_lightning import __version__
from mda_lightning.files import atomic_path, write_json
from mda_lightning.interventions.plan import Plan
from mda_lightning.schedule.ledger import PLAN_FILE, STREAM_FILE
from mda_lightning.schedule.ledger_rows import Share
from mda_lightning.schedule.stream import Schedule


class Beginning:
    """Where a fit begins: what a ledger that lies in its folder has to do with it.

    Attributes:
        step: its first.
        checkpoint: what it was resumed from, or None: ``step``, ``plan_hash``, ``stream_hash``.
    """

    def __init__(
        self, step: int, position: Mapping[str, Any] | None, order_hash: str, corpus_hash: str
    ) -> None:
        """``position``: what the data module kept in the checkpoint, if there is one."""
        self.step = step
        self.checkpoint: dict[str, Any] | None = None
        if step and position is not None:
            keys = ("step", "plan_hash", "stream_hash")
            self.checkpoint = {key: position[key] for key in keys}
        self._hashes = order_hash, corpus_hash

    def goes_on_with(self, former: Mapping[str, Any]) -> bool:
        """Whether the checkpoint is of the run that ``former``, a ``stream.json``, tells of."""
        if (
            self.checkpoint is None
            or self._hashes != (former["order_hash"], former["corpus_hash"])
            or former["steps"][0] > self.step
        ):
            return False
        plans = former["plan_hash"], former["given_plan_hash"]
        # A branch that is begun again: its parent's plan is not the ledger's any more.
        since = [one for one in former["attempts"] if one["start_step"] <= self.step]
        begun_there = bool(since) and since[-1].get("from") == self.checkpoint
        return self.checkpoint["plan_hash"] in plans or begun_there

    def drops(self, former: Mapping[str, Any], plan_hash: str) -> range:
        """Steps of another plan, in ``former``, whose place the fit's own take."""
        same_data = self._hashes == (former["order_hash"], former["corpus_hash"])
        if same_data and plan_hash in (former["plan_hash"], former["given_plan_hash"]):
            return range(0)
        first, last = former["steps"]
        return range(self.step if self.goes_on_with(former) else first, last)


def new_attempt(
    step: int,
    checkpoint: dict[str, Any] | None,
    share: Share,
    accumulate: int,
    columns: Iterable[str],
) -> dict[str, Any]:
    """What ``stream.json`` says of a fit that begins."""
    return {
        "start_step": step,
        "from": checkpoint,
        "world_size": share.world_size,
        "accumulate": accumulate,
        "micro_batch": share.size,
        "read_from": dict.fromkeys(columns, "batch"),
        "weight_type": "float32",
        "versions": {
            "mda_lightning": __version__,
            "torch": version("torch"),
            "lightning": version("lightning"),
        },
    }


def save_plan(
    folder: Path,
    stream: dict[str, Any],
    schedule: Schedule,
    given: Plan,
    *,
    corpus: Path,
    corpus_hash: str,
) -> dict[str, Any]:
    """Write the plan of a schedule to ``plan.json``; returns ``stream`` with what says which it is.

    ``stream.json``, where there is one, announces the plan first: between the two files' writing,
    either plan may lie there.

    Args:
        folder: ``stream/``.
        stream: what ``stream.json`` says.
        schedule: as it is run now.
        given: the plan without what was decided during the run.
        corpus, corpus_hash: the folder and the content hash of the corpus.
    """
    about = {
        "order": schedule.order.describe(),
        "order_hash": schedule.order.content_hash,
        "corpus": str(corpus.resolve()),
        "corpus_hash": corpus_hash,
        "plan_hash": schedule.plan.content_hash,
        "given_plan_hash": given.content_hash,
        "n_steps": len(schedule),
        "added_steps": len(schedule) - schedule.order.n_steps,
    }
    if (folder / STREAM_FILE).exists():
        announced = [*stream.get("announced", []), about]
        write_json(folder / STREAM_FILE, stream | {"announced": announced, "complete": False})
    schedule.plan.save(folder / PLAN_FILE)
    return {key: value for key, value in stream.items() if key != "announced"} | about


def keep_aside(folder: Path) -> Path:
    """Copy a ledger to ``stream-former-<n>`` beside it; one that is kept already is not again.

    The copy is a ledger like any other. It lies as deep as the original, so that the folders that
    its plan names are found from it.

    Raises:
        OSError: it cannot be written.
    """
    said = (folder / STREAM_FILE).read_bytes()
    for number in itertools.count(1):
        aside = folder.with_name(f"{folder.name}-former-{number}")
        if not aside.exists():
            break
        kept = aside / STREAM_FILE
        if kept.is_file() and kept.read_bytes() == said:
            return aside
    with atomic_path(aside) as part:
        shutil.copytree(folder, part, ignore=shutil.ignore_patterns(".*"))
    return aside
