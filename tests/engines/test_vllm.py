"""vLLM and plain transformers give our answers, or refuse the directory. Run it with `make test-engines`.

vLLM has an environment of its own, because it requires other versions. Where our two best tokens are closer than
TOLERANCE, either may be the answer. The images have the size of the tower: with torchvision, which vLLM requires,
transformers resizes images a little differently than with PIL.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.conftest import CLIP, DINOV2, SIGLIP, tiny_model
from tests.tiny_session import WORDS, corpus, picture
from tests.tiny_vlm import build_tiny
from tinyllava import checkpoint
from tinyllava.commands.export import export_checkpoint
from tinyllava.config import Tune
from tinyllava.data.sample import Message, Sample
from tinyllava.infer import Session
from tinyllava.train.tune import apply_tuning

PYTHON = os.environ.get("TINYLLAVA_ENGINES")
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not PYTHON, reason="vLLM has an environment of its own: run `make test-engines`"),
]
TOLERANCE = 0.01  # of differences of logits
NEW_TOKENS = 8  # as in answer.py

BASE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
TIED = {**BASE, "num_key_value_heads": 2, "tie_word_embeddings": True}
UNTIED = {**TIED, "tie_word_embeddings": False}
LLMS = {  # heads are 32 wide, which vLLM's attention requires
    "llama": {**UNTIED, "model_type": "llama", "num_key_value_heads": 1},
    "qwen2": {**TIED, "model_type": "qwen2"},
    "gemma": {**TIED, "model_type": "gemma", "head_dim": 32, "num_key_value_heads": 1},
    "phi3": {**UNTIED, "model_type": "phi3"},
    "qwen3": {**TIED, "model_type": "qwen3", "head_dim": 32},
    "gemma3_text": {**TIED, "model_type": "gemma3_text", "head_dim": 32},
    "mistral": {**UNTIED, "model_type": "mistral"},
    "stablelm": {**UNTIED, "model_type": "stablelm"},
}
SIZE = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96}
TOWERS = {"clip": {**CLIP, **SIZE}, "siglip": {**SIGLIP, **SIZE}}
PLAIN = [(llm, tower) for llm in ("llama", "qwen2", "gemma", "phi3") for tower in TOWERS]
PLAIN += [(llm, "clip") for llm in ("qwen3", "gemma3_text", "mistral", "stablelm")]
LORA = {"llm": {"lora": {"r": 4, "alpha": 16}}, "connector": "full"}
TUNES = {
    "lora": LORA,
    "all": {**LORA, "vision_tower": {"lora": {"r": 2, "alpha": 4}}, "connector": {"lora": {"r": 2, "alpha": 8}}},
    "rslora": {"llm": {"lora": {"r": 4, "alpha": 8, "use_rslora": True}}, "connector": "full"},
}


class Answer(NamedTuple):
    """Our greedy answer to one question."""

    prompt: list[int]
    ids: list[int]
    best: list[list[tuple[int, float]]]  # for each new token: (id, log-probability) of the two best


def save_random(directory: Path, tune: dict | None = None, **parts: object) -> None:
    """Save a model with weights that are large enough for its answers to depend on images and text."""
    vlm = build_tiny(tiny_model(**parts), corpus())
    if tune:
        apply_tuning(vlm.model, Tune.model_validate(tune), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            random = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:  # norms and biases keep their values: 0 is Gemma's norm, 1 that of others
                parameter.add_(random * 0.02)
            else:
                parameter.copy_(random * (0.3 if "embed_tokens" in name or "lm_head" in name else 0.12))
    checkpoint.save(vlm, directory)


def ask_ours(directory: Path, samples: list[Sample]) -> list[Answer]:
    """The answers of a Session, and the two best tokens of each step."""
    session = Session.load(directory)
    answers = []
    for sample in samples:
        text = session.generate([sample], max_new_tokens=NEW_TOKENS)[0]
        prompt = session.make_prompt(sample)
        first, best = len(prompt.ids), []
        for _ in range(NEW_TOKENS):
            logits = session.model.compute_logits(session.engine.compute_hidden([prompt], 1)[:, -1])[0].detach()
            logits[session.model.generation_config.suppress_tokens] = -torch.inf
            top = logits.log_softmax(-1).topk(2)
            best.append(list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
            prompt = prompt._replace(ids=[*prompt.ids, best[-1][0][0]])
            if prompt.ids[-1] in session.reader.end_ids:
                break
        ids = prompt.ids[first:]
        assert session.tokenizer.decode(ids, skip_special_tokens=True).strip() == text.strip()
        answers.append(Answer(prompt.ids[:first], ids, best))
    return answers


def run_engine(engine: str, folder: Path) -> subprocess.CompletedProcess:
    """Answer folder/jobs.json in a process without the package."""
    python = PYTHON if engine == "vllm" else sys.executable
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    settings |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    command = [python, str(Path(__file__).with_name("answer.py").resolve()), engine, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env={**os.environ, **settings})


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list]]:
    """{job: {"ours", "vllm" and, without an adapter, "transformers": answers}} of all models that vLLM takes."""
    folder = tmp_path_factory.mktemp("engines")
    images = [folder / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(images):
        picture(seed).crop((0, 0, 32, 32)).save(path)
    questions = [
        {"text": WORDS[0], "images": [str(images[0])]},
        {"text": WORDS[2], "images": [str(path) for path in images[1:]]},
        {"text": WORDS[1], "images": []},
    ]
    samples = [Sample([Message("user", "<image>\n" * len(q["images"]) + q["text"])], q["images"]) for q in questions]
    jobs, answers = [], {}

    def add(name: str, source: Path, served: Path, adapter: Path | None = None) -> None:
        suppressed = json.loads((served / "generation_config.json").read_text())["suppress_tokens"]
        paths = {"checkpoint": str(served), "adapter": str(adapter) if adapter else None}
        jobs.append({"name": name, **paths, "suppress": suppressed, "questions": questions})
        answers[name] = {"ours": ask_ours(source, samples)}

    for llm, tower in PLAIN:
        name = f"{llm}-{tower}"
        save_random(folder / name, llm=LLMS[llm], tower=TOWERS[tower])
        add(name, folder / name, folder / name)
    for name, tune in TUNES.items():
        source, merged, apart = folder / name, folder / f"{name}-merged", folder / f"{name}-apart"
        save_random(source, tune, llm=LLMS["llama"], tower=TOWERS["siglip"])
        export_checkpoint(str(source), "hf", merged, name, "auto", {})
        export_checkpoint(str(source), "adapter", apart, name, "auto", {})
        add(merged.name, source, merged)
        add(apart.name, source, apart / "base", apart / "adapter")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    vllm = run_engine("vllm", folder)
    assert vllm.returncode == 0, vllm.stderr[-3000:]
    results = {"vllm": json.loads((folder / "vllm.json").read_text())}
    (folder / "jobs.json").write_text(json.dumps([job for job in jobs if job["adapter"] is None]))
    plain = run_engine("transformers", folder)
    assert plain.returncode == 0, plain.stderr[-3000:]
    results["transformers"] = json.loads((folder / "transformers.json").read_text())
    for engine, all_answers in results.items():
        for name, engine_answers in all_answers.items():
            answers[name][engine] = engine_answers
    return answers


NAMES = [f"{llm}-{tower}" for llm, tower in PLAIN] + [
    f"{name}-{form}" for name in TUNES for form in ("merged", "apart")
]


@pytest.mark.parametrize("name", NAMES)
def test_vllm_answers_as_we_do(name: str, compared: dict) -> None:
    sure = 0
    for ours, theirs in zip(compared[name]["ours"], compared[name]["vllm"], strict=True):
        assert theirs["prompt"] == ours.prompt
        for step, (token, (first, second)) in enumerate(zip(theirs["ids"], ours.best, strict=False)):
            # Only the difference counts: vLLM's log-probabilities are those before `suppress_tokens`.
            found = [theirs["logprobs"][step].get(str(candidate)) for candidate, _ in (first, second)]
            gap = first[1] - second[1]
            assert None in found or abs(found[0] - found[1] - gap) < TOLERANCE, (step, found, gap)
            if token != first[0]:
                assert gap < TOLERANCE, f"step {step}: {token}, expected {first[0]}"
                break  # the texts are different from here
            sure += None not in found
        else:
            assert theirs["ids"] == ours.ids
    assert sure > 0.8 * sum(len(ours.ids) for ours in compared[name]["ours"])


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("apart")])
def test_transformers_answers_as_we_do(name: str, compared: dict) -> None:
    for ours, theirs in zip(compared[name]["ours"], compared[name]["transformers"], strict=True):
        assert theirs["prompt"] == ours.prompt and theirs["ids"] == ours.ids


REFUSED = {  # {what vLLM says: (parts, tune, is the directory given as a LoRA module)}
    "LlavaWithAdapter_run_tinyllava_export": ({}, LORA, False),
    "Unsupported modules_to_save": ({}, LORA, True),
    "'linear' is not supported": ({"connector": "linear"}, None, False),
    "Unsupported vision config": ({"tower": DINOV2}, None, False),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_vllm_refuses_what_it_would_misread(reason: str, tmp_path: Path) -> None:
    """One process for each, because vLLM does not clean up after an error."""
    parts, tune, is_module = REFUSED[reason]
    save_random(tmp_path / "model", tune, **{"llm": LLMS["llama"], "tower": TOWERS["clip"], **parts})
    directory = tmp_path / "model"
    assert checkpoint.read_record(directory)["engines"]["vLLM"].startswith("no: ")
    served = tmp_path / "base" if is_module else directory
    if is_module:
        save_random(served, llm=LLMS["llama"], tower=TOWERS["clip"])
    job = {"name": "a", "checkpoint": str(served), "adapter": str(directory) if is_module else None, "suppress": []}
    (tmp_path / "jobs.json").write_text(json.dumps([{**job, "questions": [{"text": WORDS[1], "images": []}]}]))
    done = run_engine("vllm", tmp_path)
    assert done.returncode != 0 and reason in done.stderr, done.stderr[-2000:]
    assert not (tmp_path / "vllm.json").exists()
