"""What training may count on: the split, the order, the shards, the position, the baselines."""

import dataclasses
import json
import math
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_diabetes, load_digits

from training import datasets
from training.data import eval_batches, first_batch, train_iterator
from training.datasets import Dataset, Rows, create, text
from training.datasets.text import Windows, split_text
from training.runtime.errors import Refused

BASE = {
    "text": {
        "path": None,
        "length": 64,
        "batch": 8,
        "val_fraction": 0.1,
        "seed": 0,
    },
    "digits": {"batch": 32, "val_fraction": 0.1, "seed": 0},
    "diabetes": {"batch": 16, "val_fraction": 0.1, "seed": 0},
}


def load(name="text", **changes):
    return datasets.load(create({"name": name, **BASE[name], **changes}))


def numbered(train=50, validation=23, **changes):
    """A dataset whose targets are the numbers of its examples."""

    def rows(n):
        inputs = np.arange(n, dtype=np.float32)[:, None]
        return Rows({"inputs": inputs, "targets": np.arange(n, dtype=np.int32)})

    options = create({"name": "digits", **BASE["digits"], **changes})
    return Dataset(options, rows(train), rows(validation), "", digest="numbered")


def weighed(dataset, *args, **kwargs):
    """The evaluation batches, each with its weights as one more entry."""
    for batch, weight in eval_batches(dataset, *args, **kwargs):
        yield {**batch, "weight": weight}


def in_one_order(dataset):
    """The same split, read in the order of seed 0."""
    return dataclasses.replace(dataset, options=dataclasses.replace(dataset.options, seed=0))


def joined(batches, key="targets"):
    return np.concatenate([batch[key] for batch in batches])


def bits(batches):
    return [{key: (v.dtype, v.shape, v.tobytes()) for key, v in b.items()} for b in batches]


def positions(windows):
    """Every window of a stream whose values are their own positions, (windows, length + 1)."""
    batch = windows.take(np.arange(len(windows)))
    return np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)


# --- the split of a text


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(0, 20_000),
    length=st.integers(1, 300),
    fraction=st.floats(0.001, 0.999),
    seed=st.integers(0, 2**40),
    stride=st.integers(1, 300),
)
def test_no_validation_window_shares_a_byte_with_a_training_window(
    size, length, fraction, seed, stride
):
    if size < 2 * (4 * length + 1):
        with pytest.raises(Refused, match=f"{length}, too long for a text of {size} bytes"):
            split_text(size, length, fraction, seed)
        return
    train, validation = split_text(size, length, fraction, seed)

    both = np.concatenate([train, validation])
    both = both[np.argsort(both[:, 0])]
    assert both[0, 0] == 0
    assert both[-1, 1] == size
    assert (both[1:, 0] == both[:-1, 1]).all()

    stream = np.arange(size)
    seen = positions(Windows(stream, train, length, stride))
    held_out = positions(Windows(stream, validation, length, length))
    assert len(seen)
    assert len(held_out)
    assert (np.diff(seen) == 1).all()
    assert (np.diff(held_out) == 1).all()
    assert not np.intersect1d(seen, held_out).size
    targets = held_out[:, 1:].ravel()
    assert len(np.unique(targets)) == len(targets)


def test_the_windows_of_a_run_are_all_those_that_fit():
    windows = Windows(np.arange(100), np.array([[3, 20], [30, 33], [50, 61]]), length=5, stride=5)

    assert positions(windows)[:, 0].tolist() == [3, 8, 13, 50, 55]


def test_another_seed_holds_out_another_part_and_the_same_seed_the_same():
    _, first = split_text(100_000, 64, 0.1, seed=1)
    _, again = split_text(100_000, 64, 0.1, seed=1)
    _, other = split_text(100_000, 64, 0.1, seed=2)

    assert first.tolist() == again.tolist() != other.tolist()
    assert np.diff(first).sum() == pytest.approx(10_000, abs=500)


@pytest.mark.parametrize("name", BASE)
def test_each_set_is_held_out_by_seed(name):
    first, again, other = (
        # read in the order of one seed, so that only the split can differ
        bits(weighed(in_one_order(load(name, seed=seed))))
        for seed in (1, 1, 2)
    )

    assert first == again != other


def test_an_epoch_of_text_reads_each_byte_as_target_at_eight_positions():
    dataset = load(length=64)

    stream = np.arange(len(dataset.train.data))
    windows = Windows(stream, dataset.train.runs, 64, dataset.train.stride)
    times = np.bincount(positions(windows)[:, 1:].ravel())
    assert np.median(times[times > 0]) == 8


# --- text from files


