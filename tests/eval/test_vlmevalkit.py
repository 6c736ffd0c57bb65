"""docs/vlmevalkit.md: its launcher registers a model with the answers of a session, and then runs run.py.

VLMEvalKit is not installed here: the two names that the launcher takes from it are stood in for, with the contract of
`vlmeval/vlm/base.py` at commit e8e78f0 (`generate` hands a list of {type, value} to `generate_inner`).
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tests.tiny_session import tiny_session
from tinyllava import checkpoint
from tinyllava.data.sample import Message, Sample
from tinyllava.infer import Session

PAGE = Path(__file__).parents[2] / "docs/vlmevalkit.md"
BASE = """
class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image", "video"]

    def __init__(self):
        self.dump_image_func = None

    def generate(self, message, dataset=None):
        assert all(item["type"] in self.allowed_types for item in message)
        return self.generate_inner(message, dataset)
"""
RUN = """
import json, sys
from vlmeval.config import supported_VLM
name = sys.argv[sys.argv.index("--model") + 1]
model = supported_VLM[name]()
print(json.dumps([model.generate(message) for message in json.load(open("messages.json"))]))
"""


def test_its_launcher_gives_the_answers_of_a_session(tmp_path) -> None:
    made = tiny_session()
    checkpoint.save(made.vlm, tmp_path / "checkpoint")
    rng = np.random.default_rng(0)
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    picture = {"type": "image", "value": paths[0]}
    messages = [
        [picture, {"type": "text", "value": "What is in the <image> picture?"}],
        [{"type": "text", "value": "two, three"}, {"type": "image", "value": paths[1]}, picture],
    ]
    for name, text in (("vlm/base", BASE), ("config", "supported_VLM = {}"), ("vlm/__init__", ""), ("__init__", "")):
        (tmp_path / "vlmeval/vlm").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"vlmeval/{name}.py").write_text(text)
    (tmp_path / "run.py").write_text(RUN)
    (tmp_path / "messages.json").write_text(json.dumps(messages))
    (launcher,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    (tmp_path / "run_tinyllava.py").write_text(launcher)
    words = [sys.executable, "run_tinyllava.py", "checkpoint", "--model", "tinyllava", "--data", "MMBench_DEV_EN"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    session = Session.load(tmp_path / "checkpoint", device="cpu")
    samples = [
        Sample([Message("user", "<image>\nWhat is in the  picture?")], [paths[0]]),
        Sample([Message("user", "two, three<image>\n<image>\n")], [paths[1], paths[0]]),
    ]
    assert json.loads(done.stdout.splitlines()[-1]) == session.generate(samples, max_new_tokens=1024)
