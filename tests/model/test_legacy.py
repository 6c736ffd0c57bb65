"""Checkpoints of the original TinyLLaVA Factory give what the original computed from them.

They lie in tests/parity/legacy_checkpoints (README there); LEGACY_CHECKPOINTS=DIR judges by others of the same form.

    LEGACY_CHECKPOINTS=DIR pytest tests/model/test_legacy.py
"""

import json
import os
import shutil
from functools import cache
from pathlib import Path

import PIL
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import tinyllava
from tinyllava import checkpoint
from tinyllava.checkpoint.layout import explain_not_plain
from tinyllava.config import Recipe
from tinyllava.data.sample import Sample
from tinyllava.data.template import Template
from tinyllava.errors import UserError
from tinyllava.infer import Session
from tinyllava.train import stage as stages

HERE = Path(__file__).parents[1] / "parity" / "legacy_checkpoints"
ROOT = Path(os.environ.get("LEGACY_CHECKPOINTS") or HERE)
NAMES = sorted(path.parent.name for path in ROOT.glob("*/expected.json"))
TOLERANCE = {"atol": 1e-4, "rtol": 0}
IN_FP16 = {"atol": 0.05, "rtol": 0}  # the original's loader merges an adapter in fp16, ours in fp32


@cache
def expected(name: str) -> dict:
    return json.loads((ROOT / name / "expected.json").read_text())


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(ROOT / name / "expected.safetensors")


def lacking(name: str) -> dict:
    """What the checkpoint does not carry."""
    facts = expected(name)
    given = {"template": facts["conv_version"], "image_processor": facts["image_processor"]}
    configs = {"dinov2_config": "dinov2_config", "qformer_config": "qformer_bert_config"}
    return given | {ours: facts[theirs] for ours, theirs in configs.items() if theirs in facts}


@cache
def session(name: str) -> Session:
    return tinyllava.load(ROOT / name / "checkpoint", device="cpu", **lacking(name))


def records(name: str) -> list[dict]:
    facts = expected(name)
    return [*facts["samples"], *facts.get("samples_pretrain_template", [])]


CASES = [(name, record["id"]) for name in NAMES for record in records(name)]
PICTURES = [(name, record["id"]) for name in NAMES for record in records(name) if record["image"]]


class Case:
    """One sample of one checkpoint: as it is written, as ours, and what the original made of it."""

    def __init__(self, name: str, sample: str) -> None:
        self.name, self.session = name, session(name)
        self.record = next(record for record in records(name) if record["id"] == sample)
        self.template = Template.load(self.record["conv_version"], compat=True)
        self.image_id = self.session.model.config.image_token_id
        image = {"image": str(ROOT / name / self.record["image"])} if self.record["image"] else {}
        self.sample = Sample.from_llava({"id": sample, "conversations": self.record["conversations"], **image})

    @property
    def picture(self) -> Image.Image:
        return Image.open(ROOT / self.name / self.record["image"]).convert("RGB")

    @property
    def pixels(self) -> torch.Tensor | None:
        """The original's: Pillow 13 resizes otherwise than Pillow 12 (`test_pixels`)."""
        return tensors(self.name)[f"{self.sample.id}.pixel_values"][None] if self.record["image"] else None

    def wanted(self, key: str) -> torch.Tensor:
        """A tensor of the original; of an adapter, as merged in fp32."""
        own = f"{self.sample.id}.{key}"
        return tensors(self.name).get(f"fp32_merge.{own}", tensors(self.name).get(own))

    def fact(self, key: str) -> object:
        merged = expected(self.name).get("fp32_merge", {"samples": []})["samples"]
        return next((record for record in merged if record["id"] == self.sample.id), self.record)[key]

    def placeholders(self, ids: list[int]) -> list[int]:
        return [-200 if token == self.image_id else token for token in ids]

    def expanded(self, ids: list[int], *others: list[int]) -> list[torch.Tensor]:
        """Rows [1, L] with as many placeholders as the picture has tokens."""
        times = torch.where(torch.tensor(ids) == self.image_id, self.session.processor.tokens_per_image, 1)
        return [torch.tensor(row).repeat_interleave(times)[None] for row in (ids, *others)]


