"""``mda-lightning monitor``: metrics over saved checkpoints, against the metrics called by hand."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from models import random_neox
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from training import Rows, StrangersModule
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXForCausalLM, OPTConfig

from mda_lightning.checkpoints import ModelFolder, find_checkpoints
from mda_lightning.cli import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, main
from mda_lightning.companion_measures import PreviousTokenOnText
from mda_lightning.corpora.bpe import train_bpe
from mda_lightning.influence import weights_hash
from mda_lightning.measures import MEASURES, measure
from mda_lightning.metrics import InductionScore, PreviousTokenScore
from mda_lightning.pretraining import PythiaModule
from mda_lightning.recipes import monitor as recipe
from mda_lightning.recipes.monitor import RepeatedWeightsError, monitor_checkpoints

FEW = ["--sequences", "6"]
ATTENTION = ["--metrics", "induction,previous_token", *FEW]


def save(folder: Path, seed: int, **settings: Any) -> Path:
    random_neox(seed=seed, vocab_size=48, **settings).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints, their names not in the order of their steps."""
    for step, seed in ((16, 1), (2, 2), (512, 3)):
        save(tmp_path / "run" / f"step{step}", seed)
    return tmp_path / "run"


def table_of(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "metrics.parquet")


def grid(table: pd.DataFrame, metric: str, step: int, column: str = "value") -> np.ndarray:
    own = table[(table["metric"] == metric) & (table["step"] == step)]
    return own.pivot(index="layer", columns="head", values=column).to_numpy(np.float32)


def provenance(folder: Path) -> dict[str, Any]:
    note = json.loads(pq.read_schema(folder / "metrics.parquet").metadata[b"mda_lightning"])
    assert note["schema_version"] == 1
    return note["provenance"]


# -- the numbers ------------------------------------------------------------------------------


