"""Checkpoints: one directory is one checkpoint, in the layout that transformers, PEFT and vLLM read.

Read saving.py first.

    config.json  model.safetensors.index.json  vision_tower*.safetensors  connector.safetensors
    language_model*.safetensors  tokenizer, processor, chat template
    [adapter_config.json  adapter_model.safetensors]
    tinyllava.json

    checkpoint.save(vlm, directory)      # saving.py
    vlm = checkpoint.load(directory)     # loading.py: ours, llava-hf's, the original TinyLLaVA Factory's (legacy.py)

Weights have the names of published `llava-hf` checkpoints. The config is plain `llava` wherever that is exact, so that
transformers and vLLM load the directory as it is; `explain_not_plain` gives the reason where it is not. Each part has
weight files of its own: a part that did not change since the last save is a hard link. `tinyllava.json` is written last
and lists every file with its size and hash, so a directory that is incomplete or damaged is refused.
"""

from tinyllava.checkpoint.layout import explain_not_plain
from tinyllava.checkpoint.loading import load, restore
from tinyllava.checkpoint.saving import save
from tinyllava.record import RECORD, is_whole, read_record

__all__ = ["RECORD", "explain_not_plain", "is_whole", "load", "read_record", "restore", "save"]
