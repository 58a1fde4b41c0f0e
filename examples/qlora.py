"""QLoRA: adapters on a base in 4 bits, on a GPU or a CPU. Needs bitsandbytes, and says so where it is missing.

python examples/qlora.py --model meta-llama/Llama-3.2-1B     # without --model: a tiny model made on the spot
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile

import torch
from offline import rows, tiny_llama
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from psilora import PSILoRA


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", default=None)
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SystemExit("qlora.py needs bitsandbytes: pip install bitsandbytes")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
        name = options.model or folder
        base = AutoModelForCausalLM.from_pretrained(name, quantization_config=four_bits, device_map={"": device})
    model = get_peft_model(
        prepare_model_for_kbit_training(base), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    optimizer = PSILoRA(model, lr=0.1)
    data, losses = rows(), []
    for step in range(options.steps):
        picked = torch.randint(len(data), (8,)).tolist()
        batch = {key: torch.stack([data[i][key] for i in picked]).to(device) for key in ("input_ids", "labels")}
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
