"""Tiles in the model: training, a Session and transformers have one set of ids, features and answers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.conftest import CLIP, DINOV2, PHI, SIGLIP, tiny_model
from tests.tiny_session import WORDS, corpus, tiny_session
from tests.tiny_vlm import build_tiny
from tinyllava import checkpoint
from tinyllava.checkpoint.adapter import merge_adapter
from tinyllava.config import ModelSpec, Recipe, Tune
from tinyllava.data.collate import Collator, make_image_inputs
from tinyllava.data.encode import expand
from tinyllava.data.sample import Message, Sample
from tinyllava.data.tiles import count_image_tokens
from tinyllava.factory import Factory
from tinyllava.infer import Session
from tinyllava.train import stage
from tinyllava.train.tune import apply_tuning

TILED = {"config": SIGLIP, "tiles": 4}  # 32 pixels a side, 16 tokens a view
SIZES = [(100, 100), (20, 30), (120, 40), (33, 90), (90, 60)]  # grids 2 x 2, 1 x 1, 1 x 3, 3 x 1, 2 x 2
COUNTS = [82, 16, 65, 67, 82]
NEW = {"max_new_tokens": 8}


def make_picture(number: int) -> Image.Image:
    width, height = SIZES[number]
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8))


PICTURES = [make_picture(number) for number in range(len(SIZES))]
SAMPLES = [  # a question each, with none to three pictures anywhere in its text
    Sample([Message("user", f"<image>\n{WORDS[0]}")], PICTURES[:1]),
    Sample([Message("user", f"a <image>, {WORDS[1]} <image> or\n<image>?")], PICTURES[2:5]),
    Sample([Message("user", WORDS[2])]),
    Sample([Message("user", f"<image><image> {WORDS[3]}")], PICTURES[1:3]),
    Sample([Message("user", f"{WORDS[0]} <image>")], PICTURES[1:2]),
]


@pytest.fixture(scope="module")
def session() -> Session:
    return tiny_session(vision_tower=TILED)


def test_a_transparent_image_is_shown_on_white_in_all_views(session: Session) -> None:
    ink = PICTURES[0].convert("RGBA")
    ink.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 100).astype(np.uint8), (100, 1))))
    white = Image.alpha_composite(Image.new("RGBA", ink.size, "white"), ink).convert("RGB")
    seen, expected = (
        session.processor(images=[image], text="<image>", return_tensors="pt")["pixel_values"] for image in (ink, white)
    )
    assert len(seen) == 5 and torch.equal(seen, expected)
    sample = replace(SAMPLES[0], images=[ink])
    assert session.generate([sample], **NEW) == session.generate([replace(sample, images=[white])], **NEW)


def add_answer(sample: Sample) -> Sample:
    return Sample([*sample.messages, Message("assistant", "a red cat")], sample.images)


def make_item(session: Session, sample: Sample) -> dict:
    """A sample as the dataset gives it to the Collator."""
    grids = session.processor.choose_grids([image.size for image in sample.images])
    encoded = session.template.encode(add_answer(sample), session.tokenizer)
    ids, labels = (np.array(encoded[name]) for name in ("input_ids", "labels"))
    counts = count_image_tokens(session.processor.tokens_per_image, grids)
    ids, labels = expand(ids, labels, session.model.config.image_token_id, counts)
    pictures = make_image_inputs(session.processor.to_pixels, sample.images, grids)
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels), "index": 0, **pictures}


def make_transformers_inputs(session: Session, processor, samples: list[Sample]) -> dict:
    texts = [session.template.encode_prompt(sample, session.tokenizer)["text"] for sample in samples]
    images = [image for sample in samples for image in sample.images]
    options = {"return_tensors": "pt", "padding": True, "padding_side": "left", "add_special_tokens": False}
    return processor(images=images or None, text=texts, **options)


def test_a_picture_s_tokens_are_its_views_with_the_separator_after_each_row(session: Session) -> None:
    processor, model = session.processor, session.model.model
    grids = processor.choose_grids(SIZES)
    assert grids == [(2, 2), (1, 1), (1, 3), (3, 1), (2, 2)]
    features = model.get_image_features(processor.to_pixels(PICTURES, grids), torch.tensor(grids)).pooler_output
    assert list(map(len, features)) == COUNTS == count_image_tokens(16, grids)
    separator = model.multi_modal_projector.row_separator.weight[0]
    for image, grid, tokens in zip(PICTURES, grids, features, strict=True):
        tiles = [_to_pixels(tile) for tile in processor.tiling.cut(image, grid)]
        alone = [processor.to_pixels([image], [(1, 1)]), *tiles]
        views = [model.get_image_features(view).pooler_output[0] for view in alone]
        rows = [views[0]]
        for row in range(grid[0] if len(alone) > 1 else 0):
            rows += [*views[1 + row * grid[1] : 1 + (row + 1) * grid[1]], separator[None]]
        torch.testing.assert_close(tokens, torch.cat(rows), rtol=1e-4, atol=1e-4)


def _to_pixels(tile: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(tile).copy()).permute(2, 0, 1)[None]


def test_training_a_session_and_transformers_have_the_same_ids_and_answers(session: Session, tmp_path: Path) -> None:
    checkpoint.save(session.vlm, tmp_path)
    assert json.loads((tmp_path / "tinyllava.json").read_text())["plain"] is False
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    for sample in SAMPLES:
        prompt = session.make_prompt(sample)
        inputs = make_transformers_inputs(session, processor, [sample])
        assert inputs["input_ids"][0].tolist() == prompt.ids
        assert make_item(session, sample)["input_ids"][: prompt.length].tolist() == prompt.ids
    inputs = make_transformers_inputs(session, processor, SAMPLES)
    assert inputs["image_grids"].tolist() == [[2, 2], [1, 3], [3, 1], [2, 2], [1, 1], [1, 3], [1, 1]]
    made = model.generate(**inputs, **NEW, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    theirs = [text.strip() for text in processor.batch_decode(made, skip_special_tokens=True)]
    ours = Session.load(tmp_path, device="cpu").generate(SAMPLES, **NEW)
    assert ours == theirs and len(set(ours)) >= 4
    sizes = [(height, width) for width, height in SIZES]
    planned = processor._get_num_multimodal_tokens(sizes)
    assert (planned.num_image_tokens, planned.num_image_patches) == (COUNTS, [5, 1, 4, 4, 5])


def test_transformers_beams_keep_each_row_s_pictures_together(session: Session) -> None:
    inputs = make_transformers_inputs(session, session.processor, SAMPLES)
    together = session.model.generate(**inputs, **NEW, num_beams=2, do_sample=False)
    answers = session.processor.batch_decode(together[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text.strip() for text in answers] == session.generate(SAMPLES, num_beams=2, **NEW)


def test_a_batch_changes_nothing(session: Session) -> None:
    alone = [session.generate([sample], **NEW)[0] for sample in SAMPLES]
    for size in (2, 3, None):
        session.images.cache.clear()
        assert session.generate(SAMPLES, batch_size=size, **NEW) == alone
    told = [session.generate([SAMPLES[0]], **NEW)[0]]
    assert [session.chat(WORDS[0], PICTURES[0], **NEW)] == told


def test_the_loss_of_a_batch_is_that_of_its_samples(session: Session) -> None:
    items = [make_item(session, sample) for sample in SAMPLES]

    def loss(chosen: list[dict]) -> torch.Tensor:
        batch = Collator(session.pad_id)(chosen)
        batch.pop("index")
        return session.model(**batch, num_items_in_batch=1).loss

    torch.testing.assert_close(loss(items), torch.stack([loss([one]) for one in items]).sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shown", [[0], [1], []], ids=["tiles", "thumbnail only", "text only"])
def test_the_separator_is_in_every_training_step(session: Session, shown: list[int]) -> None:
    sample = Sample([Message("user", "<image>" * len(shown) + "what?")], [PICTURES[number] for number in shown])
    batch = Collator(session.pad_id)([make_item(session, sample)])
    batch.pop("index")
    session.model.train()
    session.model(**batch).loss.backward()
    gradient = session.model.model.multi_modal_projector.row_separator.weight.grad
    session.model.zero_grad()
    session.model.eval()
    assert gradient is not None and bool(gradient.any()) == (shown == [0])


def test_what_does_not_fit_together_is_refused_with_both_numbers(session: Session) -> None:
    inputs = make_transformers_inputs(session, session.processor, SAMPLES[:1])
    with pytest.raises(ValueError, match="82 image placeholders in input_ids, but 1 images have 65 tokens"):
        other = make_transformers_inputs(session, session.processor, [Sample(SAMPLES[0].messages, PICTURES[2:3])])
        session.model(**{**inputs, "pixel_values": other["pixel_values"], "image_grids": other["image_grids"]})
    with pytest.raises(ValueError, match="4 views in pixel_values, but the 1 grids need 5"):
        session.model(**{**inputs, "pixel_values": inputs["pixel_values"][1:]})


@pytest.mark.parametrize(
    "tune",
    [
        {"llm": {"lora": {"r": 4, "alpha": 8}}, "connector": "full"},
        {"llm": "full"},
        {"connector": "frozen", "llm": "full"},
    ],
    ids=["lora", "full", "frozen connector"],
)
def test_the_separator_is_trained_and_saved_with_the_connector(tune: dict, tmp_path: Path) -> None:
    tiny = tiny_session(vision_tower=TILED, llm=PHI)
    model, name = tiny.model, "model.multi_modal_projector.row_separator.weight"
    before = model.state_dict()[name].clone()
    apply_tuning(model, Tune.model_validate(tune), seed=0)
    assert model.get_parameter(name).requires_grad == (tune.get("connector") != "frozen")
    batch = Collator(tiny.pad_id)([make_item(tiny, sample) for sample in SAMPLES])
    batch.pop("index")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and torch.equal(before, model.state_dict()[name]) == ("frozen" in tune.values())
    model.eval()
    checkpoint.save(tiny.vlm, tmp_path)
    loaded = checkpoint.load(tmp_path)
    assert loaded.processor.tiling == tiny.processor.tiling
    wanted = model(**batch).loss
    torch.testing.assert_close(loaded.model(**batch).loss, wanted, rtol=0, atol=0)
    if "lora" in str(tune):
        torch.testing.assert_close(merge_adapter(loaded.model)(**batch).loss, wanted, rtol=1e-4, atol=1e-4)


QUERIES = {"num_queries": 3, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OPTIONS = {"qformer": QUERIES, "resampler": {"num_queries": 3, "layers": 1}}
WIDTH = {**SIGLIP, "hidden_size": 32}  # the LLM's, for `identity`
MOF = {"model_type": "mof", "first": CLIP, "second": DINOV2}


@pytest.mark.parametrize(
    "tower,connector",
    [*((WIDTH, name) for name in Factory("connectors").list_names()), (DINOV2, "mlp"), (MOF, "mof_mlp")],
)
def test_every_connector_and_tower_takes_views(tower: dict, connector: str) -> None:
    spec = tiny_model(vision_tower={"config": tower, "tiles": 3}, connector={connector: OPTIONS.get(connector, {})})
    vlm, grids = build_tiny(spec, corpus()), [(1, 3), (1, 1)]
    pixels = vlm.processor.to_pixels(PICTURES[:2], grids)
    tokens = vlm.model.model.get_image_features(pixels, torch.tensor(grids)).pooler_output
    assert list(map(len, tokens)) == count_image_tokens(vlm.processor.tokens_per_image, grids)


def test_without_tiles_nothing_is_different(tmp_path: Path) -> None:
    plain, tiled = (build_tiny(tiny_model(vision_tower=tower), corpus()) for tower in ({"config": SIGLIP}, TILED))
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, tiled.model.state_dict()[name]) or "projector" in name
    small = PICTURES[1:2]
    assert torch.equal(plain.processor.to_pixels(small), tiled.processor.to_pixels(small, [(1, 1)]))
    checkpoint.save(plain, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llava" and "tiles" not in config
    inputs = plain.processor(images=PICTURES[:1], text="<image>", return_tensors="pt")
    assert "image_grids" not in inputs and inputs["pixel_values"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("aspect", ["square", "pad", "crop"])
def test_the_thumbnail_is_the_one_view_that_there_is_without_tiles(aspect: str) -> None:
    plain, tiled = (
        build_tiny(tiny_model(vision_tower={**tower, "image_aspect": aspect}), corpus()).processor
        for tower in ({"config": SIGLIP}, TILED)
    )
    views = tiled.to_pixels(PICTURES[2:3], [(1, 3)])
    assert torch.equal(views[:1], plain.to_pixels(PICTURES[2:3]))
    assert torch.equal(views[1:], torch.cat([_to_pixels(tile) for tile in tiled.tiling.cut(PICTURES[2], (1, 3))]))


def test_one_tile_is_no_choice() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        ModelSpec.model_validate(tiny_model(vision_tower={"config": SIGLIP, "tiles": 1}))


# -- a whole run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with 24 pictures of four shapes, and conversations with one, two or no picture."""
    folder, random = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    records = []
    for number in range(24):
        width, height = [(60, 60), (100, 36), (30, 96), (24, 20)][number % 4]
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        shown = [f"{number}.png", *([f"{number // 2}.png"] if number % 3 == 0 else [])] if number % 6 else []
        asked = {"from": "human", "value": "<image>\n" * len(shown) + "What is it?"}
        said = {"from": "gpt", "value": f"a thing of {width} by {height}"}
        records.append({"id": str(number), **({"image": shown} if shown else {}), "conversations": [asked, said]})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def make_recipe(photos: Path, **trainer: object) -> Recipe:
    trainer = {
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "report_to": "none",
        "max_steps": 6,
        "dataloader_num_workers": 0,
        **trainer,
    }
    one = {"data": [{"path": str(photos / "data.json")}], "global_batch_size": 4, "validation": 0.25}
    stages = {
        "pretrain": {**one, "trainer": {**trainer, "max_steps": 2}},
        "finetune": {**one, "tune": {"llm": "full"}, "trainer": {**trainer, "eval_steps": 3, "save_steps": 3}},
    }
    return Recipe.model_validate({"model": tiny_model(vision_tower=TILED, max_length=512), "stages": stages})


