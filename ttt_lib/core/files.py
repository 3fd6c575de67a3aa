"""YAML and JSON that people write: read as plain values, and one sentence for whatever is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ttt_lib.core.errors import UserError, reason


class _UniqueKeys(yaml.SafeLoader):
    """Plain values only, and a key that is there twice is a mistake: YAML itself would silently take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(problem=f"{key.value!r} is there twice, {key.start_mark}")
            seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key))
        return node


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return result


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark. Raises `UserError`."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe or a device may never end
            raise UserError(f"{path}: is not a file.")
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
    except yaml.YAMLError as error:
        raise UserError(f"{where}: is not valid YAML ({' '.join(str(error).split())[:300]}).") from error
    except Exception as error:  # dates that are none, numbers without end, lists nested without end
        raise UserError(f"{where}: is not valid YAML ({reason(error)}).") from error


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file. Raises `UserError`."""
    return parse_yaml(read_text(path), str(path))


def read_json(path: str | Path) -> Any:
    """The value of a JSON file. Raises `UserError`."""
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not a JSON file that can be read ({reason(error)}).") from error
