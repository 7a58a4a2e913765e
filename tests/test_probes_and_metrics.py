"""The induction and previous-token scores, and the alignment of the probe functions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import COPY_VOCABULARY, copying_neox, random_neox

from mda_lightning.attention import capture_attention
from mda_lightning.measures import measure
from mda_lightning.mechanisms import mechanism
from mda_lightning.metrics import InductionScore, PreviousTokenScore, attention_per_sequence
from mda_lightning.probes import random_sequences, repeated_sequences, single_target_sequences

# Id 0 goes in front: the very first position can attend to itself alone, so the token there would
# count as its own predecessor.
IDS, BOS = list(range(1, COPY_VOCABULARY)), 0


def _eager_patterns(model, tokens):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(tokens, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return torch.stack(attentions, dim=1)  # [N, L, heads, T, T]


def test_induction_score_is_the_definition_on_eager_attention() -> None:
    """Mean over i=1..L-1 of attention from query L+i to key i+1 (1-based), then over sequences."""
    model = random_neox(vocab_size=50)
    metric = InductionScore(model, token_ids=range(1, 50), seed=3, n_sequences=20)
    metric.update(model)
    scores = metric.compute()

    per_sequence = []
    probes = metric.probes
    for n in range(20):
        row = probes.tokens[n]
        own = probes.sequence == n
        size = int(own.sum()) + 1
        assert torch.equal(row[:size], row[size : 2 * size])
        assert len(set(row[:size].tolist())) == size
        pattern = _eager_patterns(model, row[None, : 2 * size])[0]
        stripe = [pattern[:, :, size + i - 1, i + 1 - 1] for i in range(1, size)]
        per_sequence.append(torch.stack(stripe).mean(0))
    expected = torch.stack(per_sequence)
    torch.testing.assert_close(scores.mean, expected.mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(scores.se, expected.std(0) / 20**0.5, atol=1e-6, rtol=1e-4)


def test_previous_token_score_is_the_definition_on_eager_attention() -> None:
    model = random_neox(vocab_size=50)
    metric = PreviousTokenScore(model, token_ids=range(1, 50), seed=3, n_sequences=5)
    metric.update(model)
    expected = []
    for n in range(5):
        length = int((metric.probes.sequence == n).sum()) + 1
        pattern = _eager_patterns(model, metric.probes.tokens[n, :length][None])[0]
        expected.append(torch.stack([pattern[:, :, t, t - 1] for t in range(1, length)]).mean(0))
    torch.testing.assert_close(
        metric.compute().mean, torch.stack(expected).mean(0), atol=1e-6, rtol=1e-5
    )


def test_a_hand_built_induction_circuit_scores_one() -> None:
    model = copying_neox()
    induction = mechanism("induction", token_ids=IDS, bos=BOS).scores(model).mean
    previous = (
        mechanism("previous_token", token_ids=IDS, bos=BOS, length=(8, 20)).scores(model).mean
    )
    assert induction[1, 0] > 0.99
    assert previous[0, 0] > 0.99
    others = [induction[0, 0], induction[0, 1], induction[1, 1], previous[1, 0], previous[1, 1]]
    assert all(value < 0.2 for value in others)


@pytest.mark.parametrize("layout", ["repeated", "single_target"])
def test_copy_logprob_reads_the_logits_of_the_position_before(layout: str) -> None:
    """On a model that copies, log p of the right copy is near 0; one position off it is not.

    This is the alignment a published implementation gets wrong.
    """
    model = copying_neox()
    found = mechanism(
        "induction",
        token_ids=IDS,
        bos=BOS,
        probe_function="copy_logprob",
        layout=layout,
        length=(8, 11),
    ).probe(model)
    assert found > -0.05

    probes = repeated_sequences(IDS, seed=1, length=(8, 11), bos=BOS)
    with torch.no_grad():
        logprob = torch.log_softmax(model(probes.tokens).logits, -1)
    off_by_one = logprob[
        probes.sequence, (probes.query + 1) % probes.tokens.shape[1], probes.target
    ]
    assert off_by_one.mean() < -1


def test_copy_logprob_equals_a_plain_loop() -> None:
    model = random_neox(vocab_size=50)
    found = mechanism(
        "induction", token_ids=range(1, 50), probe_function="copy_logprob", n_probe_sequences=7
    ).probe(model)
    probes = repeated_sequences(range(1, 50), seed=1, n_sequences=7)
    means = []
    for n in range(7):
        size = int((probes.sequence == n).sum()) + 1
        row = probes.tokens[n, : 2 * size]
        logprob = torch.log_softmax(model(row[None]).logits[0], -1)
        # Positions L..2L-2 see a token for the second time; the next one is known.
        means.append(
            torch.stack([logprob[t, row[t + 1]] for t in range(size, 2 * size - 1)]).mean()
        )
    torch.testing.assert_close(found, torch.stack(means).mean(), atol=1e-5, rtol=1e-5)


def test_uniform_attention_scores_its_closed_form() -> None:
    model = random_neox(vocab_size=50, std=0.0)
    mech = mechanism("induction", token_ids=range(1, 50))
    scores = mech.scores(model).mean
    torch.testing.assert_close(scores, torch.full_like(scores, mech.chance), atol=1e-6, rtol=1e-5)
    assert mech.chance == pytest.approx(0.052, abs=0.003)


def test_capturing_attention_changes_nothing_else() -> None:
    """Same logits as SDPA up to rounding inside, and the very same bits after."""
    model = random_neox(vocab_size=50)
    probes = random_sequences(range(50), seed=0, n_sequences=4, length=(20, 20))
    with torch.no_grad():
        before = model(probes.tokens).logits
        with capture_attention(model, probes.sequence, probes.query, probes.key):
            inside = model(probes.tokens).logits
        after = model(probes.tokens).logits
    torch.testing.assert_close(inside, before, atol=1e-5, rtol=1e-5)
    assert torch.equal(before, after)
    assert model.config._attn_implementation == "sdpa"


def test_probe_sets_are_pure_functions_of_their_seed() -> None:
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    one, same = (repeated_sequences(range(1, 40), seed=5) for _ in range(2))
    other = repeated_sequences(range(1, 40), seed=6)
    assert torch.equal(one.tokens, same.tokens) and torch.equal(one.weight, same.weight)
    assert one.tokens.shape != other.tokens.shape or not torch.equal(one.tokens, other.tokens)
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002
    assert float(one.weight.sum()) == pytest.approx(1.0, abs=1e-5)


def test_single_target_has_one_determined_copy() -> None:
    probes = single_target_sequences(range(1, 60), seed=0, n_sequences=50)
    for n in range(50):
        row, query, key = probes.tokens[n], int(probes.query[n]), int(probes.key[n])
        assert row[query] == row[key - 1]
        assert row[key] == probes.target[n]
        assert key < query


def test_metric_states_add_up_over_ranks() -> None:
    """Two metrics over half of the sequences each, states summed, equal one over all."""
    model = random_neox(vocab_size=50)
    halves = [InductionScore(model, token_ids=range(1, 50), seed=s, n_sequences=10) for s in (1, 2)]
    both = InductionScore(model, token_ids=range(1, 50), seed=1, n_sequences=10)
    for metric in halves:
        metric.update(model)
    both.update(model)
    both.probes = halves[1].probes
    both.update(model)
    total = sum(metric.total for metric in halves)
    torch.testing.assert_close(both.compute().mean.double(), total / 20, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: repeated_sequences(range(10), seed=0), "10 distinct token ids are too few"),
        (lambda: repeated_sequences(range(50), seed=0, repeats=1), "1 repeats"),
        (lambda: repeated_sequences(range(50), seed=0, length=(5, 3)), "length"),
        (lambda: mechanism("induktion"), "there are: induction, previous_token"),
        (
            lambda: mechanism("induction", seed=4, probe_seed=4),
            "must use different random sequences",
        ),
    ],
)
def test_bad_settings_name_the_value_and_the_way_out(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_attention_that_cannot_be_switched_is_named() -> None:
    class Stubborn(type(random_neox())):
        def set_attn_implementation(self, *_: object, **__: object) -> None:
            """Keeps its own."""

    model = random_neox()
    model.__class__ = Stubborn
    with pytest.raises(ValueError, match=r"cannot be switched to 'mda_capture' \(it stays 'sdpa'"):
        attention_per_sequence(model, repeated_sequences(range(1, 40), seed=0, n_sequences=2))


def test_the_error_of_one_sequence_is_not_known() -> None:
    metric = InductionScore(random_neox(vocab_size=60), n_sequences=1)
    metric.update(random_neox(vocab_size=60))
    scores = metric.compute()
    assert scores.mean.isfinite().all() and scores.se.isnan().all()


@pytest.mark.parametrize("name", ["induction", "previous_token"])
def test_chance_is_that_of_the_sequences_measured(name: str) -> None:
    """Uniform attention over the very probe set, once there is a model to draw it for."""
    model = random_neox(vocab_size=700)
    with torch.no_grad():
        for layer in model.gpt_neox.layers:  # queries of zero attend alike to all
            layer.attention.query_key_value.weight.zero_()
            layer.attention.query_key_value.bias.zero_()
    mech = mechanism(name)
    mech.check(model)
    found = mech.scores(model).mean
    torch.testing.assert_close(found, torch.full_like(found, mech.chance), atol=1e-6, rtol=1e-5)


def test_a_model_that_returns_tuples_is_read_alike() -> None:
    model = random_neox()
    mech = mechanism("induction", probe_function="copy_logprob", token_ids=range(1, 40))
    before = mech.probe(model).detach()
    model.config.return_dict = False
    assert torch.equal(mech.probe(model).detach(), before)


def test_settings_that_are_replaced_draw_other_sequences() -> None:
    model = random_neox(vocab_size=60)
    few = mechanism("previous_token", n_sequences=3, token_ids=np.arange(1, 60))
    many = replace(few, n_sequences=40)
    single = mechanism("previous_token", n_sequences=40, token_ids=list(range(1, 60)))
    few.scores(model)
    assert torch.equal(many.scores(model).mean, single.scores(model).mean)
    assert many.settings()["token_ids"] == {"first": 1, "last": 59}


def test_models_of_one_size_with_other_special_ids_do_not_share_sequences() -> None:
    mech, one, other = mechanism("induction"), random_neox(), random_neox()
    other.config.eos_token_id = [7, 9, 11]
    shared = mech.scores(one), mech.scores(other)
    alone = mechanism("induction").scores(other)
    assert torch.equal(shared[1].mean, alone.mean)
    assert not torch.equal(shared[0].mean, alone.mean)


@pytest.mark.parametrize("ids", [range(2, 512), range(-30, 30)])
@pytest.mark.parametrize("name", ["induction", "previous_token", "ablation", "copying"])
def test_ids_that_the_model_lacks_are_refused_before_it_is_run(name: str, ids: range) -> None:
    model = random_neox()
    measured = measure(name, token_ids=ids)
    with pytest.raises(
        ValueError, match=r"token id -?\d+ is not in the model's vocabulary 0\.\.39"
    ):
        measured.check(model)
    with pytest.raises(ValueError, match="is not in the model's vocabulary"):
        measured.measure(model)


def test_both_probe_sets_are_checked_before_training() -> None:
    """f's sequences may be longer than μ's: Eq. 18's layout is twice as long."""
    model = random_neox(vocab_size=40)
    too_few = mechanism("induction", layout="single_target", token_ids=range(1, 30))
    with pytest.raises(ValueError, match="29 distinct token ids are too few"):
        too_few.check(model)
