"""The embedded corpus: its shares, its records, and a cache that never gives another corpus."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from mda_lightning.corpora import RecordStyle, TokenRows, embedded_corpus, train_bpe
from mda_lightning.corpora.embedded import library_texts
from mda_lightning.corpora.records import LAYOUTS, RecordGenerator

TOKENIZER = Tokenizer.from_str(train_bpe(library_texts()[:5], vocab_size=400, seed=0))
SMALL = {"n_rows": 400, "row_length": 65, "vocab_size": 300, "sample_characters": 100_000}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pieces", ["vocabulary", "characters"])
def test_names_recur_within_a_record_and_not_between_records(layout: str, pieces: str) -> None:
    """Some long string stands at least twice in every record, and in no other one."""
    style = RecordStyle(pieces=pieces, pieces_per_name=(9, 14), second_name=0.0)
    generator = RecordGenerator(style, TOKENIZER, seed=0)
    records = [generator.record(layout) for _ in range(30)]
    for record in records:
        spans = {record[i : i + 9] for i in range(len(record) - 9)}
        recurring = {span for span in spans if record.count(span) > 1}
        others = "\n".join(other for other in records if other != record)
        assert any(span not in others for span in recurring)
    again = RecordGenerator(style, TOKENIZER, seed=0)
    assert [again.record(layout) for _ in range(30)] == records


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> TokenRows:
    return embedded_corpus(tmp_path_factory.mktemp("cache"), records_share=0.25, **SMALL)


def test_the_embedded_corpus_has_its_shares(embedded: TokenRows) -> None:
    domains = embedded.domains(range(len(embedded)))
    assert domains is not None and len(domains) == 400
    assert domains.count("library") == 300
    assert set(embedded.domain_names) == {"library", *LAYOUTS}
    assert all(domains.count(layout) in (16, 17) for layout in LAYOUTS)
    assert embedded.vocab_size == 300 and 0 not in embedded.token_ids
    library = [i for i, domain in enumerate(domains) if domain == "library"]
    inside_one_file = [row for row in embedded.get(library) if 0 not in row]
    everything = "\0".join(library_texts())
    assert len(inside_one_file) > 200
    assert all(embedded.decode(row) in everything for row in inside_one_file[::20])


def test_the_embedded_corpus_is_kept_under_all_that_determines_it(embedded: TokenRows) -> None:
    cache = embedded.folder.parent
    told: list[tuple[str, float]] = []
    again = embedded_corpus(
        cache, records_share=0.25, progress=lambda *told_: told.append(told_), **SMALL
    )
    assert again.folder == embedded.folder
    assert [message for message, _ in told] == ["reading the standard library"]
    other = embedded_corpus(cache, records_share=0.25, **(SMALL | {"n_rows": 80}), seed=1)
    styled = embedded_corpus(
        cache,
        records_share=0.25,
        style=RecordStyle(layouts=("csv",)),
        **(SMALL | {"n_rows": 80}),
        progress=lambda *told_: told.append(told_),
    )
    assert len({embedded.folder, other.folder, styled.folder}) == 3
    assert styled.domain_names == ("csv", "library")
    shares = [done for _, done in told[1:]]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert {path.name.startswith("embedded-") for path in cache.iterdir()} == {True}


def test_where_the_library_ends_the_shares_stay(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    short = library_texts()[:3]
    monkeypatch.setattr("mda_lightning.corpora.embedded.library_texts", lambda: short)
    rows = embedded_corpus(tmp_path, records_share=0.5, **(SMALL | {"n_rows": 100_000}))
    domains = rows.domains(range(len(rows)))
    assert domains is not None
    assert 0 < domains.count("library") == len(rows) - domains.count("library") < 10_000


def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from mda_lightning.corpora import embedded_corpus\n"
        f"print(embedded_corpus(sys.argv[1], **{SMALL}).content_hash)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    hashes = {process.communicate()[0].strip() for process in both}
    assert hashes == {embedded_corpus(tmp_path, **SMALL).content_hash}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"records_share": 1.5}, "records_share is 1.5"),
        ({"n_rows": 0}, "n_rows is 0"),
        ({"row_length": 1}, "row_length 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    tmp_path: Path, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        embedded_corpus(tmp_path, **(SMALL | settings))
    with pytest.raises(ValueError, match="layouts"):
        RecordStyle(layouts=("poem",))
    with pytest.raises(ValueError, match="lines_per_record"):
        RecordStyle(lines_per_record=(2, 1))


def test_the_library_leaves_out_tests_and_is_plain(monkeypatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name in ("b.py", "a/z.py", "a/test/x.py", "site-packages/y.py", "c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name} é", "utf-8")
    monkeypatch.setattr(
        sys.modules["mda_lightning.corpora.embedded"].sysconfig,
        "get_paths",
        lambda: {"stdlib": str(tmp_path)},
    )
    assert library_texts() == ["# b.py \\xe9", "# a/z.py \\xe9"]
    for path in tmp_path.rglob("*.py"):
        path.unlink()
    with pytest.raises(ValueError, match="no library source"):
        library_texts()
