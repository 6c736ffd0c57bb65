"""The pages of docs/: their commands and recipes are valid, and their links have a target."""

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
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("perf/*.md"), ROOT / "README.md"])
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
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http", "mailto")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_whole_recipes_are_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        content = yaml.safe_load(block)
        if isinstance(content, dict) and {"model", "stages"} <= set(content):
            Recipe.model_validate(content)


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/*.md")), ids=lambda page: page.name)
def test_every_page_can_be_found_from_the_readme(page: Path) -> None:
    assert f"docs/{page.name}" in (ROOT / "README.md").read_text(encoding="utf-8"), f"README does not link {page.name}"
