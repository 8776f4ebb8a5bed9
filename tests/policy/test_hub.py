"""Model cards, and what is sent to the hub."""

from __future__ import annotations

import re
import socket

import huggingface_hub.constants
import pytest
import yaml
from stub_hub import TOKEN, stub_hub
from tiny_models import tiny_adapter, tiny_base

from qadapter import QAdapterError, QAdapterModel
from qadapter.policy import card
from qadapter.policy.composition import compose


@pytest.fixture
def hub():
    with stub_hub() as found:
        yield found


def header(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def lora(name: str):
    base = tiny_base()
    base.config.name_or_path = base.name_or_path = name
    return QAdapterModel.from_base(base, "paper")


# --- the card -----------------------------------------------------------------------------------


def test_every_save_has_a_card_that_says_what_it_is(tmp_path):
    model = lora("some-org/some.base-1B")
    model.save_pretrained(tmp_path / "mine")
    text = (tmp_path / "mine/README.md").read_text()
    assert header(text) == {
        "base_model": "some-org/some.base-1B", "base_model_relation": "adapter",
        "library_name": "qadapter", "pipeline_tag": "text-generation", "tags": list(card.TAGS),
    }
    assert 'from_pretrained("mine")' in text and "| alpha_tilde |" in text
    assert "`some-org/some.base-1B`" in text
    # Of PEFT's options those that say something.
    assert "| r |" in text and "| lora_dropout | 0.05 |" in text and "| use_dora |" not in text


def test_a_place_of_this_machine_is_not_in_the_card(tmp_path):
    lora(str(tmp_path / "bases/small")).save_pretrained(tmp_path / "mine")
    text = (tmp_path / "mine/README.md").read_text()
    assert "`small`" in text and str(tmp_path) not in text and "base_model" not in header(text)


def test_a_composition_has_one_too(tmp_path):
    compose([lora("a/b"), lora("a/b")], (0.4, 0.6)).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "composition" in text and "[0.4, 0.6]" in text


@pytest.mark.parametrize("theirs", [
    "mine", "", b"\xff\xfe\x00", "edited", "edited at the end", "link", "folder",
])
def test_what_people_wrote_or_edited_stays(tmp_path, theirs):
    model, readme = tiny_adapter(trained=False), tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    first = readme.read_bytes()
    model.save_pretrained(tmp_path)  # its own is written again
    assert readme.read_bytes() == first
    if theirs == "edited":
        readme.write_bytes(first.replace(b"Q-Adapter", b"Q-Adapter of mine", 1))
    elif theirs == "edited at the end":
        readme.write_bytes(first + b"\nMine.\n")
    elif theirs in ("link", "folder"):
        readme.unlink()
        (tmp_path / "notes").write_text("mine")
        readme.symlink_to("notes") if theirs == "link" else readme.mkdir()
    else:
        readme.write_bytes(theirs if isinstance(theirs, bytes) else theirs.encode())
    before = None if theirs == "folder" else readme.read_bytes()
    model.save_pretrained(tmp_path)
    assert readme.is_dir() if before is None else readme.read_bytes() == before
    QAdapterModel.from_pretrained(tmp_path, tiny_adapter(trained=False).base)


def test_a_name_means_nothing_in_it(tmp_path):
    name = 'a`b"c\n# <i>d'
    tiny_adapter(trained=False).save_pretrained(tmp_path / name)
    text = (tmp_path / name / "README.md").read_text()
    assert f"from_pretrained({name!r})" in text and "\n# <i>" not in text


# --- the hub ------------------------------------------------------------------------------------


def test_what_is_sent_is_the_adapter_and_it_loads(hub, tmp_path):
    model = lora(str(tmp_path / "bases/small"))
    model.chat_template = "{{ messages }}"
    url = model.push_to_hub("mine", token=TOKEN, private=True)
    assert url.startswith(f"{hub.url}/me/mine/commit/") and hub.private == {"me/mine": True}
    files = hub.repos["me/mine"]
    assert set(files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "manifest.json", "qadapter_config.json",
    }
    sent = b"".join(files.values())
    assert str(tmp_path).encode() not in sent and TOKEN.encode() not in sent
    assert b'from_pretrained("me/mine")' in files["README.md"]
    for name, content in files.items():
        (tmp_path / "got").mkdir(exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    loaded = QAdapterModel.from_pretrained(tmp_path / "got", tiny_base())
    assert loaded.chat_template == "{{ messages }}" and loaded.base_identity.name == "small"


def test_nothing_else_of_a_folder_is_sent(hub, tmp_path):
    (tmp_path / "data.jsonl").write_text("private")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3/optimizer.pt").write_text("private")
    (tmp_path / "README.md").write_text("My own.")
    lora("a/b").save_pretrained(tmp_path, push_to_hub=True, repo_id="org/it", token=TOKEN,
                                commit_message="First")
    [(repo, message, paths)] = hub.commits
    assert (repo, message) == ("org/it", "First")
    assert paths == ["README.md", "adapter_config.json", "adapter_model.safetensors",
                     "manifest.json", "qadapter_config.json"]
    assert hub.repos["org/it"]["README.md"] == b"My own."


def test_a_composition_is_sent_with_its_parts(hub, tmp_path):
    compose([lora("a/b"), lora("a/b")], (0.4, 0.6)).push_to_hub("sum", token=TOKEN)
    for name, content in hub.repos["me/sum"].items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    loaded = QAdapterModel.from_pretrained(tmp_path, tiny_base())
    assert list(loaded.weights) == [0.4, 0.6]


@pytest.mark.parametrize(("refused", "part"), [
    ({"create": 401}, "nothing was sent"), ({"create": 403}, "nothing was sent"),
    ({"commit": 500}, "the adapter is saved in"), ({"preupload": 404}, "the adapter is saved in"),
])
def test_what_the_hub_refuses_is_one_line(hub, tmp_path, refused, part):
    hub.refused = refused
    with pytest.raises(QAdapterError) as raised:
        lora("a/b").save_pretrained(tmp_path, push_to_hub=True, repo_id="it", token=TOKEN)
    line = str(raised.value)
    assert line.startswith("push_to_hub: ") and "\n" not in line and TOKEN not in line
    assert part in line and (tmp_path / "adapter_model.safetensors").is_file()


def test_no_network_is_one_line(tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}"
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(QAdapterError, match="nothing was sent") as raised:
            lora("a/b").push_to_hub("it", token=TOKEN)
        assert "\n" not in str(raised.value)
        with pytest.raises(QAdapterError, match="push_to_hub: a name/b/c"):
            lora("a/b").push_to_hub("a name/b/c", token=TOKEN)
