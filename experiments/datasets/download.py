"""Download a file once: say what and how large, resume when broken off, verify, keep its sha256."""

import functools
import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

from experiments.common.errors import InputError, naming_full_disk

_BLOCK = 1 << 20
_TIMEOUT = 60  # seconds without a byte
_BROKEN = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


class Remote(NamedTuple):
    """A file to download; size, git blob SHA-1 and SHA-256 are checked where they are known."""

    url: str
    size: int | None = None
    git_blob: str | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def differs(self, path: Path) -> bool:
        """Whether a file is not the published one."""
        return (
            (self.size is not None and path.stat().st_size != self.size)
            or (self.git_blob is not None and git_blob(path) != self.git_blob)
            or (self.sha256 is not None and sha256(path) != self.sha256)
        )


def fetch(remote: Remote, folder: Path, attempts: int = 5, pause: float = 2.0) -> Path:
    """The file in ``folder``: verified if it is there already, else downloaded.

    What has arrived is kept in ``NAME.part``; after a broken connection, and in a later run, the
    download goes on from there. ``NAME.sha256`` (as sha256sum writes it) lies beside the result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / remote.name
    if target.exists():
        _verify_kept(target, remote)
        return target
    part = folder / f"{remote.name}.part"
    with naming_full_disk(part):
        _download(remote, part, attempts, pause)
        _verify_new(part, remote)
        _sidecar(target).write_text(f"{sha256(part)}  {target.name}\n")
    part.rename(target)
    _tag_file(part).unlink(missing_ok=True)
    return target


def unpack(archive: Path, top: str) -> Path:
    """Unpack a tar archive beside it; returns its folder ``top``, which appears only when whole."""
    target = archive.parent / top
    if target.exists():
        return target
    print(f"unpacking {archive} to {target}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="incomplete-", dir=archive.parent) as scratch:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise InputError(
                f"{archive} cannot be unpacked ({error}): check the free space, "
                "or delete it and download it again"
            ) from error
        if not (Path(scratch) / top).is_dir():
            raise InputError(f"{archive} holds no folder {top}: delete it and download it again")
        (Path(scratch) / top).rename(target)
    return target


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob(path: Path) -> str:
    """The SHA-1 that git gives the file: of "blob SIZE\\0" and the bytes."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        for block in iter(functools.partial(file.read, _BLOCK), b""):
            digest.update(block)
    return digest.hexdigest()


def _download(remote: Remote, part: Path, attempts: int, pause: float) -> None:
    """Fill ``part``, going on after broken connections."""
    problem = "the connection broke"
    for attempt in range(attempts):
        if attempt:
            print(f"{problem}; trying again", file=sys.stderr)
            time.sleep(pause * attempt)
        try:
            if _transfer(remote, part):
                return
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing follows what we have
                if error.headers.get("Content-Range") == f"bytes */{part.stat().st_size}":
                    return
                part.unlink()
            elif error.code < 500:
                raise InputError(f"cannot download {remote.url}: {error}") from error
            problem = str(error)
        except _BROKEN as error:
            problem = str(error)
    have = part.stat().st_size if part.exists() else 0
    raise InputError(
        f"cannot download {remote.url} ({problem}; tried {attempts} times, have {_human(have)}): "
        f"run again to go on from there, or get the file yourself and put it in {part.parent}"
    )


def _transfer(remote: Remote, part: Path) -> bool:
    """One connection; True if ``part`` is then as long as the server says it should be."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(remote.url)
    if have:
        request.add_header("Range", f"bytes={have}-")
        if _tag_file(part).exists():  # without it the server might have changed the file
            request.add_header("If-Range", _tag_file(part).read_text())
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        if response.status != 206:
            have = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise InputError(f"{remote.url}: the server sent another range than asked for")
        length = response.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        _announce(remote, part, have, total)
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if tag:
            _tag_file(part).write_text(tag)
        _receive(response, part, have, total)
    return total is None or part.stat().st_size == total


def _announce(remote: Remote, part: Path, have: int, total: int | None) -> None:
    """Say what is about to happen; refuse what cannot end well."""
    size = "size unknown" if total is None else _human(total)
    start = f", going on at {_human(have)}" if have else ""
    print(f"downloading {remote.url} ({size}) to {part.parent}{start}", file=sys.stderr)
    if None not in (total, remote.size) and total != remote.size:
        raise InputError(
            f"{remote.url} has {total} bytes, expected {remote.size}: the source has changed"
        )
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - have > free:
        raise InputError(f"{part.parent} has {_human(free)} free, {_human(total - have)} needed")


def _receive(response: http.client.HTTPResponse, part: Path, have: int, total: int | None) -> None:
    watched = sys.stderr.isatty()
    with part.open("ab" if have else "wb") as file:
        while block := response.read(_BLOCK):
            file.write(block)
            have += len(block)
            if watched and total:
                print(f"\r{_human(have)} ({100 * have // total} %)", end="", file=sys.stderr)
        os.fsync(file.fileno())
    if watched and total:
        print(file=sys.stderr)


def _verify_new(part: Path, remote: Remote) -> None:
    if remote.differs(part):
        part.unlink()
        _tag_file(part).unlink(missing_ok=True)
        raise InputError(
            f"{remote.url}: what arrived is not the published file (its checksum or size differs); "
            "it was deleted: try again, and if it repeats the source has changed"
        )


def _verify_kept(target: Path, remote: Remote) -> None:
    recorded = _sidecar(target)
    if recorded.exists():
        same = recorded.read_text().split()[:1] == [sha256(target)]
    else:
        same = not remote.differs(target)
    if not same:
        raise InputError(
            f"{target} does not match its checksum: it is damaged or was changed; "
            f"delete it to download it again, or load its folder without downloading"
        )


def _sidecar(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _tag_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _human(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
