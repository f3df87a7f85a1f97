"""Pre-training a small GPT, or a model of LLaMA's style, from nothing."""
