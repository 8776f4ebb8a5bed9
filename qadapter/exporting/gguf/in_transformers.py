"""A GGUF file beside the checkpoint it was made from, both read by stock transformers: a script
that knows nothing of qadapter.

    python -P in_transformers.py request.json answer.safetensors

The request: ``checkpoint`` (folder); ``gguf`` (file); ``device``, ``threads``; ``prompts`` (lists
of token ids); ``texts`` (the same, to measure on); ``max_new_tokens``; ``settings`` (names of the
config's to compare).

All is computed in float32. The answer: ``tokens.i`` [K], what the checkpoint decodes greedily after
prompt i; ``checkpoint`` and ``gguf`` [N, V], the logits of both at those tokens, one prompt after
the other; ``rounding`` [1], the largest difference that bfloat16 makes to ``checkpoint``. Metadata:
``versions``; ``measured``, {tokens, kl, same}: sums over the texts; ``weights``, [tensor, largest
ratio of an error to what rounding to the type explains]; ``settings``, those that the file says
otherwise; ``unread``, why transformers can't read the file, and then there is nothing of it.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

_ROUNDING = {  # (relative, absolute, of the largest of a block of 32)
    GGMLQuantizationType.F32: (0.0, 0.0, 0.0),
    GGMLQuantizationType.F16: (2.0**-11, 2.0**-25, 0.0),
    GGMLQuantizationType.BF16: (2.0**-8, 2.0**-133, 0.0),
    # Half a step of 1/127 of the largest, and the step itself rounded to float16.
    GGMLQuantizationType.Q8_0: (0.0, 2.0**-17, 0.5 / 127 + 2.0**-10),
}


def states(model, prompts, tokens):
    """Logits [K, V] at each token after each prompt, in the model's own dtype."""
    for prompt, decoded in zip(prompts, tokens, strict=True):
        fed = torch.tensor([prompt + decoded[:-1]], device=model.device)
        with torch.no_grad():
            yield model(input_ids=fed, use_cache=False).logits[0, len(prompt) - 1 :].float().cpu()


def decode(model, prompts, count):
    """Greedily; nothing but the logits chooses: not a penalty, nor an end of sequence."""
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    for ids in prompts:
        prompt = torch.tensor([ids], device=model.device)
        output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))
        yield output[0, len(ids) :].tolist()


def of_text(model, ids):
    """Log-probabilities [T, V] of a text's states."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    return logits[0].float().log_softmax(-1)


def load(request, **source):
    model = AutoModelForCausalLM.from_pretrained(
        dtype=torch.float32, trust_remote_code=False, **source
    )
    return model.to(request["device"]).eval()


def weights_beside(checkpoint, model, kinds):
    """[tensor, ratio] of the weight farthest off, by what rounding to its type explains."""
    state, worst = model.state_dict(), ["", 0.0]
    for path in sorted(Path(checkpoint).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                exact = file.get_tensor(name).double()
                found = state.get(name, torch.full_like(exact, torch.nan)).double().cpu()
                ratio = float("inf")
                if found.shape == exact.shape:
                    over = (found - exact).abs() / allowed(exact, kinds)
                    ratio = over.nan_to_num(nan=torch.inf).max().item()
                if ratio > worst[1]:
                    worst = [name, ratio]
    return worst


def allowed(exact, kinds):
    """What rounding to the file's types explains of a tensor's error."""
    # A norm's weight may be stored with 1 added to it.
    bound = 2.0**-23 * (1 + exact.abs()) if exact.ndim == 1 else torch.full_like(exact, 1e-300)
    if exact.ndim > 1:
        for kind in kinds:
            relative, absolute, of_block = _ROUNDING[kind]
            error = relative * exact.abs() + absolute
            if of_block and exact.shape[-1] % 32 == 0:
                blocks = exact.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
                error = error + (of_block * blocks.expand(*blocks.shape[:-1], 32)).flatten(-2)
            bound = torch.maximum(bound, error)
    return bound


def differing(names, config, stored):
    """Settings that the file says otherwise than the checkpoint's config."""
    found = {}
    for name in names:
        ours, theirs = getattr(config, name, None), getattr(stored, name, None)
        if isinstance(ours, float):  # GGUF has them in float32
            ours, theirs = torch.tensor([ours, float(theirs)]).tolist()
        if ours != theirs:
            found[name] = [ours, theirs]
    return found


def as_read(config, stored):
    """The checkpoint's config, of the class that a file's is (a Mistral's file is a Llama's): the
    reader doesn't read every setting."""
    if config.model_type == stored.model_type:
        return config
    settings = {**config.to_dict(), "model_type": stored.model_type}
    return type(stored)(**{k: v for k, v in settings.items() if hasattr(stored, k)})


def answer(request, scratch):
    """(tensors, metadata) as above."""
    prompts, texts, file = request["prompts"], request["texts"], Path(request["gguf"])
    model = load(request, pretrained_model_name_or_path=request["checkpoint"])
    config = model.config
    tokens = list(decode(model, prompts, request["max_new_tokens"]))
    tensors = {f"tokens.{i}": torch.tensor(ids) for i, ids in enumerate(tokens)}
    tensors["checkpoint"] = torch.cat(list(states(model, prompts, tokens)))
    for i, ids in enumerate(texts):  # one model at a time: these wait on disk
        save_file({"x": of_text(model, ids).cpu()}, Path(scratch) / f"text{i}.safetensors")
    model.to(torch.bfloat16)
    rounded = torch.cat(list(states(model, prompts, tokens)))
    tensors["rounding"] = (rounded - tensors["checkpoint"]).abs().max()[None]
    del model

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    measured = {"tokens": 0, "kl": 0.0, "same": 0}
    metadata = {
        "versions": versions, "measured": measured, "weights": ["", 0.0], "settings": {},
        "unread": "",
    }
    try:
        stored = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except ValueError as error:
        return tensors, metadata | {"unread": str(error)}
    metadata["settings"] = differing(request["settings"], config, stored)
    model = load(
        request, pretrained_model_name_or_path=file.parent, gguf_file=file.name,
        config=as_read(config, stored),
    )
    kinds = {tensor.tensor_type for tensor in GGUFReader(file).tensors}
    metadata["weights"] = weights_beside(request["checkpoint"], model, kinds)
    tensors["gguf"] = torch.cat(list(states(model, prompts, tokens)))
    for i, ids in enumerate(texts):
        with safe_open(Path(scratch) / f"text{i}.safetensors", "pt") as stored:
            exact = stored.get_tensor("x").to(model.device)
        found = of_text(model, ids)
        measured["tokens"] += len(ids)
        measured["kl"] += (exact.exp() * (exact - found)).sum(dtype=torch.float64).item()
        measured["same"] += (exact.argmax(-1) == found.argmax(-1)).sum().item()
    return tensors, metadata


def main(request_path, answer_path):
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    transformers.logging.set_verbosity_error()
    tensors, metadata = answer(request, Path(answer_path).parent)
    foreign = sorted(name for name in sys.modules if name.partition(".")[0] == "qadapter")
    if foreign:
        sys.exit(f"this process was meant to be free of {foreign}")
    save_file(tensors, answer_path, {key: json.dumps(value) for key, value in metadata.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