def test_inputs_are_the_bytes_of_the_text_and_targets_the_bytes_that_follow(tmp_path):
    content = bytes(np.random.default_rng(0).integers(1, 256, 5000, dtype=np.uint8))
    (tmp_path / "a.txt").write_bytes(content)
    dataset = load(path=str(tmp_path / "a.txt"), length=32)

    for batch in [first_batch(dataset), *weighed(dataset)]:
        assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
        assert batch["inputs"].shape == batch["targets"].shape
        assert batch["inputs"].shape[1:] == (32,)
        for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
            window = bytes(inputs.astype(np.uint8)) + bytes([targets[-1]])
            assert window in content
            assert window[1:] == bytes(targets.astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_bytes(b"2" * 400)
    (tmp_path / "a.txt").write_bytes(b"1" * 400)
    (tmp_path / "c.txt").write_bytes(b"3" * 400)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"\0secret")
    return tmp_path


def test_a_folder_is_read_in_sorted_order_and_says_which_files_it_took(folder):
    dataset = load(path=str(folder), length=16)

    assert bytes(dataset.train.data) == b"1" * 400 + b"\n" + b"2" * 400 + b"\n" + b"3" * 400 + b"\n"
    assert "4 files: a.txt, b/two.md, c.txt, empty.txt; 1 hidden left out" in dataset.description


def test_a_glob_takes_what_matches_at_any_depth(folder):
    dataset = load(path=str(folder / "**" / "*.md"), length=16)

    assert bytes(dataset.train.data) == b"2" * 400
    assert "two.md" in dataset.description


def test_a_long_list_of_files_is_counted_not_spelled_out(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_bytes(b"words " * 100)

    assert "(30 files: 00.txt, " in load(path=str(tmp_path)).description
    assert "07.txt and 22 more)" in load(path=str(tmp_path)).description


def test_every_binary_file_is_named_in_one_message(folder):
    (folder / "x.png").write_bytes(b"PNG\0")
    (folder / "y.bin").write_bytes(b"\0")

    with pytest.raises(Refused, match=r"(?s)x\.png looks binary .*byte at 3.*y\.bin looks binary"):
        load(path=str(folder))


def test_a_path_that_yields_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "none").mkdir()

    with pytest.raises(Refused, match=r"its 1 file\(s\) are empty"):
        load(path=str(tmp_path / "empty.txt"))
    with pytest.raises(Refused, match=r"absent\.txt', which matches nothing"):
        load(path=str(tmp_path / "absent.txt"))
    with pytest.raises(Refused, match=r"\*\.rst', which matches nothing"):
        load(path=str(tmp_path / "*.rst"))
    with pytest.raises(Refused, match="a folder without files that are not hidden"):
        load(path=str(tmp_path / "none"))


def test_the_default_text_is_the_language_reference_with_each_paragraph_once():
    dataset = load()

    paragraphs = bytes(dataset.train.data).decode().split("\n\n")
    assert len(paragraphs) == len(set(paragraphs)) > 1000
    assert 'The "assert" statement' in paragraphs[0]
    assert dataset.digest == load().digest


# --- the bundled sets


def test_digits_are_split_without_loss_and_in_the_same_proportions():
    dataset = load("digits")
    everything = load_digits()

    inputs, targets = (
        np.concatenate([dataset.train.arrays[name], dataset.validation.arrays[name]])
        for name in ("inputs", "targets")
    )
    assert inputs.shape == (1797, 8, 8, 1)
    assert inputs.dtype == np.float32
    assert targets.shape == (1797,)
    assert targets.dtype == np.int32
    assert inputs.min() == 0
    assert inputs.max() == 1
    assert Counter(
        (x.tobytes(), int(y)) for x, y in zip(inputs * 16, targets, strict=True)
    ) == Counter(
        (x.astype(np.float32).tobytes(), int(y))
        for x, y in zip(everything.images, everything.target, strict=True)
    )
    whole, held_out = np.bincount(targets), np.bincount(dataset.validation.arrays["targets"])
    assert held_out.tolist() == [round(count / 10) for count in whole]


def test_the_majority_baseline_is_the_accuracy_of_the_commonest_training_digit():
    dataset = load("digits", val_fraction=0.3, seed=4)

    commonest, _ = Counter(dataset.train.arrays["targets"].tolist()).most_common(1)[0]
    hits = sum(y == commonest for y in dataset.validation.arrays["targets"].tolist())
    assert dataset.baselines == {"majority": hits / len(dataset.validation)}


