"""Recipes: those that come with the package against the paper's tables, and how files are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mda_lightning.pretraining.sizes import PYTHIA_SIZES
from mda_lightning.recipes.studies.recipe_file import (
    Recipe,
    RecipeError,
    bundled_recipes,
    read_recipe,
)
from mda_lightning.recipes.studies.settings import STANDARD_ARMS, StudySettings
from mda_lightning.units import parse_unit

FOLDER = Path(__file__).parents[1] / "mda_lightning" / "recipes" / "paper"
NAMES = [recipe.name for recipe in bundled_recipes()]

#: Tables 4 and 5 as printed, and what their footnotes say of masking.
#: layer, head, training steps, Num, Top-K, insertion step, masked
TABLE_4 = {
    "14m": (3, 3, "1000-1999", "1,024,000", "100,000", 900, "100,000"),
    "31m": (4, 3, "0-1199", "1,228,800", "120,000", 800, "120,000"),
    "70m": (4, 3, "0-999", "1,024,000", "100,000", 700, "100,000"),
    "160m": (5, 10, "0-799", "819,200", "100,000", 600, "80,000"),
}
TABLE_5 = {
    "14m": (2, 2, "0-1199", "1,228,800", "100,000", 500, "100,000"),
    "31m": (3, 0, "0-1099", "1,126,400", "110,000", 800, "110,000"),
    "70m": (3, 3, "0-899", "921,600", "80,000", 600, "80,000"),
    "160m": (4, 10, "0-699", "716,800", "70,000", 500, "10,000"),
}
ROWS = [
    (f"pythia-{size}-{kind}", mechanism, size, row)
    for kind, mechanism, table in (
        ("induction", "induction", TABLE_4),
        ("previous-token", "previous_token", TABLE_5),
    )
    for size, row in table.items()
]
STUDIES = (
    *("deletion-augmentation", "cross-stage-replacement", "transfer-across-heads", "icl-coupling"),
    *("insertion-ablation", "selection-baselines", "online-steering"),
)


def number(printed: str) -> int:
    return int(printed.replace(",", ""))


# -- recipes that come with the package -------------------------------------------------------


@pytest.mark.parametrize(("name", "mechanism", "size", "row"), ROWS)
def test_full_size_recipes_are_those_of_the_tables(
    name: str, mechanism: str, size: str, row: tuple
) -> None:
    layer, head, steps, samples, top, inserted_at, masked = row
    first, last = map(int, steps.split("-"))
    recipe = read_recipe(name)
    settings, arms = recipe.settings, recipe.settings.arms
    assert settings.mechanism == mechanism
    assert (settings.window.start, settings.window.end) == (first, last + 1)
    unit = parse_unit(str(settings.window.target))
    assert (unit.layer, unit.head) == (layer, head)
    assert (
        settings.model.size == size and settings.model.weights == f"EleutherAI/pythia-{size}@step0"
    )
    # Every sample of the window is scored: what the table counts.
    per_step = settings.training.batch_size
    assert per_step == 1024 and settings.corpus.sequence_length == 2048
    assert (last + 1 - first) * per_step == number(samples)
    assert settings.corpus.n_rows == (last + 1) * per_step
    assert settings.training.max_steps == last + 1
    assert list(arms) == ["mask-top", "mask-random", "insert-top", "insert-random"]
    assert (arms["mask-top"].do, arms["mask-top"].count) == ("mask", number(masked))
    insert = arms["insert-top"]
    assert (insert.do, insert.count, insert.which) == ("insert", number(top), "top")
    assert insert.steps is not None and insert.steps[0] == inserted_at
    assert (insert.mode, insert.placement) == ("concentrated", "shift")
    assert (arms["mask-random"].control_of, arms["insert-random"].control_of) == (
        "mask-top",
        "insert-top",
    )
    expected = {"induction": "copy_logprob", "previous_token": "attention"}[mechanism]
    assert settings.scoring.probe_function == expected
    assert settings.scoring.curvature == "ekfac" and settings.scoring.estimator == "replay"
    training = settings.training
    assert (training.schedule, training.schedule_steps) == ("pythia", 143_000)
    assert training.learning_rate is None and training.warmup_steps is None
    assert (settings.corpus.kind, settings.corpus.shuffle) == ("megatron", False)
    assert settings.corpus.vocab_size == PYTHIA_SIZES[size].vocab_size == 50_304
    assert per_step % (training.micro_batch or per_step) == 0


@pytest.mark.parametrize("name", [*(row[0] for row in ROWS), *STUDIES])
def test_every_full_size_recipe_has_a_small_twin(name: str) -> None:
    full, small = read_recipe(name), read_recipe(f"{name}-small")
    assert full.settings.mechanism == small.settings.mechanism
    # The same experiment: as many arms of each kind, compared in the same way.
    for kind in ("mask", "insert", "replace", "prune", "steer"):
        assert _shape(full, kind) == _shape(small, kind)
    settings = small.settings
    assert settings.training.accelerator == "cpu" and len(small.seeds) >= 5
    assert settings.model.size is None and settings.model.d_model <= 96
    assert settings.training.max_steps == 12_000 and settings.corpus.kind == "embedded"
    assert settings.corpus.held_out_rows > 0 and not settings.window.is_fixed


def _shape(recipe: Recipe, kind: str) -> list[tuple[bool, bool]]:
    arms = recipe.settings.arms
    return [
        (one.control_of is not None, recipe.settings.control_of(name) is not None)
        for name, one in arms.items()
        if (arms[one.control_of] if one.control_of else one).do == kind
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_says_what_it_is(name: str) -> None:
    recipe = read_recipe(name)
    assert recipe.path == FOLDER / f"{name}.yaml"
    for word in ("What:", "Paper:", "Cost:", "Expected:", f"Run: mda-lightning compare {name}"):
        assert word in recipe.header, word
    assert recipe.header.endswith(f"compare {name}")
    assert "$MDA_DATA" not in recipe.path.read_text("utf-8") or "Needs: $MDA_DATA" in recipe.header
    assert StudySettings.from_dict(json.loads(json.dumps(recipe.settings.to_dict()))) == (
        recipe.settings
    )
    named = {one.name: one.summary for one in bundled_recipes()}
    assert named[name] and named[name] == recipe.header.split("\n")[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_treated_arm_has_a_control_or_is_named(name: str) -> None:
    recipe = read_recipe(name)
    said = " ".join(recipe.remarks)
    for arm, what in recipe.settings.arms.items():
        if what.control_of is None and recipe.settings.control_of(arm) is None:
            assert arm in said
            assert what.do == "prune"  # which is random itself
    assert ("no interval" in said) == (len(recipe.seeds) == 1)


def test_every_file_begins_with_a_comment_and_only_bases_are_left_out() -> None:
    files = {path.stem for path in FOLDER.glob("*.yaml")}
    assert {name for name in files if not name.startswith("_")} == set(NAMES)
    for path in FOLDER.glob("*.yaml"):
        text = path.read_text("utf-8")
        assert text.startswith("# ")
        assert max(map(len, text.split("\n"))) <= 100, path
    assert {f"{kind}-{extra}small" for kind in ("induction", "previous-token")
            for extra in ("", "minipile-")} <= files  # fmt: skip


def test_the_small_base_is_the_quickstart_with_rows_held_out() -> None:
    plain, small = StudySettings(), read_recipe("induction-small").settings
    for part in ("model", "training", "intervention"):
        assert getattr(small, part) == getattr(plain, part)
    assert small.arms == STANDARD_ARMS
    assert small.corpus.n_rows == plain.corpus.n_rows
    assert small.scoring.probe_function == plain.scoring.probe_function


def test_the_insertion_ablation_has_its_25_runs() -> None:
    """Appendix F: three kinds of data, four quantities, two schedules, and the baseline."""
    arms = read_recipe("insertion-ablation").settings.arms
    assert len(arms) + 1 == 25
    found = set()
    for arm in arms.values():
        own = arms[arm.control_of] if arm.control_of else arm
        kind = "random" if arm.control_of else "synthetic" if arm.generator else "real"
        found.add((kind, own.count, own.mode, own.steps))
        assert own.do == "insert"
        if kind == "synthetic":
            control = arms[arms[str(arm.control)].control_of or ""]
            assert (control.count, control.mode, control.steps) == (arm.count, arm.mode, arm.steps)
    assert found == {
        (kind, count, mode, steps)
        for kind in ("real", "synthetic", "random")
        for count in (12_500, 25_000, 50_000, 100_000)
        for mode, steps in (("concentrated", (900, 901)), ("dispersed", (900, 1400)))
    }
    assert read_recipe("insertion-ablation").settings.intervention.placement == "shift"


def test_cross_stage_replacement_has_the_intervals_of_figure_3d() -> None:
    arms = read_recipe("cross-stage-replacement").settings.arms
    replaced = {arm.from_steps for arm in arms.values() if arm.do == "replace"}
    assert {(1000, 1100), (1300, 1400), (1900, 2000)} == replaced
    assert {arm.steps for arm in arms.values() if arm.do == "replace"} == {(1400, 1500)}
    assert [arm.fraction for arm in arms.values() if arm.do == "prune"] == [0.95]


# -- reading ----------------------------------------------------------------------------------


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text, "utf-8")
    return path


BASE = """# A base
#
# with a longer word
title: Base
seeds: [3, 1]
training: {max_steps: 500, learning_rate: 1e-3}
arms:
  a: {do: mask, fraction: 0.2}
  a-random: {control_of: a}
  b: {do: insert, copies: 2}
