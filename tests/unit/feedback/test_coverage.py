"""Coverage of requests by training prompts, with gaps that were planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlhf_fast.data.records import PromptRecord
from rlhf_fast.feedback.coverage import coverage, embeddings, k_means, near_duplicates, nearest_rows, prepared
from rlhf_fast.models import hidden_states

TOPICS = np.random.default_rng(0).normal(size=(6, 32))


def about(topics: list[int], seed: int, each: int = 30) -> tuple[np.ndarray, list[str]]:
    """Raw embeddings of texts about some topics, with what all texts have in common, and the topics' names."""
    names = np.repeat(topics, each)
    common = 20 * np.ones(32)
    rows = TOPICS[names] + common + 0.3 * np.random.default_rng(seed).normal(size=(len(names), 32))
    return rows, [f"topic {i}" for i in names]


def test_requests_that_nothing_covers_are_found_and_stand_for_what_to_collect() -> None:
    raw, have = about([0, 1, 2, 3], seed=1)
    asked, want = about([0, 1, 2, 3, 4, 5], seed=2)
    prompts, requests = prepared(raw, asked)
    found = coverage(prompts, requests, have, want, clusters=6)
    planted = [i for i, name in enumerate(want) if name in ("topic 4", "topic 5")]
    assert set(found.uncovered[: len(planted)]) == set(planted)
    assert len(found.uncovered) <= len(planted) + 0.25 * 120 and found.share_expected <= 0.11
    assert {want[each.request] for each in found.collect[:2]} == {"topic 4", "topic 5"}
    assert all(each.uncovered == 30 and len(each.like) == 5 for each in found.collect[:2])
    rows = {row.name: row for row in found.categories}
    assert rows["topic 4"].missing and rows["topic 5"].missing and not rows["topic 0"].missing
    assert rows["topic 0"].prompts == 0.25 and not rows["topic 0"].thin
    assert rows["adversarial"].requests == 0 and not rows["adversarial"].thin  # nobody asks for it
    assert sum(row.thin for row in found.clusters) == 2


def test_prompts_like_the_requests_leave_no_more_uncovered_than_chance() -> None:
    (first, _), (second, _) = about([0, 1, 2], seed=1, each=60), about([0, 1, 2], seed=2, each=60)
    found = coverage(*prepared(first, second))
    assert found.share_uncovered <= 2 * found.share_expected + 0.05
    assert not any(row.thin for row in found.clusters[:3]) and found.categories == []


def test_a_thin_category_is_named() -> None:
    raw, _ = about([0], seed=1, each=40)
    prompts, requests = prepared(raw, about([0], seed=2, each=40)[0])
    have = ["simple"] * 38 + ["complex"] * 2
    found = coverage(prompts, requests, have, ["simple"] * 20 + ["complex"] * 20)
    rows = {row.name: row for row in found.categories}
    assert list(rows) == ["simple", "complex", "adversarial", "off_topic"]
    assert rows["complex"].thin and not rows["complex"].missing and not rows["simple"].thin
    assert (rows["complex"].prompts, rows["complex"].requests) == (0.05, 0.5)


def test_what_all_embeddings_share_is_taken_off() -> None:
    raw, _ = about([0, 1], seed=1)
    (rows,) = prepared(raw)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1)
    assert ((raw[:30] / np.linalg.norm(raw[:30], axis=1)[:, None]) @ (raw[40] / np.linalg.norm(raw[40]))).min() > 0.9
    assert abs((rows[:30] @ rows[30:].T).mean()) < 0.5
    parts = prepared(raw[:10], raw[10:])
    assert np.concatenate(parts) == pytest.approx(rows)


def test_clusters_are_those_that_were_planted_and_the_same_again() -> None:
    raw, names = about([0, 1, 2, 3], seed=3)
    (rows,) = prepared(raw)
    centres, cluster = k_means(rows, 4, seed=1)
    assert centres.shape == (4, 32) and len({(a, b) for a, b in zip(names, cluster.tolist(), strict=True)}) == 4
    assert (k_means(rows, 4, seed=1)[1] == cluster).all()
    assert len(k_means(np.tile(rows[:1], (9, 1)), 4)[0]) == 1  # fewer distinct rows than clusters


