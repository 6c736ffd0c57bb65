"""Images in records: none from outside of an image folder, no device, and no decoder that fills the memory."""

import io
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

from tinyllava.data.images import PIXELS, ImageFolders, open_image, read_image_size
from tinyllava.data.sample import SampleError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """root/{in.png, sub/deep.png, link -> linked/, alias -> root}, linked/there.png, secret.png, rootbeer/x.png."""
    for name in (
        "root/in.png",
        "root/sub/deep.png",
        "linked/there.png",
        "secret.png",
        "rootbeer/x.png",
        "second/b.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (255, 0, 0)).save(tmp_path / name)
    (tmp_path / "root/link").symlink_to(tmp_path / "linked")
    (tmp_path / "alias").symlink_to(tmp_path / "root")
    return tmp_path


def list_escapes(tree: Path) -> list[str]:
    secret = str(tree / "secret.png")
    return [
        "../secret.png",
        "sub/../../secret.png",
        "link/../../secret.png",
        "./.././secret.png",
        "sub/..//../secret.png",
        "../rootbeer/x.png",
        secret,
        f"/{secret}",
        f"//{secret}",
        f"{tree}/root/../secret.png",
        f"{tree}/rootbeer/x.png",
        f"file://{secret}",
        f"file:{secret}",
        f"FILE://localhost{secret}",
        f"file:///{secret}",
        f"file://{quote(secret).replace('secret', '%73ecret')}",
        "file:../secret.png",
        "file:%2e%2e/secret.png",
        "file:sub%2F..%2F..%2Fsecret.png",
        f"{tree}/alias/../secret.png",
        f"/proc/self/cwd{secret}",
        f"/proc/self/root{secret}",
    ]


def list_strange_names() -> list[str]:
    names = [
        "~/secret.png",
        "..\\secret.png",
        "in.png\0",
        "\0",
        "..%2fsecret.png",
        "..\uff0fsecret.png",
        ".\u200b./x.png",
    ]
    return [
        *names,
        "x" * 300,
        "a/" * 5000,
        "",
        ".",
        "..",
        "/",
        "\udcff.png",
        "http:/secret.png",
        "-",
        "$HOME",
    ]


@pytest.mark.parametrize("roots", [["root"], ["second", "root"], ["alias"], ["root/"], ["root/sub/.."]])
def test_no_record_leaves_the_image_folders(tree, roots):
    folders = ImageFolders([str(tree / root) for root in roots])
    for name in [*list_escapes(tree), *list_strange_names()]:
        with pytest.raises(SampleError):
            open_image(name, folders)
        with pytest.raises(SampleError):
            read_image_size(name, folders)
    for name in (
        "in.png",
        "./in.png",
        "sub/../in.png",
        "link/there.png",
        "sub/deep.png",
        str(tree / roots[-1] / "in.png"),
    ):
        assert open_image(name, folders).size == (8, 6), name


def test_the_current_folder_as_root(tree, monkeypatch):
    monkeypatch.chdir(tree / "root")
    for roots in (["."], [""]):
        for name in list_escapes(tree):
            with pytest.raises(SampleError):
                open_image(name, ImageFolders(roots))
        assert open_image("in.png", ImageFolders(roots)).size == (8, 6)
        assert open_image(str(tree / "root/in.png"), ImageFolders(roots)).size == (8, 6)


def test_without_a_folder_of_the_user_absolute_paths_are_fine(tree):
    for folders in ((), ImageFolders([str(tree / "root")], named=False)):
        assert open_image(str(tree / "secret.png"), folders).size == (8, 6)


def test_devices_and_pipes_are_no_images(tree):
    os.mkfifo(tree / "root/pipe.png")
    (tree / "root/zero.png").symlink_to("/dev/zero")
    (tree / "root/loop.png").symlink_to("loop.png")
    begin = time.monotonic()
    for name in ("pipe.png", "zero.png", "loop.png", "sub"):
        with pytest.raises(SampleError, match="not found"):
            open_image(name, ImageFolders([str(tree / "root")]))
    for name in ("/dev/zero", "/dev/stdin", "/dev/random", "/proc/kmsg", str(tree / "root/pipe.png")):
        with pytest.raises(SampleError):
            open_image(name)
    assert time.monotonic() - begin < 20


# -- decoders ----------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def write_png(width: int, height: int, *chunks: bytes, bits: int = 8, colour: int = 2, rows: int = 0) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    bytes_per_row = 1 + (width * bits * {2: 3, 0: 1, 6: 4}[colour] + 7) // 8
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(bytes(bytes_per_row)) for _ in range(rows)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def save(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def patch(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def list_bombs() -> dict[str, bytes]:
    small = Image.new("RGB", (8, 8))
    jpeg, text = save(small, "JPEG"), zlib.compress(bytes(200_000_000), 9)
    frame = jpeg.index(b"\xff\xc0") + 5
    tiff = save(small, "TIFF")
    bombs = {
        "png of many pixels": write_png(14_000, 14_000, bits=1, colour=0, rows=14_000),
        "png just over the limit": write_png(PIXELS // 1000 + 1, 1000, bits=1, colour=0, rows=1000),
        "png of 2 billion pixels a row": write_png(2**31 - 1, 2**31 - 1),
        "png text": write_png(8, 8, chunk(b"zTXt", b"a\0\0" + text), rows=8),
        "png international text": write_png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + text), rows=8),
        "png profile": write_png(8, 8, chunk(b"iCCP", b"a\0\0" + text), rows=8),
        "jpeg header": patch(jpeg, frame, struct.pack(">HH", 65535, 65535)),
        "gif header": patch(save(small, "GIF"), 6, struct.pack("<HH", 65535, 65535)),
        "bmp header": patch(save(small, "BMP"), 18, struct.pack("<ii", 2**30, 2**30)),
        "ppm header": b"P6 99999 99999 255\n",
        "plain ppm": b"P3 99999 99999 255\n" + b"1 " * 1000,
        "qoi header": b"qoif" + struct.pack(">IIBB", 65535, 65535, 3, 0) + b"\xfd" * 1000,
        "tga header": bytes([0, 0, 2]) + bytes(9) + struct.pack("<HHBB", 65535, 65535, 24, 0),
        "ico with a large png": b"\0\0\1\0\1\0"
        + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, 10**6, 22)
        + write_png(12_000, 12_000, bits=8, colour=6, rows=1),
    }
    for tag in (256, 257):  # width and height in a little-endian TIFF
        tiff = tiff.replace(struct.pack("<HHIHH", tag, 3, 1, 8, 0), struct.pack("<HHIHH", tag, 3, 1, 65535, 0))
        tiff = tiff.replace(struct.pack("<HHII", tag, 4, 1, 8), struct.pack("<HHII", tag, 4, 1, 65535))
    return bombs | {"tiff header": tiff}


BOMBS = """
import resource, sys, time
from pathlib import Path
from tinyllava.data.images import open_image
from tinyllava.data.sample import SampleError
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 400_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path(sys.argv[1]).iterdir()):
    begin = time.process_time()
    try:
        answer = open_image(str(path)).size
    except SampleError as error:
        answer = error.kind
    assert time.process_time() - begin < 5, path
    print(path.name, answer)
"""


def test_image_bombs_are_errors_in_little_time_and_memory(tmp_path):
    bombs = list_bombs()
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
    frames = [Image.new("P", (8, 8), n % 250) for n in range(2000)]
    (tmp_path / "gif of many frames").write_bytes(save(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    done = subprocess.run([sys.executable, "-c", BOMBS, tmp_path], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    readable = [line for line in lines if not line.endswith("unreadable_image")]
    assert len(lines) == len(bombs) + 1
    assert set(readable) <= {"gif of many frames (8, 8)", "png profile (8, 8)"}, readable


def test_the_limit_holds_when_pillows_own_is_off(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(SampleError, match=r"has 89479x1000 pixels, at most 89,478,485"):
        open_image(write_png(PIXELS // 1000 + 1, 1000, bits=1, colour=0, rows=1))
