"""A folder that was written here, to the hub: whole, as it was written, and nothing else. Nothing else here uses the
network, but for hub ids that a recipe names."""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from twinmerge.arguments import strict
from twinmerge.engine.verify import verify
from twinmerge.errors import DamagedFile, DataError, OutputError, ResourceError, TwinmergeError, UsageError, in_one_line
from twinmerge.results import Record
from twinmerge.store.foreign import shown_path
from twinmerge.store.manifest import CHECKSUMS, HUB_FILES, Manifest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

README = "README.md"
NETWORK = ("httpx", "httpcore", "requests", "urllib3")
"""Packages whose errors are of the network, whichever of them a release of huggingface_hub is built on."""


class Pushed(Record):
    """What was sent: repo, revision, private, files, bytes, changed (the card, where somebody edited it), left_out
    (files that are none of ours), url (None of a dry run)."""

    def _summary(self) -> str:
        where = "not sent" if self["url"] is None else f"in {self['url']}"
        return f"{len(self['files'])} files, {self['bytes']} bytes, {where}"


@strict
def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> Pushed:
    """Send a folder that was written here to a repository of the hub, which is made where there is none.

    Every file is compared with its checksum first. What is sent is what was written, with the manifest, so that
    `twinmerge verify` holds for whoever downloads it; the card may have been edited.

    Args:
        folder: of a merge, a twin, an adapter.
        repo: "name" or "organisation/name".
        private: only you, or the organisation, see it.
        revision: a branch, which is made where there is none; the main one where None.
        message: of the commit.
        overwrite: take the place of what is in the repository.
        dry_run: send nothing, and ask the hub nothing.
        progress: show how far it is.

    Raises:
        TwinmergeError: a folder that twinmerge did not write, or damage in it; a name that is none; no login, no
            network; a repository that is not empty, or is public where `private` is asked for.
    """
    found = sending(folder, repo, private, revision, message, overwrite, progress, login=not dry_run)
    return found.record(None) if dry_run else found.send()


@dataclass(frozen=True)
class Sending:
    """What is going to be sent.

    Attributes:
        folder: where it lies.
        repo, private, revision, message, overwrite: as of `push`.
        sizes: name of a file -> its bytes.
        changed: those that somebody edited, which may be the card.
        left_out: files of the folder that were not written here.
    """

    folder: Path
    repo: str
    private: bool
    revision: str | None
    message: str | None
    overwrite: bool
    sizes: dict[str, int]
    changed: list[str]
    left_out: list[str]

    def record(self, url: str | None) -> Pushed:
        """The same as plain data."""
        return Pushed(
            repo=self.repo,
            revision=self.revision,
            private=self.private,
            files=list(self.sizes),
            bytes=sum(self.sizes.values()),
            changed=self.changed,
            left_out=self.left_out,
            url=url,
        )

    def send(self) -> Pushed:
        """Send it.

        Raises:
            TwinmergeError: as `push`.
        """
        from huggingface_hub import HfApi

        api = HfApi()
        try:
            made = api.create_repo(self.repo, private=self.private or None, exist_ok=True)
            repo = made.repo_id  # with whose it is
            if self.private and not api.model_info(repo).private:
                raise UsageError(
                    f"{self.repo} is there already, and everybody can read it. Make it private in its settings, or name "
                    "another one."
                )
            if self.revision is not None:
                api.create_branch(repo, branch=self.revision, exist_ok=True)
            there = self._there(api, repo)
            if there and not self.overwrite:
                raise OutputError(
                    f"{self.repo} is not empty: it holds {there[0]!r}{' and more' if there[1:] else ''}. Add --overwrite "
                    "to take its place, or name another one."
                )
            api.upload_folder(
                repo_id=repo,
                folder_path=self.folder,
                revision=self.revision,
                commit_message=self.message or f"Upload {self.folder.absolute().name} with twinmerge",
                allow_patterns=[glob.escape(name) for name in self.sizes],
                delete_patterns=["*"] if there else None,
            )
            if {*self._there(api, repo)} != {*self.sizes}:
                raise ResourceError(
                    f"{self.repo} does not hold what was sent. Run the same command with --overwrite, which sends all "
                    "of it again."
                )
        except TwinmergeError:
            raise
        except Exception as error:  # of a library over a network, which has many
            raise self._failed(error) from error
        return self.record(str(made))

    def _there(self, api: HfApi, repo: str) -> list[str]:
        """The files of the repository, without what the hub adds itself."""
        found = api.list_repo_files(repo, revision=self.revision)
        return sorted(name for name in found if name not in HUB_FILES)

    def _failed(self, error: Exception) -> TwinmergeError:
        """What went wrong at the hub, and what to do."""
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        if isinstance(error, OfflineModeIsEnabled):
            return ResourceError("HF_HUB_OFFLINE is set, so nothing is sent. Unset it, and run again.")
        if isinstance(error, HfHubHTTPError):
            status = getattr(error.response, "status_code", None)
            if status == 401:
                return ResourceError(f"The hub does not take the token that you have. {LOG_IN}")
            if status in (403, 404):
                return UsageError(
                    f"You may not write to {self.repo} ({status}). Check its name, and that the token may write there."
                )
            return ResourceError(f"The hub refused it: {in_one_line(error)}. {AGAIN}")
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0].rstrip("2") in NETWORK:
            return ResourceError(f"The hub cannot be reached: {in_one_line(error)}. Check the network. {AGAIN}")
        return ResourceError(f"It could not be sent: {in_one_line(error)}. {AGAIN}")


LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
AGAIN = "Run the command again, with --overwrite if a part was sent already."


def sending(
    folder: str | Path,
    repo: str,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    login: bool = True,
) -> Sending:
    """Look at a folder, and say what of it is going to be sent.

    Args:
        folder, repo, private, revision, message, overwrite, progress: as of `push`.
        login: refuse where there is no token, before anything is read.

    Raises:
        TwinmergeError: as `push`, but for what only the hub knows.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    folder = Path(folder)
    if not os.path.isdir(folder):
        raise DataError(f"{shown_path(folder)} is no folder. Name one that twinmerge wrote.")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(
            f"{repo!r:.100} is no name of a repository. Write name or organisation/name, of letters, digits, '-', '_' "
            "and '.'."
        ) from error
    if login and get_token() is None:
        raise ResourceError(f"Nobody is logged in to the hub here. {LOG_IN}")
    manifest = Manifest.of(folder)
    if manifest is None:
        raise DataError(
            f"{shown_path(folder)} has no {CHECKSUMS}, so twinmerge did not write it, or not whole. Name another."
        )
    found = verify(folder, inputs=False, progress=progress)
    left_out = manifest.strange()
    bad = {name: what for name, what in found.files.items() if name not in left_out}
    changed = [README] if README in bad and (folder / README).is_file() else []
    wrong = [f"{name} {what}" for name, what in bad.items() if name not in changed]
    wrong += [f"tensor {names[0]!r} of {of} changed" for of, names in {**found.changed, **found.missing}.items()]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
        raise DamagedFile(
            f"{shown_path(folder)} is not what was written: {wrong[0]}{more}. Write it again, then push it."
        )
    sizes = {name: (folder / name).stat().st_size for name in [*manifest.files, CHECKSUMS]}
    return Sending(folder, repo, private, revision, message, overwrite, sizes, changed, left_out)
