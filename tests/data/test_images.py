import base64
import io
import socket
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from tinyllava.data.images import find_file_fault, open_image
from tinyllava.data.sample import SampleError

RED = (250, 5, 5)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


def is_red(image: Image.Image) -> bool:
    return image.mode == "RGB" and np.abs(np.asarray(image, dtype=int) - RED).max() <= 6


def test_every_kind_of_reference_gives_the_same_rgb_picture(folder):
    path = folder / "red.jpg"
    data = path.read_bytes()
    url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    for reference in (str(path), data, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, url):
        assert is_red(open_image(reference))
    assert is_red(open_image(Image.open(path)))
    assert is_red(open_image("red.jpg", [str(folder)]))


def test_url(folder, monkeypatch):
    monkeypatch.setenv("TINYLLAVA_PRIVATE_URLS", "1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        assert is_red(open_image(f"{address}/red.jpg"))
        with pytest.raises(SampleError, match=r"nothing\.jpg cannot be loaded .*404") as error:
            open_image(f"{address}/nothing.jpg")
        assert error.value.kind == "unreadable_image"
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_breaks_off_is_an_error_that_names_the_url(monkeypatch):
    monkeypatch.setenv("TINYLLAVA_PRIVATE_URLS", "1")
    server = socket.create_server(("127.0.0.1", 0))

    def answer(text: bytes) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(text)

    for text in (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort", b"garbage\r\n\r\n", b""):
        thread = threading.Thread(target=answer, args=(text,))
        thread.start()
        with pytest.raises(SampleError, match=r"image http://127\.0\.0\.1:\d+/a\.png cannot be loaded \(") as error:
            open_image(f"http://127.0.0.1:{server.getsockname()[1]}/a.png")
        assert error.value.kind == "unreadable_image"
        thread.join()
    server.close()


def test_roots_are_searched_in_order(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (8, 8), (5, 5, 250)).save(other / "red.jpg")
    Image.new("RGB", (8, 8), RED).save(other / "only_here.png")
    roots = [str(folder), str(other)]
    assert is_red(open_image("red.jpg", roots))
    assert is_red(open_image("only_here.png", roots))
    assert not is_red(open_image("red.jpg", roots[::-1]))


def test_modes_become_rgb(tmp_path):
    def saved(image: Image.Image, name: str) -> np.ndarray:
        image.save(tmp_path / name)
        opened = open_image(str(tmp_path / name))
        assert opened.mode == "RGB"
        return np.asarray(opened)

    assert (saved(Image.new("L", (4, 4), 77), "grey.png") == 77).all()
    assert (saved(Image.new("RGBA", (4, 4), (*RED, 255)), "alpha.png") == RED).all()
    assert (saved(Image.new("RGB", (4, 4), RED).quantize(4), "palette.png") == RED).all()
    assert np.abs(saved(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "print.jpg").astype(int) - (255, 0, 0)).max() < 6
    # 16 bits: half of the range stays half of the range, instead of clipping to white
    half = saved(Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)), "deep.png")
    assert (half == 128).all()


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste(RED, (0, 0, 20, 20))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes top
    image.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    opened = open_image(str(tmp_path / "phone.jpg"))
    assert opened.size == (20, 40)
    assert opened.getpixel((10, 5))[0] > 200 and opened.getpixel((10, 35))[0] < 50


def test_draft_decodes_smaller_but_never_below_the_hint(tmp_path):
    Image.new("RGB", (800, 600), RED).save(tmp_path / "large.jpg")
    path = str(tmp_path / "large.jpg")
    assert open_image(path).size == (800, 600)
    assert open_image(path, draft=(140, 140)).size == (200, 150)
    assert open_image(path, draft=(151, 151)).size == (400, 300)
    assert is_red(open_image(path, draft=(140, 140)))


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("absent.jpg", "missing_image", r"absent\.jpg not found under .*pictures"),
        ("red.gif", "missing_image", r"red\.gif not found .*\(there is .*red\.jpg\)"),
        ("empty.jpg", "unreadable_image", r"empty\.jpg has zero bytes"),
        ("broken.jpg", "unreadable_image", r"broken\.jpg cannot be decoded \(.*truncated"),
        ("text.png", "unreadable_image", r"text\.png is not an image"),
    ],
)
def test_faults_name_the_path(folder, name, kind, text):
    (folder / "text.png").write_text("<html>404</html>")
    with pytest.raises(SampleError, match=text) as error:
        open_image(name, [str(folder)])
    assert error.value.kind == kind


def test_every_cut_of_a_file_is_read_or_refused_and_never_crashes(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    for suffix in ("png", "jpeg", "gif", "webp", "bmp", "tiff"):
        stream = io.BytesIO()
        noise.save(stream, suffix)
        whole = stream.getvalue()
        for length in range(1, len(whole), max(1, len(whole) // 40)):
            try:
                assert open_image(whole[:length]).mode == "RGB"
            except SampleError as error:
                assert error.kind == "unreadable_image"


def test_absent_looks_at_the_directory_entry_only(folder):
    assert find_file_fault("broken.jpg", [str(folder)]) is None
    assert find_file_fault("empty.jpg", [str(folder)]).kind == "unreadable_image"
    assert find_file_fault("absent.jpg", [str(folder)]).kind == "missing_image"
