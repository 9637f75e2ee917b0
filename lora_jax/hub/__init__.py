"""What a Hugging Face folder is: weights, configuration, tokenizer and adapter files, read and written."""