def test_diabetes_is_standardised_with_training_statistics_alone():
    dataset = load("diabetes", val_fraction=0.25)
    raw = load_diabetes(scaled=False)

    train, validation = dataset.train, dataset.validation
    assert train.arrays["inputs"].shape[1:] == (10,)
    assert train.arrays["targets"].shape[1:] == (1,)
    assert train.arrays["inputs"].dtype == train.arrays["targets"].dtype == np.float32
    assert len(train) + len(validation) == len(raw.data)
    assert len(validation) == 110
    assert np.allclose(train.arrays["inputs"].mean(axis=0), 0, atol=1e-5)
    assert np.allclose(train.arrays["inputs"].std(axis=0), 1, atol=1e-5)
    assert not np.allclose(validation.arrays["inputs"].std(axis=0), 1, atol=1e-3)
    targets = np.sort(
        np.concatenate([train.arrays["targets"], validation.arrays["targets"]]).ravel()
    )
    std, mean = np.polyfit(targets, np.sort(raw.target), 1)
    assert np.allclose(targets * std + mean, np.sort(raw.target), atol=1e-3)


def test_the_mean_baseline_is_the_error_of_predicting_the_training_mean():
    dataset = load("diabetes")

    guess = dataset.train.arrays["targets"].astype(float).mean()
    error = np.mean((dataset.validation.arrays["targets"] - guess) ** 2)
    assert dataset.baselines == {"mean": pytest.approx(error)}


# --- the bigram baseline


def plain_bigram(train_runs, scored_pairs):
    """The formula of the docstring, a byte at a time."""
    pair, single, after = Counter(), Counter(), defaultdict(set)
    for run in train_runs:
        for a, b in pairwise(run):
            pair[a, b] += 1
            single[b] += 1
            after[a].add(b)
    seen = Counter()
    for (a, _), n in pair.items():
        seen[a] += n
    total = 0.0
    for a, b in scored_pairs:
        unigram = (single[b] + 1) / (sum(single.values()) + 256)
        kinds = len(after[a]) or 1
        total -= math.log((pair[a, b] + kinds * unigram) / (seen[a] + kinds))
    return total / len(scored_pairs)


@pytest.mark.parametrize("seed", range(3))
def test_the_bigram_baseline_scores_exactly_the_targets_that_evaluation_scores(tmp_path, seed):
    rng = np.random.default_rng(seed)
    content = bytes(
        rng.choice(rng.integers(1, 256, 40), 3000, p=rng.dirichlet(np.ones(40))).tolist()
    )
    content += bytes([255 - seed]) * 3  # rare: after it, validation may ask for what was never seen
    (tmp_path / "t").write_bytes(content)
    dataset = load(path=str(tmp_path / "t"), length=10, batch=7, seed=seed)

    pairs = [
        pair
        for batch in weighed(dataset)
        for weight, x, y in zip(batch["weight"], batch["inputs"], batch["targets"], strict=True)
        if weight
        for pair in zip(x.tolist(), y.tolist(), strict=True)
    ]
    runs = [content[start:stop] for start, stop in dataset.train.runs]
    assert dataset.baselines["bigram"] == pytest.approx(plain_bigram(runs, pairs), rel=1e-12)
    assert dataset.baselines["uniform"] == math.log(256)


def test_the_bigram_baseline_knows_bytes_with_one_follower_and_bytes_never_seen():
    content = b"ab" * 50 + b"abcacb" * 10
    data = np.frombuffer(content, np.uint8)
    train = Windows(data, np.array([[0, 100]]), length=4, stride=1)
    validation = Windows(data, np.array([[100, 160]]), length=59, stride=59)

    expected = plain_bigram([content[:100]], list(pairwise(content[100:])))
    assert text.bigram_nats(train, validation) == pytest.approx(expected, rel=1e-12)


def test_counting_in_pieces_changes_no_bit_of_the_baseline(monkeypatch):
    whole = load().baselines["bigram"]
    monkeypatch.setattr(text, "CHUNK", 1000)

    assert load().baselines["bigram"] == whole < math.log(256)


# --- order, shards, position


@given(
    examples=st.integers(1, 60),
    batch=st.integers(1, 60),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=50, deadline=None)