def test_nearest_rows_in_parts_are_those_of_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    (rows,) = prepared(about([0, 1], seed=4)[0])
    whole = nearest_rows(rows, rows, but_itself=True)
    monkeypatch.setattr("rlhf_fast.feedback.coverage.ROWS", 7)
    parts = nearest_rows(rows, rows, but_itself=True)
    assert (whole[0] == parts[0]).all() and whole[1] == pytest.approx(parts[1])
    assert (whole[0] != np.arange(60)).all()


def test_near_duplicates_by_their_words() -> None:
    words = "how much would a simple five page website cost for my small bakery in leeds by next week please".split()
    text = " ".join(words)
    texts = [text, text.upper() + "!", text.replace("leeds", "york"), "Do you also do social media?", text]
    found = near_duplicates(texts, least=0.6)
    assert [(i, j) for i, j, _ in found] == [(0, 1), (0, 2), (0, 4), (1, 2), (1, 4), (2, 4)]
    same = {(i, j): share for i, j, share in found}
    assert same[0, 1] == same[0, 4] == 1
    assert same[0, 2] == pytest.approx(14 / 20, abs=0.12)  # 17 runs each, 14 shared
    assert near_duplicates(["", "yes"]) == []


def test_the_share_of_equal_hashes_is_the_share_of_equal_runs() -> None:
    """Over 60 pairs of texts, with a mean error that 128 hashes have: about 0.04, and no lean."""
    rng = np.random.default_rng(5)
    errors = []
    for _ in range(60):
        many = [f"w{i}" for i in rng.integers(0, 10**6, 60)]
        other = many[:45] + [f"v{i}" for i in rng.integers(0, 10**6, 15)]
        runs = [{tuple(t[i : i + 3]) for i in range(58)} for t in (many, other)]
        (pair,) = near_duplicates([" ".join(many), " ".join(other)], least=0.3)
        errors.append(pair[2] - len(runs[0] & runs[1]) / len(runs[0] | runs[1]))
    assert abs(np.mean(errors)) < 0.02 and np.abs(errors).mean() < 0.06


def test_duplicates_between_two_sets_are_of_both() -> None:
    one = "please move our weekly call to thursday at noon and tell the others"
    found = near_duplicates(["something else altogether, with no like", one, one], [one, "no"])
    assert found == [(1, 0, 1.0), (2, 0, 1.0)]


def test_embeddings_are_the_mean_of_the_states_of_what_the_user_wrote(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    texts = ["Hello", "A much longer request than the first one, by far.", "x"]
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": texts[1]}]
    rows = [PromptRecord(texts[0]), PromptRecord(chat), PromptRecord(texts[2])]
    found = embeddings(model, tokenizer, rows)
    assert found.shape == (3, model.config.hidden_size) and found.dtype == np.float32
    for row, text in zip(found, texts, strict=True):
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            assert row == pytest.approx(hidden_states(model, ids)[0].mean(0).numpy(), abs=1e-5)
    short = embeddings(model, tokenizer, rows, max_length=5)
    assert short[0] == pytest.approx(found[0], abs=1e-5) and np.abs(short[1] - found[1]).max() > 1e-3
    apart = embeddings(model, tokenizer, rows, max_tokens=64)
    assert apart == pytest.approx(found, abs=1e-5)
    with pytest.raises(ValueError, match=r"requests.jsonl line 3: its user's text has no token"):
        embeddings(model, tokenizer, [PromptRecord("", name="requests.jsonl line 3")])


def test_what_cannot_be_right_is_refused() -> None:
    prompts, requests = prepared(about([0], seed=1)[0], about([1], seed=2)[0])
    with pytest.raises(ValueError, match=r"embeddings: \(30, 32\) and \(30, 31\) came; expected \(P, H\) and \(R, H\)"):
        coverage(prompts, requests[:, 1:])
    with pytest.raises(ValueError, match="30 prompts and 2 requests came; expected at least 1 and 3"):
        coverage(prompts, requests[:2])
    with pytest.raises(ValueError, match="requests: rows whose length is not 1 came; bring both through `prepared`"):
        coverage(prompts, 2 * requests)
    with pytest.raises(ValueError, match="prompt_categories: 1 came; expected one for each of 30, or none"):
        coverage(prompts, requests, ["simple"])
    with pytest.raises(ValueError, match="embeddings: some are not finite"):
        prepared(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="least: 70 came; expected a share above 0, at most 1"):
        near_duplicates(["a"], least=70)
