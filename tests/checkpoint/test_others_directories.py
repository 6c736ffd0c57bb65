"""Directories that others wrote, whole or damaged, and keywords of `from_pretrained`: loaded, or refused in a line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tinyllava as package
from tests.cli_tools import CommandResult, assert_refused, recipe, run_command_line, write_recipe  # noqa: F401  (the fixture `tinyllava`)
from tests.conftest import CLIP, LLAMA
from tests.hub_server import COMMIT
from tests.tiny_session import NEW, PICTURES, tiny_session
from tests.tiny_vlm import build_moved_vlm, build_tiny, compute_logits
from tinyllava import checkpoint
from tinyllava.checkpoint import weight_files
from tinyllava.checkpoint.adapter import has_adapter
from tinyllava.config import ModelSpec, load_recipe
from tinyllava.errors import UserError
from tinyllava.eval.run import hash_checkpoint
from tinyllava.find import NANO_FOLDER
from tinyllava.infer import find_checkpoint
from tinyllava.model.build import build
from tinyllava.train.stage import run

Damage = Callable[[Path], object]
WEIGHTS, SHARDS = "model.safetensors", "model.safetensors.index.json"
CLIP_PROCESSOR = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "crop_size": None}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


class Evil:
    """Its pickle runs a command when it is loaded without care."""

    def __reduce__(self) -> tuple:
        return (Path("evil-ran").touch, ())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the layout of llava-hf, as transformers writes it, and `sharded` beside it."""
    directory = tmp_path_factory.mktemp("published") / "base"
    vlm = build_tiny()
    vlm.processor.to_plain().save_pretrained(directory)
    text = {**LLAMA, "vocab_size": len(vlm.tokenizer), "tie_word_embeddings": False}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{key: value for key, value in CLIP.items() if key != "model_type"}),
        text_config=LlamaConfig(**{key: value for key, value in text.items() if key != "model_type"}),
        image_token_index=vlm.model.config.image_token_id,
        image_seq_length=16,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(directory)
    sharded = Path(shutil.copytree(directory, directory.with_name("sharded")))
    (sharded / WEIGHTS).unlink()
    model.save_pretrained(sharded, max_shard_size="100KB")
    return directory


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "copy"))


def write(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda directory: (directory / name).write_bytes(data)


def cut(name: str) -> Damage:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:-9])


def remove(name: str) -> Damage:
    return lambda directory: (directory / name).unlink()


def set_fields(name: str, **fields: object) -> Damage:
    def change(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**content, **fields}))

    return change


def change_weights(change: Callable[[dict], dict]) -> Damage:
    return lambda directory: save_file(change(load_file(directory / WEIGHTS)), directory / WEIGHTS, {"format": "pt"})


def pickle(content: object = None, shards: int = 0) -> Damage:
    """Replace the safetensors by .bin files: of the same weights, or of `content`."""

    def change(directory: Path) -> None:
        state = load_file(directory / WEIGHTS)
        (directory / WEIGHTS).unlink()
        if not shards:
            torch.save(state if content is None else content, directory / "pytorch_model.bin")
            return
        files = {name: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, name in enumerate(state)}
        for file in set(files.values()):
            torch.save({name: state[name] for name in state if files[name] == file}, directory / file)
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))

    return change


