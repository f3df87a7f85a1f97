"""Train a small diffusion model with diffusers, in the manner of its training example."""

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64),
        norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    model.to(device)
    ema = EMAModel(model.parameters())
    ema.to(device)
    scheduler = DDPMScheduler(num_train_timesteps=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    rate = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=1, num_training_steps=4)
    loader = torch.utils.data.DataLoader(torch.rand(16, 3, 16, 16), batch_size=4, shuffle=True)
    for epoch in range(1):
        for step, clean in enumerate(loader):
            clean = clean.to(device)
            noise = torch.randn(clean.shape, device=clean.device)
            timesteps = torch.randint(0, 100, (clean.shape[0],), device=clean.device, dtype=torch.int64)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            loss = F.mse_loss(model(noisy, timesteps, return_dict=False)[0], noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            ema.step(model.parameters())
            print({"loss": loss.detach().item(), "lr": rate.get_last_lr()[0], "step": step})
    pipeline = DDPMPipeline(unet=model, scheduler=scheduler)
    pipeline.save_pretrained("ddpm")


if __name__ == "__main__":
    main()
