"""Every pair of features trains, its loss falling and its memory told, or is refused with the reason.

The runs are those of a user: `hrm-ray train` on text, from options to bundle, each for some steps.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from hrm_ray.model import scoring
from hrm_ray.train.loop import TrainingLoop
from tests.support.fail_at import script
from tests.support.features import FEATURES, base_of, words_of
from tests.support.runs import Ran, hrm, puzzle_file, records, text_file

pytestmark = pytest.mark.slow

STEPS = 24
SIZE = (
    "--hidden-size", "32", "--num-heads", "2", "--num-layers", "2", "--threads", "1", "--launcher", "local",
    "--batch-size", "4", "--log-every", "1", "--save-every", "0", "--lr-schedule", "constant", "--device", "cpu",
)  # fmt: skip
TEXT = (*SIZE, "--vocab-size", "300", "--max-seq-len", "32")
PUZZLES = (*SIZE, "--halt-max-steps", "3", "--halt-exploration-prob", "0.5")

ADAPTED = ("int8", "nf4", "lora", "adalora", "ia3", "loha", "lokr")
REFUSED: dict[frozenset[str], str] = {
    frozenset({"8bit-optimizer", "adam-atan2"}): "bitsandbytes keeps the moments of adamw in 8 bits",
    frozenset({"int8", "nf4"}): "weights are stored in 8 or in 4 bits, not both",
    frozenset({"all-updates", "transformer"}): "a transformer reads its input once",
    **{frozenset({"expert", adapted}): "one trains an expert with all else frozen" for adapted in ADAPTED},
}
"""What cannot work together, and a part of the reason that the user is told."""


class Bases:
    """Bundles that combinations start from, each trained for a while when it is first wanted."""

    def __init__(self, folder: Path, data: Path, size: tuple[str, ...]) -> None:
        self.folder, self.data, self.size = folder, data, size

    def bundle(self, names: tuple[str, ...]) -> Path:
        """One whose weights fit the combination."""
        shared = base_of(names)
        bundle = self.folder / ("-".join(sorted(set(shared))) or "dense")
        if not bundle.exists():
            words = (*laid_under(words_of(shared), self.size), "--steps", "12", "--lr", "1e-3")
            ran = hrm("train", "--dataset-file", self.data, "--bundle-dir", bundle, *words)
            assert ran.code == 0, ran.err
        return bundle


def laid_under(words: list[str], size: tuple[str, ...]) -> list[str]:
    """The words, and of the size options those that the words do not say; halting is nothing to a transformer."""
    said = {word for word in words if word.startswith("--")}
    under = [pair for pair in zip(size[::2], size[1::2], strict=True) if pair[0] not in said]
    if "--arch" in said:
        under = [pair for pair in under if not pair[0].startswith("--halt")]
    return [*words, *(part for pair in under for part in pair)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handful of sequences, seen again and again, so that a loss that falls is not lost in the noise of batches."""
    return text_file(tmp_path_factory.mktemp("text"), rows=16)


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return puzzle_file(tmp_path_factory.mktemp("puzzles"), count=8)


@pytest.fixture(scope="module")
def text_bases(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Bases:
    return Bases(tmp_path_factory.mktemp("text_bases"), text, TEXT)


@pytest.fixture(scope="module")
def puzzle_bases(tmp_path_factory: pytest.TempPathFactory, puzzles: Path) -> Bases:
    return Bases(tmp_path_factory.mktemp("puzzle_bases"), puzzles, PUZZLES)


class Trial:
    """Trains a combination in a folder of its own."""

    def __init__(self, folder: Path, patched: pytest.MonkeyPatch) -> None:
        self.bundle, self.experts, self.adaptive = folder / "bundle", folder / "experts", folder / "adaptive.yaml"
        self.adaptive.write_text("window_steps: 4\n")
        self.patched = patched

    def run(self, names: tuple[str, ...], data: Path, bases: Bases, size: tuple[str, ...]) -> Ran:
        words = [str(self.adaptive) if word == "ADAPTIVE" else word for word in words_of(names)]
        # One small expert of a frozen model moves the loss less than all weights do.
        words += ["--steps", str(STEPS), "--lr", "1e-2" if "expert" in names and size is TEXT else "3e-3"]
        if "--use-moe" in words:
            words.append("--no-auto-adjust-lr")
        if "expert" in names:
            words += ["--experts-dir", str(self.experts)]
        if any(FEATURES[name].starts for name in names):
            words += ["--student-init", str(bases.bundle(names))]
        self._script(names)
        return hrm("train", "--dataset-file", data, "--bundle-dir", self.bundle, *laid_under(words, size))

    def _script(self, names: tuple[str, ...]) -> None:
        """What no option can ask for: scores in pieces although they are few, and a lack of memory."""
        features = [FEATURES[name] for name in names]
        if any(feature.small_scores for feature in features):
            self.patched.setattr(scoring, "SCORES_BYTES", 4 * 400 * 16)
        failures = [feature.failure for feature in features if feature.failure is not None]
        make = TrainingLoop.__init__

        def made(loop: TrainingLoop, *parts: Any, **named: Any) -> None:
            make(loop, *parts, **named)
            script(loop, failures)

        self.patched.setattr(TrainingLoop, "__init__", made)


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    return Trial(tmp_path, monkeypatch)


def check_learned(bundle: Path) -> float:
    """The loss falls by more than its noise from the first steps to the last; the most memory that was told, in GB."""
    seen = records(bundle)
    # One pass has one loss; of several segments the loss of all, which the data of a step moves least.
    losses = [float(record["segment_loss" if "segment_loss" in record else "loss"]) for record in seen]
    assert fmean(losses[-4:]) < fmean(losses[:4]) - 0.02, losses
    peaks = [float(record["peak_gb"]) for record in seen]
    assert min(peaks) > 0
    return max(peaks)


@pytest.mark.parametrize("pair", list(combinations(FEATURES, 2)), ids="+".join)
def test_pair(pair: tuple[str, str], text: Path, text_bases: Bases, trial: Trial, record_property: Any) -> None:
    ran = trial.run(pair, text, text_bases, TEXT)
    reason = REFUSED.get(frozenset(pair))
    if reason is not None:
        # An option that changes nothing beside the other feature is a note.
        noted = ran.code == 0 and "no effect here: " in ran.out and reason in ran.out
        assert noted or (ran.code == 2 and reason in ran.err), ran
        assert trial.bundle.exists() == noted
        return
    assert ran.code == 0, ran.err
    record_property("peak_gb", check_learned(trial.bundle))


@pytest.mark.parametrize("name", FEATURES)
def test_on_puzzles(name: str, puzzles: Path, puzzle_bases: Bases, trial: Trial) -> None:
    """Each feature alone, in carried supervision with the look-ahead; what is for text only says so."""
    ran = trial.run((name,), puzzles, puzzle_bases, PUZZLES)
    if not FEATURES[name].puzzles:
        noted = ran.code == 0 and "no effect here: " in ran.out and "puzzle" in ran.out
        assert noted or (ran.code == 2 and "puzzle" in ran.err), ran
        return
    assert ran.code == 0, ran.err
    check_learned(trial.bundle)
