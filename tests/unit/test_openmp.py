"""OpenMP's waiting is shortened before torch is loaded, unless the user has chosen."""

from __future__ import annotations

from hrm_ray.openmp import SPIN_COUNT, SPIN_VARIABLE, limit_openmp_spin


def test_set_where_nothing_was_said() -> None:
    environment: dict[str, str] = {}
    limit_openmp_spin(environment)
    assert environment == {SPIN_VARIABLE: SPIN_COUNT}


def test_what_the_user_said_stands() -> None:
    for said in ({SPIN_VARIABLE: "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        environment = dict(said)
        limit_openmp_spin(environment)
        assert environment == said
