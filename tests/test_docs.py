"""The pages of docs/: commands, recipes and links are valid, and a page says at its start what its reader will have."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from typer.main import get_command

from tinyllava import cli
from tinyllava.config import Recipe
from tinyllava.factory import Factory

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("perf/*.md"), ROOT / "README.md", ROOT / "SECURITY.md"])
# How the first lines of a page say what its reader has, knows or can do at its end.
PROMISE = re.compile(r"(after (reading it|this page)|at the end of this page),? you (can|know|have)", re.IGNORECASE)
FENCE = "`" * 3


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of these languages, in order."""
    return re.findall(rf"{FENCE}(?:{'|'.join(languages)})\n(.*?){FENCE}", page.read_text(encoding="utf-8"), flags=re.S)


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `tinyllava` command on a page, also after a variable or a launcher."""
    text = "\n".join(blocks(page, "bash", "sh", "console")).replace("\\\n", " ")
    lines = [re.sub(r"^\$ ", "", line.strip()) for line in text.splitlines()]
    launcher = r"(?:(?:torchrun|accelerate launch) .*?-m )?"
    actual = [re.match(rf"(?:time )?(?:\w+=\S+ )*{launcher}tinyllava( .*|$)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in actual if match]


def remove_fenced(text: str) -> str:
    """The text of a page without its fenced blocks, in which `#` begins a comment and `](` is code."""
    return re.sub(rf"^{FENCE}.*?^{FENCE}$", "", text, flags=re.S | re.M)


def list_anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page: lower case, without punctuation, `-` for a space."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", remove_fenced(page.read_text(encoding="utf-8")), flags=re.M):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        repeated = sum(bool(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", known)) for known in anchors)
        anchors.add(f"{anchor}-{repeated}" if repeated else anchor)
    return anchors


def list_links(page: Path) -> list[tuple[str, str]]:
    """(path, anchor) of every link on a page to a file of the repository; the path is empty for the page itself."""
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", remove_fenced(page.read_text(encoding="utf-8")))
    inside = [target for target in targets if not target.startswith(("http:", "https:", "mailto:"))]
    return [(path, anchor) for path, _, anchor in (target.partition("#") for target in inside)]


def parse(arguments: list[str]) -> typer.Context:
    """Parse a command and return its context. Raises an error for wrong arguments."""
    context, command = None, get_command(cli.app)
    while True:
        context = command.make_context(arguments[0] if arguments else "", list(arguments), parent=context)
        if not hasattr(command, "resolve_command"):
            return context
        _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_valid(page: Path) -> None:
    for arguments in commands(page):
        context = parse(arguments)
        recipe = context.params.get("recipe")
        if recipe and not recipe.endswith((".yaml", ".yml")):
            assert recipe in Factory("recipes").list_names(), f"{page.name}: no recipe {recipe}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_a_target(page: Path) -> None:
    for path, anchor in list_links(page):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {path}"
        known = list_anchors(target) if target.suffix == ".md" else set()
        assert not anchor or anchor in known, (
            f"{page.name} links to {path}#{anchor}, which has the anchors {sorted(known)}"
        )


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        f"# `nano`: A, b\n## [C](x.md) d_e-f?\n{FENCE}bash\n# no heading\n{FENCE}\n### Same\n### Same\n[a](#same)\n"
    )
    assert list_anchors(page) == {"nano-a-b", "c-d_e-f", "same", "same-1"}
    assert list_links(page) == [("x.md", ""), ("", "same")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_begins_with_what_its_reader_will_have_and_links_to_others(page: Path) -> None:
    intro = remove_fenced(page.read_text(encoding="utf-8")).split("\n## ")[0]
    assert page.name == "README.md" or PROMISE.search(" ".join(intro.split())), f"{page.name}: what for?"
    others = {path for path, _ in list_links(page) if path.endswith(".md") and Path(path).name != page.name}
    assert others, f"{page.name} links to no other page"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_whole_recipes_are_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        content = yaml.safe_load(block)
        if isinstance(content, dict) and {"model", "stages"} <= set(content):
            Recipe.model_validate(content)


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_every_page_can_be_found_from_the_readme(page: Path) -> None:
    assert f"docs/{page.name}" in (ROOT / "README.md").read_text(encoding="utf-8"), f"README does not link {page.name}"
