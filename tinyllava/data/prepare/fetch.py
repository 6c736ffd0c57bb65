"""Getting one part of a dataset: from a URL or from the Hub, on from where a broken download stopped.

What was fetched is checked before it takes its place: the size against what the server said, the content against the
checksum that is known (of the Hub's files always), and each file of a zip against the zip's own.
"""

import hashlib
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, track

from tinyllava.console import messages
from tinyllava.data.prepare import Part
from tinyllava.errors import UserError

CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte
TRIES = 5  # in a row without a new byte
BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
AGAIN = "Run this again, and it goes on from there."
ASIDE = ".downloads"  # under the root: zips, until they are unpacked


class NotFetched(UserError):
    """One part could not be had; what else is asked for still can."""


class Unreachable(NotFetched):
    """No connection at all: nothing else can be had from there either."""


def fetch(part: Part, root: Path) -> None:
    """Fetch a part that has a `url` or a `hub`, and unpack it where it is a zip."""
    name = part.file or part.url.rpartition("/")[2]
    target = root / part.path
    if not name.endswith(".zip"):
        _get(part, target, root / part.path.removesuffix(name))
        return
    aside = root / ASIDE / part.path.strip("/").replace("/", "-")
    archive = aside / name
    if not archive.exists():
        _get(part, archive, aside)
    unpack(archive, target if part.is_folder else target.parent)
    shutil.rmtree(aside)


def _get(part: Part, target: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if part.hub:
        from_hub(part.hub, part.file, folder)
    else:
        download(part.url, target, part.sha256)


def download(url: str, target: Path, sha256: str | None = None) -> None:
    """Fetch one file. What has come of it lies in TARGET.partial until it is whole and its checksum is right.

    Raises NotFetched (Unreachable where no connection can be made at all).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    with _bar() as bar:
        row = bar.add_task(target.name, total=None)
        tries, done = 0, _size(partial)
        while fault := _go_on(url, partial, bar, row):
            before, done = done, _size(partial)
            tries = 1 if done > before else tries + 1
            if not done:
                raise Unreachable(str(getattr(fault, "reason", fault)))
            if tries > TRIES:
                raise NotFetched(f"{url} broke off: {getattr(fault, 'reason', fault)}. {AGAIN}")
            time.sleep(2**tries / 4)
    if sha256 is not None and (found := sha256_of(partial)) != sha256:
        partial.unlink()
        raise NotFetched(
            f"{url}: its SHA-256 is {found}, expected {sha256}: damaged on the way, or changed by its publisher. "
            "It was removed; run this again."
        )
    os.replace(partial, target)


def _go_on(url: str, partial: Path, bar: Progress, row: int) -> Exception | None:
    """Append to `partial` what the server still has of the file; what broke it off, or None when all of it is there."""
    done = _size(partial)
    request = urllib.request.Request(url, headers={"User-Agent": "tinyllava", "Range": f"bytes={done}-"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response, partial.open("ab") as file:
            if response.status != 206:  # a server that knows no ranges begins anew
                done = 0
                file.truncate(0)
            length = response.headers.get("Content-Length")
            total = done + int(length) if length is not None else None
            need_room(partial.parent, (total or done) - done, url)
            bar.update(row, total=total, completed=done)
            while chunk := response.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                bar.update(row, completed=done)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # there is nothing beyond what is here
            return None
        raise NotFetched(f"{url}: the server says {error.code} {error.reason}.") from None
    except BROKEN as error:
        return error
    return None if total in (None, done) else ConnectionError("it ended too early")


def from_hub(repository: str, pattern: str, folder: Path) -> None:
    """Fetch the files of a Hub dataset that fit `pattern` into `folder`, at their paths, and verify their checksums."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import DryRunError, HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    where = {"repo_type": "dataset", "local_dir": folder}
    try:
        files = snapshot_download(repository, allow_patterns=pattern, dry_run=True, **where)
        if not files:
            raise NotFetched(f"dataset {repository} on the Hub has no {pattern} any more.")
        need_room(folder, sum(file.file_size or 0 for file in files if file.will_download), repository)
        snapshot_download(repository, allow_patterns=pattern, **where)
        verified = HfApi().verify_repo_checksums(repository, **where)
    except (DryRunError, OfflineModeIsEnabled) as error:
        cause = error.__cause__ or error
        if isinstance(cause, HfHubHTTPError):
            raise _refused(repository, cause) from None
        raise Unreachable(_first_line(cause)) from None
    except (HTTPError, OSError) as error:  # HTTPError: of the HTTP library, whichever version the client is built on
        if getattr(error, "errno", None) is not None:  # the disk, not the Hub
            raise
        raise _refused(repository, error) from None
    if verified.mismatches:
        for mismatch in verified.mismatches:
            (folder / mismatch["path"]).unlink()
        names = ", ".join(mismatch["path"] for mismatch in verified.mismatches)
        raise NotFetched(f"{names} of {repository} had a wrong checksum. Removed; run this again.")


def _refused(repository: str, error: Exception) -> NotFetched:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    if isinstance(error, GatedRepoError):
        page = f"https://huggingface.co/datasets/{repository}"
        return NotFetched(f"{repository} asks for your consent: give it on {page}, and log in with `hf auth login`.")
    again = "" if isinstance(error, HfHubHTTPError) else f" {AGAIN}"
    return NotFetched(f"dataset {repository} on the Hub: {type(error).__name__}, {_first_line(error)}{again}")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip into `folder`, which the zip may or may not name; the folder appears when all of it is there."""
    aside = folder.with_name(f".{folder.name}.partial")
    aside.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as file:
            members = [member for member in file.infolist() if not member.is_dir()]
            left = [member for member in members if _size(aside / member.filename) != member.file_size]
            need_room(folder.parent, sum(member.file_size for member in left), archive)
            shown = {"console": messages, "transient": True, "disable": not messages.is_terminal}
            for member in track(left, f"Unpacking {archive.name}", **shown):
                file.extract(member, aside)
    except zipfile.BadZipFile as error:
        archive.unlink()
        raise NotFetched(f"{archive} is damaged ({error}). It was removed; run this again.") from None
    top = aside / folder.name if [path.name for path in aside.iterdir()] == [folder.name] else aside
    if folder.is_dir():  # other parts lie there already
        shutil.copytree(top, folder, copy_function=os.replace, dirs_exist_ok=True)
    else:
        os.replace(top, folder)
    shutil.rmtree(aside, ignore_errors=True)


def need_room(folder: Path, size: int, what: object) -> None:
    """Raise NotFetched unless `size` bytes are free where `folder` is."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise NotFetched(f"{what} needs {size / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free in {place}.")


def sha256_of(path: Path) -> str:
    """In hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal)
