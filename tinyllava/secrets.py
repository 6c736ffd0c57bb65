"""Find and hide secrets: tokens, keys and passwords, in texts and in settings.

A secret is recognised by the name of its field (`hub_token`), by the name of the environment variable that holds it
(`HF_TOKEN`), or by its form (`hf_...`, `https://user:password@host`). Errors, logs and records go through this file.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
# Fields of recipes and headers. Tokenizers have an `eos_token` and a `pad_token`: these are no secrets.
NAMES = (
    r"(?:[\w-]*[_-])?(?:api[_-]?key|(?:access|private|secret|auth|signing|encryption)[_-]?key|secret|password|passwd|"
    r"passphrase|credentials?|authorization|(?:hub|hf|auth|access|api|bearer|refresh|session|security|secret|wandb|"
    r"github|gitlab|deploy|personal)[_-]?token)|(?:secret|password)[_-]\w+|x-amz-(?:credential|signature)"
)
SHORT_NAMES = r"token|sig|signature"  # in a sentence, `token: ` is an ordinary word
FIELD = re.compile(f"{NAMES}|{SHORT_NAMES}", re.IGNORECASE)
# Environment variables: the last word counts, so TOKENIZERS_PARALLELISM and HF_TOKEN_PATH are not meant.
VARIABLE = re.compile(
    r".*(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|APIKEY|_PWD|(?<![A-Z])KEY)(_?\d+|_VALUE)?|(.*_)?(SECRET|PASSWORD)_"
    r"(?!PATH|FILE|DIR)[A-Z_]+",
    re.IGNORECASE,
)
SHORTEST = 8  # characters of a variable's value: `1` or `true` would hide half of a text
FORMS = re.compile(
    r"(?<=://)[^\s/@'\"]+(?=@)|hf_[A-Za-z0-9]{16,}|\bsk-[\w-]{16,}|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|"
    r"\bglpat-[\w-]{16,}|\bxox[abprs]-[\w-]{10,}|\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}|"
    r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|(?i:(?<=bearer )[\w.~+/=-]{8,})"
)
# `token=...` in a URL or a message, and `"token": ...` in JSON
QUOTE, GAP = "['\"]", r"\s{0,4}"
LABELLED = re.compile(
    rf"(?i)(?<![\w-])((?:{NAMES}){QUOTE}?{GAP}[=:]{GAP}{QUOTE}?|(?:{SHORT_NAMES})(?:={QUOTE}?|{QUOTE}{GAP}:{GAP}{QUOTE}))"
    r"(?:(?:basic|bearer|token)\s{1,4})?[^\s'\",;&#)}*$<][^\s'\",;&#)}]{3,}"
)


def is_secret_name(name: str) -> bool:
    """Whether a field with this name holds a secret."""
    return bool(FIELD.fullmatch(name))


def hide_secrets(text: str) -> str:
    """The text with `***` in place of each secret."""
    for value in _list_values():
        text = text.replace(value, HIDDEN)
    text = FORMS.sub(HIDDEN, text)
    return LABELLED.sub(rf"\g<1>{HIDDEN}", text)


def mask_settings(settings: Any, name: str = "") -> Any:
    """A tree of settings without its secrets. The value of an environment variable becomes `${oc.env:NAME}`.

    A recipe with that text can be run again, and reads the secret from the environment.
    """
    if isinstance(settings, Mapping):
        return {key: mask_settings(value, str(key)) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [mask_settings(value, name) for value in settings]
    if not isinstance(settings, str) or not settings or settings.startswith("${oc.env:"):
        return settings
    is_secret = is_secret_name(name)
    hidden = HIDDEN if is_secret else hide_secrets(settings)
    if hidden == settings:
        return settings
    names = [key for key, value in os.environ.items() if value == settings and (is_secret or VARIABLE.fullmatch(key))]
    return f"${{oc.env:{names[0]}}}" if names else hidden


def _list_values() -> list[str]:
    """The secrets in the environment, the longest first: one may contain another."""
    named = (value for name, value in os.environ.items() if VARIABLE.fullmatch(name))
    return sorted({value for value in named if len(value) >= SHORTEST}, key=len, reverse=True)
