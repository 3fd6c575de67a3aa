"""One family of exceptions, and how other exceptions are put into their sentences.

    TTTError
      UserError            something the user can put right; one sentence: what is wrong, where, what to do
        ConfigError        a setting, a name or a file of settings
        DataError          a photograph, a sample or a set
        ModelError         a checkpoint, a hub, a family
        RunError           a folder of results, a job, a cluster
        NotSupported       what this model or machine cannot do
      NumericalError       a prediction, a loss or a gradient that is no number: ends a sample, never a run

What is not of this family is a mistake of the program and keeps its trace.
"""

from __future__ import annotations

from typing import Any


def printable(text: object, limit: int = 300) -> str:
    """On one line: control characters become spaces, bytes that are no text their escapes; the middle of long ones is
    left out."""
    plain = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    plain = "".join(c if c.isprintable() else " " for c in plain)
    half = limit // 2 - 2
    return plain if len(plain) <= limit else f"{plain[:half]} ... {plain[-half:]}"


def reason(error: BaseException) -> str:
    """What an exception says, for the brackets of a sentence: its first line, or its type where it says nothing."""
    lines = [line.strip().rstrip(".") for line in str(getattr(error, "strerror", None) or error).splitlines()]
    return printable(next(filter(None, lines), type(error).__name__), 200)


class TTTError(Exception):
    """Everything this package raises on purpose. `about` carries what the sentence is about, for programs.

    Example:
        >>> error = DataError("a.jpg: there is no such file.", path="a.jpg")
        >>> str(error), error.about
        ('a.jpg: there is no such file.', {'path': 'a.jpg'})
    """

    def __init__(self, message: object, **about: Any) -> None:
        super().__init__(printable(message, 2000))
        self.about = about

    def __reduce__(self) -> tuple[Any, ...]:  # `about` survives the way between processes
        return _again, (type(self), str(self), self.about)


def _again(kind: type[TTTError], message: str, about: dict[str, Any]) -> TTTError:
    return kind(message, **about)


class UserError(TTTError):
    """Something the user can put right. The message is one sentence: what is wrong, where, and what to do.

    The command line prints it without a traceback (`--debug` shows its cause); notebooks and Python callers may catch
    it. Names of files may hold anything; the message is one line all the same.

    Example:
        >>> from ttt_lib import UserError, load_samples
        >>> try:
        ...     load_samples("no/such/folder")
        ... except UserError as error:
        ...     print("no such" in str(error), type(error).__name__)
        True DataError
    """


class ConfigError(UserError):
    """A setting, the name of an experiment or profile, or a file of settings."""


class DataError(UserError):
    """A photograph, a sample or a set that is missing, damaged or not what it says."""


class ModelError(UserError):
    """A model's name, checkpoint, hub or family."""


class RunError(UserError):
    """A folder of results, a job, a scheduler or a cluster."""


class NotSupported(UserError):
    """What this model or this machine cannot do; callers with another way take it."""


class NumericalError(TTTError):
    """A prediction, loss or gradient that is not finite: the sample keeps its original prediction or is left out."""
