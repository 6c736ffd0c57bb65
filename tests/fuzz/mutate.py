"""Strategies that change valid inputs a little: this finds more than random bytes do."""

import copy
from collections.abc import Sequence
from random import Random
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

NASTY = [
    "",
    " ",
    "a",
    "\n",
    "\x00",
    "\u200b",
    "é",
    "日本",
    "🙂",
    "\ud83d",
    "\udc80",
    "\x1b[31m",
    "[/red]",
    "[bold]",
    "%s",
    "{}",
]
NASTY += ["{{ x }}", "{% endgeneration %}", "${oc.env:HOME}", "${a}", "A" * 300, "../a.png", "/etc/passwd", "1", "-1"]
NASTY += ["1e309", "null", "nan", "yes", "no", "<image>", "<image>\n", "<image><image>", "</s>", "<s>", "<|im_end|>"]
NASTY += [
    "USER:",
    " ASSISTANT:",
    "human",
    "gpt",
    "user",
    "assistant",
    "system",
    "http://127.0.0.1:9/x.png",
    "file:///x",
]
NASTY += ["data:image/png;base64,AAAA", "\r\n", "\t", "\u2028", "\ufeff", "'", '"', "\\", "A\u0301", "٣", "²", "1_0"]
TEXTS = st.one_of(st.sampled_from(NASTY), st.text(st.characters(exclude_categories=()), max_size=6))
NUMBERS = st.sampled_from([0, 1, -1, 2, 3.5, 10**30, -(2**63), 2**64, 1e308, -0.0, float("nan"), float("inf"), 10**400])
SCALARS = st.one_of(TEXTS, st.sampled_from([None, True, False]), NUMBERS)


def split_words(text: str) -> list[str]:
    return text.split()


def make_values(keys: Sequence[str]) -> SearchStrategy[Any]:
    """JSON values up to three levels deep, with dicts that mostly have these keys."""
    names = st.one_of(st.sampled_from(keys), TEXTS)
    flat = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(names, SCALARS, max_size=3))
    return st.one_of(SCALARS, flat, st.lists(flat, max_size=3), st.dictionaries(names, flat, max_size=3))


def _list_places(tree: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of every value inside a tree."""
    places, stack = [], [tree]
    while stack:
        holder = stack.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        places += [(holder, key) for key in keys]
        stack += [holder[key] for key in keys]
    return places


@st.composite
def edit_trees(draw: DrawFn, trees: Sequence[Any], values: SearchStrategy[Any], most: int = 4) -> Any:
    """One of `trees` with some of its values replaced, removed, repeated, wrapped or renamed."""
    root = [copy.deepcopy(draw(st.sampled_from(trees)))]
    for _ in range(draw(st.integers(0, most))):
        places = _list_places(root)
        if not places:
            break
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "repeat", "wrap", "rename", "add", "copy"]))
        if kind == "remove" and holder is not root:
            del holder[key]
        elif kind == "repeat" and isinstance(holder, list) and holder is not root:
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == "wrap":
            holder[key] = [holder[key]]
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(TEXTS)] = holder.pop(key)
        elif kind == "add" and isinstance(holder[key], dict):
            more = draw(values)
            holder[key] |= more if isinstance(more, dict) else {draw(TEXTS): more}
        elif kind == "copy":
            other, name = places[draw(st.integers(0, len(places) - 1))]
            holder[key] = copy.deepcopy(other[name])
        else:
            holder[key] = draw(values)
    return root[0]


@st.composite
def edit_texts(draw: DrawFn, texts: Sequence[str], snippets: Sequence[str], most: int = 4) -> str:
    """One of `texts` with pieces removed, repeated, replaced, or with snippets put in."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(text)))
        kind = draw(st.sampled_from(["insert", "insert", "remove", "repeat", "replace", "line", "cut"]))
        if kind == "remove":
            text = text[:at] + text[at + draw(st.integers(1, 20)) :]
        elif kind == "repeat":
            text = text[:at] + text[at : at + draw(st.integers(1, 60))] + text[at:]
        elif kind == "replace":
            text = text[:at] + draw(TEXTS) + text[at + 1 :]
        elif kind == "line":  # put in at the end of a line
            end = text.find("\n", at)
            text = text[:end] + "\n" + draw(st.sampled_from(snippets)) + text[end:] if end >= 0 else text
        elif kind == "cut":
            text = text[:at] if draw(st.integers(0, 9)) == 0 else text
        else:
            text = text[:at] + draw(st.sampled_from(snippets)) + text[at:]
    return text


WORDS = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\xff\xff", b"\x80\0\0\0", b"\xff\xff\xff\x7f"]
WORDS += [b"\0\0\0\x01", b"\x01\0\0\0", b"\xff\xff", b"\0\0", b"\xef\xbf\xbd", b"\xed\xa0\x80", b"\n", b"{", b"]"]


def edit_bytes(contents: Sequence[bytes], most: int = 5) -> SearchStrategy[bytes]:
    """One of `contents` with bytes changed, put in, repeated, removed or cut off, at its start more often.

    Hypothesis draws a number for all changes together: a draw of each costs more than reading an image.
    """
    whole = st.tuples(st.integers(0, len(contents) - 1), st.integers(0, most), st.integers(0, 2**24 - 1))
    return whole.map(lambda drawn: change_bytes(contents[drawn[0]], drawn[1], Random(drawn[2])))


def change_bytes(content: bytes, times: int, random: Random) -> bytes:
    data = bytearray(content)
    for _ in range(times):
        reach = len(data) if random.random() < 0.5 else min(64, len(data))
        at = random.randrange(max(1, reach))
        kind = random.choice(["set", "set", "flip", "word", "word", "remove", "insert", "repeat", "cut"])
        if kind == "set":
            data[at : at + 1] = random.randbytes(1)
        elif kind == "flip" and data:
            data[at] ^= 1 << random.randrange(8)
        elif kind == "word":
            word = random.choice(WORDS)
            data[at : at + len(word)] = word
        elif kind == "remove":
            del data[at : at + random.randint(1, 16)]
        elif kind == "insert":
            data[at:at] = random.randbytes(random.randint(1, 8))
        elif kind == "repeat":
            data[at:at] = data[at : at + random.randint(1, 32)]
        elif kind == "cut" and random.random() < 0.25:
            del data[at:]
    return bytes(data)
