"""Check files before a library reads them, and say in one line what is wrong with a damaged one.

Libraries answer such files with tracebacks of their own. Some say of a file that cannot be read that it does not exist.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PureWindowsPath
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
JSON_SIZE = 200_000_000  # bytes; the largest tokenizers have 35 MB
HEADER_SIZE = 20_000_000  # bytes of a safetensors file before its weights; 1,000 weights take 0.1 MB
LAYERS = 10_000  # the deepest models have about 100
DEPTH = re.compile(r"(num_)?(hidden_|encoder_|decoder_)?layers?|n_layers?|depth")
# Files that libraries load with a model, also when its config does not name them.
READ = (*(pattern for pattern in CHECKED if pattern != "*.safetensors"), "model*.safetensors", "adapter_model*")
SHARD = re.compile(r"(.+)-\d+-of-\d+\.(safetensors|bin)")


def check_file(path: Path) -> None:
    """Raise UserError for a file that cannot be read, is empty, or is the Git LFS pointer to a file."""
    if path.exists() and not path.is_file() and not path.is_dir():  # opening a pipe would wait for ever
        raise UserError(f"cannot read {path}: it is a pipe or a device, expected a file. Copy it again.")
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
    if "trust_remote_code" in text or "custom code" in text:
        return (
            "it contains custom code (`auto_map`), which is never run. Use a model whose architecture"
            " transformers has, or import a class of your own that registers it"
        )
    return text


def explain_hub_error(error: BaseException) -> str:
    """Why something could not be loaded from the Hub, in a line."""
    from huggingface_hub import errors

    chain, link = [], error
    while link is not None and link not in chain:
        chain, link = [*chain, link], link.__cause__ or link.__context__
    for link in chain:
        status = getattr(getattr(link, "response", None), "status_code", None)
        if isinstance(link, errors.GatedRepoError):
            return "its authors ask for your consent. Give it on its page on the Hub, then run `hf auth login`"
        if isinstance(link, errors.RepositoryNotFoundError | errors.HFValidationError):
            text = "neither a directory nor on the Hub"
            return f"{text}, or it is private: then run `hf auth login`" if status == 401 else text
        if isinstance(link, errors.RevisionNotFoundError):
            return "the Hub has it, but not this revision"
        if isinstance(link, errors.HfHubHTTPError):
            return f"the Hub answered {status}. Try again later, or check your token with `hf auth whoami`"
        if isinstance(link, errors.OfflineModeIsEnabled):
            return "not in the Hub's cache, and HF_HUB_OFFLINE forbids a download"
    return f"neither a directory nor readable from the Hub: {shorten_error(error)}"


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
    if path.stat().st_size > JSON_SIZE:
        raise UserError(f"{path} has more than {JSON_SIZE // 10**6} MB. It is not what its name says.")
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


def find_read_files(directory: Path) -> list[Path]:
    """The files in a directory that libraries load with a model because of their names alone."""
    return sorted(path for path in directory.iterdir() if any(fnmatchcase(path.name, pattern) for pattern in READ))


def is_inside(name: str) -> bool:
    """Whether a file's name, as a record or an index gives it, stays inside the directory that it is relative to."""
    path = PureWindowsPath(name)  # it takes both kinds of slashes, and drives
    return name.isprintable() and bool(path.parts) and not path.anchor and ".." not in path.parts


def _check_content(path: Path, content: dict[str, Any]) -> None:
    if path.name == "config.json" and not isinstance(content.get("model_type"), str):
        raise UserError(f"{path} names no model_type: it is not the config of a model. Copy it again.")
    if path.name == "config.json":
        _check_depth(path, content)
    if path.name == "tokenizer.json" and not isinstance(content.get("model"), dict):
        raise UserError(f"{path} describes no tokenizer: it has no `model`. Copy it again.")
    if not path.name.endswith(".index.json"):
        return
    files = content.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path} names no files: it has no `weight_map`. Copy it again.")
    names = sorted(set(map(str, files.values())))
    if outside := [name for name in names if not is_inside(name) or Path(name).name != name or "\\" in name]:
        raise UserError(f"{path} names {outside[0][:80]!r}, which is not a file beside it. Do not use this checkpoint.")
    missing = [name for name in names if not os.path.isfile(path.parent / name)]
    if missing:
        more = f" and {len(missing) - 3} more are" if len(missing) > 3 else " is" if len(missing) == 1 else " are"
        first = ", ".join(f"{name:.80}" for name in missing[:3])
        raise UserError(f"{path.parent} is incomplete: {first}{more} missing. Copy it again.")


def _check_depth(path: Path, content: dict[str, Any]) -> None:
    """Raise UserError for a config of more layers than any model has: they would be built one after another."""
    for name, value in content.items():
        if isinstance(value, dict):
            _check_depth(path, value)
        elif DEPTH.fullmatch(name) and isinstance(value, int) and value > LAYERS:
            raise UserError(f"{path} asks for {value:,} layers ({name}), at most {LAYERS:,} are built.")


def check_safetensors(path: Path) -> None:
    """Raise UserError when a safetensors file is damaged: its header says how long it must be."""
    from safetensors import SafetensorError, safe_open

    check_file(path)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > HEADER_SIZE:
        raise UserError(f"{path} is damaged: it announces a header of {header:,} bytes. Copy it again.")
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}. Copy it again.") from None
