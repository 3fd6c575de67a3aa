"""Files of Hugging Face hub repositories, from the cache or the network, with one sentence for all that goes wrong."""

from __future__ import annotations

import logging
from pathlib import Path

from ttt_lib.core.errors import ModelError, reason

log = logging.getLogger(__name__)

TIMEOUT = 5.0  # seconds; a hub that has not answered a HEAD request by then counts as unreachable


class NotHeld(ModelError):
    """The repository, or offline its copy in the cache, lacks a file."""


def hub_answers() -> bool:
    """Whether the hub (or its mirror, `HF_ENDPOINT`) answers at all; False with `HF_HUB_OFFLINE`.

    Asked once before downloads, because the hub's client itself repeats a first request five times with growing
    pauses: minutes of silence behind a firewall that drops packets.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # the client's own errors and those of its transport, which differ between its versions
        return False
    return True


def fetch(name: str, files: tuple[str, ...], advice: str) -> Path:
    """The folder, in the hub's cache, that holds files of the repository `name`; downloaded if need be.

    Offline only the cache is looked into. advice: what to do when the hub cannot be reached. Raises `NotHeld`, or
    `ModelError` for every other failure.
    """
    from huggingface_hub import constants, errors, snapshot_download

    known, online, folder = f"model {name!r}:", hub_answers(), None
    log.info("%s %s, hub %s", known, ", ".join(files), "answers" if online else "does not answer")
    try:
        folder = snapshot_download(name, allow_patterns=files, local_files_only=not online, etag_timeout=TIMEOUT)
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{known} the hub has no such repository (`ttt-depth models` lists known names), or it is private, or its"
            " authors must grant access first: ask on its page, then `hf auth login`."
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(f"{known} is neither a file or folder that exists nor a valid hub name.") from error
    except Exception as error:  # full disk, broken connection, a proxy's page
        if online or not isinstance(error, errors.LocalEntryNotFoundError):
            raise ModelError(f"{known} it cannot be downloaded ({reason(error)}); {advice}.") from error
    for file in files:
        if folder is None or not (Path(folder) / file).is_file():
            cause = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
            raise NotHeld(
                f"{known} the repository holds no {file}; `ttt-depth models` lists known names."
                if online
                else f"{known} the hub cannot be reached{cause} and no copy of {file} is cached; {advice}."
            )
    return Path(folder)
