"""Chat formats: one small `.jinja` file each, and the file name is the key (`template: phi` in a recipe).

A file is a Hugging Face chat template with `{% generation %}` around all that the model must produce after the prompt:
the answer, with its leading space if the format has one, through the end-of-turn token. It does not write the BOS
token: `Template.chat_template(tokenizer)` adds it for tokenizers that begin every text with one. Content is a string
with `<image>` in it, or a list of parts. `{% set end_of_turn = "..." %}` states the format's own end-of-turn; with a
tokenizer that lacks it, the tokenizer's EOS takes its place.
"""
