"""The fused loss inside TRL: its DPOTrainer's data and loop, Q-Adapter's objective.

TRL's batches are already what the loss takes: chosen rows, then rejected rows, and a mask of the
completions. Memory for logits is bounded whatever the vocabulary.

    python examples/in_trl.py MODEL PAIRS.jsonl --max_steps 20
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from qadapter import ObjectiveConfig, linear_q_adapter_loss


class QAdapterLossTrainer(DPOTrainer):
    """DPOTrainer with L = −log σ(R_chosen − R_rejected) + β·mean r² (``config.chi2_coef``)."""

    objective = ObjectiveConfig(alpha_0=0.3, alpha_tilde=0.3, chi2_coef=0.1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        peft_model = self.accelerator.unwrap_model(model)
        llama = peft_model.get_base_model()
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), peft_model.disable_adapter():
            base_hidden = llama.model(**tokens).last_hidden_state
        out = linear_q_adapter_loss(
            llama.model(**tokens).last_hidden_state, base_hidden, llama.lm_head.weight.detach(),
            inputs["input_ids"], inputs["completion_mask"], self.objective,
        )
        margins = out.chosen_rewards - out.rejected_rewards
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["rewards/margins"].append(margins.mean().item())
        metrics["rewards/accuracies"].append((margins > 0).float().mean().item())
        return (out.loss, out) if return_outputs else out.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub name of a Llama-like causal LM")
    parser.add_argument("pairs", help="JSON lines in TRL's preference format")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--output_dir", default="runs/in_trl")
    options = parser.parse_args()

    trainer = QAdapterLossTrainer(
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16),
        args=DPOConfig(
            options.output_dir, max_steps=options.max_steps, learning_rate=3e-4, logging_steps=1,
            per_device_train_batch_size=4, max_length=512, bf16=False, report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=options.pairs, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
