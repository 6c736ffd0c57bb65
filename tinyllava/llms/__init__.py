"""LLMs load through `AutoModelForCausalLM`; most need no file. A file here, named by `config.model_type`, says what
loading cannot:

class LLM:
    template: str               # the template used when a recipe names none
    def initialize(llm): ...    # optional: what random weights should begin as, where a recipe asks for such

A recipe may name one that stands outside the package, as `family: my_pkg.my_module:LLM` (docs/add-your-own-llm.md).
All files are imported before any part is loaded. One whose model transformers lacks defines its config and model
classes as well and registers them with the Auto classes (openelm.py).
"""