def cases(pairs: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", pairs, ids="-".join, indirect=True)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer(name: str) -> None:
    facts, tokenizer = expected(name)["tokenizer"], session(name).tokenizer
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (facts["pad_token_id"], facts["eos_token_id"])
    own = sorted(tokenizer.get_vocab().values())  # <image> and what transformers 5 adds (Gemma's <mask>) come after
    assert own[: facts["length"]] == list(range(facts["length"])) and own[-1] == tokenizer.convert_tokens_to_ids(
        "<image>"
    )


@cases(CASES)
def test_ids_and_labels(case: Case) -> None:
    encoded = case.template.encode(case.sample, case.session.tokenizer)
    assert case.placeholders(encoded["input_ids"]) == case.record["input_ids"]
    assert encoded["labels"] == case.record["labels"]


@cases(CASES)
def test_prompts(case: Case) -> None:
    prompt = case.template.encode_prompt(case.sample, case.session.tokenizer)
    assert prompt["text"] == case.record["prompt_generate"]
    assert case.placeholders(prompt["input_ids"]) == case.record["input_ids_generate"]


@cases(PICTURES)
def test_pixels(case: Case) -> None:
    """Equal, but for what Pillow 13 changed: it resizes the height first where that is cheaper, and a pass rounds."""
    made = case.session.processor.image_processor(case.picture, return_tensors="pt")["pixel_values"][0]
    difference = (made - case.wanted("pixel_values")).abs()
    if int(PIL.__version__.split(".")[0]) < 13 and difference.max() > TOLERANCE["atol"]:
        width, height = case.picture.size
        assert height > width and difference.max() < 0.15 and difference.mean() < 0.005
    else:
        assert difference.max() < TOLERANCE["atol"]
    # What training and serving use is the same: uint8 here, normalised on the device.
    config, raw = case.session.model.config, case.session.processor.to_pixels([case.picture])[0]
    mean, std = (torch.tensor(row)[:, None, None] for row in (config.image_mean, config.image_std))
    torch.testing.assert_close((raw / 255 - mean) / std, made, **TOLERANCE)


@cases(PICTURES)
@torch.no_grad()
def test_features(case: Case) -> None:
    made = case.session.model.model.compute_tower_features(case.pixels)[0]
    wanted = case.wanted("vision_features")
    if wanted is None:  # a mixture: two towers, joined on channels
        wanted = torch.cat([case.wanted("vision_features_clip"), case.wanted("vision_features_dinov2")], dim=-1)
    torch.testing.assert_close(made, wanted, **TOLERANCE)


@cases(PICTURES)
@torch.no_grad()
def test_image_tokens(case: Case) -> None:
    model = case.session.model.model
    made = model.multi_modal_projector(model.compute_tower_features(case.pixels))[0]
    assert len(made) == case.session.processor.tokens_per_image == case.record["image_tokens"]
    torch.testing.assert_close(made, case.wanted("connector_out"), **TOLERANCE)


@cases(CASES)
@torch.no_grad()
def test_logits(case: Case) -> None:
    (ids,) = case.expanded(case.template.encode(case.sample, case.session.tokenizer)["input_ids"])
    assert ids.shape[1] == case.record["expanded_length"]
    logits = case.session.model(input_ids=ids, pixel_values=case.pixels).logits[0]
    last = case.wanted("logits_last")
    torch.testing.assert_close(logits[-1, : len(last)], last, **TOLERANCE)
    torch.testing.assert_close(logits[:, :16], case.wanted("logits_first16"), **TOLERANCE)
    torch.testing.assert_close(logits.logsumexp(-1), case.wanted("logsumexp"), **TOLERANCE)
    in_fp16 = tensors(case.name)[f"{case.sample.id}.logits_first16"]
    torch.testing.assert_close(logits[:, :16], in_fp16, **IN_FP16)


@cases(CASES)
@torch.no_grad()
def test_losses(case: Case) -> None:
    encoded = case.template.encode(case.sample, case.session.tokenizer)
    ids, labels = case.expanded(encoded["input_ids"], encoded["labels"])
    loss = case.session.model(input_ids=ids, labels=labels, pixel_values=case.pixels).loss.item()
    assert loss == pytest.approx(case.fact("loss"), abs=TOLERANCE["atol"])
    assert loss == pytest.approx(case.record["loss"], abs=IN_FP16["atol"])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_loss_of_a_batch(name: str) -> None:
    """Padded on the right, with a sample that has no picture."""
    rows, pixels = [], []
    for record in expected(name)["samples"]:
        case = Case(name, record["id"])
        encoded = case.template.encode(case.sample, case.session.tokenizer)
        ids, labels = case.expanded(encoded["input_ids"], encoded["labels"])
        rows.append((ids[0], labels[0], torch.ones_like(ids[0])))
        pixels += [] if case.pixels is None else [case.pixels]
    ids, labels, mask = (
        torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=value)
        for column, value in zip(zip(*rows, strict=True), (session(name).pad_id, -100, 0), strict=True)
    )
    loss = session(name).model(input_ids=ids, labels=labels, attention_mask=mask, pixel_values=torch.cat(pixels)).loss
    wanted = expected(name).get("fp32_merge", expected(name))["batch_loss"]
    assert loss.item() == pytest.approx(wanted, abs=TOLERANCE["atol"])


