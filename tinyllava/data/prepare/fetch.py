"""Download one item of a dataset, from a URL or from the Hub. A broken download resumes where it stopped.

A file gets its name only after it is checked: its size against what the server announced, its content against the
checksum (always known for files of the Hub), and each file of a zip against the zip's own checksum.

Hub files are downloaded by huggingface_hub. Files from URLs can have 20 GB and no checksum, and some servers break the
connection. So an incomplete file stays in NAME.partial until the next run, while general-purpose download libraries
would delete it.
"""

import hashlib
import http.client
import lzma
import os
import re
import shutil
import ssl
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, track

from tinyllava.console import messages
from tinyllava.data.prepare import Item
from tinyllava.errors import UserError

CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte
ATTEMPTS = 5  # without a new byte, one after another
# HTTPException: a broken chunked transfer. SSLError: a connection cut inside an encrypted record.
BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
RESUME = "Run the command again to resume."
RETRY = "It was deleted. Run the command again."
MEMBERS = 2_000_000  # the largest archive of a dataset that we list has 0.2 million files
RATIO, SMALL = 100, 100_000_000  # unpacked bytes for each packed one (JSON: 20, images: 1), and bytes always allowed
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError)
ARCHIVES = ".downloads"  # under the root: zips, until they are unpacked


class DownloadError(UserError):
    """One item could not be downloaded. Other items still can."""


class Unreachable(DownloadError):
    """No connection to the server: no other item can be downloaded from it either."""


def fetch_item(item: Item, root: Path) -> None:
    """Download an item that has a `url` or a `hub`, and unpack it if it is a zip. Raises DownloadError."""
    name = item.file or item.url.rpartition("/")[2]
    target = root / item.path
    if not name.endswith(".zip"):
        _download(item, target, root / item.path.removesuffix(name))
        return
    folder = root / ARCHIVES / item.path.strip("/").replace("/", "-")
    archive = folder / name
    if not archive.exists():
        _download(item, archive, folder)
    unpack_zip(archive, target if item.is_folder else target.parent)
    shutil.rmtree(folder)


def _download(item: Item, target: Path, folder: Path) -> None:
    """Download to `target` from a URL, or into `folder` from the Hub, which adds the path inside the repository."""
    folder.mkdir(parents=True, exist_ok=True)
    if item.hub:
        download_from_hub(item.hub, item.file, folder)
    else:
        download_url(item.url, target, item.sha256)


def download_url(url: str, target: Path, sha256: str | None = None) -> None:
    """Download one file. TARGET.partial holds the bytes received until the file is complete and its checksum is right.

    Raises Unreachable if no connection can be made and DownloadError for everything else.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    size = _get_size(partial)
    attempts = 0
    with _build_bar() as bar:
        row = bar.add_task(target.name, total=None)
        while fault := _receive(url, partial, bar, row):
            before, size = size, _get_size(partial)
            attempts = 1 if size > before else attempts + 1
            reason = getattr(fault, "reason", fault)
            if not size:
                raise Unreachable(str(reason))
            if attempts > ATTEMPTS:
                raise DownloadError(f"the download of {url} was interrupted: {reason}. {RESUME}")
            time.sleep(2**attempts / 4)
    if sha256 is not None and (actual := hash_file(partial)) != sha256:
        partial.unlink()
        raise DownloadError(f"{url} has SHA-256 {actual}, expected {sha256}: damaged, or a new version. {RETRY}")
    partial.replace(target)


def _receive(url: str, partial: Path, bar: Progress, row: TaskID) -> Exception | None:
    """Append the rest of the file to `partial`. Return what interrupted it, or None if the file is complete."""
    done = _get_size(partial)
    request = urllib.request.Request(url, headers={"User-Agent": "tinyllava", "Range": f"bytes={done}-"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response, partial.open("ab") as file:
            if response.status != 206:  # a server without support for ranges sends the whole file
                done = 0
                file.truncate(0)
            length = response.headers.get("Content-Length")
            total = done + int(length) if length is not None else None
            check_disk_space(partial.parent, int(length or 0), url)
            bar.update(row, total=total, completed=done)
            while chunk := response.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                bar.update(row, completed=done)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing follows the bytes that are here: the file is complete
            return None
        raise DownloadError(f"{url}: the server answered {error.code} {error.reason}.") from None
    except BROKEN as error:
        return error
    return None if total in (None, done) else ConnectionError("the connection was closed too early")


def download_from_hub(repository: str, pattern: str, folder: Path) -> None:
    """Download the files of a Hub dataset that match `pattern` into `folder`, and verify their checksums.

    Raises Unreachable if there is no connection to the Hub and DownloadError for everything else.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import DryRunError, HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    where = {"repo_type": "dataset", "local_dir": folder}
    try:
        files = snapshot_download(repository, allow_patterns=pattern, dry_run=True, **where)
        if not files:
            raise DownloadError(f"the dataset {repository} on the Hub no longer has {pattern}.")
        check_disk_space(folder, sum(file.file_size or 0 for file in files if file.will_download), repository)
        snapshot_download(repository, allow_patterns=pattern, **where)
        verified = HfApi().verify_repo_checksums(repository, **where)
    except (DryRunError, OfflineModeIsEnabled) as error:
        cause = error.__cause__ or error
        if isinstance(cause, HfHubHTTPError):
            raise _explain_refusal(repository, cause) from None
        raise Unreachable(_get_first_line(cause)) from None
    except (HTTPError, OSError) as error:  # HTTPError: of whichever HTTP library the client is built on
        if getattr(error, "errno", None) is not None:  # an error of the disk, not of the Hub
            raise
        raise _explain_refusal(repository, error) from None
    if verified.mismatches:
        for mismatch in verified.mismatches:
            (folder / mismatch["path"]).unlink()
        names = ", ".join(mismatch["path"] for mismatch in verified.mismatches)
        raise DownloadError(f"wrong checksum: {names} of {repository}. {RETRY}")


