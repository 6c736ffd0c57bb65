"""A recipe's own tokens (`add_tokens`): exact in text, learned, kept in answers, and saved with the checkpoint."""

import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AddedToken, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import LLAMA, PHI, tiny_model
from tests.data.test_template import TOKENIZERS, make
from tests.tiny_session import tiny_session
from tests.tiny_vlm import build_tiny
from tests.train.tiny_run import recipe
from tinyllava import checkpoint
from tinyllava.config import Recipe, Tune
from tinyllava.data.sample import Message, Sample
from tinyllava.data.special_tokens import add_image_token, add_own_tokens
from tinyllava.errors import UserError
from tinyllava.infer import Session
from tinyllava.train import stage
from tinyllava.train.start import start_stage
from tinyllava.train.tune import apply_tuning

OWN = ["<loc_1>", "<loc_2>", "[SEG]"]
TEXTS = ["<loc_1><loc_2> a", "at <loc_1> and <loc_2>, [SEG] too", "[SEG]", "<loc_2>  two spaces", "é<loc_1>\n<loc_2>"]
UNTIED = {**LLAMA, "tie_word_embeddings": False}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_goes_around_them_unchanged(name: str, tmp_path: Path) -> None:
    tokenizer = make(name, tmp_path)
    add_image_token(tokenizer)
    size = len(tokenizer)
    assert add_own_tokens(tokenizer, OWN) == [size, size + 1, size + 2]
    assert add_own_tokens(tokenizer, OWN) == []  # not twice
    tokenizer.save_pretrained(tmp_path / "saved")
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        for text in TEXTS:
            if name in ("bos", "llama_legacy") and re.search(r"[>\]][^ <]", text):
                continue  # these put a space before every text, so `[SEG],` and `[SEG] ,` are the same to them
            ids = one(text, add_special_tokens=False)["input_ids"]
            assert sum(token >= size for token in ids) == sum(text.count(token) for token in OWN)
            for skip in (True, False):
                assert one.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False).strip() == text


@pytest.mark.parametrize(
    "tokens, reason",
    [
        (["<loc_1>", "<loc_1>"], "'<loc_1>': each is listed once"),
        ([""], "'': each is listed once, with no spaces"),
        (["<loc_1> "], "'<loc_1> ': each is listed once, with no spaces around it"),
        (["\t<loc_1>"], "with no spaces around it"),
        (["<image>"], "'<image>': each is listed once, with no spaces around it and no <image> in it"),
        (["<image>_1"], "and no <image> in it"),
        (["</s>"], "'</s>': the tokenizer has this token already"),
        (["a"], "'a': the tokenizer has this token already"),
    ],
)
def test_what_cannot_be_a_token_is_refused_by_name(tokens: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=r"^model\.add_tokens: cannot add .*\.$") as caught:
        build_tiny(tiny_model(add_tokens=tokens))
    assert reason in str(caught.value)


@pytest.mark.parametrize("wrong", ["<loc_1>", [5], [None], {"a": 1}])
def test_tokens_are_a_list_of_texts(wrong: object) -> None:
    with pytest.raises(ValueError, match="add_tokens"):
        Recipe.model_validate({"model": tiny_model(add_tokens=wrong), "stages": {"a": {"data": [{"path": "x"}]}}})


