"""The fused loss in a LightningModule (pip install lightning).

    python examples/in_lightning.py MODEL PAIRS.jsonl --max_steps 20
"""

import argparse

import lightning
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapter import ObjectiveConfig, linear_q_adapter_loss
from qadapter.data import PreferenceCollator, load_preferences, tokenize_preferences


class QAdapterModule(lightning.LightningModule):
    """A LoRA on a Llama-like base, trained by L = −log σ(R_chosen − R_rejected) + β·mean r²."""

    def __init__(self, base):
        super().__init__()
        self.lora = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        self.config = ObjectiveConfig(alpha_0=0.3, alpha_tilde=0.3)

    def training_step(self, batch, batch_idx):
        llama = self.lora.get_base_model()
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), self.lora.disable_adapter():
            base_hidden = llama.model(**tokens).last_hidden_state
        # Processes average gradients: each divides by its share of the actions of all.
        actions = self.all_gather(batch["completion_mask"].sum()).float().mean()
        out = linear_q_adapter_loss(
            llama.model(**tokens).last_hidden_state, base_hidden, llama.lm_head.weight.detach(),
            batch["input_ids"], batch["completion_mask"], self.config, num_actions=actions.item(),
        )
        margins = out.chosen_rewards - out.rejected_rewards
        self.log("rewards/margins", margins.mean(), sync_dist=True)
        self.log("loss", out.loss, sync_dist=True, prog_bar=True)
        return out.loss

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=3e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub name of a Llama-like causal LM")
    parser.add_argument("pairs", help="preferences: a file, or a dataset on the hub")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--output_dir", default="runs/in_lightning")
    options = parser.parse_args()

    lightning.seed_everything(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    pairs, report = tokenize_preferences(load_preferences(options.pairs), tokenizer, max_length=512)
    print(report.summary())
    batches = torch.utils.data.DataLoader(
        pairs.to_list(), options.batch_size, shuffle=True, drop_last=True,
        collate_fn=PreferenceCollator(tokenizer.pad_token_id or 0),
    )
    module = QAdapterModule(AutoModelForCausalLM.from_pretrained(options.model, dtype="auto"))
    trainer = lightning.Trainer(
        max_steps=options.max_steps, logger=False, enable_checkpointing=False, log_every_n_steps=1,
        default_root_dir=options.output_dir,
    )
    trainer.fit(module, batches)
    print({name: f"{value:.4f}" for name, value in trainer.callback_metrics.items()})
    module.lora.save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
