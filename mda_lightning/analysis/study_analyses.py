"""What the scores of a study say beyond its arms: overlap of rankings, time, linear prediction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mda_lightning.analysis.report_figures import ReportFigure
from mda_lightning.analysis.study import Study


@dataclass(frozen=True)
class StudyAnalyses:
    """The analyses of one study, of whatever it holds.

    Attributes:
        figures: in the order they are shown.
        notes: what is absent, and why, in sentences.
    """

    figures: list[ReportFigure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON values."""
        return {"notes": list(self.notes)}


def study_analyses(study: Study) -> StudyAnalyses:
    """Analyse a study; what is missing costs its own part and leaves a note."""
    return StudyAnalyses()
