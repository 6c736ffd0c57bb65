"""What holds for all connectors: as many tokens as they say, the field's short names, widths that cannot fit."""

import pytest
import torch
from torch import nn

from tests.conftest import CLIP, tiny_model
from tests.tiny_vlm import build_tiny
from tinyllava.errors import UserError
from tinyllava.factory import Factory

QFORMER = {"num_queries": 7, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OPTIONS: dict[str, list[dict]] = {  # others have their defaults only
    "mlp": [{}, {"layers": 1}, {"layers": 5, "act": "relu"}],
    "mof_mlp": [{}, {"first_dim": 8}],
    "pixel_shuffle_mlp": [{}, {"scale": 3}, {"scale": 1, "layers": 1}],
    "qformer": [QFORMER, {**QFORMER, "num_queries": 1}],
    "resampler": [{"num_queries": 7, "layers": 1}, {"num_queries": 1, "layers": 2}],
}
CASES = [(name, options) for name in Factory("connectors").list_names() for options in OPTIONS.get(name, [{}])]


def connector_of(name: str, options: dict, vision_dim: int = 32, text_dim: int = 32) -> nn.Module:
    part, options = Factory("connectors").resolve(name, options)
    return part(vision_dim, text_dim, **options)


@pytest.mark.parametrize("patches", [36, 144])
@pytest.mark.parametrize("name,options", CASES, ids=str)
def test_it_makes_as_many_tokens_as_it_says(name: str, options: dict, patches: int) -> None:
    connector = connector_of(name, options).eval()
    with torch.no_grad():
        tokens = connector(torch.randn(2, patches, 32))
    assert tokens.shape == (2, connector.num_tokens(patches), 32)


@pytest.mark.parametrize("act,module", [("gelu", "GELU"), ("relu", "ReLU"), ("silu", "SiLU")])
@pytest.mark.parametrize("layers", [1, 2, 3, 8, 12])
def test_short_names_of_any_depth(layers: int, act: str, module: str) -> None:
    mlp = connector_of(f"mlp{layers}x_{act}", {}, vision_dim=24)
    linears = [child for child in mlp.modules() if isinstance(child, nn.Linear)]
    assert [layer.in_features for layer in linears] == [24] + [32] * (layers - 1)
    features = torch.randn(1, 3, 24)
    wanted = linears[0](features)
    for layer in linears[1:]:
        wanted = layer(getattr(nn, module)()(wanted))
    with torch.no_grad():
        torch.testing.assert_close(mlp(features), wanted)
    assert Factory("connectors").resolve(f"mlp{layers}x_{act}", {"act": "tanh"})[1] == {"layers": layers, "act": "tanh"}


def test_names_that_are_none() -> None:
    for name in ("mlp2x", "mlp2x_tanh", "mlpx_gelu", "mlp-1x_gelu"):
        with pytest.raises(UserError, match=f"unknown connector '{name}'"):
            Factory("connectors").resolve(name, {})
    for options in ({"layers": 0}, {"act": "gellu"}):
        with pytest.raises(UserError, match="expected layers >= 1 and a known activation, found"):
            connector_of("mlp", options)


def test_identity_of_different_widths_names_connectors_that_fit() -> None:
    with pytest.raises(UserError, match=r"the tower is 24 wide and the LLM 32.* Use linear or mlp2x_gelu\.") as error:
        build_tiny(tiny_model(connector="identity"))
    assert len(str(error.value).splitlines()) == 1
    spec = tiny_model(tower={**CLIP, "hidden_size": 16}, connector="identity")
    spec["vision_tower"]["feature_layer"] = [-2, -1]  # two layers, joined on channels
    model = build_tiny(spec).model
    features = torch.randn(1, 3, 32)
    assert model.model.multi_modal_projector(features) is features
