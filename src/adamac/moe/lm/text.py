"""Text: where it comes from, what a document is, and which documents are held out.

A corpus is a stream of documents. Files are read in the order of their names; a file is cut at blank lines, and whole
paragraphs are gathered until a document has some thousands of characters, so that a manual and a book give documents of
like size. Where a file says itself what separates its documents, the separator is given and the pieces are taken as they
are.

Which side a document is on, training or held out, is decided by a hash of its text. The split therefore depends neither on
the order of files nor on how many there are, a document that occurs twice is on one side, and adding files moves nothing.

Where no data is given, the corpus is what every machine with this package has: the Python language reference that ships with
the interpreter (`pydoc_data`, PSF licence) and the documentation strings of the standard library (PSF) and of torch
(BSD). That is some six megabytes of technical English: enough to see a small model learn in two minutes, not enough for a
claim about quality.
"""

from __future__ import annotations

import hashlib
import inspect
import lzma
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

DOCUMENT = 4096
"""Characters after which a document made of paragraphs is long enough."""

SUFFIXES = (".txt", ".txt.xz")

_DOCSTRING = re.compile(r'(?:\A|:[ \t]*\n)\s*[rR]?"""(.*?)"""', re.DOTALL)
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "__pycache__",
}


def text_files(paths: Iterable[Path]) -> list[Path]:
    """Find the text files under some files and directories.

    Args:
        paths: Files (`.txt`, `.txt.xz`, or anything that is UTF-8 text) and directories, of which every `.txt` and
            `.txt.xz` below is taken.

    Returns:
        The files, sorted within each directory.

    Raises:
        ValueError: If a path does not exist or a directory holds no text.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file()
            )
            if not inside:
                raise ValueError(
                    f"{path} holds no text: expected files that end in .txt or .txt.xz, or the data folder of a run"
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"cannot read {path}: no such file or directory")
    return found


def read_text(file: Path) -> str:
    """Read a text file, compressed with xz or not; bytes that are not UTF-8 become replacement characters.

    Raises:
        ValueError: If the file cannot be read, its compression is broken, or it has a byte that no text has.
    """
    try:
        raw = file.read_bytes()
        data = lzma.decompress(raw) if file.suffix == ".xz" else raw
    except (OSError, lzma.LZMAError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    if b"\0" in data:
        raise ValueError(f"{file} has zero bytes and looks binary; remove it, or give other files")
    return data.decode("utf-8", errors="replace").replace("\r\n", "\n")


def cut(text: str, separator: str | None = None, least: int = DOCUMENT) -> Iterator[str]:
    """Cut a text into documents; joined again they are the text, but for separators and white space at their ends.

    Args:
        text: All of a file.
        separator: What stands between two documents; ``None`` cuts at blank lines and gathers whole paragraphs.
        least: Characters that a document has before the next begins, where paragraphs are gathered. A paragraph longer
            than that is cut at ends of lines.
    """
    if separator is not None:
        yield from (piece for piece in text.split(separator) if piece.strip())
        return
    gathered: list[str] = []
    size = 0
    for piece in _paragraphs(text, least):
        gathered.append(piece)
        size += len(piece)
        if size >= least:
            yield "".join(gathered).strip("\n")
            gathered, size = [], 0
    if rest := "".join(gathered).strip("\n"):
        yield rest


def _paragraphs(text: str, longest: int) -> Iterator[str]:
    """Whole paragraphs with the blank lines after them, those that are too long line by line."""
    for paragraph in re.findall(r".+?(?:\n(?:[ \t]*\n)+|\Z)", text, re.DOTALL):
        if len(paragraph) > longest:
            yield from paragraph.splitlines(keepends=True)
        elif paragraph.strip():
            yield paragraph


def is_held_out(document: str, share: float) -> bool:
    """Whether a document is for evaluation, decided by its text alone.

    Args:
        document: The text.
        share: Share of documents that are held out, 0 to 1.
    """
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def documents(paths: Iterable[Path], separator: str | None = None) -> Iterator[str]:
    """Read the documents of some files and directories, or the built-in corpus if none is given."""
    paths = list(paths)
    if not paths:
        yield from builtin_documents()
    for file in text_files(paths):
        yield from cut(read_text(file), separator)


def builtin_documents() -> Iterator[str]:
    """Python's language reference and the documentation strings of the standard library and of torch.

    Raises:
        ValueError: If this Python has neither of them as text.
    """
    import torch

    count = 0
    for text in (
        *_language_reference(),
        *_docstrings(Path(sysconfig.get_path("stdlib"))),
        *_docstrings(Path(torch.__file__).parent),
    ):
        for document in cut(text):
            count += 1
            yield document
    if not count:
        raise ValueError("this Python ships no documentation as text; give text files with --data")


def _language_reference() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    return list(topics.values())


def _docstrings(package: Path) -> Iterator[str]:
    """Give the documentation strings of each file under a package as one text."""
    for file in sorted(package.rglob("*.py")):
        if _SKIPPED_FOLDERS.isdisjoint(file.relative_to(package).parts):
            strings = _DOCSTRING.findall(file.read_text(encoding="utf-8", errors="replace"))
            text = "\n\n".join(inspect.cleandoc(string) for string in strings if len(string) > 80)
            if text:
                yield text
