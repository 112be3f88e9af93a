"""Files from the Hugging Face Hub: pinned to a commit, cached, and every refusal explained in one line.

Takes a `HubRef` (repository, revision, subfolder); returns paths inside the Hub's own cache. Knows nothing of what the
files hold. A connection that drops is resumed where it stopped, a file that arrived whole is never fetched again, and
`HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HOME` mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from solution.errors import WeightsError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_REFERENCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^:@]+))?(:(?P<subfolder>[^:@]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubRef:
    """A place on the Hub: `owner/name`, a branch, tag or commit, and a folder inside (empty: the root)."""

    repo: str
    revision: str = "main"
    subfolder: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"hf:{self.repo}{revision}{self.subfolder and ':' + self.subfolder}"

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return _COMMIT.fullmatch(self.revision) is not None


def parse_ref(text: str) -> HubRef:
    """`[hf:]owner/name[@revision][:subfolder]` as a `HubRef`.

    Raises:
        WeightsError: the text has another form.
    """
    match = _REFERENCE.fullmatch(text.removeprefix("hf:"))
    if match is None:
        raise WeightsError(f"{text!r} is no place on the Hub; expected hf:owner/name[@revision][:subfolder]")
    return HubRef(
        match["repo"],
        match["revision"] or "main",
        (match["subfolder"] or "").strip("/"),
    )


def fetch(ref: HubRef, filename: str, *, offline: bool = False, force: bool = False) -> Path:
    """The path of one file in the Hub's cache, downloaded if it is not there (with huggingface_hub's progress bar).

    offline: look into the cache only. force: download again even if it is there.

    Raises:
        WeightsError: no such repository, revision or file, no permission, no network; with what to do.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError  # httpx's, by whatever name

    if force and (stale := cached(ref, filename)):
        stale.unlink()  # huggingface_hub leaves a link to another blob as it is
    try:
        path = hf_hub_download(
            ref.repo,
            filename,
            subfolder=ref.subfolder or None,
            revision=ref.revision,
            local_files_only=offline,
            force_download=force,
        )
    except (HTTPError, OSError, ValueError) as error:
        raise WeightsError(explain(error, ref, filename, offline=offline)) from error
    return Path(path)


def fetch_first(ref: HubRef, filenames: tuple[str, ...], *, offline: bool = False) -> Path:
    """The first of `filenames` that the repository has.

    Raises:
        WeightsError: it has none of them, or cannot be reached.
    """
    from huggingface_hub.errors import RemoteEntryNotFoundError

    found = [path for name in filenames if (path := cached(ref, name))]
    if found:
        return found[0]
    for name in filenames[:-1]:
        try:
            return fetch(ref, name, offline=offline)
        except WeightsError as error:
            if not isinstance(error.__cause__, RemoteEntryNotFoundError):
                raise
    return fetch(ref, filenames[-1], offline=offline)


def cached(ref: HubRef, filename: str) -> Path | None:
    """The file's path if the cache has it, without any network; None if not."""
    from huggingface_hub import try_to_load_from_cache

    inside = f"{ref.subfolder}/{filename}" if ref.subfolder else filename
    path = try_to_load_from_cache(ref.repo, inside, revision=ref.revision)
    return Path(path) if isinstance(path, str) else None


def pin(ref: HubRef, path: Path) -> HubRef:
    """`ref` with the commit that the cached file `path` belongs to: later fetches cannot see another version."""
    parts = path.parts
    last = len(parts) - 1 - parts[::-1].index("snapshots")
    return replace(ref, revision=parts[last + 1])


def explain(error: Exception, ref: HubRef, filename: str, *, offline: bool = False) -> str:
    """One line: what could not be fetched, why, and what to do."""
    from huggingface_hub import constants, errors

    where = f"{ref.repo}@{ref.revision}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{where} is gated: accept its terms at {constants.ENDPOINT}/{ref.repo}, "
            "then `hf auth login` (or set HF_TOKEN) and try again"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{where}: no such repository on {constants.ENDPOINT}, or it is private: check owner/name; "
            "for a private one, `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{ref.repo} has no revision {ref.revision!r}: check the branch, tag or commit after the @"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        inside = f"{ref.subfolder}/{filename}" if ref.subfolder else filename
        return f"{where} has no file {inside}: check the repository, its revision and subfolder"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if offline or constants.HF_HUB_OFFLINE:
            why = "no network may be used" if offline else "HF_HUB_OFFLINE is set"
            return (
                f"{filename} of {where} is not in the cache {constants.HF_HUB_CACHE} and {why}: fetch it once where "
                "there is a network (python -m solution.weights pull ...), or point HF_HOME at a cache that has it"
            )
        return (
            f"{constants.ENDPOINT} cannot be reached for {filename} of {where}, and the cache "
            f"{constants.HF_HUB_CACHE} does not have it: check network and proxy, then try again"
        )
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{filename} of {where} could not be fetched ({reason}); try again: what arrived whole is kept"


@contextlib.contextmanager
def uploading(repository: str) -> Iterator[HfApi]:
    """The Hub's interface to write to `owner/name` with; its refusal in one line.

    Raises:
        WeightsError: the Hub's refusal.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        yield HfApi()
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"{repository}: not uploaded ({reason}); log in with a token that may write (hf auth login) and try again"
        ) from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file whose SHA-256 is not `expected`.

    Raises:
        WeightsError: naming the file, both hashes, and what to do.
    """
    found = sha256(path)
    if found != expected:
        raise WeightsError(
            f"{path}: SHA-256 is {found}, expected {expected}; the file was changed or is damaged: fetch it "
            "again (python -m solution.weights pull --force ...) or restore it"
        )
