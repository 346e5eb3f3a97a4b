"""benchmarks/toy.py and benchmarks/ablation.py in miniature: what they write, and going on where a run stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import ablation
import toy

from evc_fast.data.emotions import EmotionDictionary
from evc_fast.data.toy import ToyWorld, plan_world, render_world
from evc_fast.data.toy.sentences import describe
from evc_fast.metrics.compare import compare
from evc_fast.training.config import load_config

SMALL = ["model.encoder.dim=16", "model.encoder.num_queries=4", "trainer.num_beams=1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ToyWorld:
    return render_world(tmp_path_factory.mktemp("toy") / "world", limit=6, workers=1)


def test_toy_benchmark_measures_the_shipped_model(world: ToyWorld, tmp_path: Path, one_thread: None) -> None:
    arguments = ["--world", str(world.folder), "--samples", "50", "--no-meteor", "--threads", "1"]
    status = toy.main([*arguments, "--out", str(tmp_path)])
    report = json.loads((tmp_path / "toy.json").read_text())
    assert report["clips"] == 6 and set(report["scores"]) == {toy.FACE_NET, toy.SHUFFLED, toy.NEAREST}
    assert status == (0 if all(each["reached"] for each in report["targets"]) else 1)
    assert [each["names"] for each in report["comparisons"]] == [list(pair) for pair in toy.COMPARED]
    assert report["scores"][toy.FACE_NET]["METEOR"] is None and report["scores"][toy.FACE_NET]["CIDEr"] > 0
    assert report["asset_bytes"] <= 10_000_000 and 0 <= report["zero_shot"]["emotion"] <= 1
    page = (tmp_path / "toy.md").read_text()
    assert "FACE-net against nearest caption" in page and "## Targets" in page and "Linear probes" in page


def test_toy_benchmark_refuses_another_world(tmp_path: Path) -> None:
    render_world(tmp_path / "world", seed=5, limit=1, workers=1)
    with pytest.raises(ValueError, match="is of seed 5, the model was trained on seed 0"):
        toy.main(["--world", str(tmp_path / "world"), "--out", str(tmp_path)])


def run_of(seed: int, folder: Path, clips: int | None = None) -> Path:
    """With a toy.json of made-up captions: the model says a reference, the two others always the same."""
    scenes = [scene for scene in plan_world(seed) if scene.split == "test"][:clips]
    said = {scene.video_id: describe(scene)[0].text for scene in scenes}
    same = dict.fromkeys(said, "a very happy man in a park")
    captions = {toy.FACE_NET: said, toy.NEAREST: same, toy.SHUFFLED: same}
    references = {scene.video_id: [each.text for each in describe(scene)] for scene in scenes}
    pairs = [(captions[a], captions[b]) for a, b in toy.COMPARED]
    dictionary = EmotionDictionary.default()
    found = [compare(a, b, references, dictionary, meteor=False, samples=20).to_dict() for a, b in pairs]
    folder.mkdir()
    content = {"manifest": {"seed": seed}, "captions": captions, "comparisons": found}
    (folder / "toy.json").write_text(json.dumps(content))
    return folder


def test_runs_of_several_seeds_are_compared_as_one(tmp_path: Path, one_thread: None) -> None:
    folders = [run_of(seed, tmp_path / str(seed)) for seed in (5, 6)]
    options = ["--samples", "20", "--no-meteor", "--threads", "1", "--out", str(tmp_path / "out")]
    assert toy.main(["--together", *map(str, folders), *options]) == 0
    report = json.loads((tmp_path / "out" / "toy_seeds.json").read_text())
    alone = [json.loads((folder / "toy.json").read_text())["comparisons"][0]["differences"] for folder in folders]
    together = report["comparisons"][0]["differences"]
    clips = sum(scene.split == "test" for seed in (5, 6) for scene in plan_world(seed))
    assert report["seeds"] == [5, 6] and report["clips"] == clips == report["comparisons"][0]["videos"]
    # BLEU's counts add up, so that together it lies between the two.
    low, high = sorted(each["BLEU-1"]["first"] for each in alone)
    assert low < together["BLEU-1"]["first"] < high and together["CIDEr"]["low"] > 0
    page = (tmp_path / "out" / "toy_seeds.md").read_text()
    assert page.count("| together |") == 2 and page.count("| 5 |") == page.count("| 6 |") == 2
    with pytest.raises(ValueError, match="is of seed 5, as another folder is"):
        toy.main(["--together", str(folders[0]), str(folders[0]), *options])
    with pytest.raises(ValueError, match="captions of other clips than the test clips of seed 7"):
        toy.main(["--together", str(run_of(7, tmp_path / "7", clips=5)), *options])


def test_every_row_of_the_paper_is_a_variant_that_the_configuration_takes() -> None:
    assert {variant for rows in ablation.STUDIES.values() for variant in rows.values()} == set(ablation.VARIANTS)
    configs = {name: load_config("toy", overrides) for name, overrides in ablation.VARIANTS.items()}
    assert configs["none"].model.encoder.retrieval is False and configs["none"].data.repository is None
    whole = configs[ablation.FULL].model
    assert whole.encoder.num_triplets == 4 and whole.decoder.name == "transformer"
    assert len({config.to_yaml() for config in configs.values()}) == len(configs)
    assert [configs[f"K = {k}"].model.encoder.num_triplets for k in (1, 2, 3, 5)] == [1, 2, 3, 5]


def test_ablation_is_written_run_by_run_and_goes_on(
    world: ToyWorld, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("spacy")
    arguments = [
        "--world",
        str(world.folder),
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path),
        "--epochs",
        "1",
    ]
    arguments += ["--threads", "1", *(word for each in SMALL for word in ("--set", each))]
    two = ["--only", ablation.FULL, "none"]
    assert ablation.main([*arguments, "--seeds", "1", *two]) == 0
    runs = {path.name: path.read_bytes() for path in (tmp_path / "work" / "runs").iterdir()}
    assert set(runs) == {"FACE-net-0.json", "none-0.json"}
    assert not list((tmp_path / "work" / "training").iterdir())

    trained = []
    whole = ablation.run_one
    monkeypatch.setattr(ablation, "run_one", lambda *given: trained.append(given[1:3]) or whole(*given))
    assert ablation.main([*arguments, "--seeds", "2", *two]) == 0
    assert trained == [(ablation.FULL, 1), ("none", 1)]  # the others are kept
    assert {name: (tmp_path / "work" / "runs" / name).read_bytes() for name in runs} == runs
    report = json.loads((tmp_path / "ablation.json").read_text())
    assert len(report["runs"]) == 4 and report["summary"]["none"]["seeds"] == [0, 1]
    first, second = (r["scores"]["CFS"] for r in report["runs"] if r["variant"] == "none")
    assert report["summary"]["none"]["CFS"]["mean"] == pytest.approx((first + second) / 2)
    page = (tmp_path / "ablation.md").read_text()
    assert "Fig. 3, components" in page and "Table 3" not in page  # of which no two rows were run
    assert "none against the whole model: CFS" in page

    trained.clear()
    assert ablation.main([*arguments, "--seeds", "1", "--set", "optimiser.lr=1e-4", "--only", "none"]) == 0
    assert trained == [("none", 0)]  # another setting is another run
