"""Parity: the original's connectors, read by `from_original`, give its outputs.

The cases lie in `connectors/` beside this file (config, weights, inputs, outputs); PARITY_CONNECTORS=DIR judges by
another directory of the same form.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tinyllava.factory import Factory

ROOT = Path(os.environ.get("PARITY_CONNECTORS") or Path(__file__).parent / "connectors")
CASES = sorted(path.stem for path in ROOT.glob("*.json"))


def options_of(case: dict) -> dict:
    """The recipe's options of a connector that the original's config describes."""
    config = case["config"]
    return {
        "resampler": {"num_queries": config["num_queries"], "layers": config["num_resampler_layers"]},
        "qformer": {"num_queries": config["num_queries"], **(case["bert_config"] or {})},
    }.get(config["connector_type"], {})


@pytest.mark.parametrize("name", CASES)
def test_a_connector_of_the_original_gives_its_outputs(name: str) -> None:
    case, tensors = json.loads((ROOT / f"{name}.json").read_text()), load_file(ROOT / f"{name}.safetensors")
    config = case["config"]
    features = torch.cat([tensors[key] for key in sorted(tensors) if key.split(".")[0] == "input"], dim=-1)
    kind, options = Factory("connectors").resolve(config["connector_type"], options_of(case))
    connector = kind(features.shape[-1], config["hidden_size"], **options).eval()
    prefix = "state._connector."
    state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    connector.load_state_dict(getattr(kind, "from_original", dict)(state))  # strict: every weight has its place
    with torch.no_grad():
        tokens = connector(features)
    assert tokens.shape[1] == connector.num_tokens(features.shape[1])
    torch.testing.assert_close(tokens, tensors["output"], atol=1e-5, rtol=0)
