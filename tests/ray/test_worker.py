"""A worker's check that its node shares the bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from hrm_ray.errors import UnavailableError
from hrm_ray.orchestration.worker import check_shared


def test_a_folder_of_the_same_name_on_another_node_is_told_from_the_bundle(tmp_path: Path) -> None:
    marker = tmp_path / "bundle" / ".driver-12ab"
    with pytest.raises(UnavailableError, match="has no such folder"):
        check_shared(marker, "34cd")
    marker.parent.mkdir()
    another = r"sees another folder of that name\. Give --bundle-dir"
    with pytest.raises(UnavailableError, match=another):
        check_shared(marker, "34cd")
    for content in ("", "56ef"):
        marker.write_text(content)
        with pytest.raises(UnavailableError, match=another):
            check_shared(marker, "34cd")
    marker.write_text("34cd")
    check_shared(marker, "34cd")
