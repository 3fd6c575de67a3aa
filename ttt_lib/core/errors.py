"""The one exception that stands for a user's mistake, and how other exceptions are put into its sentence."""

from __future__ import annotations


def printable(text: object, limit: int = 300) -> str:
    """On one line: control characters become spaces, bytes that are no text their escapes; the middle of long ones is
    left out."""
    plain = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    plain = "".join(c if c.isprintable() else " " for c in plain)
    half = limit // 2 - 2
    return plain if len(plain) <= limit else f"{plain[:half]} ... {plain[-half:]}"


def reason(error: BaseException, limit: int = 200) -> str:
    """What an exception says, for the brackets of a sentence: its first line, or its type where it says nothing."""
    lines = [line.strip().rstrip(".") for line in str(getattr(error, "strerror", None) or error).splitlines()]
    return printable(next(filter(None, lines), type(error).__name__), limit)


class UserError(Exception):
    """Something the user can put right. The message is one sentence: what is wrong, where, and what to do.

    The command line prints it without a traceback; notebooks and Python callers may catch it. Names of files may hold
    anything; the message is one line all the same.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(message, 2000))
