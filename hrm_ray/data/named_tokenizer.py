"""A tokenizer by its name: a path, or an id of the Hugging Face Hub. Only a tokenizer's own files are downloaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hrm_ray.data.tokenizer import CONFIG_FILE, TOKENIZER_FILE, VOCABULARIES, TextTokenizer
from hrm_ray.errors import DataError, Fault, SettingsError, UnavailableError

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_FILES = (
    *(TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
"""What a tokenizer may be made of; config.json names its class where the tokenizer's own files do not."""
_TIMEOUT_S = 10.0
_GIVE = f"Give a folder with {TOKENIZER_FILE}, or leave it out to train one on the data"


def absolute_name(name: str) -> str:
    """`name` independent of the working folder: a path made absolute, a Hub id unchanged."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() or not _is_hub_id(name) else name


def load_named(name: str) -> TextTokenizer:
    """The tokenizer at the path `name`, or with the Hub id `name` if there is no such path.

    Files in the Hub's cache on this machine are used without asking the Hub, so that it works offline and a run keeps
    its tokenizer. Raises SettingsError for an unknown name, UnavailableError where the Hub cannot be asked, DataError
    for files that cannot be used.
    """
    path = Path(name).expanduser()
    if path.exists() or not _is_hub_id(name):
        return TextTokenizer.load(path)
    folder = _cached_folder(name) or _downloaded_folder(name)
    try:
        return TextTokenizer.load(folder)
    except DataError as fault:
        faults = [Fault(f"{name} (in {each.value})", each.reason, each.hint) for each in fault.faults]
        raise DataError(faults) from fault


def has_chat_template(name: str) -> bool:
    """Whether the files of the tokenizer `name` hold a chat template; those of the Hub are looked for on this machine
    only."""
    path = Path(name).expanduser()
    folder = path if path.exists() or not _is_hub_id(name) else _cached_folder(name)
    if folder is None:
        return False
    folder = folder if folder.is_dir() else folder.parent
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        config = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def _is_hub_id(name: str) -> bool:
    return _HUB_ID.fullmatch(name) is not None and not name.endswith(".json")


def _cached_folder(hub_id: str) -> Path | None:
    """The folder of the Hub's cache with this tokenizer; None where it is missing or incomplete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise SettingsError(Fault(hub_id, "is neither an existing path nor a Hub id", _GIVE)) from error
    return folder if any((folder / name).is_file() for name in VOCABULARIES) else None


def _downloaded_folder(hub_id: str) -> Path:
    """The folder of the Hub's cache with the tokenizer's files, fetched now."""
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError

    absent = f"no such path, no tokenizer of this id in the cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        raise UnavailableError(Fault(hub_id, f"{absent}, and HF_HUB_OFFLINE forbids asking the Hub", _GIVE))
    try:
        # Asked first because it has one try and a time limit; a download without a network has neither.
        about = HfApi().model_info(hub_id, timeout=_TIMEOUT_S)
        held = {file.rfilename for file in about.siblings or ()}
        for name in _FILES:
            if name in held:
                fetched = hf_hub_download(hub_id, name, etag_timeout=_TIMEOUT_S)
    except RepositoryNotFoundError as error:
        reason = "no such path, and the Hub has no such repository for this account"
        raise SettingsError(Fault(hub_id, reason, "Give another id, or log in with `hf auth login`")) from error
    except Exception as error:  # its HTTP library, and with it the kinds of a failed connection, differ by version
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f"{absent}, and the Hub cannot be reached ({first_line})"
        raise UnavailableError(Fault(hub_id, reason, _GIVE)) from error
    if not held & VOCABULARIES:
        raise SettingsError(Fault(hub_id, "the Hub's repository of this id contains no tokenizer", _GIVE))
    return Path(fetched).parent
