"""Templates are chat formats. One `.jinja` file is one template: `template: phi` in a recipe is phi.jinja.

Read phi.jinja first. data/template.py uses these files.

A file is a Hugging Face chat template. `{% generation %}` surrounds everything that the model must produce after the
prompt: the answer, with its leading space if the format has one, and the end-of-turn token.

It does not write the BOS token: `Template.get_chat_template(tokenizer)` adds it for tokenizers that begin every text
with one. Content is a string with `<image>` in it, or a list of parts. `{% set end_of_turn = "..." %}` names the token
that ends a turn. If the tokenizer does not have this token, its EOS token is used.
"""
