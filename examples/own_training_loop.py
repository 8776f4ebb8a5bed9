"""The fused loss in a training loop of your own: PyTorch and PEFT, no trainer.

One forward with the LoRA on, one with it off, no logits: the loss takes the last hidden states and
the frozen head, and never holds a [batch, tokens, vocabulary] tensor.

    python examples/own_training_loop.py MODEL PAIRS.jsonl --steps 20
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapter import ObjectiveConfig, linear_q_adapter_loss
from qadapter.data import PreferenceCollator, load_preferences, tokenize_preferences

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="folder or hub name of a causal LM")
parser.add_argument("pairs", help="preferences: a file, or a dataset on the hub")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch_size", type=int, default=4)
parser.add_argument("--output_dir", help="where to save the LoRA; default: nowhere")
options = parser.parse_args()

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(options.model)
base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
trunk, head = base.model, base.lm_head  # a Llama's; the LoRA layers sit inside the trunk

pairs, report = tokenize_preferences(load_preferences(options.pairs), tokenizer, max_length=512)
print(report.summary())
batches = torch.utils.data.DataLoader(
    pairs.to_list(), options.batch_size, shuffle=True, drop_last=True,
    collate_fn=PreferenceCollator(tokenizer.pad_token_id or 0),
)

config = ObjectiveConfig(alpha_0=0.3, alpha_tilde=0.3)
parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=3e-4)

step = 0
while step < options.steps:
    for batch in batches:
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), model.disable_adapter():
            base_hidden = trunk(**tokens).last_hidden_state
        adapter_hidden = trunk(**tokens).last_hidden_state
        out = linear_q_adapter_loss(
            adapter_hidden, base_hidden, head.weight.detach(), batch["input_ids"],
            batch["completion_mask"], config,
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        step += 1
        accuracy = (out.chosen_rewards > out.rejected_rewards).float().mean()
        print(f"step {step}  loss {out.loss.item():.4f}  accuracy {accuracy.item():.2f}")
        if step == options.steps:
            break

if options.output_dir:
    model.save_pretrained(options.output_dir)
