"""The LLaMA2 target: architecture, tokenizer, instruction data and training step; fine-tuning and generation."""
