import pytest

from tests.unprivileged import unprivileged


def test_file_permissions_are_obeyed_within_the_context_only(tmp_path):
    file = tmp_path / "secret"
    file.write_text("content")
    file.chmod(0)
    with unprivileged():
        with pytest.raises(PermissionError):
            file.read_text()
        (tmp_path / "new").write_text("written")
    file.chmod(0o600)
    assert file.read_text() == "content"
