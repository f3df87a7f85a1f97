"""The target `hf:WHAT`: models by name, config, recipe or adapter, trained as transformers and PEFT train them."""
