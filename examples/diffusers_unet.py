"""diffusers: LoRA on a UNet, its convolutions included, and on its text encoder, trained by one optimizer.

python examples/diffusers_unet.py
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from psilora import PSILoRA

WORDS, SIZE, TOKENS = 8, 16, 4


def models() -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Tiny ones; yours come from `from_pretrained(name, subfolder="unet")` and `"text_encoder"`."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    config = CLIPTextConfig(
        vocab_size=WORDS + 2,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=WORDS,
        eos_token_id=WORDS + 1,
    )
    return unet, CLIPTextModel(config)


def batch(rows: int) -> tuple[Tensor, Tensor]:
    """Plain coloured squares (rows, 3, SIZE, SIZE), and the words for their colours (rows, TOKENS)."""
    words = torch.randint(WORDS, (rows,))
    colours = torch.stack([(words >> bit) % 2 for bit in range(3)], 1).float() * 2 - 1
    return colours[:, :, None, None].expand(-1, -1, SIZE, SIZE), words[:, None].expand(-1, TOKENS).contiguous()


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(arguments)

    unet, text_encoder = models()
    noise = DDPMScheduler(num_train_timesteps=100)
    # --8<-- [start:setup]
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "conv1", "conv2"]))
    text_encoder = get_peft_model(text_encoder, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = PSILoRA(
        {"unet": unet, "text_encoder": text_encoder},
        lr=0.1,
        groups=[{"layers": "^text_encoder", "lr": 0.02}],
    )
    # --8<-- [end:setup]
    print(optimizer)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 5, 1 - step / options.steps))
    losses = []
    for _ in range(options.steps):
        images, words = batch(8)
        eps, t = torch.randn_like(images), torch.randint(100, (len(images),))
        context = text_encoder(input_ids=words).last_hidden_state
        predicted = unet(noise.add_noise(images, eps, t), t, encoder_hidden_states=context).sample
        loss = nn.functional.mse_loss(predicted, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    print(f"loss {sum(losses[:10]) / 10:.3f} -> {sum(losses[-10:]) / 10:.3f}")
    return losses


if __name__ == "__main__":
    main()
