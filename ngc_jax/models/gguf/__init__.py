"""GGUF files read as Hugging Face models.

Each module uses only those before it: `header` parses, `file` reads tensors, `config` translates the metadata,
`pretokenizers` and `tokenizer` rebuild the tokenizer, `source` presents all of it as a model.
"""
