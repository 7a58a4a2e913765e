"""The corpus of a study, and the rows held out of it, made once and kept."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from numpy.typing import NDArray

from mda_lightning.corpora import RecordStyle, TokenRows, embedded_corpus, train_bpe
from mda_lightning.corpora.bpe import encode
from mda_lightning.corpora.megatron_rows import MegatronFiles, megatron_rows
from mda_lightning.corpora.packing import pack
from mda_lightning.corpora.texts import folder_documents, jsonl_documents, read_text
from mda_lightning.files import sha256_of
from mda_lightning.recipes.studies.held_out_rows import Progress, divided, place
from mda_lightning.recipes.studies.settings import CorpusSettings
from mda_lightning.vocabulary import read_vocabulary

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


@dataclass(frozen=True, eq=False)
class StudyCorpus:
    """What a study trains on.

    Attributes:
        rows: to train on.
        held_out: rows of the same tokenizer that no run trains on; None where none were asked for.
    """

    rows: TokenRows
    held_out: TokenRows | None


def study_corpus(
    settings: CorpusSettings, cache_dir: str | os.PathLike[str], progress: Progress | None = None
) -> StudyCorpus:
    """Make a study's corpus, or open it where it was made before.

    Corpora are kept in ``cache_dir`` under a key of all that determines them. A folder of rows that
    is used whole is opened where it lies.

    ``held_out_rows`` rows are kept back in runs of neighbouring rows, so that few documents lie on
    both sides, of each domain in proportion; ``n_rows`` of the others are trained on, chosen the
    same way. With ``shuffle: false`` the first ``n_rows`` are trained on and the rows after them
    are held out, so that step i sees the samples that it saw originally.

    Args:
        settings: see :class:`CorpusSettings`.
        cache_dir: where corpora are kept.
        progress: told what is being done, and the share done.

    Raises:
        FileNotFoundError: a file is absent; the message names the setting.
        ValueError: a variable that is not set, settings that do not fit together, or too few rows.
    """
    cache, report = Path(cache_dir), progress or (lambda what, share: None)
    if settings.kind == "megatron":
        rows, held_out = _of_megatron(settings, cache, report)
    else:
        whole = _embedded(settings, cache, report) if settings.kind == "embedded" else None
        whole = whole or (
            TokenRows.open(_source(settings))
            if settings.kind == "rows"
            else _of_texts(settings, cache, report)
        )
        rows, held_out = divided(whole, settings, cache, report)
    if settings.held_out is not None:
        if settings.held_out_rows:
            raise ValueError(
                f"corpus.held_out_rows is {settings.held_out_rows} and corpus.held_out names "
                f"{settings.held_out!r}; give one of the two"
            )
        held_out = _from_file(settings, rows, cache, report)
    return StudyCorpus(rows, held_out)


def filled_in(path: str, setting: str) -> str:
    """A path of a recipe with ``~`` and ``$NAME`` filled in.

    Args:
        path: as the recipe gives it.
        setting: the setting that it is of, for the message.

    Raises:
        ValueError: a variable is not set.
    """
    found = os.path.expandvars(os.path.expanduser(path))
    if match := _VARIABLE.search(found):
        name = match[1].strip("{}")
        raise ValueError(
            f"{setting} is {path!r}, and the environment has no {name}: set it "
            f"(export {name}=/path/to/it), or give the path itself ({setting}=/path/to/it)"
        )
    return found


def _existing(path: str, setting: str) -> Path:
    found = Path(filled_in(path, setting))
    if not found.exists():
        meant = "" if str(found) == path else f" ({path})"
        raise FileNotFoundError(
            f"{setting}: there is nothing at {found}{meant}; give another one ({setting}=PATH)"
        )
    return found


def _source(settings: CorpusSettings) -> Path:
    if settings.path is None:
        raise ValueError(
            f"a corpus of kind {settings.kind!r} needs corpus.path, where it lies; only 'embedded' "
            "needs none"
        )
    return _existing(settings.path, "corpus.path")


def _tokenizer(settings: CorpusSettings) -> str | None:
    """The ``tokenizer.json`` of a file, a folder or a hub name, as text."""
    if settings.tokenizer is None:
        return None
    named = filled_in(settings.tokenizer, "corpus.tokenizer")
    if named != settings.tokenizer or named.startswith((".", "/")) or named.endswith(".json"):
        _existing(settings.tokenizer, "corpus.tokenizer")
    if Path(named).is_file():
        return Path(named).read_text("utf-8")
    return str(read_vocabulary(named).tokenizer.to_str())


# -- kinds ------------------------------------------------------------------------------------


def _embedded(settings: CorpusSettings, cache: Path, report: Progress) -> TokenRows:
    if settings.n_rows is None:
        raise ValueError("an embedded corpus is made to size: give corpus.n_rows, such as 45000")
    return embedded_corpus(
        cache,
        seed=settings.seed,
        records_share=settings.records_share,
        n_rows=settings.n_rows + settings.held_out_rows,
        row_length=settings.sequence_length + 1,
        vocab_size=settings.vocab_size,
        style=RecordStyle(
            pieces_per_name=settings.pieces_per_name, lines_per_record=settings.lines_per_record
        ),
        progress=report,
    )


def _of_texts(settings: CorpusSettings, cache: Path, report: Progress) -> TokenRows:
    path, tokenizer_json = _source(settings), _tokenizer(settings)
    made_from = {
        "kind": settings.kind,
        "source": _content_hash(path, report),
        "row_length": settings.sequence_length + 1,
        "tokenizer": None if tokenizer_json is None else sha256_of(tokenizer_json),
        "vocab_size": settings.vocab_size if tokenizer_json is None else None,
        "seed": settings.seed if tokenizer_json is None else None,
    }
    folder = place(cache, settings.kind, made_from)
    if folder.is_dir():
        return TokenRows.open(folder)
    report(f"reading {path.name}", 0.0)
    texts = [(domain, text) for domain, text in _documents(path) if text]
    if not texts:
        raise ValueError(f"corpus.path: {path} holds no text; give another one")
    if tokenizer_json is None:
        report("training the tokenizer", 0.1)
        tokenizer_json = train_bpe(
            [text for _, text in texts], vocab_size=settings.vocab_size, seed=settings.seed
        )
    return _tokenised(
        folder, texts, tokenizer_json, settings.sequence_length + 1, made_from, path.name, report
    )


def _of_megatron(
    settings: CorpusSettings, cache: Path, report: Progress
) -> tuple[TokenRows, TokenRows | None]:
    path, tokenizer_json = _source(settings), _tokenizer(settings)
    files = MegatronFiles.find(path)
    about = [(one.name, one.stat().st_size, one.stat().st_mtime_ns) for one in files.binaries]

    def part(start: int, n_rows: int | None, name: str) -> TokenRows:
        made_from = {
            "kind": "megatron",
            # Too large to hash: hundreds of gigabytes.
            "index": [str(files.index.resolve()), files.index.stat().st_mtime_ns],
            "binaries": about,
            "start": start,
            "n_rows": n_rows,
            "vocab_size": settings.vocab_size,
            "row_length": settings.sequence_length + 1,
            "tokenizer": None if tokenizer_json is None else sha256_of(tokenizer_json),
        }
        folder = place(cache, name, made_from)
        if folder.is_dir():
            return TokenRows.open(folder)
        return megatron_rows(
            folder,
            path,
            start=start,
            n_rows=n_rows,
            row_length=settings.sequence_length + 1,
            vocab_size=settings.vocab_size,
            tokenizer_json=tokenizer_json,
            progress=lambda share: report(f"copying rows of {files.index.stem}", share),
        )

    if not settings.held_out_rows:
        return part(0, settings.n_rows, "megatron"), None
    if settings.n_rows is None:
        raise ValueError(
            f"corpus.held_out_rows is {settings.held_out_rows}: of a Megatron corpus the rows "
            "after the training rows are held out, so give corpus.n_rows"
        )
    rows = part(0, settings.n_rows, "megatron")
    return rows, part(settings.n_rows, settings.held_out_rows, "megatron-held-out")


def _from_file(
    settings: CorpusSettings, rows: TokenRows, cache: Path, report: Progress
) -> TokenRows:
    """Held-out rows of a file of text, in the tokens of the training rows."""
    path = _existing(str(settings.held_out), "corpus.held_out")
    if (path / "meta.json").is_file():
        found = TokenRows.open(path)
        if (found.row_length, found.vocab_size) != (rows.row_length, rows.vocab_size):
            raise ValueError(
                f"corpus.held_out: {path} has rows of {found.row_length} tokens of "
                f"{found.vocab_size}, the training rows {rows.row_length} of {rows.vocab_size}; "
                "give rows of the same tokenizer and length, or text"
            )
        return found
    tokenizer = rows.folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise ValueError(
            f"corpus.held_out is text, and the training rows in {rows.folder} keep no tokenizer "
            "to read it with; give corpus.tokenizer, or corpus.held_out_rows instead"
        )
    tokenizer_json = tokenizer.read_text("utf-8")
    ascii_only = settings.kind == "embedded"
    made_from = {
        "kind": "held-out",
        "source": _content_hash(path, report),
        "row_length": rows.row_length,
        "tokenizer": sha256_of(tokenizer_json),
        "vocab_size": rows.vocab_size,
        "ascii": ascii_only,
    }
    folder = place(cache, "held-out", made_from)
    if folder.is_dir():
        return TokenRows.open(folder)
    texts = [(domain, text) for domain, text in _documents(path) if text]
    if ascii_only:  # as the embedded corpus spells what is outside ASCII
        texts = [(d, text.encode("ascii", "backslashreplace").decode("ascii")) for d, text in texts]
    if not texts:
        raise ValueError(f"corpus.held_out: {path} holds no text; give another one")
    return _tokenised(
        folder,
        texts,
        tokenizer_json,
        rows.row_length,
        made_from,
        path.name,
        report,
        vocab_size=rows.vocab_size,
    )


def _documents(path: Path) -> Iterator[tuple[str, str]]:
    if path.is_dir():
        return folder_documents(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return jsonl_documents(path, "text")
    return iter([("text", read_text(path))])


def _tokenised(
    folder: Path,
    texts: list[tuple[str, str]],
    tokenizer_json: str,
    row_length: int,
    made_from: dict[str, Any],
    name: str,
    report: Progress,
    *,
    vocab_size: int | None = None,
) -> TokenRows:
    vocabulary = read_vocabulary(tokenizers.Tokenizer.from_str(tokenizer_json))
    characters, done = sum(len(text) for _, text in texts), 0

    def encoded() -> Iterator[tuple[str, NDArray[Any]]]:
        nonlocal done
        ids = encode(vocabulary.tokenizer, (text for _, text in texts))
        for (domain, text), tokens in zip(texts, ids, strict=True):
            yield domain, tokens
            done += len(text)
            report(f"tokenising {name}", 0.15 + 0.8 * done / characters)

    packed = pack(encoded(), row_length=row_length, end_of_text=vocabulary.end_of_text)
    report("writing the rows", 0.95)
    written = TokenRows.write(
        folder,
        packed.rows,
        domains=packed.domains,
        tokenizer_json=tokenizer_json,
        vocab_size=vocab_size,
        provenance={
            "reader": "study",
            "name": name,
            **made_from,
            "documents": len(texts),
            "dropped_tokens": packed.dropped,
        },
    )
    report("corpus ready", 1.0)
    return written


def _content_hash(path: Path, report: Progress) -> str:
    """SHA-256 over a file, or over the names and contents of a folder's text files."""
    report(f"reading {path.name}", 0.0)
    if path.is_file():
        return sha256_of(path.read_bytes())
    texts = sorted(one for one in path.glob("**/*.txt") if one.is_file())
    return sha256_of(
        *(part for one in texts for part in (str(one.relative_to(path)), one.read_bytes()))
    )
