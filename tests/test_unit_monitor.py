"""UnitMonitor: the right rows at the right steps, in every logger and file, resumable."""

from __future__ import annotations

import csv
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from models import random_model
from tokenizers import Tokenizer, models
from training import Clock, CurveMechanism, FakeMeasure, Rows, StrangersModule, fit, jump

from mda_lightning.analysis.study import StudyError, read_head_curves
from mda_lightning.callbacks import CriticalWindow, InfluenceScoring, UnitMonitor
from mda_lightning.callbacks.metric_table import MetricTable
from mda_lightning.measures import Mu, measure
from mda_lightning.mechanisms import mechanism


def small(**settings) -> UnitMonitor:
    mechanisms = [
        mechanism("induction", n_sequences=4, n_probe_sequences=4),
        mechanism("previous_token", n_sequences=4, n_probe_sequences=4, length=(8, 12)),
    ]
    return UnitMonitor(mechanisms, **({"every_n_steps": 3, "measures": ()} | settings))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_rows_carry_the_step_of_the_weights_they_measured(tmp_path: Path) -> None:
    """Row k equals the metric computed by hand on a copy of the weights after k updates."""
    monitor = small()
    weights: dict[int, dict] = {}
    monitor.subscribe(lambda one: weights.setdefault(one.step, _copy(module)))
    module = StrangersModule()
    fit(module, [monitor], tmp_path)
    steps, values = monitor.table.curves("induction")
    assert steps.tolist() == [0, 3, 6, 9, 12]
    induction = monitor.mechanism("induction")
    for step, value in zip(steps, values, strict=True):
        module.load_state_dict(weights[int(step)])
        expected = induction.scores(module.net["lm"]).mean.numpy()
        np.testing.assert_array_equal(value, expected)
    assert not np.array_equal(values[0], values[-1])


def _copy(module: StrangersModule) -> dict:
    return {k: v.clone() for k, v in module.state_dict().items()}


def test_measures_once_per_optimizer_step_under_accumulation(tmp_path: Path) -> None:
    monitor = small(every_n_steps=2)
    seen = []
    monitor.subscribe(lambda one: seen.append((one.metric, one.step)))
    fit(StrangersModule(), [monitor], tmp_path, max_steps=6, accumulate_grad_batches=3)
    assert seen == [(m, s) for s in (0, 2, 4, 6) for m in ("induction", "previous_token")]


def test_every_logger_gets_exact_rows(tmp_path: Path) -> None:
    loggers = [
        CSVLogger(tmp_path, name="csv"),
        TensorBoardLogger(tmp_path, name="tb"),
    ]
    monitor = small(top_k=2)
    fit(StrangersModule(), [monitor], tmp_path, logger=loggers, log_every_n_steps=5)
    logged = [r for r in rows(Path(loggers[0].log_dir) / "metrics.csv") if r["induction/max"]]
    steps, values = monitor.table.curves("induction")
    assert [int(r["step"]) for r in logged] == steps.tolist()
    np.testing.assert_allclose(
        [float(r["induction/max"]) for r in logged], values.max(axis=(1, 2)), rtol=1e-6
    )
    heads = [k for k in logged[-1] if k.startswith("induction/L") and logged[-1][k]]
    assert len(heads) == 2
    assert monitor.folder == Path(loggers[0].log_dir) / "mda"


def test_the_long_table_and_the_picture_are_in_the_folder(tmp_path: Path) -> None:
    fit(StrangersModule(), [small(folder=str(tmp_path / "run"))], tmp_path)
    table = pq.read_table(tmp_path / "run" / "unit_metrics.parquet")
    assert table.schema.names == ["step", "layer", "head", "metric", "value", "se"]
    assert [str(t) for t in table.schema.types] == [
        "int32",
        "int16",
        "int16",
        "string",
        "float",
        "float",
    ]
    frame = table.to_pandas()
    assert len(frame) == 5 * 2 * 2 * 2
    note = json.loads(table.schema.metadata[b"mda_lightning"])
    assert note["schema_version"] == 1
    assert note["provenance"]["mechanisms"]["induction"]["n_sequences"] == 4
    assert (tmp_path / "run" / "induction.png").read_bytes()[:4] == b"\x89PNG"
    assert not list((tmp_path / "run").glob(".*"))


