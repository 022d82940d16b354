"""Names from outside (of files, folders, columns, data sets) as text that can be printed and kept. Finds nothing by it.

A file's name is bytes: Python gives those that are no UTF-8 as lone surrogates, which neither a terminal, nor YAML, nor
a database takes. A name may also hold line ends, and characters that change what stands beside them. Whatever is shown
or written into a file goes through here; whatever opens a file uses the name as it is.
"""

import os

LONGEST = 500   # characters of a name that are shown


def printable(name: str | os.PathLike[str]) -> str:
    """`name` on one line, of printable characters, and shortened in its middle when it is very long."""
    text = escaped(os.fspath(name))
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST // 2]}...{text[-LONGEST // 2:]}"


def escaped(text: str) -> str:
    r"""`text` with \xNN for a byte that is no UTF-8, and Python's escape for any other character that is not printable.

    Printable is what `str.isprintable` says: no control characters, line ends, surrogates or marks of direction.
    """
    return text if text.isprintable() else "".join(map(_escape, text))


def is_valid_unicode(text: str) -> bool:
    """Whether UTF-8, and so every file format here, can hold `text` as it is."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _escape(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":   # as os.fsdecode gives a byte
        return f"\\x{ord(character) - 0xdc00:02x}"
    return character.encode("unicode_escape").decode("ascii")
