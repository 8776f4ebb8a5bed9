"""Files of ours may be read by whoever may read a new file there."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_adapter

from qadapter.system.modes import give_usual_modes


def modes(folder) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=[0o022, 0o002, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_of_every_writer_get_the_mode_of_a_new_one(umask, tmp_path):
    (tmp_path / "inner").mkdir()
    save_file({"x": torch.zeros(2)}, tmp_path / "inner/x.safetensors")
    (tmp_path / "y").write_text("")
    (tmp_path / "y").chmod(0o600)
    give_usual_modes(tmp_path)
    assert modes(tmp_path) == {0o666 & ~umask}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["inner", "x.safetensors", "y"]


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "elsewhere").chmod(0o400)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/link").symlink_to(tmp_path / "elsewhere")
    give_usual_modes(tmp_path / "ours")
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o400


def test_saved_adapters(umask, tmp_path):
    tiny_adapter(trained=True).save_pretrained(tmp_path / "run")
    assert modes(tmp_path / "run") == {0o666 & ~umask}
