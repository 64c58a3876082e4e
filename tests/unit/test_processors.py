"""How many processors a process may use."""

from pathlib import Path

import pytest

from app.processors import processors


@pytest.fixture(autouse=True)
def _big_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(32)))


def _own(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "cgroup"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("quota", "count"),
    [("max 100000", 32), ("50000 100000", 1), ("150000 100000", 2), ("400000 100000", 4), ("junk", 32)],
)
def test_i7_the_quota_of_the_own_group_counts(tmp_path: Path, quota: str, count: int) -> None:
    group = tmp_path / "kubepods/pod1"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text(quota)
    assert processors(tmp_path, _own(tmp_path, "0::/kubepods/pod1\n")) == count


def test_i7_a_quota_of_a_group_above_counts_and_so_does_a_containers_root(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/cpu.max").write_text("300000 100000")
    assert processors(tmp_path, _own(tmp_path, "0::/a/b\n")) == 3
    (tmp_path / "cpu.max").write_text("200000 100000")
    assert processors(tmp_path, _own(tmp_path, "0::/host/path/of/the/container\n")) == 2


def test_i7_the_first_version_of_cgroups_is_read_too(tmp_path: Path) -> None:
    group = tmp_path / "cpu/docker/1"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("250000")
    (group / "cpu.cfs_period_us").write_text("100000")
    assert processors(tmp_path, _own(tmp_path, "4:cpu,cpuacct:/docker/1\n3:memory:/docker/1\n")) == 3


def test_without_cgroups_the_affinity_counts(tmp_path: Path) -> None:
    assert processors(tmp_path / "none", tmp_path / "none") == 32