def greedy(case: Case, model: torch.nn.Module | None = None) -> list[int]:
    (ids,) = case.expanded(case.template.encode_prompt(case.sample, case.session.tokenizer)["input_ids"])
    model = model or case.session.model
    pixels = {} if case.pixels is None else {"pixel_values": case.pixels}
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, **pixels
    )
    return made[0, ids.shape[1] :].tolist()


@cases(CASES)
def test_greedy_tokens(case: Case) -> None:
    assert greedy(case) == case.fact("greedy_ids")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_saved_again_it_is_an_ordinary_checkpoint(name: str, tmp_path: Path) -> None:
    """With its switches; and where it is plain llava, transformers itself computes what the original did."""
    old = session(name)
    checkpoint.save(old.vlm, tmp_path / "c")
    new = tinyllava.load(tmp_path / "c", device="cpu")
    assert (new.template.name, new.template.compat) == (old.template.name, True)
    assert new.processor.tokens_per_image == old.processor.tokens_per_image
    models = [new.model]
    if explain_not_plain(old.model) is None:
        models.append(AutoModelForImageTextToText.from_pretrained(tmp_path / "c").eval())
        assert type(models[-1]).__module__ == "transformers.models.llava.modeling_llava"
    for record in expected(name)["samples"]:
        case = Case(name, record["id"])
        prompt = case.template.encode_prompt(case.sample, old.tokenizer)["input_ids"]
        assert case.template.encode_prompt(case.sample, new.tokenizer)["input_ids"] == prompt
        (ids,) = case.expanded(prompt)
        rows = old.model.config.head_rows
        logits = old.model(input_ids=ids, pixel_values=case.pixels).logits[..., :rows]
        for model in models:
            own = model(input_ids=ids, pixel_values=case.pixels).logits[..., :rows]
            torch.testing.assert_close(own, logits, atol=1e-6, rtol=0)
            assert greedy(case, model) == case.fact("greedy_ids")


def test_a_recipe_starts_from_a_released_checkpoint(pictures: Path, tmp_path: Path) -> None:
    trainer = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none", "dataloader_num_workers": 0}
    stage = {
        "data": [{"path": str(pictures / "instructions.json")}],
        "tune": {"llm": {"lora": {"r": 2, "alpha": 4}}},
        "global_batch_size": 4,
        "trainer": trainer,
    }
    model = {"checkpoint": str(HERE / "lora_llama_clip_mlp2x" / "checkpoint")}
    final = stages.run(Recipe.model_validate({"model": model, "stages": {"tuned": stage}}), "own", tmp_path)
    tuned = tinyllava.load(final, device="cpu")
    assert (tuned.template.name, tuned.template.compat, tuned.model.config.head_rows) == ("llama", True, 640)
    assert tuned.chat("What is it?", str(pictures / "1.png"), max_new_tokens=2) is not None


# -- TinyLLaVABench ----------------------------------------------------------------------------------------------------


