"""The fused loss under accelerate: on one process or many, the same step.

    accelerate launch --num_processes 2 examples/in_accelerate.py MODEL PAIRS.jsonl --max_steps 20

(On CPUs: ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 …) Processes average their gradients.
The χ² term is a mean over actions, of which one may have more than another: each divides by what
the step has of them in the mean, and the average is right.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapter import ObjectiveConfig, linear_q_adapter_loss
from qadapter.data import PreferenceCollator, load_preferences, tokenize_preferences


class PairLoss(torch.nn.Module):
    """A LoRA and its loss as one module: what processes share is the call of its ``forward``."""

    def __init__(self, lora, config):
        super().__init__()
        self.lora, self.config = lora, config

    def forward(self, batch, num_actions):
        llama = self.lora.get_base_model()
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), self.lora.disable_adapter():
            base_hidden = llama.model(**tokens).last_hidden_state
        return linear_q_adapter_loss(
            llama.model(**tokens).last_hidden_state, base_hidden, llama.lm_head.weight.detach(),
            batch["input_ids"], batch["completion_mask"], self.config, num_actions=num_actions,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub name of a Llama-like causal LM")
    parser.add_argument("pairs", help="preferences: a file, or a dataset on the hub")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=4, help="pairs of each process")
    parser.add_argument("--chi2_coef", type=float, default=0.1, help="weight of the χ² term")
    parser.add_argument("--output_dir", default="runs/in_accelerate")
    options = parser.parse_args()

    # One order of the pairs, whatever the number of processes.
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    lora = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    pairs, report = tokenize_preferences(load_preferences(options.pairs), tokenizer, max_length=512)
    accelerator.print(report.summary())
    batches = torch.utils.data.DataLoader(
        pairs.to_list(), options.batch_size, shuffle=True, drop_last=True,
        collate_fn=PreferenceCollator(tokenizer.pad_token_id or 0),
    )
    trained = [p for p in lora.parameters() if p.requires_grad]
    model, optimizer, batches = accelerator.prepare(
        PairLoss(lora, ObjectiveConfig(0.3, 0.3, chi2_coef=options.chi2_coef)),
        torch.optim.AdamW(trained, lr=3e-4), batches,
    )
    step = 0
    while step < options.max_steps:
        for batch in batches:
            actions = accelerator.reduce(batch["completion_mask"].sum().float(), "mean")
            loss = model(batch, actions.item()).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            mean = accelerator.reduce(loss.detach(), "mean").item()
            accelerator.print(f"step {step}  loss {mean:.6f}")
            if step == options.max_steps:
                break
    if accelerator.is_main_process:
        lora.save_pretrained(options.output_dir)
    model = accelerator.free_memory(model)  # before the processes part: it waits for the others
    accelerator.end_training()


if __name__ == "__main__":
    main()