"""


def test_a_recipe_is_its_files_values(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, "base", BASE))
    assert (recipe.title, recipe.seeds, recipe.header) == (
        "Base",
        (3, 1),
        "A base\n\nwith a longer word",
    )
    assert recipe.settings.training.max_steps == 500
    assert recipe.settings.training.learning_rate == 0.001
    assert recipe.settings.training.batch_size == StudySettings().training.batch_size
    assert recipe.settings.arms["b"].copies == 2
    assert recipe.remarks[0].startswith("no matched random control: b;")
    assert recipe.remarks[1].startswith("2 seeds")
    plain = read_recipe(write(tmp_path, "plain", "title: x\n"), ["arms.mask-top.fraction=0.3"])
    assert plain.settings.arms["mask-top"].fraction == 0.3
    assert list(plain.settings.arms) == list(STANDARD_ARMS)
    assert read_recipe(write(tmp_path, "untitled", "seeds: 2\n")).title == "untitled"


def test_one_recipe_extends_another_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, "base", BASE)
    text = "extends: base\ntraining: {max_steps: 900}\narms:\n  a: {fraction: 0.4}\n  b: null\n"
    recipe = read_recipe(write(tmp_path, "child", text))
    assert (recipe.title, recipe.seeds, recipe.header) == ("Base", (3, 1), "")
    assert recipe.settings.training.max_steps == 900
    assert recipe.settings.training.learning_rate == 0.001
    assert list(recipe.settings.arms) == ["a", "a-random"]
    assert (recipe.settings.arms["a"].do, recipe.settings.arms["a"].fraction) == ("mask", 0.4)
    grandchild = write(tmp_path, "grandchild", "extends: child\nseeds: 4\n")
    assert read_recipe(grandchild).seeds == (0, 1, 2, 3)
    bundled = write(tmp_path, "mine", "extends: induction-small\nseeds: 1\n")
    assert read_recipe(bundled).settings == read_recipe("induction-small").settings
    write(tmp_path, "gone", "extends: base\narms:\n  c: null\n")
    with pytest.raises(RecipeError, match=r"arms\.c is null, which removes it, and there is none"):
        read_recipe(tmp_path / "gone.yaml")


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "one", "extends: two\n")
    write(tmp_path, "two", "extends: three\n")
    write(tmp_path, "three", "extends: one\n")
    with pytest.raises(RecipeError, match=r"in a circle \(one.yaml -> two.yaml -> three.yaml"):
        read_recipe(tmp_path / "one.yaml")
    with pytest.raises(RecipeError, match=r"in a circle \(self.yaml -> self.yaml\)"):
        read_recipe(write(tmp_path, "self", "extends: self\n"))
    with pytest.raises(RecipeError, match=r"no recipe 'nowhere'"):
        read_recipe(write(tmp_path, "lost", "extends: nowhere\n"))


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "base", BASE)
    recipe = read_recipe(
        path,
        ["training.max_steps=200", "seeds=3", "arms.a.fraction=0.3", "arms.b=null",
         "title=other words", "corpus.n_rows=20000", "training.learning_rate=2e-3",
         "monitor.thresholds=[0.1, 0.5]"],
    )  # fmt: skip
    assert recipe.settings.training.max_steps == 200 and recipe.seeds == (0, 1, 2)
    assert recipe.settings.arms["a"].fraction == 0.3 and "b" not in recipe.settings.arms
    assert recipe.title == "other words" and recipe.settings.corpus.n_rows == 20_000
    assert recipe.settings.training.learning_rate == 0.002
    assert recipe.settings.monitor.thresholds == (0.1, 0.5)
    assert read_recipe(path, ["seeds=[4, 7]"]).seeds == (4, 7)
    assert read_recipe(path, ["corpus.held_out_rows=5"]).settings.corpus.held_out_rows == 5


REFUSED_OVERRIDES = {
    "training.max_stps=3": r"no setting training\.max_stps \(did you mean 'max_steps'\?\); there",
    "trainin.max_steps=3": r"no setting trainin \(did you mean 'training'\?\)",
    "training.max_steps=many": r"training\.max_steps is 'many'; allowed is a whole number",
    "training.max_steps=2.5": r"training\.max_steps is 2\.5; allowed is a whole number",
    "training.max_steps=true": r"training\.max_steps is true; allowed is a whole number",
    "training=3": r"training is 3; it holds settings: batch_size, ",
    "arms=3": r"arms is 3; it holds settings by name",
    "arms.a.do=maks": r"arms\.a\.do is 'maks'; allowed is one of mask, insert, replace",
    "arms.a.fractoin=1": r"no setting arms\.a\.fractoin \(did you mean 'fraction'\?\)",
    "arms.c.fraction=1": r"names no entry of arms; there are: a, a-random, b",
    "arms.a.steps=5": r"arms\.a\.steps is 5; allowed is a list of 2, of each a whole",
    "corpus.shuffle=1": r"corpus\.shuffle is 1; allowed is true or false",
    "scoring.replay_at=[middle]": r"allowed is a list, of each one of start, mid, end",
    "window.start=x": r"window\.start is 'x'; allowed is a whole number or null",
    "seeds=0": "seeds is 0; allowed is how many",
    "seeds=[1, 1]": r"seeds is \[1, 1\]; allowed",
    "seeds=[-1]": r"seeds is \[-1\]",
    "seeds=true": "seeds is True",
    "title=": "title is None; it is a line of text",
    "extends=other": "extends cannot be overridden",
    "training.max_steps": r"'training\.max_steps' is not KEY=VALUE",
    "training..x=1": "is not KEY=VALUE",
    "seeds.first=1": r"seeds is \[3, 1\], no settings",
    "title={": "the value of title is not valid YAML",
}


@pytest.mark.parametrize("override", REFUSED_OVERRIDES)
def test_refused_overrides_name_key_value_and_way_out(tmp_path: Path, override: str) -> None:
    path = write(tmp_path, "base", BASE)
    with pytest.raises(RecipeError, match=REFUSED_OVERRIDES[override]) as caught:
        read_recipe(path, [override])
    assert str(caught.value).startswith(f"{path}: ")


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no recipe 'inductoin-small'.*did you mean 'indu"):
        read_recipe("inductoin-small")
    with pytest.raises(FileNotFoundError, match=r"no recipe .*absent\.yaml"):
        read_recipe(tmp_path / "absent.yaml")
    for text, said in (
        ("- 1\n", "holds no settings"),
        ("", "holds no settings"),
        ("title: [\n", "is not valid YAML"),
        ("title: a\nseeds: 1\ntitle: b\n", "'title' is given twice"),
        ("arms:\n  a: {do: mask}\n  a: {do: insert}\n", "'a' is given twice"),
        ("extends: [a]\n", "it names one recipe"),
    ):
        with pytest.raises(RecipeError, match=said):
            read_recipe(write(tmp_path, "bad", text))
    (tmp_path / "latin.yaml").write_bytes(b"title: \xe9\n")
    with pytest.raises(RecipeError, match="is not UTF-8"):
        read_recipe(tmp_path / "latin.yaml")