def as_bench(name: str, folder: Path, model_type: str, **fields: object) -> Path:
    """A checkpoint of the Factory as its forerunner wrote it: LLaVA's flat config and names."""
    source = HERE / name / "checkpoint"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model*", "config.json"))
    written = json.loads((source / "config.json").read_text())
    flat = {**written["text_config"], "model_type": model_type, "mm_vision_tower": "a/b", **fields}
    (folder / "config.json").write_text(json.dumps(flat))
    state = {key: tensor for path in sorted(source.glob("*.safetensors")) for key, tensor in load_file(path).items()}
    renames = {
        "vision_tower._vision_tower.": "model.vision_tower.vision_tower.",
        "connector._connector.": "model.mm_projector.",
        "language_model.": "",
    }
    for old, new in renames.items():
        state = {new + key.removeprefix(old) if key.startswith(old) else key: t for key, t in state.items()}
    save_file(state, folder / "model.safetensors")
    return folder


@torch.no_grad()
def test_benchs_keys_give_the_same_model(tmp_path: Path) -> None:
    name = "full_llama_clip_mlp2x"
    fields = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    directory = as_bench(name, tmp_path / "c", "tiny_llava", image_aspect_ratio="pad", **fields)
    with pytest.raises(UserError, match=r"vision_config=\{...\}"):
        tinyllava.load(directory, device="cpu", template="llama")
    vision = json.loads((HERE / name / "checkpoint" / "config.json").read_text())["vision_config"]
    with pytest.raises(UserError, match=r"template=\.\.\."):
        tinyllava.load(directory, device="cpu", vision_config=vision)
    bench = tinyllava.load(directory, device="cpu", template="llama", vision_config=vision)
    assert bench.processor.image_processor.do_pad
    factory = tinyllava.load(HERE / name / "checkpoint", device="cpu", template="llama")
    image = bench.model.config.image_token_id
    ids = torch.tensor([[1, 5, *[image] * 16, 7, 9]])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    wanted = factory.model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(bench.model(input_ids=ids, pixel_values=pixels).logits, wanted, rtol=0, atol=0)


@torch.no_grad()
def test_benchs_siglip_gives_all_patches_of_its_last_layer_but_one(tmp_path: Path) -> None:
    """It was stored without that last layer and without its head."""
    name = "full_phi_siglip_resampler"
    directory = as_bench(name, tmp_path / "c", "tiny_llava_phi", mm_projector_type="linear")
    state = load_file(directory / "model.safetensors")
    unused = ("model.mm_projector.", "model.vision_tower.vision_tower.vision_model.head.")
    last = "model.vision_tower.vision_tower.vision_model.encoder.layers.2."
    state = {key: tensor for key, tensor in state.items() if not key.startswith((*unused, last))}
    state |= {"model.mm_projector.weight": torch.randn(40, 48), "model.mm_projector.bias": torch.zeros(40)}
    save_file(state, directory / "model.safetensors")
    vision = json.loads((HERE / name / "checkpoint" / "config.json").read_text())["vision_config"]
    bench = tinyllava.load(directory, device="cpu", vision_config=vision)
    assert (bench.template.name, bench.processor.tokens_per_image) == ("phi", 16)
    factory = tinyllava.load(HERE / name / "checkpoint", device="cpu")
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    wanted = factory.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(bench.model.model.compute_tower_features(pixels), wanted, rtol=0, atol=0)


# -- what is refused ---------------------------------------------------------------------------------------------------


def copy_of(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(HERE / name / "checkpoint", folder / "any name"))


def given(name: str) -> dict:
    facts = json.loads((HERE / name / "expected.json").read_text())
    return {"template": facts["conv_version"], "device": "cpu"}


