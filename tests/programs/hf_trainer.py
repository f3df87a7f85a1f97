"""Fine-tune a causal language model with the Trainer of transformers."""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments


class Samples(torch.utils.data.Dataset):
    def __init__(self, count, length, vocab):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, vocab, (count, length), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index].clone()}


def main(folder=None, length=32):
    if folder:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    else:
        config = LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config)
    args = TrainingArguments(
        output_dir="out",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        bf16=True,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        logging_steps=1,
        report_to="none",
        dataloader_num_workers=2 if torch.cuda.is_available() else 0,
        use_cpu=not torch.cuda.is_available(),
    )
    data = Samples(16, length, model.config.vocab_size)
    trainer = Trainer(model=model, args=args, train_dataset=data, eval_dataset=Samples(4, length, 128))
    trainer.train()
    trainer.save_model("out/final")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
