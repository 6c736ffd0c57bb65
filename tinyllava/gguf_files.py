"""An LLM from a GGUF file, as llama.cpp and ollama use them: `llm: {name: path/to/model.gguf}`.

transformers dequantises such a file to fp32 at every load, which takes 20 s for 135M parameters, and marks the model as
one that cannot be trained or saved. Therefore the file is converted once, to an ordinary directory in the cache.
"""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_gguf_available

from tinyllava import atomic
from tinyllava.cache import digest, find_cache_root, lock, mark_used
from tinyllava.console import messages
from tinyllava.errors import UserError


def convert_gguf(path: Path) -> Path:
    """Convert a GGUF file once, and return the directory with its weights and its tokenizer.

    Raises UserError for a missing file, for one that transformers cannot read, and when the package gguf is missing.
    """
    if not path.is_file():
        raise UserError(f"GGUF file {path} not found. Give an existing file: model.llm.name=/path/to/{path.name}")
    status = path.stat()
    directory = find_cache_root() / "gguf" / f"{path.stem}-{digest(path.resolve(), status.st_size, status.st_mtime_ns)}"
    with lock(directory):
        if not directory.is_dir():
            if not is_gguf_available():
                raise UserError(f"reading {path.name} requires the package gguf: pip install 'tinyllava-factory[gguf]'")
            with messages.status(f"Converting {path.name} (once)"):
                _convert(path, directory)
    mark_used(directory)
    return directory


def _convert(path: Path, directory: Path) -> None:
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "trust_remote_code": False}
    try:
        tokenizer, model = AutoTokenizer.from_pretrained(**source), AutoModelForCausalLM.from_pretrained(**source)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"cannot read {path} as a GGUF model: {str(error).strip().splitlines()[0]}") from None
    # The weights are now plain fp32: remove the marks of quantisation.
    model.hf_quantizer, model.is_quantized = None, False
    vars(model).pop("quantization_method", None)
    del model.config.quantization_config
    with atomic.write_directory(directory) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
