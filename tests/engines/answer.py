"""Answer the questions of jobs.json with vLLM or with plain transformers, and write answers.json beside it.

PYTHON answer.py vllm|transformers FOLDER

Runs in a process that never imports the package; for vLLM, in an environment of its own (`make test-engines`). A job:

{"name", "checkpoint", "adapter" (a LoRA module) or null, "suppress": [ids], "questions": [{"text", "images": [path]}]}

An answer: for each question {"prompt": ids, "ids": new ids, "logprobs": [{id: log-probability} of each new id]}; only
vLLM gives log-probabilities.
"""

import gc
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
NEW_TOKENS = 8


def make_messages(question: dict, image_part: dict) -> list[dict]:
    """The question as a chat of one turn: the images, then the text."""
    images = [{key: value or image for key, value in image_part.items()} for image in question["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question["text"]}]}]


def answer_with_transformers(job: dict) -> list[dict]:
    """Greedy answers of transformers' own classes."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(job["checkpoint"])
    model = AutoModelForImageTextToText.from_pretrained(job["checkpoint"], dtype=torch.float32).eval()
    answers = []
    for question in job["questions"]:
        messages = make_messages(question, {"type": "image"})
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        images = [Image.open(path).convert("RGB") for path in question["images"]] or None
        inputs = processor(images=images, text=text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
        prompt = inputs["input_ids"][0].tolist()
        answers.append({"prompt": prompt, "ids": output[len(prompt) :]})
    return answers


def answer_with_vllm(job: dict) -> list[dict]:
    """Greedy answers of vLLM in fp32."""
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    lora = LoRARequest(job["name"], 1, job["adapter"]) if job["adapter"] else None
    llm = LLM(
        job["checkpoint"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        limit_mm_per_prompt={"image": 2},
        enable_lora=lora is not None,
    )
    # vLLM does not read `suppress_tokens` of generation_config.json.
    bias = {token: -100.0 for token in job["suppress"]}
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=4, logit_bias=bias)
    chats = [
        make_messages(
            {**question, "images": list(map(Image.open, question["images"]))}, {"type": "image_pil", "image_pil": None}
        )
        for question in job["questions"]
    ]
    answers = [
        {
            "prompt": list(output.prompt_token_ids),
            "ids": list(output.outputs[0].token_ids),
            "logprobs": [
                {token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs
            ],
        }
        for output in llm.chat(chats, sampling, lora_request=lora, use_tqdm=False)
    ]
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return answers


def main() -> None:
    """Answer all jobs in the order of the file."""
    engine, folder = sys.argv[1], Path(sys.argv[2])
    answer = {"vllm": answer_with_vllm, "transformers": answer_with_transformers}[engine]
    answers = {job["name"]: answer(job) for job in json.loads((folder / "jobs.json").read_text())}
    (folder / f"{engine}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