def test_scores_can_be_monitored_by_other_callbacks(tmp_path: Path) -> None:
    clock = Clock()
    monitor = UnitMonitor([CurveMechanism(clock, jump(4))], every_n_steps=1)
    best = ModelCheckpoint(
        tmp_path / "best", monitor="curve/L1H1", mode="max", every_n_train_steps=1, save_top_k=1
    )
    trainer = fit(
        StrangersModule(), [clock, monitor, best], tmp_path, enable_checkpointing=True, max_steps=9
    )
    assert "step=9" in best.best_model_path
    assert float(trainer.callback_metrics["curve/max"]) == pytest.approx(float(jump(4)(9).max()))
    EarlyStopping("curve/max")._validate_condition_metric(trainer.callback_metrics)


def test_resumed_the_table_goes_on_without_a_gap_or_a_repeat(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "at", every_n_train_steps=6, save_top_k=-1)
    whole = small(folder=str(tmp_path / "whole"))
    fit(StrangersModule(), [whole, saver], tmp_path, enable_checkpointing=True)
    again = small(folder=str(tmp_path / "again"))
    checkpoint = next((tmp_path / "at").glob("*step=6.ckpt"))
    torch.load(checkpoint, weights_only=True)
    # The stranger's loader begins again from row 0, so only rows up to step 6 can be equal.
    fit(StrangersModule(), [again], tmp_path, ckpt_path=checkpoint)
    steps, values = again.table.curves("induction")
    assert steps.tolist() == [0, 3, 6, 9, 12]
    np.testing.assert_array_equal(values[:3], whole.table.curves("induction")[1][:3])


def test_a_monitor_used_for_a_second_run_begins_again(tmp_path: Path) -> None:
    monitor = small()
    for _ in range(2):
        fit(StrangersModule(), [monitor], tmp_path, max_steps=3)
        assert monitor.table.curves("induction")[0].tolist() == [0, 3]


def test_values_that_are_not_finite_are_reported_and_training_goes_on(tmp_path: Path) -> None:
    clock = Clock()

    def curve(step: int) -> np.ndarray:
        values = np.full((2, 2), 0.1)
        values[1] = np.nan if step >= 2 else 0.1
        return values

    monitor = UnitMonitor([CurveMechanism(clock, curve)], every_n_steps=1)
    with pytest.warns(UserWarning, match="not finite at step 2 in layer 1"):
        trainer = fit(StrangersModule(), [clock, monitor], tmp_path, max_steps=4)
    assert trainer.global_step == 4
    assert np.isnan(monitor.latest("curve").value[1]).all()


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_n_steps=0"):
        UnitMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match="'indiction' is not a mechanism; there are: induction"):
        UnitMonitor(["indiction"])
    with pytest.raises(ValueError, match="each of another name"):
        UnitMonitor(["induction", "induction"])
    with pytest.raises(ValueError, match="has no submodule 'lm'"):
        fit(StrangersModule(), [small(model="lm")], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="choose another output folder"):
        fit(StrangersModule(), [small(folder=str(tmp_path / "file" / "x"))], tmp_path)


def test_numbers_out_of_range_are_refused_and_no_head_is_a_number_in_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="top_k=-1: log 0 heads"):
        UnitMonitor(top_k=-1)
    with pytest.raises(ValueError, match="write_every_n_steps=0: write at most every step, 1"):
        UnitMonitor(write_every_n_steps=0)
    logger = CSVLogger(tmp_path)
    fit(StrangersModule(), [small(top_k=0)], tmp_path, logger=logger, max_steps=3)
    keys = rows(Path(logger.log_dir) / "metrics.csv")[0].keys()
    assert "induction/max" in keys and not any("/L" in key for key in keys)


def test_one_name_or_object_is_a_list_of_one() -> None:
    one = UnitMonitor("induction", measures="ablation")
    assert one.measuring.names == ["induction", "ablation"]
    mechanisms = [mechanism("induction"), mechanism("previous_token", n_sequences=4)]
    two = UnitMonitor(mechanisms[0], measures=mechanisms[1])
    assert two.mechanisms == mechanisms[:1] and two.measures == [Mu(mechanisms[1])]
    assert two.mechanism("previous_token") is None
    with pytest.raises(ValueError, match="each of another name"):
        UnitMonitor("induction", measures=[mechanisms[0]])


@pytest.mark.parametrize("name", ["copying", "ablation", "induction"])
def test_a_measures_own_token_ids_stay(name: str) -> None:
    own = measure(name).with_token_ids([3, 5, 8, 9, 11, 17])
    (kept,) = UnitMonitor(measures=[own], mechanisms=(), token_ids=range(1, 40)).measures
    assert kept is own
    (given,) = UnitMonitor(measures=[measure(name)], mechanisms=(), token_ids=range(1, 7)).measures
    assert given == measure(name).with_token_ids([1, 2, 3, 4, 5, 6])


