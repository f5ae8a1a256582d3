"""Files in the cloud (s3://, gs://, az://), through pyarrow, or through fsspec where pyarrow has no such file system.

A missing file is an error of the data. Errors of the network or the account raise UnavailableError and end reading, so
that no rows are lost silently.

Credentials come from the environment, as for each cloud's own tools. Another server: AWS_ENDPOINT_URL_S3 or
AWS_ENDPOINT_URL for S3, STORAGE_EMULATOR_HOST for Google. Azure needs AZURE_STORAGE_ACCOUNT_NAME, and
AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from functools import lru_cache
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from hrm_ray.data.file_systems import Entry, FileSystem, split_pattern
from hrm_ray.errors import Fault, SettingsError, UnavailableError

_BUFFER_BYTES = 4 << 20
_CONNECT_S, _REQUEST_S, _RETRY_S = 10, 30, 10
_ATTEMPTS = 3
_ENVIRONMENT = (
    *("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "STORAGE_EMULATOR_HOST"),
    *("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"),
)
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}


def cloud_of(address: str) -> FileSystem:
    """The file system of a cloud address. Raises SettingsError for one without a bucket, UnavailableError where a
    library or an account is missing."""
    scheme, _, path = address.partition("://")
    bucket = path.partition("/")[0]
    if not bucket:
        raise SettingsError(Fault(address, "the address has no bucket", f"Write {scheme}://BUCKET/KEY"))
    try:
        return _Cloud(scheme, _file_system(scheme, bucket, tuple(os.environ.get(name) for name in _ENVIRONMENT)))
    except OSError as error:
        raise _unreachable(address, error) from error


class _Cloud:
    """A FileSystem on top of a pyarrow file system, whose paths are addresses without the scheme."""

    def __init__(self, scheme: str, files: Any) -> None:
        self._prefix, self._files = f"{scheme}://", files

    def file(self, address: str) -> Entry | None:
        path = self._path(address)
        found = self._info(address)
        return self._entry(found, path.rpartition("/")[2]) if found.is_file else None

    def is_folder(self, address: str) -> bool:
        from pyarrow.fs import FileType

        return bool(self._info(address).type == FileType.Directory)

    def walk(self, address: str) -> Iterator[Entry]:
        from pyarrow.fs import FileSelector

        root = self._path(address)
        try:
            found = self._files.get_file_info(FileSelector(root, recursive=True, allow_not_found=True))
        except OSError as error:
            raise _unreachable(address, error) from error
        for each in found:
            if each.is_file:
                yield self._entry(each, each.path.lstrip("/")[len(root) :].lstrip("/"))

    def matching(self, pattern: str) -> Iterator[Entry]:
        root, rest = split_pattern(pattern)
        wanted = _regex(rest)
        for entry in self.walk(root):
            if wanted.fullmatch(entry.name):
                yield entry

    def open(self, address: str) -> BinaryIO:
        try:
            file = self._files.open_input_file(self._path(address))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _unreachable(address, error) from error
        raw = _Remote(file, address)
        return cast(BinaryIO, io.BufferedReader(raw, max(io.DEFAULT_BUFFER_SIZE, min(_BUFFER_BYTES, file.size()))))

    def _info(self, address: str) -> Any:
        try:
            return self._files.get_file_info(self._path(address))
        except OSError as error:
            raise _unreachable(address, error) from error

    def _entry(self, found: Any, name: str) -> Entry:
        return Entry(name, self._prefix + found.path.lstrip("/"), found.size or 0, str(found.mtime_ns or ""))

    def _path(self, address: str) -> str:
        return address[len(self._prefix) :].rstrip("/")


class _Remote(io.RawIOBase):
    """A pyarrow file as a Python raw stream."""

    def __init__(self, file: Any, address: str) -> None:
        super().__init__()
        self._file, self._address = file, address

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            length: int = self._file.readinto(buffer)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _unreachable(self._address, error) from error
        return length

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position: int = self._file.seek(offset, whence)
        return position

    def tell(self) -> int:
        position: int = self._file.tell()
        return position

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _unreachable(address: str, error: OSError) -> UnavailableError:
    message = str(error).strip().rstrip(".").partition("\n")[0]
    hint = "Check the address, the credentials in the environment, and the network"
    return UnavailableError(Fault(address, f"it cannot be read from the cloud ({message})", hint))


@lru_cache(maxsize=8)
def _file_system(scheme: str, bucket: str, environment: tuple[str | None, ...]) -> Any:
    """The file system of a bucket. `environment` holds the values of _ENVIRONMENT, as part of the cache's key."""
    variables = dict(zip(_ENVIRONMENT, environment, strict=True))
    try:
        if scheme == "s3":
            return _s3(bucket, variables)
        return _google(variables) if scheme == "gs" else _azure(variables)
    except ImportError:
        return _through_fsspec(scheme)


