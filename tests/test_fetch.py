"""Downloads from a small local server: resumed, verified, unpacked; and the shrinking of what was downloaded."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from merge_ray.cli import app
from merge_ray.compress import compress
from merge_ray.errors import DataError, MergeRayError
from merge_ray.fetch import Link, fetch, read_links, usual_links


def archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 5000
            file.addfile(member, io.BytesIO(name[-1:].encode() * 5000))
    return buffer.getvalue()


class Server:
    """Answers with ``files``; ``cut`` bytes into an answer it hangs up, once for every entry."""

    def __init__(self) -> None:
        self.files: dict[str, list[bytes]] = {}
        self.cut: list[int] = []
        self.asked: list[str | None] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked.append(self.headers.get("Range"))
                versions = server.files.get(self.path.removeprefix("/"))
                if versions is None:
                    self.send_error(404)
                    return
                content = versions[0] if len(versions) == 1 else versions.pop(0)
                start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                stop = start + server.cut.pop() if server.cut else len(content)
                self.wfile.write(content[start:stop])

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def link(self, name: str, *versions: bytes, sha256: str | None = None) -> Link:
        if versions:
            self.files[name] = list(versions)
        return Link(f"http://127.0.0.1:{self.http.server_port}/{name}", sha256)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_fetch_unpacks_and_is_done_once(server: Server, tmp_path: Path) -> None:
    content = archive("./rgb/point_0_view_0_domain_rgb.png", "../../b")
    links = [
        server.link("ihlen_rgb.tar", content, sha256=hashlib.sha256(content).hexdigest()),
        server.link("ihlen_depth_zbuffer.tar", archive("a")),
    ]
    counted: list[tuple[int, int, str]] = []
    places = fetch(links, tmp_path, lambda *count: counted.append(count))
    assert places == [tmp_path / "ihlen" / "rgb", tmp_path / "ihlen" / "depth_zbuffer"]
    assert sorted(path.name for path in places[0].iterdir()) == ["b", "point_0_view_0_domain_rgb.png"]
    assert (places[0] / "b").read_bytes() == b"b" * 5000
    assert counted == [(1, 2, "ihlen_rgb.tar"), (2, 2, "ihlen_depth_zbuffer.tar")]
    assert not any((tmp_path / "archives").iterdir())
    fetch(links, tmp_path)
    assert len(server.asked) == 2


def test_a_broken_download_goes_on(server: Server, tmp_path: Path) -> None:
    link = server.link("ihlen_rgb.tar", archive("a", "b"))
    server.cut = [3000, 2000]
    (place,) = fetch([link], tmp_path)
    assert (place / "b").read_bytes() == b"b" * 5000
    assert server.asked == [None, "bytes=2000-", "bytes=5000-"]


def test_a_download_of_an_earlier_run_goes_on(server: Server, tmp_path: Path) -> None:
    content = archive("a")
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "ihlen_rgb.tar.part").write_bytes(content[:700])
    fetch([server.link("ihlen_rgb.tar", content)], tmp_path)
    assert server.asked == ["bytes=700-"]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "checksum"])
def test_a_damaged_archive_is_kept_aside_and_fetched_again(server: Server, tmp_path: Path, damage: str) -> None:
    good = archive("a", "b")
    bad = {"truncated": good[: 512 + 5120], "garbage": b"<html>" * 900, "checksum": archive("a", "c")}[damage]
    link = server.link(
        "ihlen_rgb.tar", bad, good, sha256=hashlib.sha256(good).hexdigest() if damage == "checksum" else None
    )
    (place,) = fetch([link], tmp_path)
    assert sorted(path.name for path in place.iterdir()) == ["a", "b"]
    assert (tmp_path / "archives" / "ihlen_rgb.tar.damaged").read_bytes() == bad


def test_what_cannot_be_fetched(server: Server, tmp_path: Path) -> None:
    links = [
        server.link("none_rgb.tar"),
        server.link("bad_rgb.tar", b"x" * 900),
        server.link("good_rgb.tar", archive("a")),
    ]
    with pytest.raises(DataError) as raised:
        fetch(links, tmp_path)
    assert "2 of 3 archives could not be fetched" in str(raised.value)
    assert "none_rgb.tar: the server answers 404" in str(raised.value)
    assert "bad_rgb.tar: damaged, twice" in str(raised.value)
    assert (tmp_path / "good" / "rgb" / "a").exists()
    with pytest.raises(DataError, match=r"called <building>_<folder>.tar"):
        fetch([Link("http://127.0.0.1/readme.html")], tmp_path)


def test_links(tmp_path: Path) -> None:
    file = tmp_path / "links.txt"
    file.write_text("# archives\nhttps://a.org/x_rgb.tar  # images\n\nhttps://a.org/x_normal.tar ff\n")
    assert read_links(file) == [Link("https://a.org/x_rgb.tar"), Link("https://a.org/x_normal.tar", "ff")]
    file.write_text("https://a.org/x_rgb.tar\nx_normal.tar\n")
    with pytest.raises(DataError, match=r"line 2: expected `URL` or `URL SHA256`; found 'x_normal.tar'"):
        read_links(file)
    places = [str(link.place) for link in usual_links()]
    assert len(places) == 10 * 11 + 8
    assert {"ihlen/segment_semantic", "corozal/normal", "uvalda/depth_zbuffer", "hiteman/rgb"} <= set(places)


def test_commands(server: Server, tmp_path: Path) -> None:
    links = tmp_path / "links.txt"
    links.write_text(server.link("ihlen_rgb.tar", archive("a.txt")).url)
    shown = CliRunner().invoke(app, ["fetch", "taskonomy", "--links", str(links), "-o", str(tmp_path / "data")])
    assert shown.exit_code == 0 and "1 folders are in" in shown.output
    wrong = CliRunner().invoke(app, ["fetch", "taskonomie"])
    assert isinstance(wrong.exception, MergeRayError) and "did you mean 'taskonomy'" in str(wrong.exception)


def test_compress(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    written = {
        "rgb": rng.integers(0, 256, (32, 32, 3), np.uint8),
        "edge_texture": rng.integers(0, 65536, (32, 32), np.uint16),
        "depth_zbuffer": rng.integers(0, 65536, (32, 32), np.uint16),
    }
    for folder, pixels in written.items():
        (tmp_path / "ihlen" / folder).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "ihlen" / folder / "point_0_view_0.png")
    assert compress(tmp_path, 16) == (2, 2)
    sizes = {folder: np.asarray(Image.open(tmp_path / "ihlen" / folder / "point_0_view_0.png")) for folder in written}
    assert sizes["rgb"].shape == (16, 16, 3) and sizes["rgb"].dtype == np.uint8
    assert sizes["edge_texture"].shape == (16, 16) and sizes["edge_texture"].dtype == np.uint16
    assert sizes["edge_texture"].mean() == pytest.approx(written["edge_texture"].mean(), rel=0.02)
    assert np.array_equal(sizes["depth_zbuffer"], written["depth_zbuffer"])
    assert compress(tmp_path, 16) == (0, 2)
    with pytest.raises(DataError, match="no images in"):
        compress(tmp_path / "ihlen", 16)
