"""Files of Hugging Face hub repositories, from the cache or the network, with one sentence for all that goes wrong."""

from __future__ import annotations

from pathlib import Path

from ttt_lib.core.errors import UserError, reason

TIMEOUT = 5.0  # seconds; a hub that has not answered a HEAD request by then counts as unreachable


class NotInRepository(Exception):
    """The repository exists and does not hold the file; or offline, the cache does not."""


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


def download(name: str, file: str, online: bool, advice: str) -> Path:
    """The path of `file` of the repository `name`, in the hub's cache.

    online: what `hub_answers` said; offline only the cache is looked into. advice: what to do when the hub cannot be
    reached. Raises `NotInRepository`, or `UserError` for every other failure.
    """
    from huggingface_hub import constants, errors, hf_hub_download

    known = f"model {name!r}:"
    try:
        return Path(hf_hub_download(name, file, local_files_only=not online, etag_timeout=TIMEOUT))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{known} its authors must grant access first; ask on its page, then `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{known} the hub has no such repository (or it is private); `ttt-depth models` lists known names."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if online:
            raise UserError(f"{known} the hub stopped answering; {advice}.") from error
        cause = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise UserError(
            f"{known} the hub cannot be reached{cause} and no copy of {file} is cached; {advice}."
        ) from error
    except errors.EntryNotFoundError as error:
        raise NotInRepository(file) from error
    except errors.HFValidationError as error:
        raise UserError(f"{known} is neither a file or folder that exists nor a valid hub name.") from error
    except Exception as error:  # full disk, broken connection, a proxy's page: not to be had from here
        raise UserError(
            f"{known} the download of {file} failed ({type(error).__name__}: {reason(error)}); {advice}."
        ) from error
