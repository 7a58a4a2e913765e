"""CheckpointSteps: which steps are due, against plain definitions; its text, there and back."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mda_lightning.checkpoint_steps import PYTHIA, CheckpointSteps

N = 400


def ranges(first: int = 0) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(first, N), st.integers(first, N)).map(
        lambda pair: tuple(sorted(pair))
    )


listed = st.lists(st.integers(0, N), min_size=1, max_size=5).map(lambda s: CheckpointSteps.at(*s))
powers = st.builds(
    lambda base, last: CheckpointSteps.log_spaced(last, base=base),
    st.integers(2, 9),
    st.integers(1, N),
)
everywhere = st.integers(1, 50).map(CheckpointSteps.every)
inside = st.builds(
    lambda k, pair, is_open: CheckpointSteps.every(
        k, first=pair[0], last=None if is_open else pair[1]
    ),
    st.integers(1, 50),
    ranges(),
    st.booleans(),
)
spread = (
    ranges(1)
    .filter(lambda pair: pair[0] < pair[1])
    .flatmap(
        lambda pair: st.integers(2, pair[1] - pair[0] + 1).map(
            lambda n: CheckpointSteps.log_points(n, *pair)
        )
    )
)
last = st.just(CheckpointSteps(last=True))
simple = st.one_of(listed, powers, everywhere, inside, spread, last)


@st.composite
def schedules(draw: st.DrawFn) -> CheckpointSteps:
    first, *others = draw(st.lists(simple, min_size=1, max_size=4))
    for other in others:
        first = first | other
    return first


def test_pythia_has_the_suites_154_checkpoints() -> None:
    suite = [0, *(2**i for i in range(10)), *range(1000, 143_001, 1000)]
    assert PYTHIA.up_to(143_000) == suite and len(suite) == 154
    assert CheckpointSteps.parse("pythia") == PYTHIA
    assert str(PYTHIA) == "0, log2..512, every 1000"


@given(k=st.integers(1, 60), pair=ranges())
def test_every_k_inside_a_range_is_counted_from_its_start(k: int, pair: tuple[int, int]) -> None:
    a, b = pair
    plain = [s for s in range(N + 1) if a <= s <= b and (s - a) % k == 0]
    assert CheckpointSteps.every(k, first=a, last=b).up_to(N) == plain
    assert CheckpointSteps.parse(f"every {k} in {a}..{b}").up_to(N) == plain
    assert a in plain


@given(k=st.integers(1, 60))
def test_every_k_everywhere_is_its_multiples_without_step_0(k: int) -> None:
    plain = [s for s in range(1, N + 1) if s % k == 0]
    assert CheckpointSteps.parse(f"every {k}").up_to(N) == plain


@given(base=st.integers(2, 9), end=st.integers(1, N))
def test_powers_stop_at_the_last_step(base: int, end: int) -> None:
    plain = sorted({base**i for i in range(20) if base**i <= end})
    assert CheckpointSteps.parse(f"log{base}..{end}").up_to(N) == plain


@given(data=st.data(), pair=ranges(1).filter(lambda pair: pair[0] < pair[1]))
def test_log_spaced_points_are_those_of_geomspace(
    data: st.DataObject, pair: tuple[int, int]
) -> None:
    a, b = pair
    n = data.draw(st.integers(2, b - a + 1))
    found = CheckpointSteps.parse(f"{n} log-spaced in {a}..{b}").up_to(N)
    points = np.geomspace(a, b, n)
    assert found[0] == a and found[-1] == b and found == sorted(set(found))
    # Every point has its step and every step its point; a half may be rounded either way.
    distances = np.abs(points[:, None] - np.array(found)[None])
    assert (distances.min(axis=1) <= 0.5 + 1e-9).all()
    assert (distances.min(axis=0) <= 0.5 + 1e-9).all()


@given(a=schedules(), b=schedules())
def test_a_union_has_the_steps_of_both(a: CheckpointSteps, b: CheckpointSteps) -> None:
    assert (a | b).up_to(N) == sorted({*a.up_to(N), *b.up_to(N)})
    assert (a | b).last == (a.last or b.last)
    assert a | b == b | a and hash(a | b) == hash(b | a)
    assert a | a == a


@given(schedules())
def test_the_text_gives_the_schedule_back(one: CheckpointSteps) -> None:
    assert CheckpointSteps.parse(str(one)) == one
    assert CheckpointSteps.of(json.loads(json.dumps(str(one).split(", ")))) == one
    assert str(CheckpointSteps.parse(str(one))) == str(one)


@given(one=schedules(), step=st.integers(0, N))
def test_the_next_step_and_whether_it_is_due_agree_with_the_list(
    one: CheckpointSteps, step: int
) -> None:
    due = one.up_to(N)
    assert one.is_due(step) == (step in due)
    later = [s for s in due if s > step]
    found = one.next_after(step)
    assert found == later[0] if later else found is None or found > N


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("every 10 in 1000..2000", [*range(1000, 2001, 10)]),
        ("0, log2..8, every 1000", [0, 1, 2, 4, 8, 1000, 2000]),
        ("  EVERY 500 , Last ", [500, 1000, 1500, 2000]),
        ("every 900 in 300 .. ", [300, 1200]),
        ([0, 7, "every 1000"], [0, 7, 1000, 2000]),
        (["3 log-spaced in 10..1000"], [10, 100, 1000]),
        (range(0, 30, 10), [0, 10, 20]),
        ("5, every 5 in 0..10, 5", [0, 5, 10]),
        ("1, 500", [1, 500]),
        ("5,50,1000,1500", [5, 50, 1000, 1500]),
        ("1000,200,7", [7, 200, 1000]),
    ],
)
def test_plain_values(value: object, expected: list[int]) -> None:
    assert CheckpointSteps.of(value).up_to(2000) == expected


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("every 10 in 2000..1000", r"ends at 1000.*first step 2000.*'every 10 in 1000\.\.2000'"),
        ("5 log-spaced in 9..2", r"ends at 2.*first step 9.*'5 log-spaced in 2\.\.9'"),
        ("every 0", r"'every 0': save at most every step, 'every 1'"),
        ("every -3", r"'every -3': save at most every step, 'every 1'"),
        ("every 5 in -10..10", "'every 5 in -10..10' has a negative step; steps count from 0"),
        ("0, -5", "step -5 is negative; steps count from 0"),
        ([3, -4], "step -4 is negative"),
        ("log1..100", "powers of 1 do not grow; use 2 or more"),
        ("log2..0", "before its first step 1; list step 0"),
        ("5 log-spaced in 0..100", "0 has no logarithm; start at 1"),
        ("9 log-spaced in 5..10", "9 points, where 6 steps are; ask for 2 to 6"),
        ("2 log-spaced in 5..5", "is one step; write '5'"),
        ("every 1,500", "write 1500 without a separator, or '1, 500' for 2 steps"),
        ("log2..1,024", "write 1024 without a separator"),
        ("1,000", "comma separates terms, .*write 1000 without a separator"),
        ("1,500", "'1,500' may be one number or 2 steps; write 1500 without"),
        ("500, 1,500", "'1,500' may be .*write 1500 without a separator"),
        ("12,345", "write 12345 without a separator, or '12, 345' for 2 steps"),
        ("0, 143,000,000", "3 steps; write 143000000 without .* '143, 000, 000'"),
        (["1,500"], "write 1500 without"),
        ([0, "every 10 in 1,000..2,000"], "write 1000 without"),
        ("20 log-spaced in 10..1,000", "write 1000 without"),
        ("1,024,last", "write 1024 without"),
        ("evry 10", "'evry 10' is no term of a schedule; write .*every 1000"),
        ("0,, 5", "'' is no term"),
        (" ", "without steps; write"),
        ([], "without steps; write"),
    ],
)
def test_a_bad_schedule_is_named_with_the_way_out(value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CheckpointSteps.of(value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1000, r"'every 1000', or \[1000\]"),
        (True, "steps=True is no schedule"),
        ([1.5], "1.5 in steps="),
        ([False], "False in steps="),
        ({"every": 10}, "is no schedule; write"),
        (None, "steps=None is no schedule"),
    ],
)
def test_other_values_are_refused(value: object, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        CheckpointSteps.of(value)


def test_it_loads_no_torch() -> None:
    code = "import mda_lightning.checkpoint_steps, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
