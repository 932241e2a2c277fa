"""Files that are written at once."""

import pytest

from jaxmed.build.config import replacing


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "table.csv"
    with replacing(path) as draft:
        draft.write_text("old")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), replacing(path) as draft:
        draft.write_text("ha")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    with replacing(path) as draft:
        draft.write_text("new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