def test_the_table_holds_what_the_metrics_give_on_the_same_saved_model(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    random_state = torch.get_rng_state()
    assert main(["monitor", str(run), "--output", str(out), "--sequences", "6"]) == EXIT_OK
    assert torch.equal(torch.get_rng_state(), random_state)
    table = table_of(out)
    assert list(dict.fromkeys(table["step"])) == [2, 16, 512]
    for step in (2, 16, 512):
        model = GPTNeoXForCausalLM.from_pretrained(run / f"step{step}", dtype=torch.float32)
        for name, score in (("induction", InductionScore), ("previous_token", PreviousTokenScore)):
            metric = score(model, n_sequences=6)
            metric.update(model)
            mean, se = metric.compute()
            np.testing.assert_array_equal(grid(table, name, step), mean.numpy())
            np.testing.assert_array_equal(grid(table, name, step, "se"), se.numpy())
        for name, scores in measure("ablation", n_sequences=6).measure(model).items():
            np.testing.assert_array_equal(grid(table, name, step), scores.mean.numpy())
        sha = table[table["step"] == step]["weights_sha256"].unique()
        assert list(sha) == [weights_hash(model)]
    assert not np.allclose(grid(table, "induction", 2), grid(table, "induction", 16))


def test_what_is_written_and_what_it_says(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["monitor", str(run), "--output", str(out), *ATTENTION]) == EXIT_OK
    table = table_of(out)
    assert list(table) == [
        *("step", "layer", "head", "metric", "value", "se"),
        *("checkpoint", "weights_sha256", "repeats"),
    ]
    csv = pd.read_csv(out / "metrics.csv")
    assert len(csv) == len(table) == 3 * 2 * 4
    np.testing.assert_allclose(csv["value"], table["value"], rtol=1e-6)
    assert table["repeats"].isna().all()
    note = provenance(out)
    assert note["complete"] and note["metrics"]["induction"]["n_sequences"] == 6
    assert [one["step_from"] for one in note["checkpoints"]] == ["name"] * 3
    for metric in ("induction", "previous_token"):
        image = np.asarray(Image.open(out / f"heatmap-{metric}.png").convert("RGB"))
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 12
    printed = capsys.readouterr().out
    top = table[table["metric"] == "induction"].sort_values("value").iloc[-1]
    assert f"L{top['layer']}H{top['head']}" in printed and f"{top['value']:.3f}" in printed


def test_the_function_gives_the_same_table(run: Path, tmp_path: Path) -> None:
    table = monitor_checkpoints(
        [str(run / "step2")], metrics=["induction"], output=tmp_path / "out", n_sequences=6
    )
    pd.testing.assert_frame_equal(table, table_of(tmp_path / "out"), check_dtype=False)


def test_numbers_of_the_whole_model_have_no_head(run: Path, tmp_path: Path, capsys) -> None:
    rows = torch.randint(2, 40, (8, 33), generator=torch.Generator().manual_seed(0))
    icl = measure("icl", text=rows)
    table = monitor_checkpoints([str(run)], metrics=[icl], output=tmp_path / "out")
    assert table["layer"].isna().all() and table["head"].isna().all()
    model = GPTNeoXForCausalLM.from_pretrained(run / "step16", dtype=torch.float32)
    for key, scores in icl.measure(model).items():
        own = table[(table["metric"] == key) & (table["step"] == 16)]
        assert own["value"].item() == scores.mean.item()
    assert len(list((tmp_path / "out").glob("heatmap-icl*.png"))) == 2


def test_text_is_read_with_the_tokenizer_beside_the_weights(
    run: Path, tmp_path: Path, monkeypatch
) -> None:
    words = ["name", "of", "the", "other", "one", "and", "so", "it", "goes", "on", "again"]
    text = " ".join(words[i * i % len(words)] for i in range(6000))
    tokenizer = train_bpe([text], vocab_size=270, seed=0)
    folder = tmp_path / "model" / "step3"
    random_neox(seed=1, vocab_size=300).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer)
    (tmp_path / "text.txt").write_text(text)
    arguments = ["--text", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out")]
    command = ["monitor", str(folder), "--metrics", "icl,previous_token_text", *arguments]
    with monkeypatch.context() as patch:
        counts = counted(patch)
        # The model has 64 positions, and this metric's rows are longer.
        patch.setitem(MEASURES, "previous_token_text", partial(PreviousTokenOnText, length=32))
        assert main(command) == EXIT_OK
        (tmp_path / "text.txt").write_text(text[100:])
        assert main(command) == EXIT_OK
        assert counts["icl"] == counts["previous_token_text"] == 2  # another text, measured anew
    model = GPTNeoXForCausalLM.from_pretrained(folder, attn_implementation="eager")
    encoded = Tokenizer.from_str(tokenizer).encode(text[100:]).ids
    rows = torch.tensor(encoded[: 128 * 32]).view(128, 32)
    with torch.no_grad():
        patterns = torch.stack(model(rows, output_attentions=True).attentions, dim=1)
    expected = patterns.diagonal(offset=-1, dim1=-2, dim2=-1).mean(dim=(0, -1))
    found = grid(table_of(tmp_path / "out"), "previous_token_text", 3)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


# -- weights that repeat ----------------------------------------------------------------------


def test_repeated_weights_are_said_marked_and_kept(run: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(run / "step2", run / "step4")
    out = tmp_path / "out"
    assert main(["monitor", str(run), "--output", str(out), *ATTENTION]) == EXIT_OK
    told = capsys.readouterr().err
    assert "repeated weights" in told and "step 4" in told and "step 2)" in told
    table = table_of(out)
    by_step = table.groupby("step")["repeats"].unique()
    assert by_step[2] == [str(run / "step4")] and by_step[4] == [str(run / "step2")]
    assert table[table["step"].isin([16, 512])]["repeats"].isna().all()
    np.testing.assert_array_equal(grid(table, "induction", 2), grid(table, "induction", 4))


def test_strict_refuses_them(run: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(run / "step2", run / "step4")
    out = ["--output", str(tmp_path / "out"), *ATTENTION]
    assert main(["monitor", str(run), "--strict", *out]) == EXIT_ERROR
    told = capsys.readouterr().err
    assert "step4" in told and "step2" in told
    assert not provenance(tmp_path / "out")["complete"]
    with pytest.raises(RepeatedWeightsError), pytest.warns(UserWarning, match="repeated"):
        save(run / "step1024", 4)
        monitor_checkpoints([str(run)], metrics=["induction"], output=tmp_path / "a")
        monitor_checkpoints([str(run)], metrics=["induction"], output=tmp_path / "b", strict=True)


# -- going on ---------------------------------------------------------------------------------


def counted(monkeypatch) -> Counter[str]:
    """How often each metric is measured from now on."""
    counts: Counter[str] = Counter()
    former = recipe.measure_all

    def count(metric, model):
        counts[metric.name] += 1
        return former(metric, model)

    monkeypatch.setattr(recipe, "measure_all", count)
    return counts


def test_an_interrupted_call_goes_on_where_it_was(
    run: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    arguments = ["monitor", str(run), "--output", str(tmp_path / "out"), *ATTENTION]
    former = ModelFolder.load

    def interrupted(self, dtype):
        if self.step == 16:
            raise KeyboardInterrupt
        return former(self, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(ModelFolder, "load", interrupted)
        assert main(arguments) == EXIT_INTERRUPTED
    assert "goes on from there" in capsys.readouterr().err
    assert set(table_of(tmp_path / "out")["step"]) == {2}
    assert not provenance(tmp_path / "out")["complete"]
    counts = counted(monkeypatch)
    assert main(arguments) == EXIT_OK
    assert counts == {"induction": 2, "previous_token": 2}
    again = ["monitor", str(run), "--output", str(tmp_path / "other"), *ATTENTION]
    assert main(again) == EXIT_OK
    pd.testing.assert_frame_equal(table_of(tmp_path / "out"), table_of(tmp_path / "other"))


def test_a_killed_call_leaves_what_it_measured(run: Path, tmp_path: Path, monkeypatch) -> None:
    code = f"""
import os, signal
from mda_lightning.recipes.monitor import monitor_checkpoints
def watch(now):
    if now.doing == "loading" and now.done == 1:
        os.kill(os.getpid(), signal.SIGKILL)
monitor_checkpoints([{str(run)!r}], metrics=["induction"], output={str(tmp_path / "out")!r},
                    n_sequences=6, watch=watch)
"""
    killed = subprocess.run([sys.executable, "-c", code])
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out" / "measured").iterdir())) == 1
    counts = counted(monkeypatch)
    arguments = ["--metrics", "induction", *FEW, "--output", str(tmp_path / "out")]
    assert main(["monitor", str(run), *arguments]) == EXIT_OK
    assert counts == {"induction": 2}
    assert set(table_of(tmp_path / "out")["step"]) == {2, 16, 512}


def test_only_the_very_same_measurement_is_taken_up(tmp_path: Path, monkeypatch) -> None:
    """Other settings, another configuration round equal weights, another precision: all anew."""
    folder = save(tmp_path / "model", 1)
    arguments = ["--output", str(tmp_path / "out"), "--metrics", "induction"]
    counts = counted(monkeypatch)

    def measured(*more: str) -> np.ndarray:
        before = counts["induction"]
        assert main(["monitor", str(folder), *arguments, *more]) == EXIT_OK
        assert counts["induction"] == before + 1
        return grid(table_of(tmp_path / "out"), "induction", 0)

    first = measured(*FEW)
    assert not np.array_equal(measured(*FEW, "--seed", "7"), first)
    assert not np.array_equal(measured("--sequences", "5"), first)
    assert not np.array_equal(measured(*FEW, "--dtype", "bfloat16"), first)
    config = json.loads((folder / "config.json").read_text())
    rotary = config["rope_parameters"]["partial_rotary_factor"]
    config["rope_parameters"]["partial_rotary_factor"] = 2 * rotary
    (folder / "config.json").write_text(json.dumps(config))
    assert not np.array_equal(measured(*FEW), first)
    config["rope_parameters"]["partial_rotary_factor"] = rotary
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["monitor", str(folder), *arguments, *FEW]) == EXIT_OK
    np.testing.assert_array_equal(grid(table_of(tmp_path / "out"), "induction", 0), first)


# -- Lightning checkpoints --------------------------------------------------------------------


def trainer(folder: Path, steps: int) -> L.Trainer:
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def test_checkpoints_of_pythia_module_need_no_configuration(tmp_path: Path, capsys) -> None:
    size = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 48,
        "rotary_pct": 0.5,
    }
    models = {}
    for steps in (3, 1):
        module = PythiaModule(size, total_steps=4)
        one = trainer(tmp_path, steps)
        one.fit(module, DataLoader(Rows(16), batch_size=4))
        one.save_checkpoint(tmp_path / "kept" / f"{'ab'[steps > 1]}.ckpt")
        models[steps] = module.model
    shutil.copy(tmp_path / "kept" / "b.ckpt", tmp_path / "kept" / "last.ckpt")
    out = tmp_path / "out"
    assert main(["monitor", str(tmp_path / "kept"), "--output", str(out), *ATTENTION]) == EXIT_OK
    assert "again; it is measured once" in capsys.readouterr().err
    table = table_of(out)
    assert list(dict.fromkeys(table["step"])) == [1, 3]
    for steps, model in models.items():
        metric = InductionScore(model, n_sequences=6)
        metric.update(model)
        np.testing.assert_array_equal(
            grid(table, "induction", steps), metric.compute().mean.numpy()
        )
        own = table[table["step"] == steps]
        assert set(own["weights_sha256"]) == {weights_hash(model)}


@pytest.fixture
def strangers(tmp_path: Path) -> tuple[Path, Path, GPTNeoXForCausalLM]:
    """A checkpoint of a module that knows nothing of this package, and its model's config."""
    module = StrangersModule()
    one = trainer(tmp_path, 2)
    one.fit(module, DataLoader(Rows(8), batch_size=4))
    one.save_checkpoint(tmp_path / "theirs.ckpt")
    module.net["lm"].config.save_pretrained(tmp_path / "config")
    return tmp_path / "theirs.ckpt", tmp_path / "config", module.net["lm"]


def test_another_modules_model_is_found_by_its_configuration(strangers, tmp_path: Path) -> None:
    path, config, model = strangers
    (found,) = find_checkpoints([str(path)], config=str(config))
    assert found.step == 2 and found.step_from == "global_step"
    assert weights_hash(found.load(torch.float32)) == weights_hash(model)
    arguments = [str(path), "--config", str(config), "--output", str(tmp_path / "out")]
    assert main(["monitor", *arguments, *ATTENTION]) == EXIT_OK


def test_names_of_other_releases_and_of_compiled_modules_are_understood(
    strangers, tmp_path: Path
) -> None:
    path, config, model = strangers
    content = torch.load(path, weights_only=True)
    renamed = {
        name.replace("net.lm.", "net._orig_mod.lm.").replace("lm_head.", "embed_out."): value
        for name, value in content["state_dict"].items()
    }
    torch.save({"state_dict": renamed}, tmp_path / "old-step7.ckpt")
    (found,) = find_checkpoints([str(tmp_path / "old-step7.ckpt")], config=str(config))
    assert (found.step, found.step_from) == (7, "name")
    assert weights_hash(found.load(torch.float32)) == weights_hash(model)


def test_several_models_in_a_file_need_a_prefix(strangers, tmp_path: Path, capsys) -> None:
    path, config, model = strangers
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    average = {name.replace("net.lm", "ema.lm"): value + 1 for name, value in state.items()}
    torch.save({"state_dict": state | average, "global_step": 5}, tmp_path / "two.ckpt")
    arguments = [str(tmp_path / "two.ckpt"), "--config", str(config), *ATTENTION]
    assert main(["monitor", *arguments]) == EXIT_ERROR
    told = capsys.readouterr().err
    assert "'net.lm'" in told and "'ema.lm'" in told and "--prefix" in told
    assert main(["monitor", *arguments, "--prefix", "net"]) == EXIT_ERROR
    told = capsys.readouterr().err
    assert "'net.lm', 'ema.lm'" in told
    (found,) = find_checkpoints([str(tmp_path / "two.ckpt")], config=str(config), prefix="net.lm")
    assert weights_hash(found.load(torch.float32)) == weights_hash(model)


def test_ckpt_files_that_cannot_be_loaded_say_why(strangers, tmp_path: Path, capsys) -> None:
    path, config, _ = strangers
    assert main(["monitor", str(path), *ATTENTION]) == EXIT_ERROR
    assert "--config" in capsys.readouterr().err
    random_neox(vocab_size=40).config.save_pretrained(tmp_path / "smaller")
    assert main(["monitor", str(path), "--config", str(tmp_path / "smaller")]) == EXIT_ERROR
    told = capsys.readouterr().err
    assert "[48, 16]" in told and "[40, 16]" in told and "'net.lm'" in told
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["net.lm.lm_head.weight"]
    torch.save(content, tmp_path / "headless.ckpt")
    arguments = ["--config", str(config), *ATTENTION, "--output", str(tmp_path / "out")]
    assert main(["monitor", str(tmp_path / "headless.ckpt"), *arguments]) == EXIT_ERROR
    assert "lm_head.weight" in capsys.readouterr().err
    content = torch.load(path, weights_only=True)
    torch.save(content | {"options": Namespace(a=1)}, tmp_path / "objects.ckpt")
    assert main(["monitor", str(tmp_path / "objects.ckpt"), *arguments]) == EXIT_ERROR
    assert "--trust" in capsys.readouterr().err
    assert main(["monitor", str(tmp_path / "objects.ckpt"), *arguments, "--trust"]) == EXIT_OK
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    assert main(["monitor", str(tmp_path / "text.ckpt"), *arguments]) == EXIT_ERROR
    assert "text.ckpt" in capsys.readouterr().err


# -- arguments --------------------------------------------------------------------------------


def test_without_a_step_the_place_in_the_list_counts(tmp_path: Path, capsys) -> None:
    folders = [save(tmp_path / name, i) for i, name in enumerate(("step9", "final"))]
    arguments = [*map(str, folders), "--output", str(tmp_path / "out"), *ATTENTION]
    assert main(["monitor", *arguments]) == EXIT_OK
    told = capsys.readouterr().err
    assert "final" in told and "place in the list" in told
    table = table_of(tmp_path / "out")
    assert dict(zip(table["checkpoint"], table["step"], strict=True)) == {
        str(folders[0]): 0,
        str(folders[1]): 1,
    }
    sources = {one["step_from"] for one in provenance(tmp_path / "out")["checkpoints"]}
    assert sources == {"place in the list"}


def test_other_weights_of_one_step_are_both_kept(tmp_path: Path, capsys) -> None:
    folders = [save(tmp_path / name / "step5", i) for i, name in enumerate("ab")]
    arguments = [*map(str, folders), "--output", str(tmp_path / "out"), *ATTENTION]
    assert main(["monitor", *arguments]) == EXIT_OK
    assert "two checkpoints are of step 5" in capsys.readouterr().err
    assert table_of(tmp_path / "out")["checkpoint"].nunique() == 2


def test_what_cannot_be_measured_is_named_before_anything_is(
    run: Path, tmp_path: Path, capsys
) -> None:
    def told(*arguments: str) -> str:
        code = main(["monitor", *arguments, "--output", str(tmp_path / "out")])
        assert code == EXIT_ERROR and not (tmp_path / "out").exists()
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint" in told(str(tmp_path / "empty"))
    (tmp_path / "bare").mkdir()
    shutil.copy(run / "step2" / "config.json", tmp_path / "bare")
    assert "has no weights" in told(str(run), str(tmp_path / "bare"))
    OPTConfig(hidden_size=8).save_pretrained(tmp_path / "opt")
    (tmp_path / "opt" / "model.safetensors").touch()
    assert "'opt' has no layout" in told(str(tmp_path / "opt"))
    assert "no file" in told(str(tmp_path / "missing.ckpt"))
    assert "no hub name" in told("not/a/name")
    assert "name its folder" in told(str(run / "step2" / "model.safetensors"))
    save(tmp_path / "deeper", 1, n_layers=3)
    wrong_shape = told(str(run), str(tmp_path / "deeper"))
    assert "3 layers" in wrong_shape and "2 layers" in wrong_shape
    assert "--config and --prefix" in told(str(run), "--prefix", "net.lm")
    assert "is measured on text" in told(str(run), "--text", "wikitext-2")
    (run / "step1024").mkdir()
    assert "step1024 has no" in told(str(run))


def test_weights_that_are_not_whole_are_refused(run: Path, tmp_path: Path, capsys) -> None:
    """transformers would draw what is missing, and the noise would be measured."""
    from safetensors.torch import load_file, save_file

    path = run / "step16" / "model.safetensors"
    weights = load_file(path)
    del weights["gpt_neox.layers.1.attention.dense.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    arguments = ["monitor", str(run), "--output", str(tmp_path / "out"), *ATTENTION]
    assert main(arguments) == EXIT_ERROR
    assert "layers.1.attention.dense.weight" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:500])
    assert main(arguments) == EXIT_ERROR
    told = capsys.readouterr().err
    assert "step16" in told and "cannot be read" in told
    assert set(table_of(tmp_path / "out")["step"]) == {2}


def test_wrong_usage_is_told_apart(run: Path, capsys) -> None:
    for arguments in (["--metrics", "inductoin"], ["--sequences", "0"], ["--device", "tpu"]):
        with pytest.raises(SystemExit) as stopped:
            main(["monitor", str(run), *arguments])
        assert stopped.value.code == EXIT_USAGE
    told = capsys.readouterr().err
    assert "inductoin" in told and "previous_token" in told


@pytest.mark.parametrize("name", ["icl", "prefix_matching", "previous_token_text"])
def test_the_help_says_what_text_is_read_by_default(name: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["monitor", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    about = told[told.index("for metrics on text:") :].split(" --")[0]
    assert f"(default: {measure(name).text})" in about


def test_other_families_and_numbers_that_are_not_finite(tmp_path: Path, capsys) -> None:
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "checkpoint-10")
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "checkpoint-20")
    folders = [str(tmp_path / f"checkpoint-{step}") for step in (10, 20)]
    arguments = ["monitor", *folders, "--output", str(tmp_path / "out"), *ATTENTION]
    for _ in range(2):  # measured, and taken up from disk
        assert main(arguments) == EXIT_OK
        told = capsys.readouterr().err
        assert "induction" in told and "step 20" in told and "layer 1" in told
        table = table_of(tmp_path / "out")
        values = grid(table, "induction", 20)
        assert np.isnan(values[1]).all() and np.isfinite(values[0]).all()
        assert np.isfinite(grid(table, "induction", 10)).all()