def _explain_refusal(repository: str, error: Exception) -> DownloadError:
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    if isinstance(error, GatedRepoError):
        page = f"https://huggingface.co/datasets/{repository}"
        return DownloadError(f"{repository} requires your consent. Give it on {page}, then run `hf auth login`.")
    resume = "" if isinstance(error, HfHubHTTPError) else f" {RESUME}"
    return DownloadError(f"dataset {repository} on the Hub: {type(error).__name__}, {_get_first_line(error)}{resume}")


def unpack_zip(archive: Path, folder: Path) -> None:
    """Unpack a zip into `folder`. It does not matter whether the paths in the zip begin with the folder's name.

    The folder appears when it is complete. Raises DownloadError for a zip that is damaged, which is deleted, or that
    could write elsewhere or fill the disk.
    """
    # Kept after an interruption, unlike the directory of atomic.write_directory: the next run unpacks the rest.
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as file:
            check_members(file, archive)
            members = [member for member in file.infolist() if not member.is_dir()]
            rest = [member for member in members if _get_size(partial / member.filename) != member.file_size]
            check_disk_space(folder.parent, sum(member.file_size for member in rest), archive)
            shown = {"console": messages, "transient": True, "disable": not messages.is_terminal}
            for member in track(rest, f"Unpacking {archive.name}", **shown):
                file.extract(member, partial)
    except DAMAGED as error:
        archive.unlink()
        raise DownloadError(f"{archive} is damaged ({error}). {RETRY}") from None
    top = partial / folder.name if [path.name for path in partial.iterdir()] == [folder.name] else partial
    try:
        if folder.is_dir():  # other items are in it already
            shutil.copytree(top, folder, copy_function=os.replace, dirs_exist_ok=True)
        else:
            top.replace(folder)
    except (shutil.Error, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        text = str(error.args[0][0][2] if isinstance(error, shutil.Error) else error)
        raise DownloadError(f"cannot move the content of {archive} to {folder}: {text}. Move that aside.") from None
    shutil.rmtree(partial, ignore_errors=True)


def check_members(file: zipfile.ZipFile, archive: Path) -> None:
    """Raise DownloadError if a zip could write outside of its folder, or fill the disk, or holds more than files."""
    members, names, folders = file.infolist(), set(), set()
    size = sum(member.file_size for member in members)
    if len(members) > MEMBERS or size > max(SMALL, RATIO * archive.stat().st_size):
        raise DownloadError(
            f"{archive} announces {len(members):,} files with {size / 1e9:.1f} GB: at most {MEMBERS:,} files and"
            f" {RATIO} times its own size are unpacked."
        )
    for member in members:
        path, mode = PurePosixPath(member.filename), member.external_attr >> 16
        fault = None
        if member.flag_bits & 1:
            fault = "is encrypted"
        elif stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            fault = "is a link or a device, not a file"
        elif (
            path.is_absolute() or {"..", ""} & set(path.parts) or re.search(r"[\\\x00-\x1f]|^\w:", member.orig_filename)
        ):
            fault = "names a place outside of the folder"
        elif any(len(os.fsencode(part)) > 255 for part in path.parts):
            fault = "has too long a name"
        if fault:
            name = member.orig_filename[:80].encode("unicode_escape").decode()
            raise DownloadError(f"{archive} is not unpacked: its entry {name} {fault}. Get the data elsewhere.")
        folders |= set(path.parents)
        if not member.is_dir():
            names.add(path)
    if clash := names & folders:
        raise DownloadError(f"{archive} is not unpacked: {min(clash)} is a file and a folder in it.")


def check_disk_space(folder: Path, size: int, what: object) -> None:
    """Raise DownloadError unless `size` bytes are free where `folder` is, or will be."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        required, available = (f"{number / 1e9:.1f} GB" for number in (size, free))
        raise DownloadError(f"{what} requires {required} more, but only {available} are free in {existing}.")


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _get_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _get_first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _build_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal)
