"""Fine-tuning of LLaMA2 on instruction data: the architecture, its tokenizer and data, and the training step."""
