"""Download Taskonomy's archives into ``<directory>/<building>/<folder>/``, as often interrupted as need be."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from merge_ray.errors import DataError
from merge_ray.tasks.scene_sources import BUILDINGS, RGB
from merge_ray.tasks.taskonomy_labels import LAYERS

SERVER = "https://datasets.epfl.ch/taskonomy"
CHUNK = 1 << 20
AT_ONCE = 4
TRIES = 5
SECONDS = 60
"""A server that says nothing for so long is asked again."""
TAR_END = 1024
"""So many zeros end a tar archive; without them, one that was cut between two files looks whole."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Link:
    """One archive, ``.../<building>_<folder>.tar``, and its SHA-256 where it is known."""

    url: str
    sha256: str | None = None

    @property
    def name(self) -> str:
        """The archive's file name."""
        return PurePosixPath(urlsplit(self.url).path).name

    @property
    def place(self) -> PurePosixPath:
        """``<building>/<folder>``; raises :class:`DataError` for a name that does not say them."""
        building, _, folder = self.name.removesuffix(".tar").partition("_")
        if not self.name.endswith(".tar") or not building or not folder:
            raise DataError(f"{self.url}: an archive is called <building>_<folder>.tar")
        return PurePosixPath(building, folder)


def usual_links() -> list[Link]:
    """All that a sweep over the tasks of training-free merging needs: labels to choose and score by, else images."""
    folders = sorted({layer.folder for layer in LAYERS.values()} - {"principal_curvature"})
    scored = (*BUILDINGS["val"], *BUILDINGS["test"])
    labelled = [f"{building}_{folder}" for building in scored for folder in folders]
    return [Link(f"{SERVER}/{name}.tar") for name in (*labelled, *(f"{name}_{RGB}" for name in BUILDINGS["train"]))]


def read_links(path: Path) -> list[Link]:
    """The links in a file: one a line, its SHA-256 behind it where that is known; ``#`` begins a comment.

    Raises :class:`DataError` with the line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    links = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 2 or urlsplit(words[0]).scheme not in ("http", "https"):
            raise DataError(f"{path}, line {number}: expected `URL` or `URL SHA256`; found {line!r}")
        links.append(Link(*words))
    if not links:
        raise DataError(f"{path}: holds no links")
    return links


def fetch(links: Iterable[Link], directory: Path, progress: Progress | None = None) -> list[Path]:
    """Download, verify and unpack archives; returns their directories. What is unpacked already is left alone.

    ``progress(done, total, note)`` counts archives. A download goes on where an earlier one stopped. An archive that is
    damaged is kept aside as ``<name>.damaged`` and fetched once more. Raises :class:`DataError` where a server refuses,
    cannot be reached or has nothing but a damaged archive; the other archives are fetched nevertheless.
    """
    links = list(links)
    places = [directory / link.place for link in links]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = [pool.submit(_fetch, link, place, directory) for link, place in zip(links, places, strict=True)]
        failures = []
        for done, (link, job) in enumerate(zip(links, running, strict=True), start=1):
            if (error := job.exception()) is not None:
                if not isinstance(error, DataError | OSError):
                    raise error
                failures.append(f"{link.url}: {error}")
            if progress is not None:
                progress(done, len(links), link.name)
    if failures:
        raise DataError("\n".join([f"{len(failures)} of {len(links)} archives could not be fetched:", *failures]))
    return places


def _fetch(link: Link, place: Path, directory: Path) -> None:
    if place.exists():
        return
    archive = directory / "archives" / link.name
    archive.parent.mkdir(parents=True, exist_ok=True)
    for last in (False, True):
        if not archive.exists():
            _download(link.url, archive)
        try:
            _verify(link, archive)
            _unpack(archive, place)
        except (DataError, tarfile.TarError, EOFError) as error:
            aside = archive.with_name(f"{archive.name}.damaged")
            archive.replace(aside)
            if last:
                raise DataError(f"damaged, twice ({error}); kept at {aside}") from error
        else:
            archive.unlink()
            return


def _download(url: str, archive: Path) -> None:
    """Fetch into ``<archive>.part``, from its end where it is there, and rename it when it is whole."""
    part = archive.with_name(f"{archive.name}.part")
    for attempt in range(1, TRIES + 1):
        try:
            if _continue_download(url, part):
                part.replace(archive)
                return
            problem = "the connection ends early"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500:
                raise DataError(f"the server answers {error.code} {error.reason}") from error
            problem = f"the server answers {error.code}"
        except (OSError, http.client.HTTPException) as error:
            problem = str(error)
        time.sleep(min(attempt - 1, SECONDS))
    raise DataError(f"given up after {TRIES} tries ({problem}); run the same command again to go on")


def _continue_download(url: str, part: Path) -> bool:
    """Append to ``part`` what it lacks; says whether it is whole."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=SECONDS)
    except urllib.error.HTTPError as error:
        if have and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            error.close()
            # There is nothing beyond the end; whether it is the archive is seen when it is verified.
            return True
        raise
    with answer:
        continued = answer.status == http.HTTPStatus.PARTIAL_CONTENT
        length = answer.headers.get("Content-Length")
        whole = None if length is None else int(length) + (have if continued else 0)
        with part.open("ab" if continued else "wb") as file:
            shutil.copyfileobj(answer, file, CHUNK)
    return whole is None or part.stat().st_size == whole


def _verify(link: Link, archive: Path) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest() if link.sha256 else None
        file.seek(max(0, archive.stat().st_size - TAR_END))
        whole = file.read() == bytes(TAR_END)
    if link.sha256 and found != link.sha256.lower():
        raise DataError(f"its SHA-256 is {found}, not {link.sha256}")
    if not whole:
        raise DataError("it does not end as a tar archive does")


def _unpack(archive: Path, place: Path) -> None:
    """Put the archive's files, whatever folders they are in, into ``place``; all of them or none."""
    aside = place.with_name(f"{place.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with tarfile.open(archive) as opened:
        for member in opened:
            content = opened.extractfile(member) if member.isfile() else None
            if content is not None:
                with content, (aside / PurePosixPath(member.name).name).open("wb") as file:
                    shutil.copyfileobj(content, file, CHUNK)
    if not any(aside.iterdir()):
        raise DataError("the archive holds no files")
    aside.rename(place)
