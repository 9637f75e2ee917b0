"""Reading and writing Hugging Face folders: weights, configuration, tokenizer and adapter files."""