def break_link(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to("gone")


def replace_by_folder(name: str) -> Damage:
    return lambda directory: ((directory / name).unlink(), (directory / name).mkdir())


DAMAGES: dict[str, tuple[Damage, str]] = {
    "no processor": (remove("processor_config.json"), "has no image processor"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer: none of tokenizer.json, tokenizer.model"),
    "no weights": (remove(WEIGHTS), r"no weights. Looked for model.safetensors.*pytorch_model.bin"),
    "lfs weights": (write(WEIGHTS, POINTER), "Git LFS pointer.*git lfs pull"),
    "lfs tokenizer": (write("tokenizer.json", POINTER), "tokenizer.json is a Git LFS pointer"),
    "lfs config": (write("config.json", POINTER), "config.json is a Git LFS pointer"),
    "truncated": (cut(WEIGHTS), "model.safetensors is damaged.*Copy it again"),
    "html": (write(WEIGHTS, "<html>404 Not Found</html>" * 9), "model.safetensors is damaged"),
    "truncated tokenizer": (cut("tokenizer.json"), "tokenizer.json as JSON"),
    "no tokenizer in it": (write("tokenizer.json", "{}"), "describes no tokenizer"),
    "unknown tokenizer": (
        write("tokenizer.json", '{"model": {"type": "X"}}'),
        "cannot read the image processor",
    ),
    "slow tokenizer": (
        lambda d: (
            write("vocab.json", '{"a": 0}')(d),
            write("merges.txt", "#version: 0.2")(d),
            remove("tokenizer.json")(d),
        ),
        "has no tokenizer.json, and transformers cannot make one",
    ),
    "empty weights": (write(WEIGHTS, ""), "model.safetensors is empty"),
    "empty config": (write("generation_config.json", ""), "generation_config.json is empty"),
    "broken config": (write("config.json", "<html>404</html>"), "config.json as JSON"),
    "config is a list": (write("config.json", "[1]"), "holds a list, expected a JSON object"),
    "processor is a list": (write("processor_config.json", "[1]"), "holds a list, expected a JSON object"),
    "empty processor": (write("processor_config.json", "{}"), "cannot read the image processor"),
    "no model_type": (set_fields("config.json", model_type=None), "names no model_type"),
    "unknown model_type": (set_fields("config.json", model_type="foo_vl"), "foo_vl.*import the module"),
    "code": (set_fields("config.json", model_type="x", auto_map={"AutoConfig": "x.Y"}), "contains custom code"),
    "text": (write("config.json", '{"model_type": "llama"}'), "holds a llama model, expected a llava one"),
    "other VLM": (write("config.json", '{"model_type": "qwen2_vl"}'), "holds a qwen2_vl model"),
    "tower": (set_fields("config.json", vision_config={"model_type": "pixtral"}), "vision tower family 'pixtral'"),
    "wrong type": (set_fields("config.json", image_seq_length="x"), "image_seq_length.*expected int"),
    "image token": (set_fields("config.json", image_token_index=99999), "has the id 99999, and the tokenizer says 3"),
    "layer": (set_fields("config.json", vision_feature_layer=-99), "feature_layer -99: the tower has 3 layers"),
    "awq": (set_fields("config.json", quantization_config={"quant_method": "awq"}), r"stored quantised \(awq\)"),
    "awq of the LLM": (
        set_fields("config.json", text_config={"model_type": "llama", "quantization_config": {"quant_method": "awq"}}),
        r"stored quantised \(awq\)",
    ),
    "missing key": (change_weights(lambda state: dict(list(state.items())[1:])), "1 missing"),
    "unexpected key": (change_weights(lambda state: {**state, "x.weight": torch.zeros(2)}), "1 unexpected.*x.weight"),
    "wrong shape": (
        change_weights(lambda state: {**state, "multi_modal_projector.linear_1.bias": torch.zeros(3)}),
        "1 of another shape.*linear_1.bias",
    ),
    "a folder": (replace_by_folder(WEIGHTS), r"cannot read .*model.safetensors: Is a directory"),
    "a config folder": (replace_by_folder("config.json"), r"cannot read .*config.json: Is a directory"),
    "broken link": (break_link, "link to a file that is gone"),
    "code in a pickle": (pickle({"a": Evil()}), "as plain tensors.*safetensors"),
    "a pickled list": (pickle([1]), "other things than named tensors"),
    "truncated pickle": (lambda d: (pickle()(d), cut("pytorch_model.bin")(d)), "as plain tensors"),
    "no square": (
        set_fields("processor_config.json", image_processor={"size": {"longest_edge": 32}, **CLIP_PROCESSOR}),
        "expected squares of one size",
    ),
    "half an adapter": (
        write("adapter_model.safetensors", b"\2" + b"\0" * 7 + b"{}"),
        "adapter_config.json is missing",
    ),
    "other adapter": (
        lambda d: (shutil.copy(d / WEIGHTS, d / "adapter_model.safetensors"), write("adapter_config.json", "{}")(d)),
        "peft_type None, expected LORA",
    ),
}
SHARD_DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing shard": (
        lambda directory: next(directory.glob("model-00002*")).unlink(),
        "model-00002.* is missing",
    ),
    "missing index": (remove(SHARDS), f"has shards of model.safetensors, but no {SHARDS}"),
    "lfs shard": (lambda directory: next(directory.glob("model-00002*")).write_text(POINTER), "Git LFS pointer"),
    "index is a list": (write(SHARDS, "[]"), "holds a list"),
    "index without files": (write(SHARDS, "{}"), "names no files"),
}


