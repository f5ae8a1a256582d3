"""Data sets of the Hugging Face Hub (`hf://id:config:split`), streamed through the `datasets` library.

Nothing is downloaded before it is read. The revision is looked up when the shards are listed, so that every process
reads the same one.
"""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from hrm_ray.data.rows import Cursor, Row
from hrm_ray.data.splits import missing_split
from hrm_ray.data.streams import Unreadable
from hrm_ray.errors import DataError, Fault, SettingsError, UnavailableError
from hrm_ray.settings.hub_name import HubName, hub_name

_TIMEOUT_S = 10.0
_LET_GO_S = 2.0
_CHECK_ID = "Check ORGANISATION/NAME"
_ADDRESS = re.compile(r"(?P<name>.*)#(?P<index>\d+)/(?P<count>\d+)@(?P<revision>[^@]*)", re.DOTALL)


class Shard(NamedTuple):
    """A part of a data set that is read on its own: usually one of its files. `address`: name#index/count@revision;
    `bytes` is 0 (unknown); `stamp` is the data set's fingerprint."""

    name: str
    address: str
    bytes: int
    stamp: str


def list_shards(address: str, split: str) -> tuple[list[Shard], tuple[str, ...]]:
    """The shards of a split of a data set, and all its splits; a split in the address overrides `split`.

    Raises UnavailableError where the library is missing or the Hub cannot be reached, SettingsError for an id or a
    configuration that is not there, DataError for a split that is not there or data that cannot be opened.
    """
    name = hub_name(address)
    if name is None:
        raise ValueError(f"{address} is not an address of the Hub")
    name = name._replace(split=name.split or split)
    _require_datasets(address)
    revision = "" if Path(name.id).is_dir() else _revision(name)
    dataset, fingerprint, splits = _open(name, revision)
    count: int = dataset.num_shards
    shards = [
        Shard(f"{name.split}/{index:05d}", f"{name}#{index}/{count}@{revision}", 0, fingerprint)
        for index in range(count)
    ]
    return shards, splits


def split_rows(address: str) -> int | None:
    """The number of rows in the split that the shard at `address` belongs to, where the data set's card has it."""
    name, found = _parsed(address)
    splits = _open(name, found["revision"])[0].info.splits or {}
    entry = splits.get(name.split)
    return None if entry is None else entry.num_examples or None


def _parsed(address: str) -> tuple[HubName, re.Match[str]]:
    """The name and the other parts of a shard's address."""
    found = _ADDRESS.fullmatch(address)
    name = hub_name(found["name"]) if found is not None else None
    if found is None or name is None:
        raise ValueError(f"{address} is not an address that list_shards made")
    return name, found


def shard_rows(address: str, cursor: Cursor) -> Iterator[Row]:
    """The rows of a shard. Raises Unreadable for damaged data, UnavailableError where the Hub cannot be reached."""
    import pyarrow as pa

    name, found = _parsed(address)
    _require_datasets(address)
    cursor.where = f"{name}, shard {found['index']}"
    shard = _open(name, found["revision"])[0].shard(num_shards=int(found["count"]), index=int(found["index"]))
    if shard.column_names is not None:
        fault = cursor.columns.absent(shard.column_names, cursor.where, "data set")
        if fault is not None:
            raise Unreadable(fault)
        shard = shard.select_columns(list(cursor.columns.names))
    cursor.row = cursor.start
    rows = iter(shard.skip(cursor.start) if cursor.start else shard)
    held_bytes, ended = pa.total_allocated_bytes(), False
    try:
        while (values := _next(rows, cursor.where)) is not None:
            row = cursor.next_row()
            yield cursor.columns.document(values, f"{cursor.where}, row {row + 1}", row, None)
        ended = True
    finally:
        del rows
        if not ended:
            _end_reading_ahead(held_bytes)


def _end_reading_ahead(held_bytes: int) -> None:
    """Waits up to _LET_GO_S until pyarrow has freed what it read ahead of rows that are not wanted any more, down to
    the `held_bytes` of before. A process that ends while its threads still read hangs or aborts (apache/arrow 45214);
    a reference cycle keeps their data."""
    import pyarrow as pa

    gc.collect()
    until = time.monotonic() + _LET_GO_S
    while pa.total_allocated_bytes() > held_bytes and time.monotonic() < until:
        time.sleep(0.01)


