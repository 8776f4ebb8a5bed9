"""A GGUF file in llama.cpp, by llama-cpp-python: a script that knows nothing of qadapter.

    python -P in_llama_cpp.py request.json answer.safetensors

The request: ``gguf`` (file); ``threads``; ``prompts`` (lists of token ids); ``tokens`` (what
follows each); ``texts`` (strings, to be read as prompts).

The answer: ``logits`` [N, V] at each of the tokens, one prompt after the other; ``greedy.i`` [K],
what llama.cpp decodes itself after prompt i; ``text.i``, text i as its tokenizer reads it.
Metadata: ``version``.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np
from safetensors.numpy import save_file


def main(request_path, answer_path):
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    pairs = list(zip(request["prompts"], request["tokens"], strict=True))
    model = llama_cpp.Llama(
        request["gguf"], n_ctx=max(len(ids) + len(tokens) for ids, tokens in pairs) + 8,
        logits_all=True, n_threads=request["threads"], n_threads_batch=request["threads"],
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False,
        n_gpu_layers=0, verbose=False,
    )
    rows, tensors = [], {}
    for i, (ids, tokens) in enumerate(pairs):
        model.reset()
        model.eval(ids + tokens[:-1])
        rows.append(np.array(model.scores[len(ids) - 1 : len(ids) + len(tokens) - 1]))
        model.reset()
        model.eval(ids)
        decoded = []
        for _ in tokens:
            decoded.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(decoded[-1:])
        tensors[f"greedy.{i}"] = np.array(decoded)
    for i, text in enumerate(request["texts"]):
        read = model.tokenize(text.encode(), add_bos=True, special=True)
        tensors[f"text.{i}"] = np.array(read)
    tensors["logits"] = np.concatenate(rows).astype(np.float32)
    save_file(tensors, answer_path, {"version": json.dumps(llama_cpp.__version__)})


if __name__ == "__main__":
    main(*sys.argv[1:])