def test_token_ids_that_the_settings_do_not_tell_of_stay_too() -> None:
    class Own(FakeMeasure):
        token_ids = (3, 5)

        def settings(self) -> dict[str, Any]:
            return {}

        def with_token_ids(self, token_ids: list[int]) -> FakeMeasure:
            raise AssertionError("its own ids were to be replaced")

    own = Own(Clock())
    assert UnitMonitor(measures=own, mechanisms=(), token_ids=range(1, 40)).measures == [own]


def test_two_monitors_may_not_write_over_each_other(tmp_path: Path) -> None:
    others = {"every_n_steps": 5, "measures": ()}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for folders in ((None, None), (tmp_path / "a", tmp_path / "b")):
        first, second = (None if f is None else str(f) for f in folders)
        pair = [
            UnitMonitor("induction", folder=first, **others),
            UnitMonitor("previous_token", folder=second, **others),
        ]
        with pytest.raises(
            ValueError, match=r"\['induction'\]\) and .*\['previous_token'\]\) .*folder="
        ):
            fit(StrangersModule(), pair, tmp_path)
    pair[1] = UnitMonitor("previous_token", folder=str(tmp_path / "c"), **others)
    fit(StrangersModule(), [*pair, CriticalWindow("previous_token")], tmp_path, max_steps=5)
    for folder, metric in (("a", "induction"), ("c", "previous_token")):
        assert set(table_of(tmp_path / folder)["metric"]) == {metric}
        assert metric in (tmp_path / folder / "live.html").read_text()


def test_what_heads_share_is_on_the_page_and_in_the_tables_provenance(tmp_path: Path) -> None:
    for family in ("llama", "gpt2"):
        module = StrangersModule()
        module.net["lm"] = random_model(family)
        folder = tmp_path / family
        fit(module, [small(folder=str(folder))], tmp_path, max_steps=1)
        metadata = pq.read_schema(folder / "unit_metrics.parquet").metadata[b"mda_lightning"]
        sharing = json.loads(metadata)["provenance"]["sharing"]
        page = (folder / "live.html").read_text()
        if family == "llama":  # 4 heads, 2 of keys and values
            assert "2 heads share each key and value head" in sharing and sharing in html.unescape(
                page
            )
        else:
            assert sharing is None and "grouped queries" not in page


def test_a_second_fit_reports_again_what_is_not_finite(tmp_path: Path) -> None:
    clock = Clock()
    curve = CurveMechanism(clock, lambda step: np.full((2, 2), np.nan if step else 0.1))
    monitor = UnitMonitor([curve], measures=(), every_n_steps=1)
    for _ in range(2):
        with pytest.warns(UserWarning, match="curve is not finite at step 1"):
            fit(StrangersModule(), [clock, monitor], tmp_path, max_steps=3)


def test_a_measurement_without_a_finite_number_logs_no_empty_row(tmp_path: Path) -> None:
    clock, logger = Clock(), CSVLogger(tmp_path)
    curve = CurveMechanism(clock, lambda step: np.full((2, 2), 0.1 if step in (0, 4) else np.nan))
    monitor = UnitMonitor([curve], measures=(), every_n_steps=2)
    with pytest.warns(UserWarning, match="not finite at step 2"):
        fit(StrangersModule(), [clock, monitor], tmp_path, logger=logger, max_steps=6)
    logged = rows(Path(logger.log_dir) / "metrics.csv")
    assert [row["step"] for row in logged if row["curve/max"]] == ["0", "4"]
    assert all(any(v for k, v in row.items() if k not in ("step", "epoch")) for row in logged)


def table_of(folder: Path) -> Any:
    return pq.read_table(folder / "unit_metrics.parquet").to_pandas()


def test_measures_are_taken_at_every_tenth_measurement_or_their_own_rate(tmp_path: Path) -> None:
    for own, expected in ((None, [0, 20, 40]), (7, [0, 7, 14, 21, 28, 35, 42])):
        clock = Clock()
        fake = FakeMeasure(clock, every_n_steps=own)
        monitor = small(every_n_steps=2, measures=[fake], folder=str(tmp_path / f"{own}"))
        fit(StrangersModule(), [clock, monitor], tmp_path, max_steps=43)
        assert fake.checked == ["GPTNeoXForCausalLM"]
        assert monitor.table.curves("induction")[0].tolist() == list(range(0, 44, 2))
        steps, whole = monitor.table.curves("fake/whole@7")
        assert steps.tolist() == expected and whole.shape == (len(expected),)
        assert monitor.table.curves("fake/heads")[0].tolist() == expected


