"""Prepare data: the place of each file, real downloads from a server in this process, and the errors."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.cli_tools import CommandResult, assert_refused, run_command_line  # noqa: F401  (the fixture `tinyllava`)
from tinyllava.data import prepare
from tinyllava.data.prepare import check, fetch
from tinyllava.data.prepare.fetch import DownloadError, Unreachable, download_url, unpack_zip
from tinyllava.factory import Factory

CONTENT = bytes(range(256)) * 4000
SHA = "7" * 40


class Files(BaseHTTPRequestHandler):
    """Files by path, in ranges; and the same as datasets of a hub, at /datasets/OWNER/NAME/PATH.

    `server.drops` is the number of answers to break off half-way, `server.ranges` whether it supports ranges, and
    `server.asked` the requests so far.
    """

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/"):
            self.describe(path)
        else:
            self.answer(with_body=True)

    def describe(self, path: str) -> None:
        owner, name = path.split("/")[3:5]
        if owner == "no":
            self.send_error(404)
            return
        prefix, actual = f"/datasets/{owner}/{name}/", []
        for file, content in self.server.files.items():
            if file.startswith(prefix):
                sha = self.server.checksums.get(file) or hashlib.sha256(content).hexdigest()
                one = {"type": "file", "path": file.removeprefix(prefix), "size": len(content), "oid": "0" * 40}
                actual.append({**one, "lfs": {"oid": sha, "size": len(content), "pointerSize": 100}})
        body = json.dumps(
            actual if "/tree/" in path else {"id": f"{owner}/{name}", "sha": SHA, "siblings": []}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self, with_body: bool) -> None:
        path = self.path.replace(f"/resolve/{SHA}/", "/").replace("/resolve/main/", "/")
        content = self.server.files.get(path)
        if content is None:
            self.send_error(404)
            return
        asked = self.headers.get("Range") if self.server.ranges else None
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        if with_body:
            self.server.asked.append((path, start))
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if with_body:
            dropped = self.server.drops > 0
            self.server.drops -= dropped
            self.wfile.write(content[start : start + (len(content) - start) // 2] if dropped else content[start:])
            self.close_connection = True


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """A running server; `address` is where."""
    one = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    one.files, one.checksums, one.drops, one.ranges, one.asked = {"/big.bin": CONTENT}, {}, 0, True, []
    one.address = f"http://127.0.0.1:{one.server_port}"
    threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
    yield one
    one.shutdown()
    one.server_close()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """datasets(name=..., ...) writes the YAML of a dataset for this test and returns the folder."""
    folder = tmp_path / "datasets"
    folder.mkdir()
    monkeypatch.setattr(prepare, "FOLDER", folder)

    def write(name: str, **content: object) -> Path:
        about = {"title": name, "licence": "none", "page": "https://example.org", "kind": "training", "parts": []}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(about | content))
        return folder

    return write


# -- one file -------------------------------------------------------------------------------------------------------


def test_a_download_resumes_where_it_stopped(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.drops = 2
    download_url(f"{server.address}/big.bin", tmp_path / "a/big.bin", hashlib.sha256(CONTENT).hexdigest())
    assert (tmp_path / "a/big.bin").read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert [start for _, start in server.asked] == [0, half, half + half // 2]  # no byte was asked for twice
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["big.bin"]


def test_a_download_resumes_after_the_process_died(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    for done in (CONTENT[:1000], CONTENT):  # the second died before the renaming
        server.asked.clear()
        (tmp_path / "big.bin.partial").write_bytes(done)
        download_url(f"{server.address}/big.bin", tmp_path / "big.bin")
        assert (tmp_path / "big.bin").read_bytes() == CONTENT
        assert server.asked == [("/big.bin", len(done))]


def test_a_server_without_ranges_begins_anew(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.ranges, server.drops = False, 1
    download_url(f"{server.address}/big.bin", tmp_path / "big.bin")
    assert (tmp_path / "big.bin").read_bytes() == CONTENT


def test_a_wrong_checksum_is_an_error_and_leaves_no_file(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    right, actual = hashlib.sha256(CONTENT).hexdigest(), hashlib.sha256(CONTENT[::-1]).hexdigest()
    server.files["/big.bin"] = CONTENT[::-1]
    with pytest.raises(DownloadError, match=f"SHA-256 {actual}, expected {right}.*Run the command again"):
        download_url(f"{server.address}/big.bin", tmp_path / "big.bin", right)
    assert not list(tmp_path.iterdir())
    server.files["/big.bin"] = CONTENT
    download_url(f"{server.address}/big.bin", tmp_path / "big.bin", right)


def test_downloads_that_are_impossible(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DownloadError, match=r"gone.bin: the server answered 404"):
        download_url(f"{server.address}/gone.bin", tmp_path / "gone.bin")
    with pytest.raises(Unreachable, match="refused"):
        download_url("http://127.0.0.1:9/big.bin", tmp_path / "big.bin")
    server.drops = 100
    with pytest.raises(DownloadError, match=r"interrupted: the connection was closed too early.*again to resume"):
        download_url(f"{server.address}/big.bin", tmp_path / "slow.bin")
    assert len(CONTENT) * 0.9 < (tmp_path / "slow.bin.partial").stat().st_size < len(CONTENT)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DownloadError, match=r"requires 0.0 GB more, but only 0.0 GB are free in"):
        download_url(f"{server.address}/big.bin", tmp_path / "full.bin")


# -- zips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["images/", ""])
def test_a_zip_is_unpacked_whether_it_names_its_folder_or_not(tmp_path: Path, inside: str) -> None:
    archive, folder = tmp_path / "images.zip", tmp_path / "gqa/images"
    with zipfile.ZipFile(archive, "w") as file:
        for number in range(3):
            file.writestr(f"{inside}0{number}/{number}.jpg", f"picture {number}")
    unpack_zip(archive, folder)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg")) == [
        "00/0.jpg",
        "01/1.jpg",
        "02/2.jpg",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["images"]
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(f"{inside}00/new.jpg", "later")
        file.writestr(f"{inside}01/1.jpg", "changed")
    unpack_zip(archive, folder)  # beside what other parts left there
    assert (folder / "00/new.jpg").read_text() == "later" and (folder / "00/0.jpg").read_text() == "picture 0"


def test_a_damaged_zip_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("1.jpg", "picture " * 100)
    whole = archive.read_bytes()
    archive.write_bytes(whole[:60] + b"?" + whole[61:])
    with pytest.raises(DownloadError, match=r"images.zip is damaged \(Bad CRC.*Run the command again"):
        unpack_zip(archive, tmp_path / "images")
    assert not archive.exists() and not (tmp_path / "images").exists()


@pytest.mark.parametrize("path", ["coco/train2017/", "coco/first.json"])
def test_only_the_content_of_a_zip_stays(server: ThreadingHTTPServer, tmp_path: Path, path: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for name in ("train2017/1.jpg", "train2017/2.jpg") if path.endswith("/") else ("coco/first.json", "coco/a/2"):
            file.writestr(name, "content")
    server.files["/zips/x.zip"] = (tmp_path / "x.zip").read_bytes()
    root = tmp_path / "root"
    fetch.fetch_item(prepare.Item(path=path, url=f"{server.address}/zips/x.zip"), root)
    actual = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
    expected = (
        ["coco/train2017/1.jpg", "coco/train2017/2.jpg"] if path.endswith("/") else ["coco/a/2", "coco/first.json"]
    )
    assert actual == expected


@pytest.mark.parametrize(("there", "text"), [(3, ""), (2, "2 of 3 files")])
def test_a_table_with_a_missing_file_is_not_complete(tmp_path: Path, there: int, text: str) -> None:
    (tmp_path / "data").mkdir()
    for number in range(there):
        (tmp_path / f"data/test-{number:05d}-of-00003.parquet").write_bytes(b"x")
    actual = check.check_item(prepare.Item(path="data/test-*.parquet", hub="a/b", file="data/test-*.parquet"), tmp_path)
    assert actual.is_complete == (there == 3) and text in actual.text


# -- whole datasets, through the command line -----------------------------------------------------------------------


def run(folder: Path, server: ThreadingHTTPServer, *arguments: object) -> subprocess.CompletedProcess:
    """`tinyllava data prepare` in a process whose Hub is `server`: the address is read when the client is imported."""
    code = "import sys, pathlib\nfrom huggingface_hub import constants\n"
    code += "constants.DOWNLOAD_CHUNK_SIZE = 10_000\n"  # a small file in many pieces
    code += "from tinyllava import cli\nfrom tinyllava.data import prepare\n"
    code += f"prepare.FOLDER = pathlib.Path({str(folder)!r})\ncli.main(['data', 'prepare', *sys.argv[1:]])"
    there = {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **there})


def test_a_benchmark_from_a_page_and_from_the_hub(
    server: ThreadingHTTPServer, datasets: Callable[..., Path], tmp_path: Path
) -> None:
    parts = []
    for category in ("adversarial", "popular", "random"):
        one = {"question_id": 1, "image": f"COCO_{category}.jpg", "text": "Is there a dog in the image?", "label": "no"}
        server.files[f"/coco_pope_{category}.json"] = content = json.dumps(one).encode()
        url = f"{server.address}/coco_pope_{category}.json"
        sha = hashlib.sha256(content).hexdigest()
        parts.append({"path": f"pope/coco/coco_pope_{category}.json", "url": url, "sha256": sha})
    parts.append({"path": "pope/data/test-*.parquet", "hub": "some/POPE", "file": "data/test-*.parquet"})
    parts.append({"path": "pope/llava.jsonl", "page": "https://x", "how": "in a zip", "optional": "its order"})
    parts.append({"path": "pope/x.bin", "hub": "no/such", "file": "x.bin", "optional": "nothing"})
    folder = datasets("pope", kind="benchmark", questions=3, parts=parts)
    Image.new("RGB", (300, 300), "red").save(tmp_path / "red.jpg")
    picture = {"bytes": (tmp_path / "red.jpg").read_bytes() + bytes(100_000), "path": None}
    columns = dict.fromkeys(("question_id", "question", "answer", "category"), ["1"] * 3)
    columns |= {"image_source": ["COCO_adversarial", "COCO_popular", "COCO_random"]}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(columns | {"image": pa.array([picture] * 3, kind)})
    pq.write_table(table, tmp_path / "t.parquet", compression="none", use_dictionary=False)
    shard = "/datasets/some/POPE/data/test-00000-of-00001.parquet"
    server.files[shard] = whole = (tmp_path / "t.parquet").read_bytes()
    server.files["/datasets/some/POPE/data/train-00000-of-00001.parquet"] = b"not asked for"
    root = tmp_path / "root"

    server.files[shard] = whole[:-9] + b"?" + whole[-8:]  # as long, and not what the Hub's listing says
    server.checksums[shard] = hashlib.sha256(whole).hexdigest()
    damaged = run(folder, server, "pope", "--root", root)
    assert damaged.returncode == 1, damaged.stderr
    assert "wrong checksum: data/test-00000-of-00001.parquet of some/POPE" in damaged.stderr
    assert (
        "dataset no/such on the Hub: HfHubHTTPError, Client error '404" in damaged.stderr
        and "no connection" not in damaged.stderr
    )
    assert not list((root / "pope/data").glob("*.parquet"))

    server.files[shard], server.drops = whole, 1
    server.asked.clear()
    done = run(folder, server, "pope", "--root", root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 questions on 3 images, no image missing" in done.stdout
    starts = [start for path, start in server.asked if path == shard]
    assert len(starts) == 2 and starts[0] == 0 < starts[1]  # broken off, and on from there
    assert {path for path, _ in server.asked} == {shard}  # what was there already was not fetched again
    assert "download by hand, in a zip: https://x (only for its order)" in done.stdout
    assert not list(root.rglob("train-*"))
    again = run(folder, server, "pope", "--root", root, "--check")
    assert again.returncode == 0 and again.stderr == ""


def test_without_a_network_the_rest_is_checked(
    tinyllava: Callable[..., CommandResult], datasets: Callable[..., Path], tmp_path: Path
) -> None:
    nowhere = "http://127.0.0.1:9"
    datasets(
        "far",
        parts=[
            {"path": "a.json", "url": f"{nowhere}/a.json"},
            {"path": "b.json", "url": f"{nowhere}/b.json"},
            {"path": "c.json", "hub": "some/thing", "file": "c.json"},
            {"path": "d/", "page": "https://forms.example.org", "how": "on request"},
            {"path": "e.json", "url": f"{nowhere}/e.json", "sha256": hashlib.sha256(b"right").hexdigest()},
            {"path": "f/", "url": f"{nowhere}/f.zip", "files": 2},
            {"path": "g/", "also": ["h.json"], "url": f"{nowhere}/g.zip", "files": 2},
        ],
    )
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "e.json").write_text("wrong")
    (tmp_path / "h.json").write_text("[0]")
    (tmp_path / "f").mkdir()
    (tmp_path / "f/1.jpg").write_text("x")
    result = tinyllava("data", "prepare", "far", "--root", tmp_path)
    assert result.code == 1 and "Traceback" not in result.err
    assert result.err.count("cannot connect to") == 1 and "127.0.0.1, the Hub" in result.err
    assert result.err.count("downloading") == 2  # not one more from a place that cannot be reached
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert "ok a.json 2 bytes" in lines
    assert "ok g/ 3 bytes (h.json)" in lines
    assert "missing b.json download from http://127.0.0.1:9/b.json" in lines
    assert "missing d/ download by hand, on request: https://forms.example.org" in lines
    assert any(line.startswith("missing e.json wrong checksum") for line in lines)
    assert any(line.startswith("missing f/ 1 files, expected 2") for line in lines)


def test_training_files_and_the_pictures_that_they_name(
    tinyllava: Callable[..., CommandResult],
    datasets: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "root"
    records = [{"id": 0, "conversations": []}]
    for number in range(300):
        name = f"coco/train2017/{number:012d}.jpg" if number % 2 else f"vg/VG_100K/{number % 3}/{number}.jpg"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if number % 50 != 1:
            (root / name).touch()
        records.append({"id": number, "image": name if number else [name, "web/x.jpg"], "conversations": []})
    (root / "mix.json").write_text(json.dumps(records))
    url = "http://127.0.0.1:9/x.zip"
    parts = [{"path": path, "url": url} for path in ("coco/train2017/", "vg/VG_100K/")]
    numbers = {"path": "mix.json", "images": ".", "records": 301, "with_picture": 300}
    datasets("mix", parts=parts, annotations=[numbers])
    listed, listdir = [], os.listdir
    monkeypatch.setattr(check.os, "listdir", lambda folder: listed.append(folder) or listdir(folder))
    result = tinyllava("data", "prepare", "mix", "--root", root, "--check")
    assert result.code == 1
    assert "mix.json: 301 records, 300 with an image\n" in result.out
    assert "coco/train2017: 150 images, 6 missing, such as coco/train2017/000000000001.jpg, coco" in result.out
    assert "vg/VG_100K: 150 images, none missing" in result.out
    assert "web: 1 images, 1 missing, such as web/x.jpg" in result.out
    assert len(listed) == len(set(listed)) == 4  # each folder once; web/ is none

    (root / "mix.json").write_text(json.dumps(records[:100])[:-1])
    result = tinyllava("data", "prepare", "mix", "--root", root, "--check")
    assert result.code == 1 and "mix.json: " in result.out and "is not valid JSON" in result.out
    (root / "mix.json").write_text(json.dumps(records[:100]))
    result = tinyllava("data", "prepare", "mix", "--root", root, "--check")
    assert "100 records, 99 with an image (expected 301, 300 with an image: is this another release?)" in result.out


# -- the descriptions that come with the package --------------------------------------------------------------------


def test_there_is_a_description_for_each_benchmark_and_for_the_training_data(
    tinyllava: Callable[..., CommandResult],
) -> None:
    benchmarks = {name for name in prepare.list_datasets() if prepare.load_description(name).kind == "benchmark"}
    assert benchmarks == {"gqa", "mme", "mmmu", "mmvet", "pope", "scienceqa", "textvqa", "vqav2"}
    assert set(prepare.list_datasets()) - benchmarks == {"llava-1.5", "sharegpt4v"}
    result = tinyllava("data", "prepare")
    assert result.code == 0 and all(name in result.out for name in prepare.list_datasets())
    assert_refused(tinyllava("data", "prepare", "pop"), "unknown dataset 'pop'", "did you mean 'pope'")


def test_descriptions_have_the_files_that_benchmarks_and_recipes_read() -> None:
    for name in prepare.list_datasets():
        dataset = prepare.load_description(name)
        paths = [path for item in dataset.items for path in (item.path, *item.also)]
        assert not any(path.startswith(("/", ".")) for path in paths)
        if dataset.kind == "benchmark":
            folder = Factory("benchmarks").get(name).folder
            assert all(path.startswith(f"{folder}/") for path in paths), name
        for item in dataset.items:
            assert item.sha256 is None or len(item.sha256) == 64
            assert not item.hub or item.path.endswith((item.file, "/")), item.path
    folders = {item.path for item in prepare.load_description("llava-1.5").items}
    assert folders >= {"coco/train2017/", "gqa/images/", "ocr_vqa/images/", "textvqa/train_images/", "vg/VG_100K/"}
    of_sharegpt4v = {item.path for item in prepare.load_description("sharegpt4v").items}
    assert folders < of_sharegpt4v | {"text_files/llava_v1_5_mix665k.json"}
