"""WebDataset tar files: records as their author wrote them, with the members as images."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tinyllava.config import DataSpec
from tinyllava.data.bad_records import BadRecords
from tinyllava.data.images import open_image
from tinyllava.data.sample import SampleError
from tinyllava.data.sources import open_source
from tinyllava.errors import UserError
from tinyllava.lanes import Dealer

COLOURS = {"red": (250, 5, 5), "green": (5, 250, 5), "blue": (5, 5, 250)}


def draw(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), COLOURS[colour]).save(stream, "PNG")
    return stream.getvalue()


def talk(images: int = 1, **record) -> bytes:
    turns = [{"from": "human", "value": "<image>\n" * images + "which?"}, {"from": "gpt", "value": "that"}]
    return json.dumps({"conversations": turns, **record}).encode()


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[..., str]:
    def write(name: str, *members: tuple[str, bytes]) -> str:
        (tmp_path / "shards").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "shards" / name, "w") as archive:
            for member, content in members:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return str(tmp_path / "shards" / "*.tar")

    return write


def test_records_and_their_images(write_tar: Callable[..., str], tmp_path: Path) -> None:
    write_tar(
        "a.tar",
        *(("one.json", talk(image="elsewhere.jpg", id=7)), ("one.png", draw("red"))),
        *(
            ("dir/two.10.png", draw("blue")),
            ("dir/two.2.PNG", draw("green")),
            ("dir/two.json", talk(2, extra={"z": [1]})),
        ),
        ("text.json", talk(0, image=["a", "b"])),
        ("text.txt", b"not read"),
    )
    messages = {"messages": [{"role": "user", "content": "<image>\nhi"}, {"role": "assistant", "content": "ho"}]}
    path = write_tar("b.tar", ("m.json", json.dumps(messages).encode()), ("m.jpg", draw("blue")))
    for each in (path, str(tmp_path / "shards")):
        source = open_source(DataSpec(path=each, streaming=True))
        assert source.streaming and source.count_shards() == 2
        samples = list(source.iterate_samples())
        assert [sample.id for sample in samples] == ["one", "dir/two", "text", "m"]
        colours = [[open_image(image, source.roots).getpixel((3, 3)) for image in sample.images] for sample in samples]
        assert colours == [[COLOURS["red"]], [COLOURS["green"], COLOURS["blue"]], [], [COLOURS["blue"]]]
        assert samples[3].messages[1].text == "ho"
    assert len(open_source(DataSpec(path=str(tmp_path / "shards" / "a.tar"), streaming=True)).fingerprint) == 16


def test_what_is_wrong_with_a_record_is_said(write_tar: Callable[..., str]) -> None:
    bad = BadRecords()
    path = write_tar(
        "a.tar",
        ("a.png", draw("red")),
        ("b.json", b"{"),
        ("c.json", b"[1]"),
        ("d.json", b"\xff\xfe"),
        ("e.json", b"{}"),
    )
    source = open_source(DataSpec(path=path, streaming=True))
    for record in source.iterate():
        with pytest.raises(SampleError) as caught:
            source.to_sample(record)
        bad.add(caught.value.kind, record["id"], caught.value.text)
    assert bad.to_dict()["no_conversation"]["ids"] == ["a", "b", "c", "d", "e"]


def test_refused_with_the_remedy(write_tar: Callable[..., str], tmp_path: Path) -> None:
    path = write_tar("a.tar", *((f"{row}.json", talk(0)) for row in range(50)))
    with pytest.raises(UserError, match=r"Set `streaming: true`"):
        open_source(DataSpec(path=path))
    with pytest.raises(UserError, match=r"nowhere/\*\.tar not found"):
        open_source(DataSpec(path=str(tmp_path / "nowhere" / "*.tar"), streaming=True))
    with pytest.raises(UserError, match=r"cannot list what://x\.tar"):
        open_source(DataSpec(path="what://x.tar", streaming=True))
    whole = tmp_path / "shards" / "a.tar"
    whole.write_bytes(whole.read_bytes()[: 512 * 40 + 100])
    dealer = Dealer(open_source(DataSpec(path=path, streaming=True)), (0, 0), [0], 1, {})
    with pytest.raises(UserError, match=r"a\.tar is not a whole tar file"):
        dealer.take(0, lambda record: record)


def test_shards_of_a_tar_set_are_read_alone(write_tar: Callable[..., str]) -> None:
    for shard in range(4):
        path = write_tar(f"{shard}.tar", *((f"{shard}-{row}.json", talk(0)) for row in range(3)))
    source = open_source(DataSpec(path=path, streaming=True))
    lanes = [Dealer(source, (0, 0), [lane], 4, {}) for lane in range(4)]
    ids = [[lane.take(each, lambda record: record["id"]) for _ in range(3)] for each, lane in enumerate(lanes)]
    assert all(len({identity[0] for identity in lane}) == 1 for lane in ids)
    assert len({identity for lane in ids for identity in lane}) == 12


def test_a_sparse_member_does_not_fill_the_memory(tmp_path: Path) -> None:
    """Its holes are not in the file: 10 kB can stand for a terabyte."""
    content = draw("red")
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in (("one.json", talk()), ("one.png", content), ("two.json", talk()), ("two.png", content)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name == "one.png":
                info.pax_headers = {"GNU.sparse.size": str(1 << 50), "GNU.sparse.map": f"0,{len(data)}"}
            archive.addfile(info, io.BytesIO(data))
    source = open_source(DataSpec(path=str(tmp_path / "a.tar"), streaming=True))
    holes, whole = (source.to_sample(record) for record in source.iterate())
    assert open_image(whole.images[0]).size == (16, 16)
    with pytest.raises(SampleError, match="not an image"):
        open_image(holes.images[0])