def test_ablation_is_watched_unless_told_otherwise(tmp_path: Path) -> None:
    monitor = UnitMonitor(every_n_steps=5)
    fit(StrangersModule(), [monitor], tmp_path, max_steps=50, data=Rows(200))
    for key in ("ablation/logit", "ablation/centred", "ablation/logprob"):
        assert monitor.table.curves(key)[0].tolist() == [0, 50]
    assert UnitMonitor(measures=[]).measures == []


def test_a_real_measure_is_what_it_gives_alone(tmp_path: Path) -> None:
    ablation = measure("ablation", n_sequences=4, every_n_steps=6)
    monitor = small(measures=[ablation])
    module = StrangersModule()
    fit(module, [monitor], tmp_path)
    expected = ablation.measure(module.net["lm"].eval())
    for key, scores in expected.items():
        assert monitor.table.curves(key)[0].tolist() == [0, 6, 12]
        np.testing.assert_array_equal(monitor.latest(key).value, scores.mean.numpy())
    assert monitor.measures == [ablation]


def test_numbers_of_the_whole_model_are_scalars_and_rows_without_a_head(tmp_path: Path) -> None:
    clock, logger = Clock(), CSVLogger(tmp_path)
    monitor = small(measures=[FakeMeasure(clock, every_n_steps=6)], folder=str(tmp_path / "run"))
    fit(StrangersModule(), [clock, monitor], tmp_path, logger=logger)
    logged = [r for r in rows(Path(logger.log_dir) / "metrics.csv") if r["fake/whole@7"]]
    # The clock ticks before the monitor measures, so row k is the curve at k.
    assert [(int(r["step"]), float(r["fake/whole@7"])) for r in logged] == [
        (0, 10.0),
        (6, 16.0),
        (12, 22.0),
    ]
    assert {float(r["fake/whole@7_se"]) for r in logged} == {0.25}
    assert [float(r["fake/heads/max"]) for r in logged] == [2.0, 8.0, 14.0]
    assert [float(r["fake/heads/L1H1"]) for r in logged] == [-3.0, 3.0, 9.0]

    frame = table_of(tmp_path / "run")
    whole = frame[frame["metric"] == "fake/whole@7"]
    assert whole["layer"].isna().all() and whole["head"].isna().all()
    assert whole["value"].tolist() == [10.0, 16.0, 22.0] and set(whole["se"]) == {0.25}
    heads = frame[frame["metric"] == "fake/heads"]
    assert heads[heads["step"] == 6]["value"].tolist() == [6.0, 7.0, 8.0, 3.0]
    for name in ("fake-heads.png", "fake-whole@7.png"):
        assert (tmp_path / "run" / name).read_bytes()[:4] == b"\x89PNG"

    # What reads one metric of all heads is not confused by rows without one.
    curves = read_head_curves(tmp_path / "run" / "unit_metrics.parquet", "fake/heads")
    assert curves.units == ("L0H0", "L0H1", "L1H0", "L1H1")
    with pytest.raises(StudyError, match="a number of the whole model"):
        read_head_curves(tmp_path / "run" / "unit_metrics.parquet", "fake/whole@7")


def test_the_table_goes_round_with_numbers_of_both_kinds(tmp_path: Path) -> None:
    table = MetricTable()
    generator = np.random.default_rng(0)
    kept = []
    for step in range(40):  # more than the first buffers hold
        grid = generator.normal(size=(2, 3)).astype(np.float32)
        table.append(step, "heads", grid, 2 * grid)
        table.append(2 * step, "whole", grid[0, 0], grid[0, 1])
        kept.append(grid)
    torch.save(table.state_dict(), tmp_path / "state.pt")
    again = MetricTable()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one in (table, again):
        np.testing.assert_array_equal(one.curves("heads")[1], np.stack(kept))
        np.testing.assert_array_equal(one.errors("heads"), 2 * np.stack(kept))
        np.testing.assert_array_equal(one.curves("whole")[0], 2 * np.arange(40))
        np.testing.assert_array_equal(one.curves("whole")[1], [g[0, 0] for g in kept])
        assert one.since("heads", 37).shape == (3, 2, 3) and one.last_step == 78
        assert one.rows("whole", first=39) == [
            (78, None, None, "whole", float(kept[-1][0, 0]), float(kept[-1][0, 1]))
        ]
        assert one.rows("heads")[4] == (
            0,
            1,
            1,
            "heads",
            float(kept[0][1, 1]),
            float(2 * kept[0][1, 1]),
        )


