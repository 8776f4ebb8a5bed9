"""Greedy decoding by stock transformers or PEFT: a script that knows nothing of qadapter.

    python -P stock.py request.json answer.safetensors

The request: ``export`` (folder); ``base`` and ``revision`` (what a PEFT folder is put on; null for
a checkpoint); ``dtype``, ``device``, ``attn_implementation``, ``threads``; ``prompts`` (lists of
token ids) and ``texts`` (the same as text, or null); ``max_new_tokens``.

The answer, for prompt i: ``tokens.i`` [K]; ``logits.i`` [K, V], which each was chosen from;
``states.i`` and ``entering.i`` [K, D], the last hidden states those come from and the states that
entered the last layer; ``prompt.i``, the text as the export's
own tokenizer reads it. Metadata: ``versions``; ``temperature``, of the export's
generation_config.json.
"""

import json
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def load(request):
    """The model, and versions of the libraries that loaded it."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    model, report = AutoModelForCausalLM.from_pretrained(
        request["base"] or request["export"], revision=request["revision"] or "main",
        dtype=getattr(torch, request["dtype"]),
        attn_implementation=request["attn_implementation"], output_loading_info=True,
        device_map="auto" if request["device"] == "auto" else None, trust_remote_code=False,
    )
    wrong = {key: sorted(map(str, names)) for key, names in report.items() if names}
    if wrong:
        sys.exit(f"weights do not fit the architecture: {wrong}")
    if request["base"]:
        import peft

        versions["peft"] = peft.__version__
        model = peft.PeftModel.from_pretrained(model, request["export"])
    if request["device"] != "auto":
        model.to(request["device"])
    return model.eval(), versions


def answer(request):
    """(tensors, metadata) as above."""
    model, versions = load(request)
    stored = GenerationConfig.from_pretrained(request["export"])
    # Nothing but the logits shall choose the tokens: not a penalty, nor an end of sequence.
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=request["max_new_tokens"], pad_token_id=0,
        output_logits=True, output_hidden_states=True, return_dict_in_generate=True,
    )
    tensors = {}
    for i, ids in enumerate(request["prompts"]):
        prompt = torch.tensor([ids], device=model.device)
        output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))
        tensors[f"tokens.{i}"] = output.sequences[0, prompt.shape[1]:].cpu()
        tensors[f"logits.{i}"] = torch.cat(output.logits).float().cpu()
        for name, place in (("states", -1), ("entering", -2)):
            states = [layers[place][0, -1] for layers in output.hidden_states]
            tensors[f"{name}.{i}"] = torch.stack(states).float().cpu()
    if request["texts"] is not None:
        tokenizer = AutoTokenizer.from_pretrained(request["export"], trust_remote_code=False)
        for i, text in enumerate(request["texts"]):
            tensors[f"prompt.{i}"] = torch.tensor(tokenizer(text)["input_ids"])
    metadata = {"versions": json.dumps(versions), "temperature": json.dumps(stored.temperature)}
    return tensors, metadata


def main(request_path, answer_path):
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    torch.set_num_threads(request["threads"])
    transformers.logging.set_verbosity_error()
    tensors, metadata = answer(request)
    foreign = sorted(name for name in sys.modules if name.partition(".")[0] == "qadapter")
    if foreign:
        sys.exit(f"this process was meant to be free of {foreign}")
    save_file(tensors, answer_path, metadata=metadata)


if __name__ == "__main__":
    main(*sys.argv[1:])
