"""Text files as people's programs save them: with or without a byte order mark, with any line end,
zipped or not."""

from __future__ import annotations

import codecs
import errno
import gzip
import itertools
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from qadapter.errors import QAdapterError

# The mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)
ZIPPED_BYTES, ZIPPED_TIMES = 64 * 2**20, 100
"""A .gz may hold the first, or the second times its own size, whichever is more: text shrinks to a
tenth or so, a hundredth is made to fill the memory."""
_LOOKED_AT = 2**20
"""Bytes that tell how a file's lines end."""


def read_text(path: str | Path, *, most: int | None = None) -> str:
    """What a text file holds, without its byte order mark and with its own line ends.

    UTF-8; UTF-16 and UTF-32 where a mark says so. A name that ends in .gz is unzipped.

    Args:
        most: bytes it may hold; None: any number.

    Raises:
        QAdapterError: can't be read, is larger, or is not text in these encodings (with its line).
    """
    return decode(read_bytes(path, most=most), path)


def read_bytes(path: str | Path, *, most: int | None = None) -> bytes:
    """The bytes of a file, unzipped where its name ends in .gz.

    Raises:
        QAdapterError: can't be read, holds more than ``most`` bytes, or is zipped and grows beyond
            ``ZIPPED_BYTES`` and ``ZIPPED_TIMES`` its size.
    """
    file = Path(path).expanduser()
    try:
        size = _size(file)
        if not str(path).endswith(".gz"):
            with open(file, "rb") as stream:
                # read(n) takes n bytes of memory first, however small the file is.
                data = stream.read(None if most is None or size <= most else most + 1)
        else:
            grown = max(ZIPPED_BYTES, ZIPPED_TIMES * size)
            least = grown if most is None else min(most, grown)
            with gzip.open(file, "rb") as stream:
                data = stream.read(least + 1)
            if len(data) > grown:
                raise _grown(path)
    except (OSError, EOFError, zlib.error, ValueError) as error:  # ValueError: a name with \0
        raise _unreadable(path, error) from error
    if most is not None and len(data) > most:
        raise QAdapterError(f"{path} can't be read: it holds more than {most:,} bytes")
    return data


def _unreadable(path: str | Path, error: Exception) -> QAdapterError:
    reason = getattr(error, "strerror", None) or error
    return QAdapterError(f"{path} can't be read: {reason}")


def _grown(path: str | Path) -> QAdapterError:
    return QAdapterError(
        f"{path} can't be read: it grows to more than {ZIPPED_TIMES} times its size; if it really "
        "holds that much, unzip it yourself"
    )


class _Unzipped(gzip.GzipFile):
    """A .gz that ends in an error where it grows beyond the limits."""

    def __init__(self, file: Path) -> None:
        self._left = max(ZIPPED_BYTES, ZIPPED_TIMES * _size(file))
        super().__init__(file, "rb")

    def _count(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise _grown(self.name)
        return data

    def read(self, size: int | None = -1) -> bytes:
        return self._count(super().read(self._most(size)))

    def readline(self, size: int | None = -1) -> bytes:
        return self._count(super().readline(self._most(size)))

    def _most(self, size: int | None) -> int:
        return self._left + 1 if size is None or size < 0 else size


def _size(file: Path) -> int:
    """In bytes; raises OSError for what is no file, a device for one, which might never end."""
    found = file.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISFIFO(found.st_mode)):
        raise OSError(errno.EINVAL, "it is a device, not a file")
    return found.st_size


def decode(data: bytes, name: str | Path, *, errors: str = "strict") -> str:
    """The text that the file of this name holds.

    Args:
        errors: "strict", or "surrogatepass" to let halves of surrogate pairs through, as JSON does.

    Raises:
        QAdapterError: it is not text, or in another encoding (with its line).
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        if encoding.startswith("utf-8"):
            line = data.count(b"\n", 0, error.start) + 1
            raise _not_utf8(name, line, data[error.start]) from error
        raise QAdapterError(
            f"{name} begins like {encoding.upper()} and is not: save it as UTF-8"
        ) from error
    if "\0" in text:
        raise _zero_byte(name, text.count("\n", 0, text.index("\0")) + 1)
    return text


def _not_utf8(name: str | Path, line: int, byte: int) -> QAdapterError:
    return QAdapterError(f"{name}:{line} is not UTF-8 text (byte {byte:#04x}): save it as UTF-8")


def _zero_byte(name: str | Path, line: int) -> QAdapterError:
    return QAdapterError(
        f"{name}:{line} holds a zero byte: it is no text, or UTF-16 without a byte order mark; "
        "save it as UTF-8"
    )


def lines_of(path: str | Path, *, errors: str = "strict") -> Iterator[str]:
    """``split_lines`` of a file's text, of which one line is in memory at a time. UTF-16, UTF-32,
    and files whose lines end with ``\\r`` alone, are read whole.

    Args:
        errors: as ``decode``'s.

    Raises:
        QAdapterError: as ``read_text``; what is wrong with a line when it is reached.
    """
    file = Path(path).expanduser()
    try:
        with _stream(file) as stream:
            begin = stream.read(_LOOKED_AT)
            whole = any(
                begin.startswith(mark) for mark, encoding in _MARKS if encoding != "utf-8-sig"
            ) or (b"\n" not in begin and b"\r" in begin)
            if not whole:
                yield from _decoded(itertools.chain(_cut(begin, stream), stream), path, errors)
    except QAdapterError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise _unreadable(path, error) from error
    if whole:
        yield from split_lines(decode(read_bytes(path), path, errors=errors))


def _stream(file: Path) -> BinaryIO | _Unzipped:
    if _size(file) and str(file).endswith(".gz"):
        return _Unzipped(file)
    return open(file, "rb")


def _cut(begin: bytes, stream: BinaryIO | _Unzipped) -> Iterator[bytes]:
    """The lines that begin in what was read of a file."""
    lines = begin.split(b"\n")
    for line in lines[:-1]:
        yield line + b"\n"
    yield lines[-1] + stream.readline()


def _decoded(lines: Iterable[bytes], name: str | Path, errors: str) -> Iterator[str]:
    ended = True
    for number, line in enumerate(lines, 1):
        data, ended = line.removesuffix(b"\n"), line.endswith(b"\n")
        if number == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        try:
            text = data.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, number, data[error.start]) from error
        if "\0" in text:
            raise _zero_byte(name, number)
        yield text.removesuffix("\r")
    if ended:
        yield ""


def split_lines(text: str) -> list[str]:
    """Lines without their ends: ``\\n``, ``\\r\\n``, or ``\\r`` in a text that has no ``\\n``.

    Nothing else ends a line (``str.splitlines`` knows eight more): a text may hold it.
    """
    if "\n" not in text:
        return text.split("\r")
    return [line.removesuffix("\r") for line in text.split("\n")]


def check_unicode(texts: Iterable[object], name: str) -> None:
    """
    Args:
        name: what each of the texts is; those that are no strings are left alone.

    Raises:
        QAdapterError: one holds half of a surrogate pair; names it by its number, from 0.
    """
    for number, text in enumerate(texts):
        if isinstance(text, str) and not is_unicode(text):
            raise QAdapterError(
                f"{name} {number} holds half of a surrogate pair, which is no character: "
                f"{text[:60]!r}"
            )


def is_unicode(text: str) -> bool:
    """Whether it can be written down: JSON, and arguments of a command, may hold half of a
    surrogate pair, which files, Arrow and tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
