"""Checkpoints at gs:// and s3://, of which orbax knows the first only.

Nothing is renamed there: orbax writes a checkpoint in its place, and the file COMMITTED last. Four private names of
orbax decide which addresses are such, and how tensorstore reaches them; here they are replaced by ones that know s3://.
"""

import os
from pathlib import Path
from typing import Any

import tensorstore

from gpt_jax.errors import UserError
from gpt_jax.storage.remote import AnyPath, RemotePath

COMMITTED = "commit_success.txt"
"""The file of a whole checkpoint, and of each of its items."""

PREFIXES = ("gs://", "s3://")


def orbax_path(folder: AnyPath) -> str:
    """The name of a folder for orbax. Raises UserError for an address that it cannot write to."""
    if isinstance(folder, Path):
        return str(folder.absolute())
    if not folder.url.startswith(PREFIXES):
        raise UserError(f"{folder}: checkpoints can be at {' and '.join(PREFIXES)} and in local folders only")
    import fsspec
    from orbax.checkpoint._src.path import gcs_utils  # Here, so that local runs do not need what is private.
    from orbax.checkpoint._src.serialization import tensorstore_utils

    for scheme in ("s3", "gs"):  # Others write there, too, such as tensorstore.
        fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    gcs_utils._GCS_PATH_PREFIX = PREFIXES
    gcs_utils.get_kvstore_for_gcs = lambda path: kvstore(RemotePath(path))
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(PREFIXES)
    tensorstore_utils._normalize_path = normalized
    return str(folder)


def check_reachable(folder: RemotePath) -> None:
    """Raises UserError when tensorstore, which looks for credentials by itself, cannot read in a folder."""
    orbax_path(folder)
    try:
        tensorstore.KvStore.open(kvstore(folder)).result().read(COMMITTED).result()
    except (ValueError, OSError, RuntimeError) as e:
        cause = " ".join(str(e).split())[:200]
        raise UserError(f"{folder} cannot be reached by tensorstore, which writes the checkpoints ({cause})") from e


def normalized(path: str) -> str:
    """A path or address without a slash at its end, or two in its middle."""
    scheme, separator, rest = path.rpartition("://")
    return scheme + separator + os.path.normpath(rest)


def kvstore(folder: AnyPath) -> dict[str, Any]:
    """tensorstore's specification of the files in a folder. Raises UserError."""
    if isinstance(folder, Path):
        return {"driver": "file", "path": f"{folder.absolute()}/"}
    bucket, _, path = folder.url.partition("://")[2].partition("/")
    place: dict[str, Any] = {"bucket": bucket, "path": f"{path.rstrip('/')}/"}
    if folder.scheme == "gs":
        return {"driver": os.environ.get("TENSORSTORE_GCS_BACKEND", "gcs"), **place}
    # tensorstore finds Amazon's servers and the credentials as s3fs does, but no other servers.
    client = folder.request("reached", lambda fs, name: fs.connect())
    if not client.meta.endpoint_url.endswith(".amazonaws.com"):
        place |= {"endpoint": client.meta.endpoint_url, "aws_region": client.meta.region_name or "us-east-1"}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        place["aws_credentials"] = {"type": "environment"}  # The default complains if there is no ~/.aws/config.
    return {"driver": "s3", **place}