def save_llm(folder: Path, llm: dict, spare: int = 0) -> str:
    """An LLM with a tokenizer as on the Hub, with `spare` rows more than its tokenizer needs."""
    base = build_tiny(tiny_model(llm=llm))
    names = [token for token in base.tokenizer.get_vocab() if token != "<image>"]
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, "</s>")),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>",
    )  # fmt: skip
    config = base.model.config.text_config
    config.vocab_size = len(names) + spare
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    plain.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("llm", [LLAMA, UNTIED, PHI], ids=["tied", "untied", "bias"])
@pytest.mark.parametrize("spare", [0, 60])
def test_they_start_from_the_mean_of_the_others(llm: dict, spare: int, tmp_path: Path) -> None:
    folder = save_llm(tmp_path / "llm", llm, spare)
    llm_alone = AutoModelForCausalLM.from_pretrained(folder)
    vlm = build_tiny({**tiny_model(), "llm": folder, "add_tokens": OWN})
    ids = vlm.tokenizer.convert_tokens_to_ids(OWN)
    known = llm_alone.config.vocab_size - spare
    assert ids == [known + 1, known + 2, known + 3]  # <image> is before them
    assert vlm.model.config.new_tokens == [known, *ids]
    embeddings, head = vlm.model.get_input_embeddings(), vlm.model.get_output_embeddings()
    assert embeddings.num_embeddings == head.out_features == max(known + 4, known + spare)
    for before, after in [
        (llm_alone.get_input_embeddings(), embeddings),
        (llm_alone.get_output_embeddings(), head),
    ]:
        assert torch.equal(after.weight[:known], before.weight[:known])
        torch.testing.assert_close(after.weight[ids], after.weight[: known + 1].mean(0).expand(3, -1))
    if head.bias is not None:
        torch.testing.assert_close(head.bias[ids], head.bias[: known + 1].mean().expand(3))


ANSWER = "<loc_1><loc_2> a"
TURNS = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": ANSWER}]


def make_recipe(folder: Path, tune: dict, model: dict) -> Recipe:
    (folder / "records.json").write_text(json.dumps([{"id": str(at), "conversations": TURNS} for at in range(4)]))
    chosen = recipe(folder, tune, model, ("finetune",), num_train_epochs=60, save_strategy="no", learning_rate=2e-2)
    one = chosen.stages["finetune"]
    one.global_batch_size = 4
    one.data[0].path, one.validation = str(folder / "records.json"), None
    return chosen


LORA = {"lora": {"r": 16, "alpha": 64, "new_tokens": True}}


@pytest.mark.parametrize("llm, tuning", [(LLAMA, LORA), (UNTIED, "full")], ids=["lora-tied", "full-untied"])
def test_a_run_learns_them_and_answers_keep_them(llm: dict, tuning: object, tmp_path: Path) -> None:
    start = build_tiny(tiny_model(llm=llm))
    with torch.no_grad():  # a head of a size with which an adapter can choose tokens
        start.model.get_output_embeddings().weight.mul_(8)
    checkpoint.save(start, tmp_path / "base")  # knows no token of its own
    model = {"checkpoint": str(tmp_path / "base"), "add_tokens": OWN}
    final = stage.run(make_recipe(tmp_path, {"llm": tuning, "connector": "frozen"}, model), "tiny", tmp_path / "run")
    session = Session.load(final, device="cpu")
    ids = session.tokenizer.convert_tokens_to_ids(OWN)
    assert session.model.config.new_tokens == ids == list(range(len(start.tokenizer), len(start.tokenizer) + 3))
    trained = session.model.get_input_embeddings().weight
    assert len({tuple(row) for row in trained[ids].tolist()}) == 3  # no longer the mean
    if tuning != "full":
        assert torch.equal(trained[: ids[0]], start.model.get_input_embeddings().weight[: ids[0]])

    asked = Sample([Message("user", "Where?")])
    assert session.generate([asked], max_new_tokens=20) == [ANSWER]
    assert "".join(session.stream_answer(asked, max_new_tokens=20)) == ANSWER
    assert session.chat("Where?", max_new_tokens=20) == session.conversation.messages[-1].text == ANSWER
    ((best, other),) = session.loglikelihood([asked], [[ANSWER, "<loc_2><loc_1> a"]])
    assert best.is_greedy and best.total > other.total


def test_they_are_in_plain_checkpoints_and_in_labels(tmp_path: Path) -> None:
    vlm = build_tiny(tiny_model(add_tokens=OWN))
    checkpoint.save(vlm, tmp_path / "c")
    processor = AutoProcessor.from_pretrained(tmp_path / "c")
    ids = processor.tokenizer("<loc_1><loc_2> a", add_special_tokens=False)["input_ids"]
    assert processor.decode(ids, skip_special_tokens=True) == "<loc_1><loc_2> a"
    assert not set(ids[:2]) & set(processor.tokenizer.all_special_ids)  # vLLM leaves special ones out
    again = checkpoint.load(tmp_path / "c")
    assert again.tokenizer.convert_tokens_to_ids(OWN) == vlm.tokenizer.convert_tokens_to_ids(OWN)
    encoded = again.template.encode(
        Sample([Message("user", "Where?"), Message("assistant", "<loc_1><loc_2> a")]), again.tokenizer
    )
    labels = [label for label in encoded["labels"] if label != -100]
    assert again.tokenizer.decode(labels) == " <loc_1><loc_2> a</s>"


