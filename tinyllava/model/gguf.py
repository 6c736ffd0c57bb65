"""An LLM from a GGUF file, as llama.cpp and ollama use them: `llm: {name: path/to/model.gguf}`.

transformers dequantises such a file to fp32 while it loads it, which takes 20 s for 135M parameters, and marks the
model as one that can be neither trained nor saved. It is converted once, into an ordinary directory in the cache.
"""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import is_gguf_available

from tinyllava.console import messages
from tinyllava.data.cache import cache_root, digest, locked
from tinyllava.errors import UserError


def converted(path: Path) -> Path:
    """The directory with the weights and the tokenizer of a GGUF file, made now if it has not been.

    Raises UserError for a missing file, one that transformers cannot read, and without the `gguf` package.
    """
    if not path.is_file():
        raise UserError(f"GGUF file {path} not found. Give an existing file: model.llm.name=/path/to/{path.name}")
    status = path.stat()
    directory = cache_root() / "gguf" / f"{path.stem}-{digest(path.resolve(), status.st_size, status.st_mtime_ns)}"
    with locked(directory):
        if not directory.is_dir():
            if not is_gguf_available():
                raise UserError(f"reading {path.name} needs the package gguf: pip install 'tinyllava-factory[gguf]'")
            with messages.status(f"Converting {path.name}, once"):
                _convert(path, directory)
    return directory


def _convert(path: Path, directory: Path) -> None:
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        tokenizer, model = AutoTokenizer.from_pretrained(**source), AutoModelForCausalLM.from_pretrained(**source)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"cannot read {path} as a GGUF model: {str(error).strip().splitlines()[0]}") from None
    aside = directory.with_name(f".{directory.name}.partial")
    _trainable(model).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(directory)


def _trainable(model: PreTrainedModel) -> PreTrainedModel:
    """Take off the marks of quantisation: the weights are plain fp32 ones by now."""
    model.hf_quantizer, model.is_quantized = None, False
    vars(model).pop("quantization_method", None)
    del model.config.quantization_config
    return model
