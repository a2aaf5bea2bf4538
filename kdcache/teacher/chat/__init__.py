"""Tokenizers, chat templates, and which tokens of a rendered chat are whose.

- `hf_tokenizer` is the tokenizer of transformers, with fingerprints of what it means.
- `marked_text` is text whose characters know where they come from; `jinja_template` runs a chat template on it, in the sandbox
  of `jinja_bounds`.
- `shapes` brings a chat into the shape that its template takes, and says what is lost of it.
- `turns` proves which characters of a rendered chat are whose; `rendered` holds what it finds; `tokens` carries it over to
  tokens.
"""
