"""What is asked for against what is there: pure numbers, no Ray."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm_ray.errors import ResourceError, SettingsError, UnavailableError
from hrm_ray.launch.cluster_address import check_address
from hrm_ray.launch.resources import (
    ResourceRequest,
    check_cluster,
    check_free,
    check_local_gpus,
    check_machine,
    places,
    spare_cpus,
    usable_cpus,
)
from hrm_ray.train.host_memory import available_memory_bytes

GIB = 2**30


def test_every_shortage_of_this_machine_is_told_at_once() -> None:
    with pytest.raises(ResourceError) as caught:
        check_machine(ResourceRequest(64, 2, 0), cpus=8, memory_bytes=2 * GIB)
    assert "--world-size 64 x --threads 2 = 128 CPUs: this machine offers 8" in str(caught.value)
    assert "--world-size 4" in str(caught.value)
    assert "world_size" not in str(caught.value)
    assert "31.9 GiB" in str(caught.value)
    assert caught.value.exit_code == 4


def test_exactly_enough_is_enough() -> None:
    check_machine(ResourceRequest(4, 2, 0), cpus=8, memory_bytes=4 * GIB)


def test_a_worker_must_fit_on_one_node() -> None:
    nodes = [{"CPU": 3.0}, {"CPU": 3.0}, {"CPU": 2.0, "GPU": 1.0}]
    assert places(ResourceRequest(1, 2, 0), nodes) == 3
    assert places(ResourceRequest(1, 2, 1), nodes) == 1
    with pytest.raises(ResourceError, match="room for 3: 8 CPUs, 1 GPUs on 3"):
        check_cluster(ResourceRequest(4, 2, 0), nodes, "10.0.0.1:6379")


def test_a_busy_cluster_says_what_is_free() -> None:
    with pytest.raises(ResourceError, match="busy: 1 of 8 CPUs free"):
        check_free(ResourceRequest(2, 1, 0), {"CPU": 1.0}, {"CPU": 8.0}, "10.0.0.1:6379")
    check_free(ResourceRequest(2, 1, 0), {"CPU": 2.0}, {"CPU": 8.0}, "10.0.0.1:6379")


def test_missing_gpus_are_refused() -> None:
    with pytest.raises(ResourceError, match="--device cpu"):
        check_local_gpus(ResourceRequest(1, 1, 1), 0)


def test_this_machine_has_something() -> None:
    assert usable_cpus() >= 1
    assert available_memory_bytes() > 0


@pytest.mark.parametrize("address", ["ray://host:10001", "http://host:8265", "host", "host:port", ":6379"])
def test_an_address_of_the_wrong_form_is_a_usage_error(address: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_address(address)
    assert address in str(caught.value)


def test_an_address_where_nothing_listens_is_refused() -> None:
    with pytest.raises(UnavailableError, match="nothing answers"):
        check_address("127.0.0.1:1")


def test_a_loopback_address_is_looked_for_where_ray_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes this machine's own address in its place, where a head that is bound to loopback does not answer."""
    probed: list[str] = []

    def probe(host: str, port: int) -> str | None:
        probed.append(host)
        return "nothing answers there (refused)" if host == "10.0.0.7" else None

    monkeypatch.setattr("hrm_ray.launch.cluster_address._probe", probe)
    monkeypatch.setattr("hrm_ray.launch.cluster_address.own_address", lambda: "10.0.0.7")
    with pytest.raises(UnavailableError) as caught:
        check_address("127.0.0.1:6379")
    assert "127.0.0.1:6379: Ray looks for it at 10.0.0.7:6379" in str(caught.value) and len(str(caught.value)) < 300
    check_address("10.0.0.8:6379")
    assert probed == ["127.0.0.1", "10.0.0.7", "10.0.0.8"]
    monkeypatch.setattr("hrm_ray.launch.cluster_address.own_address", lambda: None)
    check_address("localhost:6379")


NODES = st.lists(st.fixed_dictionaries({"CPU": st.integers(0, 9).map(float)}), min_size=1, max_size=4)


@given(NODES, st.integers(1, 4), st.integers(1, 7), st.integers(1, 5))
def test_spare_cpus_leave_every_worker_its_place(
    nodes: list[dict[str, float]], workers: int, threads: int, most: int
) -> None:
    request = ResourceRequest(workers, threads, 0)
    spare = spare_cpus(request, nodes, most)
    assert len(spare) <= most
    left = [dict(node) for node in nodes]
    for index in spare:
        left[index]["CPU"] -= 1
    assert not spare or places(request, left) >= workers
    assert all(node["CPU"] >= 0 for node in left)


def test_a_cpu_is_spared_only_where_no_worker_needs_it() -> None:
    two = [{"CPU": 8.0}, {"CPU": 8.0}]
    assert spare_cpus(ResourceRequest(2, 7, 0), two, 2) == [0, 1]
    assert spare_cpus(ResourceRequest(2, 8, 0), two, 2) == []
