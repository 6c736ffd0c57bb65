import pickle
import re
from itertools import islice

import datasets
import numpy as np
import pytest
import torch

from tinyllava.config import DataSpec
from tinyllava.data import dataset as dataset_module
from tinyllava.data.collate import Collator
from tinyllava.data.dataset import build_dataset, hold_out
from tinyllava.data.options import DataOptions
from tinyllava.data.sample import Sample
from tinyllava.data.template import BoundTemplate, Template, image_token_id
from tinyllava.errors import UserError

TOKENS = 5  # positions of a picture


def pixels(images) -> torch.Tensor:
    """A model's processor in small: uint8 [n, 3, 4, 4]."""
    arrays = [np.asarray(image.resize((4, 4))) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


@pytest.fixture
def build(tokenizer, folder):
    """build(path or DataSpec, ...) -> dataset; keyword arguments are those of DataOptions."""

    def build(*specs, **options):
        specs = [DataSpec(path=spec, images=str(folder)) if isinstance(spec, str) else spec for spec in specs]
        defaults = {"template": Template.load("phi"), "tokens_per_image": TOKENS, "max_length": 1000, "pixels": pixels}
        return build_dataset(specs, DataOptions(tokenizer=tokenizer, **{**defaults, **options}))

    return build


def test_items_are_the_template_s_ids_with_pictures_expanded(build, write, llava, tokenizer):
    records = [
        llava("one", "red.jpg", ("<image>\nwhat is it?", "a red cat"), ("and?", "no more")),
        llava("two", ["green.jpg", "blue.jpg"], ("<image> or <image>?", "blue")),
        llava("text", None, ("hi", "hello")),
    ]
    data = build(write(records))
    template, image = Template.load("phi"), image_token_id(tokenizer)
    for i, record in enumerate(records):
        item, sample = data[i], Sample.from_llava(record)
        expected = template.encode(sample, tokenizer)
        expanded = [
            pair
            for pair in zip(expected["input_ids"], expected["labels"], strict=True)
            for _ in range(TOKENS if pair[0] == image else 1)
        ]
        assert item["input_ids"].tolist() == [token for token, _ in expanded]
        assert item["labels"].tolist() == [label for _, label in expanded]
        assert item["index"] == i and data.ids[i] == record["id"]
        assert data.lengths[i] == len(item["input_ids"])
        assert data.supervised[i] == (item["labels"][1:] != -100).sum() > 0
        assert (item["input_ids"] == image).sum() == TOKENS * len(sample.images)
    assert data[2]["pixel_values"] is None
    assert data[1]["pixel_values"].dtype == torch.uint8
    assert data[1]["pixel_values"].shape == (2, 3, 4, 4)
    assert data[1]["pixel_values"].amax(dim=(2, 3)).argmax(dim=1).tolist() == [1, 2]  # green, then blue
    assert list(data.ids) == data.ids[:] == ["one", "two", "text"]
    assert [image.size for image in data.load_images(1)] == [(32, 24), (32, 24)]


def test_pictures_inside_records(build, folder, tmp_path):
    def record(identity, *names):
        images = [{"bytes": (folder / f"{name}.jpg").read_bytes(), "path": None} for name in names]
        turns = [{"role": "user", "content": "<image>" * len(names)}, {"role": "assistant", "content": "yes"}]
        return {"id": identity, "messages": turns, "images": images}

    records = [record("a", "red"), record("b", "green", "blue"), record("bad", "broken")]
    table = datasets.Dataset.from_list(records).cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(tmp_path / "data.parquet")
    data = build(DataSpec(path=str(tmp_path / "data.parquet")), on_bad_sample="skip")
    assert data[1]["pixel_values"].amax(dim=(2, 3)).argmax(dim=1).tolist() == [1, 2]
    assert data[2]["skipped"] and (data[2]["labels"] == -100).all()


BAD = {
    "placeholders": ("both", "red.jpg", ("<image><image> both?", "yes")),
    "empty_answer": ("mute", None, ("hi", "")),
    "missing_image": ("lost", "absent.jpg", ("<image> what?", "nothing")),
    "unreadable_image": ("zero", "empty.jpg", ("<image> what?", "nothing")),
    "too_long": ("long", None, ("word " * 2000, "yes")),
}


@pytest.fixture
def bad(write, llava):
    records = [llava("good", "red.jpg", ("<image> what?", "a cat")), *(llava(*arguments) for arguments in BAD.values())]
    records.append({"id": "void"})
    records.append({"id": "order", "conversations": [{"from": "gpt", "value": "me first"}]})
    records.append("no record")
    records.append({"id": "odd", "conversations": ["turn"]})
    return write(records, "bad.json")


KINDS = {**{kind: [arguments[0]] for kind, arguments in BAD.items()}, "turn_order": ["order"]}
KINDS["no_conversation"] = ["void", "#8", "odd"]


def test_bad_samples_are_refused_with_counts_ids_and_remedy(build, bad):
    with pytest.raises(UserError) as error:
        build(bad)
    text = str(error.value)
    assert text.startswith("9 of 10 records cannot be used: 3 no_conversation (void, #8, odd); 1 ")
    assert "1 missing_image (lost)" in text
    assert f"Run `tinyllava data check {bad}` to see all, or set `on_bad_sample: skip`." in text
    assert text.count("\n") == 1


def test_both_numbers_of_a_mismatch_are_named(build, write, llava):
    with pytest.raises(UserError, match=r"both: 2 <image> in its text, but 1 image"):
        build(write([llava(*BAD["placeholders"])]))


def test_bad_samples_are_dropped_and_counted(build, bad):
    data = build(bad, on_bad_sample="skip")
    assert list(data.ids) == ["good"]
    assert {kind: entry["ids"] for kind, entry in data.bad_records.to_dict().items()} == KINDS
    assert all(entry["count"] == len(entry["ids"]) for entry in data.bad_records.to_dict().values())
    assert data.bad_records.to_dict()["missing_image"]["first"].startswith("image absent.jpg not found under")
    assert data.sources[0]["records"] == 10 and data.sources[0]["usable"] == 1


def test_nothing_to_learn(build, write, llava, tmp_path):
    (tmp_path / "mute.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}"
        "{{ '' if m.content == 'hush' else m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    records = [llava("a", None, ("say:", "word")), llava("b", None, ("say:", "hush"))]
    data = build(write(records), template=Template.load(tmp_path / "mute.jinja"), on_bad_sample="skip")
    assert list(data.ids) == ["a"] and data.bad_records.to_dict()["nothing_to_learn"]["ids"] == ["b"]


def test_nothing_left(build, bad, write, llava):
    with pytest.raises(UserError, match=r"no usable sample is left in .*only_bad\.json: dropped 1 empty_answer"):
        build(write([llava(*BAD["empty_answer"])], "only_bad.json"), on_bad_sample="skip")


def test_over_long_samples_lose_whole_rounds_from_the_end(build, write, llava, tokenizer):
    rounds = [(f"<image> question {n}?", f"answer {n}") for n in range(6)]
    record = llava("long", ["red.jpg", "green.jpg", "blue.jpg"] * 2, *rounds)
    record["conversations"].insert(0, {"from": "system", "value": "be brief"})
    path = write([record])
    whole = build(path)
    assert whole.bad_records.to_dict() == {}
    per_length = {}
    for limit in range(int(whole.lengths[0]) - 1, 0, -7):
        data = build(path, max_length=limit, on_bad_sample="skip") if limit > 60 else None
        if data is None:
            break
        item = data[0]
        pictures = 0 if item["pixel_values"] is None else len(item["pixel_values"])
        assert data.lengths[0] == len(item["input_ids"]) <= limit
        assert (item["input_ids"] == image_token_id(tokenizer)).sum() == TOKENS * pictures
        assert item["input_ids"][-1] == item["labels"][-1] == tokenizer.eos_token_id  # no answer is cut
        text = tokenizer.decode(item["labels"][item["labels"] != -100])
        assert re.findall(r"answer (\d)", text) == [str(n) for n in range(pictures)]
        assert item["input_ids"].tolist() == whole[0]["input_ids"][: len(item["input_ids"])].tolist()
        assert data.bad_records.to_dict()["shortened"] == {
            "count": 1,
            "ids": ["long"],
            "first": f"kept {pictures} of 6 rounds",
        }
        per_length[limit] = pictures
    assert set(per_length.values()) >= {2, 3, 4, 5} and list(per_length.values()) == sorted(per_length.values())[::-1]
    with pytest.raises(
        UserError, match=r"1 too_long \(long\).*6 x 5 for images.*first round alone is over max_length 20"
    ):
        build(path, max_length=20)


def test_weights_and_several_files(build, write, llava, folder):
    def spec(name, count, weight):
        path = write([llava(f"{name}{n}", "red.jpg", ("<image>?", name)) for n in range(count)], f"{name}.json")
        return DataSpec(path=path, images=[str(folder.parent), str(folder)], weight=weight)

    specs = [spec("a", 10, 2.0), spec("b", 10, 0.3), spec("c", 10, 1.5)]
    data = build(*specs)
    ids = list(data.ids)
    assert len(data) == 20 + 3 + 15
    assert all(ids.count(f"a{n}") == 2 for n in range(10))
    assert len({i for i in ids if i[0] == "b"}) == 3
    assert {ids.count(f"c{n}") for n in range(10)} == {1, 2}
    assert [entry["samples"] for entry in data.sources] == [20, 3, 15]
    assert list(build(*specs).ids) == ids and build(*specs).fingerprint == data.fingerprint
    assert list(build(*specs, seed=1).ids) != ids and build(*specs, seed=1).fingerprint != data.fingerprint
    assert data[37]["index"] == 37 and data[37]["pixel_values"] is not None


def test_tokenised_once_and_again_when_something_changes(build, write, llava, tokenizer, monkeypatch):
    path = write([llava("1", "red.jpg", ("<image> what?", "a cat"))])
    calls = []
    original = BoundTemplate.encode
    monkeypatch.setattr(BoundTemplate, "encode", lambda *a: calls.append(1) or original(*a))
    first = build(path)
    assert calls == [1]
    assert build(path).fingerprint == first.fingerprint
    tokenizer(["pad", "this please"], padding=True, truncation=True, max_length=4)  # leaves its mark in the tokenizer
    assert build(path).fingerprint == first.fingerprint
    assert calls == [1]
    changed = [
        {"template": Template.load("pretrain")},
        {"template": Template.load("phi", compat=True)},
        {"tokens_per_image": 6},
        {"max_length": 999},
    ]
    fingerprints = {build(path, **options).fingerprint for options in changed} | {first.fingerprint}
    assert len(calls) == 5 and len(fingerprints) == 5
    write([llava("1", "red.jpg", ("<image> what?", "a dog"))])
    assert build(path).fingerprint not in fingerprints
    assert len(calls) == 6


def test_files_that_vanish_are_noticed_in_spite_of_the_cache(build, write, llava, folder):
    path = write([llava("1", "red.jpg", ("<image> what?", "a cat"))])
    build(path)
    (folder / "red.jpg").unlink()
    with pytest.raises(UserError, match=r"1 missing_image \(1\)"):
        build(path)


def test_processes_give_the_same_rows(build, write, llava, monkeypatch, cache):
    path = write([llava(str(n), "red.jpg", ("<image> " + "word " * (n % 9), f"answer {n}")) for n in range(50)])
    one = build(path)  # fewer than RECORDS_PER_PROCESS: in this process
    monkeypatch.setattr(dataset_module, "RECORDS_PER_PROCESS", 25)
    monkeypatch.setattr(dataset_module.os, "cpu_count", lambda: 2)
    two = build(path, cache_dir=cache / "other")
    assert list(two.ids) == list(one.ids) == [str(n) for n in range(50)]
    assert (two.lengths == one.lengths).all() and two.fingerprint == one.fingerprint
    assert two[49]["input_ids"].tolist() == one[49]["input_ids"].tolist()


def test_unreadable_picture_in_a_worker(build, write, llava):
    path = write(
        [llava("fine", "red.jpg", ("<image> what?", "a cat")), llava("bad", "broken.jpg", ("<image> what?", "?"))]
    )

    def batches(policy):
        loader = torch.utils.data.DataLoader(
            build(path, on_bad_sample=policy), batch_size=2, num_workers=1, collate_fn=Collator(0)
        )
        return list(loader)

    with pytest.raises(UserError) as error:
        batches("error")
    assert re.fullmatch(
        r"record bad: image \S+broken\.jpg cannot be decoded \(.*\)\. Repair it, or set `on_bad_sample: skip`\.",
        str(error.value),
    )
    (batch,) = batches("skip")
    assert batch["skipped"].tolist() == [False, True]
    assert (batch["labels"][1] == -100).all() and (batch["labels"][0] != -100).any()
    assert batch["pixel_values"].shape == (2, 3, 4, 4)


def test_what_travels_to_a_worker_is_small(build, write, llava):
    records = [llava(f"record {n}", "red.jpg", ("<image>\n" + "what is it? " * 10, "a cat")) for n in range(500)]
    data = build(write(records))
    assert data.lengths.sum() > 10_000
    pickled = pickle.dumps(data)
    assert len(pickled) < 20_000 + 8 * len(data)  # an index of 8 bytes a sample
    copy = pickle.loads(pickled)
    assert copy[499]["input_ids"].tolist() == data[499]["input_ids"].tolist()
    assert (copy.lengths == data.lengths).all()


def test_split_never_shares_a_record(build, write, llava):
    path = write([llava(str(n), None, ("say:", f"word {n}")) for n in range(20)])
    data = build(DataSpec(path=path, weight=2.0))
    for holdout, count in ((0.25, 5), (3, 3)):
        train, validation = hold_out(data, holdout, seed=1)
        assert len(validation) == len(set(validation.ids)) == count
        assert len(train) == 2 * (20 - count) and not set(train.ids) & set(validation.ids)
        assert validation[0]["index"] == 0 and len(validation.lengths) == count
        assert len({data.fingerprint, train.fingerprint, validation.fingerprint}) == 3
    assert list(hold_out(data, 3, seed=1)[1].ids) == list(hold_out(data, 3, seed=1)[1].ids)
    assert list(hold_out(data, 3, seed=1)[1].ids) != list(hold_out(data, 3, seed=2)[1].ids)
    with pytest.raises(UserError, match="cannot hold out 20 of 20"):
        hold_out(data, 20)


def test_a_tokenizer_without_image_token_is_refused_first(tokenizer):
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer.__class__.from_str(
            '{"model":{"type":"BPE","vocab":{},"merges":[]}}'
        )
    )
    with pytest.raises(UserError, match="no <image> token"):
        build_dataset(
            [DataSpec(path="not even looked at")],
            DataOptions(Template.load("phi"), plain, tokens_per_image=TOKENS, pixels=pixels, max_length=10),
        )


def test_streaming_gives_the_same_items(build, bad, write, llava):
    path = write([llava(str(n), "red.jpg", ("<image> what?", f"answer {n}")) for n in range(5)])
    mapped = build(path)
    folder = mapped.origins[0].roots
    stream = build(DataSpec(path=path, images=folder, streaming=True))
    items = list(islice(stream, 5))
    assert [item["index"] for item in items] == [0, 1, 2, 3, 4]
    order = [[item["input_ids"].tolist() for item in mapped].index(item["input_ids"].tolist()) for item in items]
    assert sorted(order) == [0, 1, 2, 3, 4] != order  # shuffled, and always alike
    assert [item["input_ids"].tolist() for item in islice(stream, 5)] == [item["input_ids"].tolist() for item in items]
    for a, b in zip(items, (mapped[at] for at in order), strict=True):
        assert a["input_ids"].tolist() == b["input_ids"].tolist() and a["labels"].tolist() == b["labels"].tolist()
        assert (a["pixel_values"] == b["pixel_values"]).all()

    spec = DataSpec(path=bad, images=folder, streaming=True)
    stream = build(spec, on_bad_sample="skip")
    assert len({item["id"] for item in islice(stream, 2)}) == 1  # and the next pass
    found = {kind: sorted(entry["ids"]) for kind, entry in stream.bad_records.to_dict().items()}
    assert found.keys() == KINDS.keys()
    assert all(set(found[kind]) == set(ids) for kind, ids in KINDS.items())
    with pytest.raises(UserError, match=r"record \S+: .*Repair it, or set `on_bad_sample: skip`"):
        next(iter(build(spec)))
    with pytest.raises(UserError, match=r"data\.json does not stream but others do"):
        build(spec, DataSpec(path=path, images=folder))
