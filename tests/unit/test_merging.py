"""The streaming merge against a naive average in float64, its rules per tensor, its files and its memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from hrm_ray.atomic_files import sync_folder
from hrm_ray.errors import DataError, DiskError
from hrm_ray.merging import (
    OUTER_STEPS,
    TOUCHED,
    AnchorFiles,
    Member,
    MergeReport,
    OuterStep,
    Rule,
    TensorFile,
    check_member,
    merge_deltas,
    rule_of,
)
from hrm_ray.rundir import file_sha256

Tree = Mapping[str, Tensor]
EXPERTS = "L_level.layers.0.mlp.experts.up_proj.weight"
PUZZLES = "embedding.puzzle_emb.weights"
PLAIN = OuterStep()


def random_tree(
    seed: int, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tuple(shape), generator=generator).to(dtype) for name, shape in shapes.items()}


def saved(folder: Path, name: str, tree: Tree) -> Path:
    path = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tree.items()}, path)
    return path


def merged(
    folder: Path,
    anchor: Tree,
    members: Sequence[Tree],
    weights: Sequence[float] | None = None,
    outer: OuterStep = PLAIN,
    *,
    momentum: Path | None = None,
    whole: bool = False,
    series: Sequence[str] | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], MergeReport]:
    """The merge of trees, written to files below a fresh folder and read back. `whole`: members are weights."""
    place = folder / str(len(list(folder.iterdir())))
    place.mkdir()
    start = saved(place, "anchor", anchor)
    shares = weights or [1 / len(members)] * len(members)
    named = [
        Member(saved(place, f"member{k}", tree), share, start if whole else None, series[k] if series else None)
        for k, (tree, share) in enumerate(zip(members, shares, strict=True))
    ]
    out = AnchorFiles(place / "out.safetensors", place / "momentum.safetensors" if outer.momentum else None)
    report = merge_deltas(AnchorFiles(start, momentum), named, outer, out, **options)
    assert file_sha256(out.weights) == report.sha256
    assert sorted(path.name for path in place.iterdir() if ".tmp" in path.name) == []
    return load_file(out.weights), report


NAMES = st.sampled_from(["a.weight", "b.bias", "lm_head.weight", "H_level.x", "puzzle_emb.weights", EXPERTS])
SHAPES = st.dictionaries(NAMES, st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=4)
FLOATS = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=SHAPES,
    count=st.integers(1, 4),
    seed=st.integers(0, 99),
    window=st.integers(8, 400),
    anchor_type=FLOATS,
    member_type=FLOATS,
    outer=st.sampled_from(list(OUTER_STEPS.values())),
    whole=st.booleans(),
)
def test_any_tree_is_the_naive_average_and_windows_change_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: dict[str, list[int]],
    count: int,
    seed: int,
    window: int,
    anchor_type: torch.dtype,
    member_type: torch.dtype,
    outer: OuterStep,
    whole: bool,
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    anchor = random_tree(seed, shapes, anchor_type)
    members = [random_tree(seed + k + 1, shapes, member_type) for k in range(count)]
    raw = np.random.default_rng(seed).random(count) + 0.1
    weights = [float(w) for w in raw / raw.sum()]
    options: dict[str, Any] = {"whole": whole}
    result, report = merged(folder, anchor, members, weights, outer, window_bytes=window, **options)
    again, _ = merged(folder, anchor, members, weights, outer, **options)
    for name, start in anchor.items():
        base = start.double() if whole else 0
        change = sum(
            (w * (member[name].double() - base) for w, member in zip(weights, members, strict=True)),
            torch.zeros_like(start.double()),
        )
        expected = start.double() + outer.lr * (1 + outer.momentum) * change
        precision = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[anchor_type]
        assert result[name].dtype == anchor_type
        torch.testing.assert_close(result[name].double(), expected, rtol=precision, atol=precision)
        assert torch.equal(result[name], again[name])
    for figures, member in zip(report.members, members, strict=True):
        squares = sum(
            float((m.double() - (anchor[n].double() if whole else 0)).square().sum()) for n, m in member.items()
        )
        assert figures.finite
        assert figures.norm == pytest.approx(squares**0.5, rel=1e-4, abs=1e-6)


def test_the_outer_step_is_that_of_pytorchs_sgd(tmp_path: Path) -> None:
    """Three rounds of each outer optimizer, the momentum carried in its file."""
    shapes = {"a": (5, 3), "b": (2,)}
    for outer in OUTER_STEPS.values():
        anchor = random_tree(0, shapes)
        parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in anchor.items()}
        sgd = torch.optim.SGD(parameters.values(), outer.lr, outer.momentum, nesterov=outer.momentum > 0)
        momentum: Path | None = None
        for turn in range(3):
            members = [random_tree(10 * turn + k + 1, shapes) for k in range(2)]
            (tmp_path / f"{outer.momentum}-{turn}").mkdir()
            anchor, _ = merged(tmp_path / f"{outer.momentum}-{turn}", anchor, members, None, outer, momentum=momentum)
            momentum = tmp_path / f"{outer.momentum}-{turn}" / "0" / "momentum.safetensors" if outer.momentum else None
            for name, parameter in parameters.items():
                parameter.grad = -(members[0][name] + members[1][name]) / 2
            sgd.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(anchor[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_a_sole_member_is_copied_bit_for_bit_where_the_outer_step_is_plain(tmp_path: Path) -> None:
    shapes = {"a.weight": (40, 30), PUZZLES: (9, 4), EXPERTS: (3, 4, 5)}
    anchor, trained = random_tree(1, shapes), random_tree(2, shapes)
    trained[PUZZLES][3] = -0.0
    anchor[PUZZLES][3] = 0.0
    result, _ = merged(tmp_path, anchor, [trained], whole=True)
    assert all(torch.equal(result[n].view(torch.int32), trained[n].view(torch.int32)) for n in shapes)
    added = anchor["a.weight"] + (trained["a.weight"] - anchor["a.weight"])
    assert not torch.equal(added, trained["a.weight"])


def test_identical_members_change_nothing(tmp_path: Path) -> None:
    """The mean of three equal numbers need not be that number; the anchor plus the mean of no changes is."""
    tree = random_tree(3, {"a": (100, 7), EXPERTS: (4, 3, 3)})
    result, report = merged(tmp_path, tree, [tree, tree, tree], whole=True)
    assert all(torch.equal(result[name], tree[name]) for name in tree)
    assert [one.norm for one in report.members] == [0, 0, 0]


@pytest.mark.parametrize("window", [64, 8 << 20])
@pytest.mark.parametrize("name", [EXPERTS, PUZZLES])
def test_rows_count_for_those_who_changed_them(name: str, window: int, tmp_path: Path) -> None:
    """Rows longer and shorter than a window: a row that one member changed gets all of its change, one that nobody
    changed stays with its momentum."""
    anchor = {name: torch.ones(3, 5, 7)}
    one, two = {name: torch.zeros(3, 5, 7)}, {name: torch.zeros(3, 5, 7)}
    one[name][0], one[name][1], two[name][1] = 4.0, 4.0, 8.0
    result, _ = merged(tmp_path, anchor, [one, two], [0.25, 0.75], window_bytes=window)
    assert [float(row.unique()) for row in result[name]] == [5.0, 8.0, 1.0]
    for tree, counts in ((one, [10, 30, 0]), (two, [0, 10, 5])):
        tree[name + TOUCHED] = torch.tensor(counts, dtype=torch.float32)
    two[name][2] = 2.0
    result, _ = merged(tmp_path, anchor, [one, two], [0.25, 0.75], window_bytes=window)
    assert [float(row.unique()) for row in result[name]] == [5.0, 6.0, 3.0]
    outer = OuterStep(1.0, 0.5)
    for tree in (one, two):
        del tree[name + TOUCHED]
        tree[name][2] = 0
    kept = saved(tmp_path, "momentum", {name: torch.full((3, 5, 7), 2.0)})
    result, _ = merged(tmp_path, anchor, [one, two], [0.25, 0.75], outer, momentum=kept, window_bytes=window)
    assert [float(row.unique()) for row in result[name]] == [7.5, 12.0, 1.0]
    momentum = load_file(sorted(tmp_path.glob("*/momentum.safetensors"))[-1])[name]
    assert [float(row.unique()) for row in momentum] == [5.0, 8.0, 2.0]


def test_changes_move_as_far_in_rounds_of_their_own_as_in_one(tmp_path: Path) -> None:
    """With and without momentum, over all rounds that follow; rows belong to who changed them, whatever the share."""
    one, two = ({"a": torch.tensor([size]), PUZZLES: torch.zeros(2, 2)} for size in (1.0, 3.0))
    one[PUZZLES][0], two[PUZZLES][1] = 1.0, 1.0
    still = {name: torch.zeros_like(tensor) for name, tensor in one.items()}
    for outer in (PLAIN, OUTER_STEPS["nesterov"], OUTER_STEPS["diloco"]):
        ends = []
        for rounds in ([([one, two], 1.0)], [([one], 0.5), ([two], 0.5)]):
            weights, momentum, folder = dict(still), None, tmp_path / str(len(list(tmp_path.iterdir())))
            folder.mkdir()
            for changes, share in [*rounds, *[([still], 1.0)] * (40 if outer.momentum > 0.5 else 5)]:
                weights, _ = merged(folder, weights, changes, None, outer, momentum=momentum, share=share)
                made = folder / str(len(list(folder.iterdir())) - 1) / "momentum.safetensors"
                momentum = made if outer.momentum else None
            ends.append(weights)
        goal = 2.0 * outer.lr / (1 - outer.momentum)
        assert float(ends[0]["a"]) == pytest.approx(goal, rel=0.03) == float(ends[1]["a"]), outer
        torch.testing.assert_close(ends[0]["a"], ends[1]["a"], rtol=0.01, atol=0)
        if outer is PLAIN:
            assert torch.equal(ends[0][PUZZLES], torch.ones(2, 2)) and torch.equal(ends[1][PUZZLES], torch.ones(2, 2))


def test_what_training_never_changes_is_copied_and_must_be_equal(tmp_path: Path) -> None:
    anchor = {
        "a": torch.zeros(2),
        "H_init": torch.randn(4).bfloat16(),
        "steps": torch.tensor([3]),
        "m": torch.ones(1) > 0,
    }
    change = {"a": torch.ones(2)}
    result, _ = merged(tmp_path, anchor, [change])
    assert all(torch.equal(result[name], anchor[name]) for name in ("H_init", "steps", "m"))
    same = anchor | change
    result, _ = merged(tmp_path, anchor, [same, same], whole=True, window_bytes=8)
    assert torch.equal(result["steps"], anchor["steps"])
    for name, other in (("H_init", torch.zeros(4).bfloat16()), ("steps", torch.tensor([4]))):
        with pytest.raises(DataError, match=f"{name}, which training never changes"):
            merged(tmp_path, anchor, [same, same | {name: other}], whole=True)

        def kept(name: str, is_float: bool) -> Rule:
            found = rule_of(name, is_float)
            return Rule.KEPT if found is Rule.EQUAL else found

        result, _ = merged(tmp_path, anchor, [same, same | {name: other}], whole=True, rule=kept)
        assert torch.equal(result[name], anchor[name])
    with pytest.raises(DataError, match="steps, which training never changes"):
        merged(tmp_path, anchor, [change | {"steps": torch.tensor([1])}])


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    anchor = saved(tmp_path, "anchor", {"a": torch.zeros(2), "b": torch.zeros(3), "n": torch.tensor([1])})
    wrong = saved(tmp_path, "wrong", {"a": torch.zeros(3), "c": torch.zeros(3), "n": torch.tensor([1])})
    for base in (None, anchor):
        with pytest.raises(DataError) as raised:
            check_member(anchor, Member(wrong, 1.0, base))
        message = str(raised.value)
        assert str(wrong) in message and all(
            part in message for part in ("c is not in that", "a has shape [3], not [2]", "1 more")
        )
    check_member(anchor, Member(saved(tmp_path, "right", {"a": torch.zeros(2), "b": torch.zeros(3)}), 1.0))


def test_not_finite_is_reported(tmp_path: Path) -> None:
    good, bad, huge = ({"a": torch.full((4,), value)} for value in (1.0, float("nan"), 1e30))
    _, report = merged(tmp_path, {"a": torch.zeros(4)}, [good, bad, huge])
    assert [one.finite for one in report.members] == [True, False, True]
    assert report.members[2].norm == pytest.approx(2e30)


def test_a_base_that_is_older_than_the_anchor(tmp_path: Path) -> None:
    old, new, trained = (random_tree(seed, {"a": (6, 2)}) for seed in (1, 2, 3))
    paths = [saved(tmp_path, name, tree) for name, tree in (("old", old), ("new", new), ("trained", trained))]
    out = AnchorFiles(tmp_path / "out.safetensors")
    merge_deltas(AnchorFiles(paths[1]), [Member(paths[2], 1.0, paths[0])], PLAIN, out)
    torch.testing.assert_close(load_file(out.weights)["a"], new["a"] + (trained["a"] - old["a"]))


def test_bfloat16_is_read_and_rounded_as_pytorch_does(tmp_path: Path) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    finite = bits[torch.isfinite(bits.float())]
    odd = torch.tensor([1.00390625, 1.01171875, 3.3895e38, -0.0, float("inf")])
    zeros = {"a": torch.zeros(len(finite) + len(odd), dtype=torch.bfloat16)}
    values = torch.cat([finite.float(), odd])
    result, _ = merged(tmp_path, zeros, [{"a": values}])
    torch.testing.assert_close(result["a"], values.bfloat16(), rtol=0, atol=0)
    result, _ = merged(tmp_path, {"a": torch.zeros(len(finite))}, [{"a": finite}])
    torch.testing.assert_close(result["a"], finite.float(), rtol=0, atol=0)
    result, _ = merged(tmp_path, {"a": torch.zeros(1, dtype=torch.bfloat16)}, [{"a": torch.tensor([float("nan")])}])
    assert bool(result["a"].isnan().all())


def test_the_residual_of_averaged_adapters(tmp_path: Path) -> None:
    shapes = {"q.lora_A.default.weight": (3, 20), "q.lora_B.default.weight": (11, 3), "lm_head.weight": (2, 2)}
    anchor, *members = (random_tree(seed, shapes) for seed in range(4))
    weights = [0.5, 0.3, 0.2]
    a, b = ([member[name].double() for member in members] for name in list(shapes)[:2])
    mean_a, mean_b = (sum(w * f for w, f in zip(weights, factors, strict=True)) for factors in (a, b))
    exact = sum(w * y @ x for w, x, y in zip(weights, a, b, strict=True))
    for window in (64, 8 << 20):
        result, report = merged(tmp_path, anchor, members, weights, whole=True, window_bytes=window)
        torch.testing.assert_close(result["q.lora_A.default.weight"].double(), mean_a, rtol=1e-5, atol=1e-5)
        assert report.lora is not None
        assert report.lora.residual == pytest.approx(float((exact - mean_b @ mean_a).norm()), rel=1e-5)
        assert report.lora.product == pytest.approx(float((mean_b @ mean_a).norm()), rel=1e-5)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in anchor.items()}
    parts = [{n: t * k - anchor[n] * k for n, t in members[0].items()} for k in (0.25, 0.75)]
    changes = [*parts, *({n: t - anchor[n] for n, t in one.items()} for one in members[1:]), zeros]
    _, report = merged(tmp_path, anchor, changes, [0.5, 0.5, 0.3, 0.1, 0.1], series=["a", "a", "b", "c", "d"])
    _, whole = merged(tmp_path, anchor, [*members, anchor], [0.5, 0.3, 0.1, 0.1], whole=True)
    assert report.lora is not None and whole.lora is not None
    assert report.lora.residual == pytest.approx(whole.lora.residual, rel=1e-5)
    assert merged(tmp_path, {"a": torch.zeros(1)}, [{"a": torch.zeros(1)}])[1].lora is None


@pytest.mark.parametrize("count", [2, 8])
def test_memory_is_bounded_by_the_window(count: int, tmp_path: Path) -> None:
    """All buffers are numpy's, which tracemalloc counts: the peak is the same few windows
    for two members and for eight, of files of 6 and 14 MB."""
    window = 1 << 20
    anchor = saved(tmp_path, "anchor", {"a": torch.zeros(3, 1 << 20), EXPERTS: torch.zeros(2, 1 << 19)})
    tree = {"a": torch.ones(3, 1 << 20).bfloat16(), EXPERTS: torch.ones(2, 1 << 19).bfloat16()}
    member = saved(tmp_path, "member", tree)
    out = AnchorFiles(tmp_path / "out", tmp_path / "momentum")
    tracemalloc.start()
    try:
        merge_deltas(
            AnchorFiles(anchor), [Member(member, 1 / count)] * count, OUTER_STEPS["nesterov"], out, window_bytes=window
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * window + (3 << 20)


def damaged_files() -> dict[str, bytes]:
    def file(header: Any, data: bytes = b"") -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data

    def entry(**changes: Any) -> dict[str, Any]:
        return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}

    return {
        "empty": b"",
        "of another kind": b"PK\x03\x04" + b"\x00" * 100,
        "not JSON": file(b"{{{{"),
        "nested": file(b"[" * 200_000),
        "a type that is no text": file({"a": entry(dtype=[])}, b"1234"),
        "no object": file([1]),
        "no text": file({"__metadata__": {"a": 1}}),
        "no shape": file({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234"),
        "negative": file({"a": entry(shape=[-1])}, b"1234"),
        "other bytes than its shape": file({"a": entry(shape=[2])}, b"1234"),
        "gap": file({"a": entry(data_offsets=[4, 8])}, b"12345678"),
        "overlap": file({"a": entry(), "b": entry()}, b"1234"),
        "cut short": file({"a": entry()}, b"123"),
        "longer": file({"a": entry()}, b"12345"),
        "an unknown type": file({"a": entry(dtype="F8_E4M3", shape=[4])}, b"1234"),
    }


@pytest.mark.parametrize("kind", damaged_files())
def test_a_damaged_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damaged_files()[kind])
    with pytest.raises(DataError, match=r"damaged\.safetensors") as raised:
        TensorFile(path)
    assert len(str(raised.value).replace(str(tmp_path), "")) < 300


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights fail after the momentum has its name: it goes too, and the next attempt may use both names."""
    anchor = saved(tmp_path, "anchor", {"a": torch.zeros(9)})
    member = Member(saved(tmp_path, "member", {"a": torch.ones(9)}), 1.0)
    out = AnchorFiles(tmp_path / "out.safetensors", tmp_path / "momentum.safetensors")
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(folder: Path) -> None:
        if out.momentum is not None and out.momentum.exists():
            raise OSError(28, "No space left on device")
        sync_folder(folder)

    with monkeypatch.context() as patch, pytest.raises(DiskError, match="No space left"):
        patch.setattr("hrm_ray.atomic_files.sync_folder", full)
        merge_deltas(AnchorFiles(anchor), [member], OUTER_STEPS["diloco"], out)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    merge_deltas(AnchorFiles(anchor), [member], OUTER_STEPS["diloco"], out, metadata={"round": "1"})
    with TensorFile(out.weights) as file:
        assert file.metadata["round"] == "1"
    with pytest.raises(FileExistsError):
        merge_deltas(AnchorFiles(anchor), [member], OUTER_STEPS["diloco"], out)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("name", [EXPERTS, "lm_head.weight"])
def test_changes_that_follow_each_other_are_added_up(name: str, counted: bool, tmp_path: Path) -> None:
    """Two reports of one trainer and one of another with three times the weight: the reports are never averaged with
    each other. Rows: both trainers changed the first, the second trainer alone the second."""
    anchor = {name: torch.ones(2, 3, 3)}
    one, two, other = ({name: torch.zeros(2, 3, 3)} for _ in range(3))
    one[name][0], two[name][0], other[name][:] = 4.0, 8.0, 16.0
    if counted and name == EXPERTS:
        for tree, counts in ((one, [4, 0]), (two, [6, 0]), (other, [30, 7])):
            tree[name + TOUCHED] = torch.tensor(counts, dtype=torch.float32)
    result, _ = merged(tmp_path, anchor, [one, two, other], [0.25, 0.25, 0.75], series=["a", "a", "b"])
    both, alone = 1 + 0.25 * 12 + 0.75 * 16, 17.0 if name == EXPERTS else 13.0
    assert [float(row.unique()) for row in result[name]] == [both, alone]
