"""LLMs load through transformers' `AutoModelForCausalLM`. Most need no file here. Read llama.py first.

A file is one family, named by `config.model_type`. It adds what transformers does not know:

    class LLM:
        template: str  # the template that is used when a recipe names none
        @staticmethod
        def initialize(llm: PreTrainedModel) -> None: ...  # optional: change the random weights of an LLM from a config

A recipe can name a family outside the package, as `family: my_pkg.my_module:LLM` (docs/add-your-own-llm.md). A family
whose model transformers does not have also defines its config and model classes, and registers them with the Auto
classes (openelm.py). Its file is imported when a config of its `model_type` is read.
"""
