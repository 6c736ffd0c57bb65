"""Find out what an LLM computes after its last hidden state, by comparing logits instead of by a list of names.

Llava keeps an LLM's base model and one linear layer. It would silently drop Phi-2's bias, Granite's scaling and
Gemma2's soft cap.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tinyllava.errors import UserError

PROBED_LOGITS = 30.0  # the size of the compared logits: as large as Gemma2's soft cap, so that the cap shows


@torch.no_grad()
def probe_head(llm: PreTrainedModel) -> dict[str, Any]:
    """The bias, scale or soft cap of an LLM's output head, as fields of TinyLlavaConfig.

    Raises UserError when the LLM computes anything else between its last hidden state and its logits.
    """
    head = llm.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(llm).__name__} has no linear output head: it cannot be the LLM of a Llava model.")
    hidden, actual = _run_probe(llm, head)
    plain = head(hidden).float()
    fields: dict[str, Any] = {"head_bias": head.bias is not None}
    estimate = ((actual * plain).sum() / (plain * plain).sum()).item()
    stated = (1.0, getattr(llm.config, "logit_scale", None), 1.0 / getattr(llm.config, "logits_scaling", 1.0))
    # The estimate comes last: a scale in the config is exact, and an estimate is rounded.
    for scale in (*stated, estimate):
        if scale is not None and _are_equal(actual, plain * scale, llm.dtype):
            return fields | {"head_scale": float(scale)}
    cap = getattr(llm.config, "final_logit_softcapping", None)
    if cap and _are_equal(actual, torch.tanh(plain / cap) * cap, llm.dtype):
        return fields | {"head_softcap": float(cap)}
    raise UserError(
        f"{type(llm).__name__} changes its logits in a way that the model class cannot hold"
        f" (off by {(actual - plain).abs().max():.2g})."
        " It needs a file in llms/ and a field in TinyLlavaConfig."
    )


def _run_probe(llm: PreTrainedModel, head: nn.Linear) -> tuple[Tensor, Tensor]:
    """Hidden states [1, L, D], and the logits [1, L, V] that the LLM computes from them."""
    was_training = llm.training
    llm.eval()
    ids = torch.arange(8, device=llm.device).unsqueeze(0) % llm.config.vocab_size
    hidden: list[Tensor] = []

    def magnify(_module: nn.Module, _args: tuple, outputs: Any) -> None:
        """Make the logits large: the rounding of bfloat16 would hide a soft cap of small ones."""
        states = outputs.last_hidden_state
        outputs.last_hidden_state = states * (PROBED_LOGITS / head(states).float().std()).to(states.dtype)
        hidden.append(outputs.last_hidden_state)

    handle = llm.base_model.register_forward_hook(magnify)
    logits = llm(ids, use_cache=False).logits.float()
    handle.remove()
    llm.train(was_training)
    return hidden[0], logits


def _are_equal(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether two computations of the same logits agree, except for rounding."""
    return bool((a - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm())
