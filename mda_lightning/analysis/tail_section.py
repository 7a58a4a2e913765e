"""How influence is spread over samples, in words and one table (figures 3a and 8, appendix I.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mda_lightning.analysis.analysis_sections import AnalysisSection, AnalysisTable
from mda_lightning.analysis.analysis_words import number, p_text
from mda_lightning.analysis.effects import signed
from mda_lightning.analysis.study_findings import SeedTail


def tail_section(found: Sequence[SeedTail], fraction: float) -> AnalysisSection | None:
    """Does a small share of the samples hold most of the influence, and by which law?"""
    if not found:
        return None
    shares, noise = (
        float(np.mean([getattr(one, name) for one in found])) for name in ("share", "noise_share")
    )
    positive = sum(one.drive.balance > 0 for one in found)
    sentences = []
    if math.isfinite(shares):
        sentences.append(
            f"The top {fraction:.0%} of the samples hold {shares:.0%} of the positive influence; "
            f"of normal noise with the same mean and spread they would hold {noise:.0%}. Positive "
            f"influence outweighs negative in {positive} of {len(found)} "
            f"seed{'s' * (len(found) != 1)}."
        )
    fits = [one.fit for one in found if one.fit is not None]
    if fits:
        plausible = sum(bool(fit.plausible) for fit in fits)
        exponents = [fit.exponent for fit in fits]
        low, high = min(exponents), max(exponents)
        span = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
        of = f"of {len(fits)} tail{'s' * (len(fits) != 1)}"
        sentences.append(
            f"A power law is plausible for {plausible} {of} (goodness of fit p > 0.1), with "
            f"exponent {span}. {_against(found, 'log-normal', of)} "
            f"{_against(found, 'exponential', of)}"
        )
    rows = tuple(
        (
            str(one.seed),
            one.unit,
            f"{one.n:,}",
            number(one.share, 2),
            number(one.noise_share, 2),
            signed(one.drive.balance, 2) if math.isfinite(one.drive.balance) else "–",
            "–" if one.fit is None else f"{one.fit.exponent:.2f} ± {one.fit.error:.2f}",
            "–" if one.fit is None else f"{one.fit.n_tail:,}",
            "–" if one.fit is None or one.fit.p_value is None else p_text(one.fit.p_value),
            *(_verdict(one, law) for law in ("exponential", "log-normal")),
            _bins(one),
        )
        for one in found
    )
    table = AnalysisTable(
        caption=(
            f"Share of positive influence in the top {fraction:.0%}, and in that of normal noise; "
            "net drive (P \N{MINUS SIGN} N)/(P + N); power law of the upper tail: exponent, "
            "samples in the tail, goodness-of-fit p (implausible at or below 0.1); which law is "
            "likelier there, with the p of Vuong's test; exponents of the time bins fitted alone"
        ),
        columns=(
            "seed",
            "head",
            "scores",
            "top share",
            "noise",
            "net drive",
            "exponent",
            "in tail",
            "fit p",
            "or exponential",
            "or log-normal",
            "over bins",
        ),
        rows=rows,
    )
    return AnalysisSection("How concentrated is influence?", tuple(sentences), (table,))


def _against(found: Sequence[SeedTail], law: str, of: str) -> str:
    verdicts = [ratio.verdict for one in found for ratio in one.alternatives if ratio.law == law]
    power, other = verdicts.count("power law"), verdicts.count(law)
    article = "an" if law[0] in "aeiou" else "a"
    return f"Against {article} {law} tail it is likelier for {power}, less likely for {other} {of}."


def _verdict(one: SeedTail, law: str) -> str:
    ratio = next((ratio for ratio in one.alternatives if ratio.law == law), None)
    return "–" if ratio is None else f"{ratio.verdict} ({p_text(ratio.p_value)})"


def _bins(one: SeedTail) -> str:
    if not one.bin_exponents:
        return "–"
    return f"{min(one.bin_exponents):.2f} to {max(one.bin_exponents):.2f}"
