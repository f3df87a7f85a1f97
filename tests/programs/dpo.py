"""Direct preference optimization with a frozen reference model, in a plain loop."""

import copy

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

device = "cuda" if torch.cuda.is_available() else "cpu"
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
policy = AutoModelForCausalLM.from_config(config).to(device)
reference = copy.deepcopy(policy).eval().requires_grad_(False)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
beta = 0.1


def log_probabilities(model, tokens, mask):
    logits = model(input_ids=tokens).logits[:, :-1].float()
    picked = torch.gather(logits.log_softmax(-1), 2, tokens[:, 1:, None]).squeeze(2)
    return (picked * mask[:, 1:]).sum(-1)


policy.train()
for step in range(3):
    tokens = torch.randint(0, 64, (4, 24), device=device)
    mask = torch.ones(4, 24, dtype=torch.bool, device=device)
    mask[:, :8] = False
    with torch.no_grad():
        of_reference = log_probabilities(reference, tokens, mask)
    of_policy = log_probabilities(policy, tokens, mask)
    ratios = of_policy - of_reference
    chosen, rejected = ratios.chunk(2)
    loss = -F.logsigmoid(beta * (chosen - rejected)).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}, accuracy {(chosen > rejected).float().mean().item():.2f}")