def test_a_tokenizer_says_which_ids_are_drawn(tmp_path: Path) -> None:
    words = {f"w{i}": i for i in range(3, 45)}
    tokenizer = Tokenizer(models.WordLevel(words | {"[UNK]": 45}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monitor = small(tokenizer=str(tmp_path / "tokenizer.json"), measures=["ablation"])
    fit(StrangersModule(), [monitor], tmp_path, max_steps=3)
    for one in (*monitor.mechanisms, *monitor.measures):
        assert one.settings()["token_ids"] in ({"first": 3, "last": 45}, tuple(range(3, 46)))
    with pytest.raises(ValueError, match="give one"):
        small(tokenizer=str(tmp_path / "tokenizer.json"), token_ids=range(40))
    words |= {f"v{i}": i for i in range(46, 60)}
    Tokenizer(models.WordLevel(words | {"[UNK]": 45}, unk_token="[UNK]")).save(
        str(tmp_path / "large.json")
    )
    with pytest.raises(ValueError, match="tokenizer is larger than the model"):
        fit(StrangersModule(), [small(tokenizer=str(tmp_path / "large.json"))], tmp_path)


def test_sequences_longer_than_the_models_context_are_refused_at_setup(tmp_path: Path) -> None:
    module = StrangersModule()
    module.net["lm"].config.max_position_embeddings = 24
    long = UnitMonitor([mechanism("induction", n_sequences=4, length=(8, 20))])
    with pytest.raises(
        ValueError, match=r"induction: sequences of \d+ .* of 24 .*length=\(8, 20\)"
    ):
        fit(module, [long], tmp_path)
    short = mechanism("induction", n_sequences=4, length=(8, 12))
    with pytest.raises(ValueError, match=r"ablation sequences of 32 .* of 24"):
        fit(module, [UnitMonitor([short], measures=[measure("ablation", length=32)])], tmp_path)
    fit(module, [UnitMonitor([short], measures=())], tmp_path, max_steps=1)


def test_a_whole_models_number_that_is_not_finite_is_reported_too(tmp_path: Path) -> None:
    clock = Clock()
    fake = FakeMeasure(
        clock, every_n_steps=1, whole=lambda step: np.nan if step >= 3 else float(step)
    )
    monitor = small(every_n_steps=1, measures=[fake], folder=str(tmp_path / "run"))
    with pytest.warns(UserWarning, match="fake/whole@7 is not finite at step 3:"):
        trainer = fit(StrangersModule(), [clock, monitor], tmp_path, max_steps=5)
    assert trainer.global_step == 5
    assert np.isfinite(monitor.table.curves("induction")[1]).all()
    assert np.isfinite(monitor.table.curves("fake/heads")[1]).all()
    assert "fake/whole@7 is not finite at step 3" in (tmp_path / "run" / "live.html").read_text()


def test_every_logged_key_is_documented(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "logged-keys.md").read_text()
    clock = Clock()
    run = [
        clock,
        UnitMonitor(
            [CurveMechanism(clock, jump(2, ramp=2)), "induction"],
            every_n_steps=1,
            measures=[FakeMeasure(clock), measure("ablation", n_sequences=4)],
        ),
        CriticalWindow("curve"),
        InfluenceScoring("induction", active="always"),
    ]
    logger = CSVLogger(tmp_path)
    fit(StrangersModule(), run, tmp_path, logger=logger)
    keys = set(rows(Path(logger.log_dir) / "metrics.csv")[0]) - {"step", "epoch"}
    general = {
        re.sub(
            r"L\d+H\d+",
            "L<l>H<h>",
            re.sub(r"^(curve|induction|ablation/\w+|fake/heads)|^fake/whole@7", _family, key),
        )
        for key in keys
    }
    assert {
        "<key>/max",
        "<key>/L<l>H<h>",
        "<key>_se",
        "<mechanism>/ema_max",
        "<mechanism>/scored",
    } <= general
    missing = {key for key in general if f"`{key}`" not in page}
    assert not missing


def _family(found: re.Match[str]) -> str:
    """Keys of the monitor are named after what is measured, the others after a mechanism."""
    follows = ("ema_max", "n_rising", "n_formed", "window_open", "scored")
    return "<mechanism>" if found.string.endswith(follows) else "<key>"
