"""YAML and JSON that people write, read with one sentence for whatever is wrong; JSON and text written in one step."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic_core import to_jsonable_python

from ttt_lib.core.errors import UserError, reason

LARGEST_TEXT = 1 << 28  # bytes: a list of a million samples; what YAML and JSON make of it is far more

Value = TypeVar("Value", bound=Hashable)


def first_repeated(values: Iterable[Value]) -> Value | None:
    """The first value that was there before; None if all differ.

    Example:
        >>> first_repeated(["a", "b", "a"]), first_repeated("abc")
        ('a', None)
    """
    seen: set[Value] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def absolute(path: str | Path) -> str:
    """A path that means the same in every folder: once, where it enters, because the notebooks of a batch run elsewhere.

    `~` is your home, unless something here is called so; `scheme://...` stays as it is.

    Example:
        >>> absolute("/a/../b.pt"), absolute("s3://bucket/set")
        ('/b.pt', 's3://bucket/set')
    """
    path = str(path)
    if "://" in path:
        return path
    return os.path.abspath(path if os.path.lexists(path) else os.path.expanduser(path))


class _UniqueKeys(yaml.SafeLoader):
    """Plain values only, and a key that is there twice is a mistake: YAML itself would silently take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        twice = first_repeated((key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice is not None:
            raise yaml.constructor.ConstructorError(problem=f"{twice[1]!r} is there twice, {node.start_mark}")
        return node


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := first_repeated(key for key, _ in pairs)) is not None:
        raise ValueError(f"{twice!r} is there twice")
    return dict(pairs)


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark. Raises `UserError`."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe or a device may never end
            raise UserError(f"{path}: is not a file.")
        if path.is_file() and path.stat().st_size > LARGEST_TEXT:
            raise UserError(f"{path}: has more than {LARGEST_TEXT >> 20} MiB; a text that is read here has not.")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; check the name.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read (it is not text in UTF-8).") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise UserError(f"{path}: cannot be read ({reason(error)}).") from error


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text without tags for Python objects. where: begins the sentence of the `UserError`."""
    try:
        return yaml.load(text, Loader=_UniqueKeys)  # a subclass of the safe loader
    except Exception as error:  # also of dates that are none, numbers without end, lists nested without end
        raise UserError(f"{where}: is not valid YAML ({' '.join(str(error).split())[:300]}).") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises `UserError`."""
    content = parse_yaml(read_text(path), str(path))
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold keys and values at its top level, not {type(content).__name__}.")
    return content


def read_json(path: str | Path) -> Any:
    """The value of a JSON file. Raises `UserError`."""
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not a JSON file that can be read ({reason(error)}).") from error


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON as its standard has it: NaN and infinity, which it lacks, are `null`; arrays and tensors are lists or numbers.

    Example:
        >>> to_json({"loss": float("nan"), "steps": (1, 2)})
        '{"loss": null, "steps": [1, 2]}'
    """
    plain = to_jsonable_python(value, inf_nan_mode="null", fallback=lambda array: array.tolist())
    return json.dumps(plain, indent=indent, allow_nan=False)


def _unfinished(folder: Path, process: int | str) -> Path:
    """Where a process makes the new content of a folder: beside it, as the last step renames it.

    The folder's own name may be as long as names may be. The machine's is there because folders may be shared, and what
    a number of a process means is not.
    """
    machine = re.sub(r"[^0-9A-Za-z_-]", "_", platform.node())[:40]
    return folder.with_name(f".{folder.name[:40]}.{machine}-{process}.partial")


def _is_running(process: int) -> bool:
    """Whether a process of this machine lives; True where that cannot be asked."""
    if os.name != "posix":  # elsewhere this signal is none that only asks
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return True


def _clear_left_over(folder: Path) -> None:
    """Remove what processes of this machine left beside a folder that were killed while they made it."""
    before, after = map(re.escape, _unfinished(folder, "*").name.rsplit("*", 1))
    for path in folder.parent.iterdir():
        left = re.fullmatch(f"{before}([0-9]+){after}", path.name)
        if left and not _is_running(int(left[1])):
            shutil.rmtree(path, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Raises `UserError` where `replacing` could not make this folder: to be asked before work that would be lost.

    Leaves nothing behind.
    """
    if os.path.ismount(folder):
        raise UserError(f"{folder}: is where a disk is mounted and cannot be replaced; name a folder in it.")
    work = _unfinished(folder, os.getpid())
    new = [work, *(path for path in work.parents if not os.path.lexists(path))]
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({reason(error)}).") from error
    finally:
        for path in new:
            with suppress(OSError):
                path.rmdir()


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place at the end; whatever goes wrong before leaves all as it was.

    What processes left there that were killed in the middle of it is removed. Raises `UserError` where it cannot be
    written.
    """
    work = _unfinished(folder, os.getpid())
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        _clear_left_over(folder)
        yield work
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(work, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({reason(error)}).") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A new file beside `path`, which takes its place at the end: `path` has the old content or the new, never a part."""
    work = path.with_name(f".{path.stem[:40]}.{os.getpid()}.partial{path.suffix}")
    try:
        yield work
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8 in one step."""
    with replacing_file(Path(path)) as work:
        work.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `to_json(value)`, indented, in one step."""
    write_text(path, to_json(value, indent=1) + "\n")