def _s3(bucket: str, variables: dict[str, str | None]) -> Any:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

    endpoint = variables["AWS_ENDPOINT_URL_S3"] or variables["AWS_ENDPOINT_URL"]
    region = variables["AWS_REGION"] or variables["AWS_DEFAULT_REGION"]
    server: dict[str, str] = {}
    if endpoint:
        address = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        server = {"endpoint_override": address.netloc, "scheme": address.scheme}
    elif not region:
        region = resolve_s3_region(bucket)
    return S3FileSystem(
        region=region or "us-east-1",
        connect_timeout=_CONNECT_S,
        request_timeout=_REQUEST_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        **server,
    )


def _google(variables: dict[str, str | None]) -> Any:
    from pyarrow.fs import GcsFileSystem

    endpoint = variables["STORAGE_EMULATOR_HOST"]
    limit = timedelta(seconds=_RETRY_S)
    if not endpoint:
        return GcsFileSystem(retry_time_limit=limit)
    address = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
    return GcsFileSystem(
        anonymous=True, endpoint_override=address.netloc, scheme=address.scheme, retry_time_limit=limit
    )


def _azure(variables: dict[str, str | None]) -> Any:
    from pyarrow.fs import AzureFileSystem

    account = variables["AZURE_STORAGE_ACCOUNT_NAME"]
    if not account:
        reason = "an az:// address needs the name of the storage account"
        raise UnavailableError(Fault("AZURE_STORAGE_ACCOUNT_NAME", reason, "Set it in the environment"))
    key, token = variables["AZURE_STORAGE_ACCOUNT_KEY"], variables["AZURE_STORAGE_SAS_TOKEN"]
    # Only what is given: older versions of pyarrow know no token.
    return AzureFileSystem(account, **({"account_key": key} if key else {"sas_token": token} if token else {}))


def _through_fsspec(scheme: str) -> Any:
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    try:
        import fsspec

        return PyFileSystem(FSSpecHandler(fsspec.filesystem(scheme)))
    except ImportError as error:
        reason = f"this build of pyarrow has no file system for {scheme}://, and {_PACKAGES[scheme]} is not installed"
        raise UnavailableError(Fault(f"{scheme}://", reason, f"pip install {_PACKAGES[scheme]}")) from error


def _regex(pattern: str) -> re.Pattern[str]:
    """A pattern as the glob module reads it: `*` and `?` stay within a folder, `**` goes through any number of them."""
    made = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern, re.DOTALL):
        if token in ("**/", "**"):
            made += "(?:[^/]+/)*" if token == "**/" else ".*"
        elif token in ("*", "?"):
            made += "[^/]*" if token == "*" else "[^/]"
        elif token.startswith("[") and len(token) > 1:
            inside = re.sub(r"[\\\[&~|]", r"\\\g<0>", token[1:-1])
            made += f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"
        else:
            made += re.escape(token)
    return re.compile(made)
