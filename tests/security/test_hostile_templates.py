"""Chat templates of checkpoints and tokenizers are programs of strangers: they get no file, little time and memory."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from tinyllava import sandbox
from tinyllava.data.template import Template
from tinyllava.errors import UserError
from tinyllava.sandbox import render_template

CHAT = [{"role": "user", "content": "Hello {{ 7*7 }} \ud800"}, {"role": "assistant", "content": "Hi"}]
CHATML = "{% for m in messages %}<|{{ m.role }}|>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
GROWTH = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"
BOMBS = {
    "in some chats": "{% if messages | length > 1 %}" + LOOPS + "{% endif %}",
    "one operation": "{{ 9 ** (9 ** 9) }}",
    "doubling": GROWTH.replace("STEP", "ns.x ~ ns.x"),
    "nesting": GROWTH.replace("STEP", "[ns.x, ns.x]"),
    "width": "{{ '%999999999999d' % 1 }}",
    "output": "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
}
ERRORS = {
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "division": "{{ 1 / 0 }}",
    "range": "{{ range(10 ** 9) | list }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.os }}",
    "code": "{{ messages.append.__self__.__class__.__init__.__globals__ }}",
    "format attribute": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "change": "{{ messages.clear() }}",
    "unknown": "{{ x.y.z }}",
    "raised": "{{ raise_exception('no \x1b[31m system role') }}",
}


@pytest.fixture
def short_time(monkeypatch):
    """A renderer with another time limit, so that the test is short."""
    sandbox._Renderer.stop()
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    yield
    sandbox._Renderer.stop()


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_stopped(name, short_time):
    with pytest.raises((UserError, TemplateError), match=r"was stopped|Error"):
        render_template(CHAT, BOMBS[name])


def test_after_a_bomb_the_next_template_is_rendered(short_time):
    with pytest.raises(UserError, match=r"more than 0\.3 seconds"):
        render_template(CHAT, LOOPS)
    assert render_template(CHAT, "{{ messages[1].content }}")[0] == ["Hi"]


@pytest.mark.parametrize("name", ERRORS)
def test_what_a_template_must_not_do_is_an_error(name):
    with pytest.raises(TemplateError) as error:
        render_template(CHAT, ERRORS[name])
    assert "root:" not in str(error.value) and len(str(error.value)) < 600


def test_a_syntax_error_has_its_line():
    with pytest.raises(TemplateSyntaxError) as error:
        render_template(CHAT, "line\n{% for %}")
    assert error.value.lineno == 2


@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_is_that_of_transformers(prompt):
    options = {"add_generation_prompt": prompt, "return_assistant_tokens_mask": True, "bos_token": "<s>"}
    texts, spans = render_jinja_template([CHAT], chat_template=CHATML, **options)
    ours = render_template(CHAT, CHATML, **options)
    assert ours[0] == texts and [list(map(tuple, each)) for each in ours[1]] == spans


def test_threads_and_forked_processes_render_at_once():
    def render(number: int) -> bool:
        chat = [{"role": "user", "content": f"{threading.get_ident()} {number}" * 100}]
        return render_template(chat, CHATML)[0] == [f"<|user|>{chat[0]['content']}"]

    assert render(0)  # the renderer exists before the fork
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(render, range(40)))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(render_template, [(CHAT, CHATML)] * 6) == [render_template(CHAT, CHATML)] * 6


def test_templates_of_ours_and_of_the_user_need_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox._Renderer, "ask", lambda request: pytest.fail("the renderer was asked"))
    for name in ("phi", "llama"):
        source = Template.load(name).source
        for fitted in (source, sandbox.BOS + source, sandbox.END_OF_TURN.sub("eos_token", source)):
            assert render_template(CHAT, fitted, bos_token="<s>", eos_token="</s>")[0]
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m.content }}{% endfor %} of mine")
    assert render_template(CHAT, Template.load(own).source)[0][0].endswith("of mine")