def _next(rows: Iterator[dict[str, object]], where: str) -> dict[str, object] | None:
    """The next row; None at the end."""
    import pyarrow as pa
    from datasets.exceptions import DatasetsError

    try:
        return next(rows, None)
    except FileNotFoundError as error:
        raise Unreadable(Fault(where, "a file of the data set is gone", "Restore it, or start again")) from error
    except _network_errors() as error:
        raise _no_hub(where, error) from error
    except (DatasetsError, pa.ArrowException, OSError, ValueError, TypeError, EOFError) as error:
        hint = "Correct the data set, or name another --dataset-config or split"
        raise Unreadable(Fault(where, f"the rest cannot be read ({_first_line(error)})", hint)) from error


def _require_datasets(address: str) -> None:
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        reason = "data sets of the Hub are read through the library `datasets`, which is not installed"
        raise UnavailableError(Fault(address, reason, "pip install datasets")) from error


def _revision(name: HubName) -> str:
    """The commit that a data set of the Hub is at now. Asked here, with a time limit: `datasets` would try for half a
    minute."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        revision = HfApi(endpoint=constants.ENDPOINT).dataset_info(name.id, timeout=_TIMEOUT_S).sha
    except HFValidationError as error:
        raise SettingsError(Fault(str(name), f"not an id of the Hub ({_first_line(error)})", _CHECK_ID)) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status not in (401, 403, 404):
            raise _no_hub(str(name), error) from error
        reason = f"the Hub has no such data set for this account (status {status})"
        hint = f"{_CHECK_ID}; for a private or gated one log in with `hf auth login`"
        raise SettingsError(Fault(str(name), reason, hint)) from error
    except Exception as error:  # the HTTP library, and with it the kinds of a failed connection, differ by version
        raise _no_hub(str(name), error) from error
    if revision is None:
        raise _no_hub(str(name), ValueError("no revision in its answer"))
    return revision


def _no_hub(what: str, error: Exception) -> UnavailableError:
    hint = "Check the network, or give --dataset-file with a copy of the data"
    return UnavailableError(Fault(what, f"the Hub cannot be reached ({_first_line(error)})", hint))


@lru_cache(maxsize=4)
def _open(name: HubName, revision: str) -> tuple[Any, str, tuple[str, ...]]:
    """The data set as a stream of rows, its fingerprint, and its splits."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError

    path = os.path.abspath(name.id) if not revision else name.id
    try:
        builder = load_dataset_builder(path, name.config, revision=revision or None)
    except _network_errors() as error:
        raise _no_hub(str(name), error) from error
    except (DatasetsError, ValueError, OSError) as error:
        reason = f"this data set cannot be opened ({_first_line(error)})"
        raise SettingsError(Fault(str(name), reason, _config_hint(str(error)))) from error
    splits = tuple(sorted(str(split) for split in builder.config.data_files or ()))
    try:
        return builder.as_streaming_dataset(split=name.split), revision or builder.hash, splits
    except ValueError as error:
        if name.split in splits:
            reason = f"it cannot be read ({_first_line(error)})"
            raise DataError(Fault(str(name), reason, "Correct the data set")) from error
        raise missing_split(str(name._replace(split=None)), str(name.split), splits) from error


def _network_errors() -> tuple[type[Exception], ...]:
    """What an interrupted connection raises. The library below differs from version to version; the Hub's own error is
    a kind of that library's."""
    from huggingface_hub.errors import HfHubHTTPError

    below = tuple(kind for kind in HfHubHTTPError.__bases__ if kind is not OSError and issubclass(kind, Exception))
    return (ConnectionError, TimeoutError, *below)


def _config_hint(message: str) -> str:
    if "onfig" in message:
        return "Name one of its configurations with --dataset-config"
    return "Check the id; a folder must have the structure of a data set of the Hub"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".") or type(error).__name__
