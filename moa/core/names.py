"""Escapes users' names of files, folders, columns and data sets, so that they can be printed and stored as text.

A file's name is bytes. Python decodes a byte that is no UTF-8 to a lone surrogate, which terminals, YAML and databases
refuse. A name may also hold line ends and marks of writing direction, which garble the text around it. Code that shows
a name or writes it into a file escapes it first; code that opens the file uses the original name.
"""

import os

LONGEST = 500   # characters; a longer name is shown without its middle


def printable(name: str | os.PathLike[str]) -> str:
    """`name` escaped to one line of printable characters; of a name longer than LONGEST, both ends."""
    text = escaped(os.fspath(name))
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST // 2]}...{text[-LONGEST // 2:]}"


def escaped(text: str) -> str:
    r"""`text` with \xNN for a byte that is no UTF-8, and Python's escape for any other character that is not printable.

    `str.isprintable` decides: control characters, line ends, surrogates and marks of direction are not printable.
    """
    return text if text.isprintable() else "".join(map(_escape, text))


def is_valid_unicode(text: str) -> bool:
    """Whether `text` can be encoded in UTF-8: it has no lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _escape(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":   # os.fsdecode maps byte b to U+DC00 + b
        return f"\\x{ord(character) - 0xdc00:02x}"
    return character.encode("unicode_escape").decode("ascii")