def test_missing_unexpected_and_misshapen_weights_are_listed(tmp_path: Path) -> None:
    directory = copy_of("full_llama_clip_mlp2x", tmp_path)
    state = load_file(directory / "model.safetensors")
    state["language_model.model.what.weight"] = state.pop("language_model.model.norm.weight")
    del state["connector._connector.2.bias"]
    name = "vision_tower._vision_tower.vision_model.pre_layrnorm.bias"
    state[name] = state[name][:3].clone()
    save_file(state, directory / "model.safetensors")
    with pytest.raises(UserError) as error:
        tinyllava.load(directory, **given("full_llama_clip_mlp2x"))
    for part in (
        "2 missing (language_model.model.norm.weight, multi_modal_projector.linear_2.bias)",
        "1 unexpected (language_model.model.what.weight)",
        "1 of another shape (vision_tower.vision_model.pre_layrnorm.bias)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("lost", ["connector/pytorch_model.bin", "language_model/pytorch_model.bin"])
def test_a_component_without_weights_is_refused(lost: str, tmp_path: Path) -> None:
    directory = copy_of("lora_llama_clip_mlp2x", tmp_path)
    (directory / lost).unlink()
    with pytest.raises(UserError, match="holds no weights"):
        tinyllava.load(directory, **given("lora_llama_clip_mlp2x"))


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    directory = copy_of("full_phi_siglip_resampler", tmp_path)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors is missing"):
        tinyllava.load(directory, **given("full_phi_siglip_resampler"))


def test_an_adapter_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    directory = copy_of("lora_llama_clip_mlp2x", tmp_path)
    state = load_file(directory / "adapter_model.safetensors")
    key = next(name for name in state if name.endswith("lora_A.weight"))
    state[key.replace("layers.", "layers.9")] = state.pop(key)
    save_file(state, directory / "adapter_model.safetensors")
    with pytest.raises(UserError, match="fit nothing in its base"):
        tinyllava.load(directory, **given("lora_llama_clip_mlp2x"))


def test_an_adapter_on_every_part_is_merged(tmp_path: Path) -> None:
    directory = copy_of("lora_llama_clip_mlp2x", tmp_path)
    adapter, places = load_file(directory / "adapter_model.safetensors"), {}
    for ours, theirs in {
        "multi_modal_projector.linear_2": "connector._connector.2",
        "vision_tower.encoder.layers.1.mlp.fc1": "vision_tower._vision_tower.vision_model.encoder.layers.1.mlp.fc1",
    }.items():
        weight = session_of(directory).model.model.get_submodule(ours).weight
        down, up = torch.randn(8, weight.shape[1]), torch.randn(weight.shape[0], 8)
        adapter |= {f"base_model.model.{theirs}.lora_{x}.weight": t for x, t in (("A", down), ("B", up))}
        places[ours] = weight + 16 / 8 * up @ down
    save_file(adapter, directory / "adapter_model.safetensors")
    for name, wanted in places.items():
        torch.testing.assert_close(session_of(directory).model.model.get_submodule(name).weight, wanted)


def session_of(directory: Path) -> Session:
    return tinyllava.load(directory, device="cpu", template="llama")


def test_codes_of_qlora_are_refused(tmp_path: Path) -> None:
    directory = copy_of("components_pretrain_llama_clip_mlp2x", tmp_path)
    path = directory / "language_model" / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    torch.save(state, path)
    with pytest.raises(UserError, match=r"int8 codes without their scales .*QLoRA"):
        tinyllava.load(directory, **given("components_pretrain_llama_clip_mlp2x"))


def test_what_must_be_given_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dinov2_config=\{...\}"):
        tinyllava.load(HERE / "full_tinyllama_mof_mofmlp" / "checkpoint", device="cpu")
    directory = copy_of("full_llama_clip_mlp2x", tmp_path)
    for file in directory.glob("tokenizer*"):
        file.rename(tmp_path / file.name)
    with pytest.raises(UserError, match=r"no tokenizer .* tokenizer="):
        tinyllava.load(directory, device="cpu")
    tinyllava.load(directory, device="cpu", tokenizer=str(tmp_path))
    directory, ours = HERE / "full_llama_clip_mlp2x" / "checkpoint", tmp_path / "ours"
    loaded = tinyllava.load(directory, device="cpu")  # the template is that of the LLM's family
    assert loaded.template.name == "llama"
    checkpoint.save(loaded.vlm, ours)
    with pytest.raises(UserError, match="carries its own template"):
        tinyllava.load(ours, template="phi", device="cpu")