def test_a_run_with_tiles_trains_resumes_and_answers(photos: Path, tmp_path: Path) -> None:
    final = stage.run(make_recipe(photos, eval_strategy="steps"), "tiny", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    again = tmp_path / "b" / "finetune" / "final"
    for lost in (again, again.with_name("checkpoint-6")):  # as if killed after its third step
        shutil.rmtree(lost)
    assert stage.run(make_recipe(photos, eval_strategy="steps"), "tiny", tmp_path / "b") == again
    metrics = [
        (run / "finetune" / "metrics.jsonl").read_text().splitlines() for run in (tmp_path / "a", tmp_path / "b")
    ]
    first, second = ([json.loads(line) for line in lines] for lines in metrics)
    assert [line.get("loss") for line in first] == [line.get("loss") for line in second]
    assert [line["eval_loss"] for line in first if "eval_loss" in line]
    weights = [checkpoint.load(path).model.state_dict() for path in (final, again)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    separator = "model.multi_modal_projector.row_separator.weight"
    start = checkpoint.load(tmp_path / "a" / "pretrain" / "final").model.state_dict()[separator]
    assert not torch.equal(start, weights[0][separator])
    trained = Session.load(final, device="cpu")
    (answer,) = trained.generate([Sample([Message("user", "<image>\nWhat is it?")], [str(photos / "1.png")])], **NEW)
    assert isinstance(answer, str) and trained.make_prompt(SAMPLES[1]).length > 65 + 67 + 82
