"""Checkpoints by name: folders, and repositories of the hub, which is never asked here."""

import pytest

from ecar.hub import checkpoint_folder


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/a/b", "a/b/c", "../b"])
def test_what_can_be_no_repository_is_not_looked_for(name, monkeypatch):
    monkeypatch.delattr("ecar.hub.snapshot_download")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        checkpoint_folder(name, ("config.json",))


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(FileNotFoundError, match="not a folder"):
        checkpoint_folder(tmp_path / "x", ("config.json",))


def test_a_repository_that_cannot_be_had_is_one_line(monkeypatch):
    def fail(name, **options):
        raise OSError("no network\nsecond line")

    monkeypatch.setattr("ecar.hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"'someone/none': no such folder.*\(no network\)$"):
        checkpoint_folder("someone/none", ("config.json",))