def test_tokens_are_added_to_a_finished_model(tmp_path: Path) -> None:
    vlm = build_tiny(tiny_model(llm=UNTIED, add_tokens=OWN[:1]))
    apply_tuning(vlm.model, Tune.model_validate({"llm": "lora"}), seed=0)
    checkpoint.save(vlm, tmp_path / "c")
    chosen = make_recipe(tmp_path, {"llm": "embeddings"}, {"checkpoint": str(tmp_path / "c"), "add_tokens": OWN})
    started, files = start_stage(chosen, None)
    first, *more = started.tokenizer.convert_tokens_to_ids(OWN)
    assert started.model.config.new_tokens[-2:] == more and first == vlm.tokenizer.convert_tokens_to_ids(OWN[0])
    assert not files  # no file on disk has these rows
    checkpoint.save(started, tmp_path / "again")
    assert checkpoint.load(tmp_path / "again").model.lm_head.out_features == len(started.tokenizer)
    with pytest.raises(UserError, match=r"model\.add_tokens: cannot add '</s>'"):
        start_stage(make_recipe(tmp_path, {}, {"checkpoint": str(tmp_path / "c"), "add_tokens": ["</s>"]}), None)
    vlm = checkpoint.load(tmp_path / "c")
    vlm.model.config.head_rows = 300
    with pytest.raises(UserError, match="checkpoint of the original never answers with a token above 300"):
        from tinyllava.model.build import add_tokens

        add_tokens(vlm, ["[NEW]"])


def test_the_hash_of_a_recipe_and_of_its_data_include_them(tmp_path: Path) -> None:
    recipes = [make_recipe(tmp_path, {}, tiny_model(add_tokens=tokens)) for tokens in ([], OWN, OWN[:2])]
    assert len({one.compute_hash() for one in recipes}) == 3


def test_special_tokens_that_are_content_stay_in_answers() -> None:
    session = tiny_session()
    tokenizer = session.tokenizer
    content = ["<|box_start|>", "<loc0001>"]  # as in Qwen2-VL and PaliGemma: special, but part of answers
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in content], special_tokens=True)
    tokenizer.add_tokens([AddedToken("USER", special=True)], special_tokens=True)  # of the template
    reader = type(session.reader).from_vlm(session.vlm)
    answer = "<|box_start|>a<loc0001> b"
    ids = tokenizer(f"<s>{answer}<pad><image>USER</s> more", add_special_tokens=False)["input_ids"]
    assert reader.decode(ids) == answer
    assert "".join(reader.stream_text(iter(ids))) == answer


def test_a_stage_that_does_not_train_them_says_so(caplog: pytest.LogCaptureFixture) -> None:
    for tune, says in [("frozen", True), ("lora", True), ("embeddings", False), (LORA, False), ("full", False)]:
        caplog.clear()
        vlm = build_tiny(tiny_model(add_tokens=OWN), empty=tune == "full")
        apply_tuning(vlm.model, Tune.model_validate({"llm": tune}), seed=0)
        assert ("3 new tokens of the LLM are not trained in this stage" in caplog.text) == says


def test_a_trained_tokenizer_does_not_learn_from_them(tmp_path: Path) -> None:
    chosen = make_recipe(tmp_path, {"llm": "full"}, tiny_model(add_tokens=["LOCATION"]))
    records = json.loads((tmp_path / "records.json").read_text())
    records[0]["conversations"] = [TURNS[0], {"from": "gpt", "value": "LOCATION " * 200}]
    (tmp_path / "records.json").write_text(json.dumps(records))
    vlm, _ = start_stage(chosen, None)
    assert vlm.tokenizer.tokenize("LOCATION LOCATIONS") == ["LOCATION", "Ġ", "LOCATION", "S"]