def test_each_epoch_is_a_new_order_of_all_examples(examples, batch, seed):
    batch = min(batch, examples)
    iterator = train_iterator(numbered(examples, batch=batch, seed=seed))
    rows = joined(islice(iterator, -(-3 * examples // batch)))
    iterator.close()

    epochs = rows[: 3 * examples].reshape(3, examples)
    assert (np.sort(epochs) == np.arange(examples)).all()
    if examples > 20:
        assert len({epoch.tobytes() for epoch in epochs}) == 3


def test_the_order_depends_on_the_seed():
    one, two, again = (joined(islice(train_iterator(numbered(seed=s)), 3)) for s in (0, 1, 0))

    assert (one == again).all()
    assert (one != two).any()


@pytest.mark.parametrize("name", BASE)
@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_read_the_batches_of_one_process(name, count):
    dataset = load(name)

    for read in (lambda *p: islice(train_iterator(dataset, *p), 60), eval_part(dataset)):
        whole = list(read(0, 1))
        parts = zip(*(read(p, count) for p in range(count)), strict=True)
        together = [{k: np.concatenate([p[k] for p in part]) for k in part[0]} for part in parts]
        assert bits(together) == bits(whole)


def eval_part(dataset):
    return lambda *process: weighed(dataset, None, *process)


@pytest.mark.parametrize("name", BASE)
@pytest.mark.parametrize("k", [0, 1, 57])
def test_a_position_saved_after_k_batches_resumes_with_the_next_one_bit_for_bit(name, k):
    uninterrupted = train_iterator(load(name))
    for _ in range(k):
        next(uninterrupted)
    position = json.loads(json.dumps(uninterrupted.get_state()))

    resumed = train_iterator(load(name))
    next(resumed)
    resumed.set_state(position)
    assert resumed.get_state() == position
    assert bits(islice(resumed, 40)) == bits(islice(uninterrupted, 40))
    assert resumed.get_state() == uninterrupted.get_state() != position


def test_reading_ahead_does_not_move_the_position():
    iterator = train_iterator(numbered())

    for k in range(1, 20):
        next(iterator)
        assert iterator.get_state()["batches"] == k


def test_a_position_in_other_data_is_refused_with_every_difference(tmp_path):
    text = tmp_path / "t"
    text.write_bytes(b"some words " * 500)
    position = train_iterator(load(path=str(text))).get_state()

    text.write_bytes(b"same lines " * 500)
    changed = load(path=str(text), batch=4, seed=9)
    with pytest.raises(Refused) as error:
        train_iterator(changed).set_state(position)
    message = str(error.value)
    assert message.count(": was ") == 3
    for part in ("digest: was", "batch: was 8, is 4", "seed: was 0, is 9", "begin another run"):
        assert part in message

    with pytest.raises(Refused, match="this one has next_index"):
        train_iterator(changed).set_state({"next_index": 3})


def test_a_position_does_not_depend_on_where_the_file_lies(tmp_path):
    states = []
    for name in ("here", "there"):
        (tmp_path / name).write_bytes(b"some words " * 500)
        states.append(train_iterator(load(path=str(tmp_path / name))).get_state())

    assert states[0] == states[1]


# --- evaluation


@given(validation=st.integers(1, 40), batch=st.integers(1, 30), seed=st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_evaluation_weighs_every_validation_example_once(validation, batch, seed):
    dataset = numbered(validation=validation, batch=batch, seed=seed)
    batches = list(weighed(dataset))

    weight = joined(batches, "weight")
    assert weight.dtype == np.float32
    assert {len(b["targets"]) for b in batches} == {batch}
    assert len(batches) == -(-validation // batch)
    assert sorted(joined(batches)[weight == 1]) == list(range(validation))
    assert weight.sum() == validation
    assert bits(batches) == bits(weighed(dataset))
    assert bits(weighed(dataset, limit=2)) == bits(batches[:2])


# --- refusals


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(Refused, match="500, more than the 398 training examples of diabetes"):
        load("diabetes", batch=500)


def test_rows_that_processes_cannot_share_are_refused_for_both_splits():
    for read in (train_iterator, weighed):
        with pytest.raises(Refused, match=r"10 rows .*, which 4 processes cannot share"):
            next(iter(read(numbered(batch=10), process_count=4)))


def test_a_split_that_starves_a_class_or_the_statistics_is_refused():
    with pytest.raises(Refused, match="of digit 0, 0 would be validation, and both sides need"):
        load("digits", val_fraction=0.001)
    with pytest.raises(Refused, match="no spread to standardise by"):
        load("diabetes", val_fraction=0.999, batch=1)


def test_any_seed_of_the_config_splits_every_set():
    for name in BASE:
        assert len(load(name, seed=2**63).validation)


# --- start-up


def test_text_is_loaded_without_scikit_learn_and_described_without_jax():
    code = """if True:
        import sys
        from training.datasets import create, load
        options = {"path": None, "length": 64, "batch": 8, "val_fraction": 0.1, "seed": 0}
        load(create({"name": "text", **options}))
        heavy = {"sklearn", "jax", "grain", "scipy"} & set(sys.modules)
        sys.exit(f"imported: {heavy}" if heavy else 0)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
