"""The output folder of a run of the authors' published code, on a tiny model.

As that code makes it: PEFT's default LoRA without a task type, saved by PEFT, a checkpoint inside,
and every argument of the run in ``training_config.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import torch
from tiny_models import tiny_llama

ARGUMENTS = {
    "base_model": "meta-llama/Meta-Llama-3.1-8B-Instruct", "dataset_name": "dsp",
    "data_dir": "data/chat/dsp/dsp_academy_pairs.train.json", "output_dir": "logs/qadapter",
    "alpha_tilde": 0.8, "alpha_0": 0.3, "gamma": 1.0, "beta": 0.05, "batch_size": 512,
    "micro_batch_size": 1, "num_epochs": 3, "learning_rate": 3e-4, "cutoff_len": 512, "lora_r": 8,
    "lora_alpha": 16, "lora_dropout": 0.05, "train_on_inputs": False,
    "resume_from_checkpoint": None, "gradient_accumulation_steps": 128, "device_map": {"": 0},
    "world_size": 4, "ddp": True, "use_wandb": False,
}
"""What they were trained with; the base is where the folder's ``adapter_config.json`` says."""


def lora_on(base: torch.nn.Module) -> peft.PeftModel:
    """Q: their LoRA, as if it had been trained."""
    torch.manual_seed(3)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, bias="none")
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save_run(folder: Path, base: Path | str, arguments: dict | None = None) -> Path:
    """A finished run on ``tiny_llama()``, whose folder is ``base``."""
    model = lora_on(tiny_llama())
    for place in (folder, folder / "checkpoint-100"):
        model.save_pretrained(place)
        path = place / "adapter_config.json"
        config = json.loads(path.read_text())
        assert config["task_type"] is None
        path.write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
        torch.save({"not": "read"}, place / "training_args.bin")
    text = json.dumps(ARGUMENTS if arguments is None else arguments, indent=4)
    (folder / "training_config.json").write_text(text)
    return folder
