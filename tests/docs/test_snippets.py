"""Every command and snippet of the pages runs, page by page and in order, on a tiny model."""

from __future__ import annotations

import os

import pytest
from pages import PAGES, ROOT, blocks
from snippets import Page, furnish
from stand_ins import COMPILED, PARSED, SHORTER
from tiny_models import chatml, cli, preference_rows, tiny_llama, write_jsonl


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What every page finds: a model, pairs, texts, prompts and a run trained on them."""
    folder = tmp_path_factory.mktemp("place")
    tiny_llama(num_hidden_layers=10).save_pretrained(folder / "model")
    chatml().save_pretrained(folder / "model")
    rows = preference_rows(80)
    for name, some in (("pairs", rows[:40]), ("held_out", rows), ("test", rows[40:48])):
        write_jsonl(folder / f"{name}.jsonl", some)
    texts = ["The sky is blue.", "Yes, no, maybe, never."]
    (folder / "texts.txt").write_text("\n\n".join(texts))
    write_jsonl(folder / "texts.jsonl", [{"text": text} for text in texts])
    (folder / "prompts.txt").write_text("What is blue?\nWhat is red?\n")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows[:2]])
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert cli("train", "--dataset_name", "pairs.jsonl", "--output_dir", "runs/mine",
                   "--adapter_kind", "head", *SHORTER["train"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_block_of_a_page_runs(page, place, tmp_path, monkeypatch):
    furnish(tmp_path, place, page)
    monkeypatch.chdir(tmp_path)
    shared = Page(tmp_path, monkeypatch)
    for block in blocks(page):
        shared.run(block)


def test_nothing_is_excused_that_isnt_there():
    text = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    joined = " ".join(" ".join(text.values()).replace("\\\n", " ").split())
    for beginning in PARSED:
        assert beginning in joined, beginning
    for page, beginning in COMPILED:
        assert beginning in text[page], (page, beginning)
