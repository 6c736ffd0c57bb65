"""LLMs load through `AutoModelForCausalLM`; most need no file. A file here, named by `config.model_type`, says what
loading cannot:

class LLM:
    template: str               # the template used when a recipe names none
"""
