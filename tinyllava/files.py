"""Check files before a library reads them, and say in one line what is wrong with a damaged one.

Libraries answer such files with tracebacks of their own. Some say of a file that cannot be read that it does not exist.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from tinyllava.errors import UserError

# What transformers and torch raise for directories that they cannot load.
FAULTS = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError, AssertionError)
FAULTS += (UnpicklingError,)
POINTER = b"version https://git-lfs"
CHECKED = ("config.json", "generation_config.json", "adapter_config.json", "*processor_config.json", "*.index.json")
CHECKED += (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
)
CHECKED += ("tokenizer.model", "pytorch_model*.bin", "adapter_model*.bin", "*.safetensors")
SHARD = re.compile(r"(.+)-\d+-of-\d+\.(safetensors|bin)")


def check_file(path: Path) -> None:
    """Raise UserError for a file that cannot be read, is empty, or is the Git LFS pointer to a file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError as error:
        reason = "it is a link to a file that is gone" if path.is_symlink() and not path.exists() else error.strerror
        raise UserError(f"cannot read {path}: {reason}. Check its owner and its mode, or copy it again.") from None
    if not start:
        raise UserError(f"{path} is empty. Copy it again.")
    if start == POINTER:
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` in {path.parent}, or download it"
            " again with `hf download`."
        )


@contextmanager
def raise_value_errors() -> Iterator[None]:
    """Turn what the tokenizers library raises, plain `Exception`, into a ValueError: FAULTS cannot hold the former."""
    try:
        yield
    except Exception as error:
        if type(error) is Exception:
            raise ValueError(str(error)) from None
        raise


def shorten_error(error: Exception) -> str:
    """The first sentence of a library's error; at most 200 characters."""
    text = " ".join(str(error).split()).partition(". ")[0][:200].rstrip(".: ")
    if "ignore_mismatched_sizes" in text:  # transformers' report, which names the weights, is not shown
        return "its weights do not have the shapes of its config"
    if "instantiate the backend tokenizer" in text:
        return "it has no tokenizer.json, and transformers cannot make one of its other files"
    return text


def parse_json(text: str | bytes) -> Any:
    """The value in a JSON text. Raises ValueError for everything that Python's json raises, a RecursionError too.

    Lone surrogates in it are replaced (see `replace_surrogates`), so that it can be written to a file and tokenised.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    try:
        return replace_surrogates(text, json.loads(text))[1]
    except (ValueError, RecursionError) as error:
        raise ValueError(describe_json_error(error)) from None


def describe_json_error(error: ValueError | RecursionError) -> str:
    """What is wrong with a JSON text, from the error of Python's json."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return "a number has too many digits" if "int_max_str_digits" in str(error) else str(error)


def replace_surrogates(text: str, value: Any) -> tuple[str, Any]:
    r"""A JSON text and its value without lone surrogates, such as half an emoji (`\ud83d`).

    JSON allows them, but no tokenizer and no file takes them.
    """
    if "\\ud" not in text and "\\uD" not in text:
        return text, value
    text = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text, json.loads(text)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError when the file cannot be read or holds something else."""
    check_file(path)
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"cannot read {path} as JSON: {error}. Copy it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a JSON object. Copy it again.")
    return content


def check_model_files(directory: Path) -> None:
    """Check the files of a model that libraries are about to read. Raises UserError for the first damaged one."""
    try:
        paths = sorted({path for pattern in CHECKED for path in directory.glob(pattern)})
    except OSError as error:
        raise UserError(f"cannot read {directory}: {error.strerror}. Check its owner and its mode.") from None
    for path in paths:
        if path.suffix == ".json":
            _check_content(path, read_json(path))
        elif path.suffix == ".safetensors":
            check_safetensors(path)
        else:
            check_file(path)
    shards = {f"{match[1]}.{match[2]}" for path in paths if (match := SHARD.fullmatch(path.name))}
    is_indexed = any(path.name.endswith(".index.json") for path in paths)  # ours has one index for all parts
    for whole in sorted(shards):
        if not is_indexed and not (directory / whole).exists():
            raise UserError(f"{directory} has shards of {whole}, but no {whole}.index.json. Copy that file too.")


def _check_content(path: Path, content: dict[str, Any]) -> None:
    if path.name == "config.json" and not isinstance(content.get("model_type"), str):
        raise UserError(f"{path} names no model_type: it is not the config of a model. Copy it again.")
    if path.name == "tokenizer.json" and not isinstance(content.get("model"), dict):
        raise UserError(f"{path} describes no tokenizer: it has no `model`. Copy it again.")
    if not path.name.endswith(".index.json"):
        return
    files = content.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path} names no files: it has no `weight_map`. Copy it again.")
    missing = sorted(name for name in set(map(str, files.values())) if not os.path.isfile(path.parent / name))
    if missing:
        more = f" and {len(missing) - 3} more are" if len(missing) > 3 else " is" if len(missing) == 1 else " are"
        first = ", ".join(f"{name:.80}" for name in missing[:3])
        raise UserError(f"{path.parent} is incomplete: {first}{more} missing. Copy it again.")


def check_safetensors(path: Path) -> None:
    """Raise UserError when a safetensors file is damaged: its header says how long it must be."""
    from safetensors import SafetensorError, safe_open

    check_file(path)
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}. Copy it again.") from None
