"""Text as tokens: files, documents, splits, tokenizers, memory-mapped tokens, windows and the batches of a step."""