def assert_told(directory: Path, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        package.load(directory, device="cpu")
    assert len(str(error.value).splitlines()) <= 2 and len(str(error.value)) < 700


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_directory_is_refused_with_the_reason(
    name: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, reason = DAMAGES[name]
    damage(copy)
    assert_told(copy, reason)
    assert not (tmp_path / "evil-ran").exists()


@pytest.mark.parametrize("name", SHARD_DAMAGES)
def test_a_damaged_set_of_shards_is_refused_with_the_reason(name: str, published: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(published.with_name("sharded"), tmp_path / "copy"))
    damage, reason = SHARD_DAMAGES[name]
    damage(copy)
    assert_told(copy, reason)


def test_shards_of_ours_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "SHARD_SIZE", "50KB")
    checkpoint.save(build_moved_vlm(), tmp_path)
    assert list(tmp_path.glob("language_model-*-of-*.safetensors"))
    checkpoint.load(tmp_path)


@pytest.mark.parametrize("record", ["{}", "[]", '{"format": 1, "files": 3}', '{"format": 1', '{"format": 9}'])
def test_a_broken_record_of_ours_is_refused(record: str, tmp_path: Path) -> None:
    shutil.copytree(NANO_FOLDER / "model", tmp_path / "copy")
    write("tinyllava.json", record)(tmp_path / "copy")
    assert_told(tmp_path / "copy", "newer version" if "9" in record else r"tinyllava.json")


def test_a_file_that_may_not_be_read_does_not_count_as_missing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests can run as root, who may read everything: so opening is made to fail."""
    opened = Path.open

    def refuse(path: Path, *args: object, **kwargs: object) -> object:
        if path.name == refused:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    for refused in (WEIGHTS, "config.json", "tokenizer.json", "processor_config.json"):
        assert_told(copy, f"cannot read .*{refused}: Permission denied. Check its owner")


def test_every_command_says_it(copy: Path, tinyllava: Callable[..., CommandResult], pictures: Path) -> None:
    write(WEIGHTS, POINTER)(copy)
    assert_refused(tinyllava("chat", copy, "--prompt", "What?"), "Git LFS pointer")
    assert_refused(tinyllava("export", copy, "--to", "hf", "--output", copy / "x"), "Git LFS pointer")
    assert_refused(tinyllava("eval", copy, "--tasks", "stamps"), "Git LFS pointer")
    quantised = ("--to", "split", "--output", copy / "x", "--lacking", "load_in_4bit=true")
    assert_refused(tinyllava("export", copy, *quantised), "quantised weights cannot be exported")
    content = {**recipe(pictures), "model": {"checkpoint": str(copy), "lacking": {"template": "llama"}}}
    assert_refused(tinyllava("look", write_recipe(copy, content)), "Git LFS pointer")


@pytest.mark.parametrize("damage", [pickle(), pickle(shards=2)], ids=["whole", "sharded"])
def test_pickled_weights_are_read(damage: Damage, copy: Path, published: Path, pictures: Path) -> None:
    before = hash_checkpoint(copy)
    expected = checkpoint.load(published)
    damage(copy)
    loaded = checkpoint.load(copy)
    logits = compute_logits(loaded.model, loaded.processor, pictures)
    assert torch.equal(logits, compute_logits(expected.model, expected.processor, pictures))
    changed = hash_checkpoint(copy)
    (copy / next(copy.glob("pytorch_model*.bin"))).write_bytes(b"x")
    assert len({before, changed, hash_checkpoint(copy)}) == 3  # scores of other weights are never shown for these


def test_a_chat_template_in_the_tokenizers_config_is_read(copy: Path) -> None:
    """transformers 4 wrote it there. Without a template at all, the answer says how to name one."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    (copy / "chat_template.jinja").unlink()
    assert_told(copy, "none. Name one of ours, in model.template or after `--lacking template=`: gemma, llama")
    set_fields("tokenizer_config.json", chat_template=template)(copy)
    assert package.load(copy, device="cpu").tokenizer.chat_template == template
    other = [{"name": "default", "template": template}, {"name": "rag", "template": "x"}]
    set_fields("tokenizer_config.json", chat_template=other)(copy)
    assert package.load(copy, device="cpu").chat("What?", max_new_tokens=2) is not None


PARTS: dict[str, tuple[Damage, str]] = {
    "lfs": (write(WEIGHTS, POINTER), "Git LFS pointer"),
    "truncated": (cut(WEIGHTS), "is damaged"),
    "wrong shape": (set_fields("config.json", intermediate_size=96), "do not have the shapes of its config"),
    "code in a pickle": (pickle({"a": Evil()}), "Weights only load failed"),
    "awq": (set_fields("config.json", quantization_config={"quant_method": "awq"}), r"stored quantised \(awq\)"),
    "code": (set_fields("config.json", model_type="x", auto_map={"AutoConfig": "x.Y"}), "contains custom code"),
    "image processor": (write("preprocessor_config.json", POINTER), "Git LFS pointer"),
    "its size": (
        write("preprocessor_config.json", '{"size": "x", "image_processor_type": "CLIPImageProcessor"}'),
        "size",
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_damaged_part_is_refused_with_the_reason(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    part = Path(shutil.copytree(NANO_FOLDER / "vision_tower", tmp_path / "tower"))
    damage, reason = PARTS[name]
    damage(part)
    spec = {"llm": "nano", "vision_tower": str(part), "connector": "linear", "template": "plain"}
    with pytest.raises(UserError, match=reason) as error:
        build(ModelSpec.model_validate(spec))
    assert len(str(error.value).splitlines()) <= 2 and not (tmp_path / "evil-ran").exists()


# -- adapters that stand alone -----------------------------------------------------------------------------------------


def write_peft(base: Path, directory: Path, name: object, **options: object) -> torch.nn.Module:
    """Write an adapter as peft does, for the base `name`; return the adapted model."""
    torch.manual_seed(1)
    model = LlavaForConditionalGeneration.from_pretrained(base)
    targets = r".*language_model.*\.(q_proj|v_proj)"
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, target_modules=targets, **options))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(name)
    adapted.save_pretrained(directory)
    return adapted.eval()


@pytest.mark.parametrize(
    ("place", "options"),
    [("{base}", {}), ("base", {"modules_to_save": ["multi_modal_projector"]}), ("../base", {"use_dora": True})],
    ids=["absolute", "beside, with its connector", "above, as .bin"],
)
def test_an_adapter_alone_is_put_onto_its_base(
    place: str, options: dict, published: Path, pictures: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(published, tmp_path / "base"))
    directory = tmp_path / "adapter"
    theirs = write_peft(base, directory, place.format(base=base), **options)
    if options.get("use_dora"):
        torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
        (directory / "adapter_model.safetensors").unlink()
    session = package.load(directory, device="cpu", template="llama")
    expected = compute_logits(theirs, session.processor, pictures)
    torch.testing.assert_close(compute_logits(session.model, session.processor, pictures), expected)
    checkpoint.save(session.vlm, tmp_path / "saved")
    saved = checkpoint.load(tmp_path / "saved")
    torch.testing.assert_close(compute_logits(saved.model, saved.processor, pictures), expected)


@pytest.mark.parametrize("name", ["/elsewhere/base", r"C:\models\base", "someone/base"])
def test_a_base_that_moved_with_its_adapter_is_found_beside_it(name: str, published: Path, tmp_path: Path) -> None:
    write_peft(shutil.copytree(published, tmp_path / "base"), tmp_path / "adapter", name)
    assert has_adapter(package.load(tmp_path / "adapter", device="cpu", template="llama").model)


def test_a_missing_base_is_told_with_the_places_searched(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "adapter"
    write_peft(published, directory, "me/gone")
    assert find_checkpoint(directory) == directory
    assert_told(directory, rf"missing: 'me/gone'. Looked in {directory}/me/gone.*, me/gone, .*, the Hub's cache")
    looked = rf"missing: '/gone'. Looked in /gone, {tmp_path}/gone\."
    for name, reason in ((None, "names no base"), ("/gone", looked), (".", "missing")):
        set_fields("adapter_config.json", base_model_name_or_path=name)(directory)
        assert_told(directory, reason)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--me--gone"
    shutil.copytree(published, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    write("main", COMMIT)(cached / "refs")
    set_fields("adapter_config.json", base_model_name_or_path="me/gone")(directory)
    assert has_adapter(package.load(directory, device="cpu").model)
    set_fields("adapter_config.json", base_model_name_or_path=str(published))(directory)
    before = hash_checkpoint(directory)
    for fields, reason in (
        ({"r": 9}, "of another shape"),
        ({"target_modules": ["x"]}, "x"),
        ({"peft_type": "IA3"}, "IA3"),
    ):
        whole = (directory / "adapter_config.json").read_text()
        set_fields("adapter_config.json", **fields)(directory)
        assert_told(directory, f"the adapter in {directory}.*{reason}")
        (directory / "adapter_config.json").write_text(whole)
    other = Path(shutil.copytree(published, tmp_path / "base"))
    cut(WEIGHTS)(other)
    set_fields("adapter_config.json", base_model_name_or_path="base")(directory)
    assert hash_checkpoint(directory) != before
    (directory / "adapter_model.safetensors").unlink()
    assert_told(directory, "adapter_model.safetensors is missing")


def test_a_run_starts_from_an_adapter_alone(published: Path, pictures: Path, tmp_path: Path) -> None:
    write_peft(published, tmp_path / "adapter", published)
    content = recipe(pictures, model={"checkpoint": str(tmp_path / "adapter"), "lacking": {"template": "llama"}})
    content["stages"] = {"finetune": content["stages"]["finetune"]}
    content["stages"]["finetune"]["trainer"] |= {"max_steps": 1, "save_steps": 1}
    final = run(load_recipe(str(write_recipe(tmp_path, content))), "tiny", tmp_path / "run")
    assert has_adapter(checkpoint.load(final).model)
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


def test_no_path_of_this_machine_is_saved(tmp_path: Path) -> None:
    for part in ("llm", "vision_tower"):
        shutil.copytree(NANO_FOLDER / part, tmp_path / "parts" / part)
    parts = {part: str(tmp_path / "parts" / part) for part in ("llm", "vision_tower")}
    vlm = build(ModelSpec.model_validate({**parts, "connector": "mlp2x_gelu", "template": "plain"}))
    checkpoint.save(vlm, tmp_path / "saved")
    checkpoint.save(checkpoint.load(tmp_path / "saved"), tmp_path / "again")
    texts = [path for path in tmp_path.glob("[sa]*/*") if path.suffix in {".json", ".jinja"}]
    assert len(texts) > 10 and not any(str(tmp_path) in path.read_text() for path in texts)


# -- keywords ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"device_map": "auto"}, "device_map is no keyword of `load`: give .*device='cuda:0'"),
        ({"torch_dtype": "bfloat16"}, "give dtype='bfloat16'"),
        ({"trust_remote_code": True}, "import your own code before you load"),
        ({"local_files_only": True}, "HF_HUB_OFFLINE=1"),
        ({"load_in_4bits": True}, "did you mean 'load_in_4bit'"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "give one of"),
        ({"load_in_4bit": "yes"}, "give one of"),
        ({"load_in_4bit": 1}, "give one of"),
        ({"quantization_config": BitsAndBytesConfig()}, "without load_in_4bit or load_in_8bit"),
        ({"quantization_config": {"bits": 4}}, "expected transformers' BitsAndBytesConfig"),
    ],
)
def test_other_keywords_are_refused_by_name(keywords: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        package.load("nano", device="cpu", **keywords)


@pytest.mark.parametrize("keyword", ["load_in_4bit", "load_in_8bit", "quantization_config"])
def test_the_llm_is_quantised_on_loading(keyword: str, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    checkpoint.save(tiny_session().vlm, tmp_path / "whole")
    whole = package.load(tmp_path / "whole", device="cpu")
    value = BitsAndBytesConfig(load_in_4bit=True) if keyword == "quantization_config" else True
    session = package.load(tmp_path / "whole", device="cpu", **{keyword: value})
    kind = bitsandbytes.nn.Linear8bitLt if keyword == "load_in_8bit" else bitsandbytes.nn.Linear4bit
    packed = {name for name, module in session.model.named_modules() if isinstance(module, kind)}
    llm = {name for name, _ in session.model.model.language_model.named_modules() if name.endswith("_proj")}
    assert packed == {f"model.language_model.{name}" for name in llm}
    close, exact = (compute_last(each) for each in (session, whole))
    assert 0 < (close - exact).norm() < 0.5 * exact.norm()
    assert session.chat("What?", PICTURES[0], **NEW)
    with pytest.raises(UserError, match="the llm is quantised"):
        checkpoint.save(session.vlm, tmp_path / "x")


def compute_last(session: package.infer.Session) -> torch.Tensor:
    """The last logits [V] of a question without an image."""
    ids = session.tokenizer("What is in the picture?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return session.model(input_ids=ids).logits[0, -1]


def test_dora_is_not_quantised_to_8_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    checkpoint.save(build_moved_vlm({"llm": {"lora": {"r": 4, "alpha": 8, "use_dora": True}}}), tmp_path / "d")
    with pytest.raises(UserError, match="Use load_in_4bit=True"):
        package.load(tmp_path / "d", device="cpu", load_in_8bit=True)
    assert package.load(tmp_path / "d", device="cpu", load_in_4bit=True).chat("What?", PICTURES[0], **NEW) is not None
