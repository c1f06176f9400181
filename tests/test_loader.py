"""loader.py: every document as often as the epoch has it, in full rows, from any state on."""

import copy
import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from loader import Loader, draw, prefetch
from model import IGNORE

FILES = [  # documents, of which an epoch draws, repeat
    dict(n=1500, per_epoch=400, repeat=1),
    dict(n=500, per_epoch=500, repeat=1),
    dict(n=20, per_epoch=60, repeat=3),
]


def write(directory, lengths, files):
    """A dataset whose document d is d % 60000 over and over, half of it prefix."""
    directory.mkdir()
    tokens = np.repeat(np.arange(len(lengths)) % 60000, lengths).astype(np.uint16)
    tokens.tofile(directory / "train.bin")
    np.stack([np.cumsum(lengths), lengths // 2], axis=1).astype(np.int64).tofile(directory / "train.idx")
    meta = {"dtype": "uint16", "splits": {"train": {"documents": len(lengths)}}, "files": []}
    for file in files:
        counts = {"documents": file["n"], "per_epoch": file["per_epoch"]}
        meta["files"].append({"repeat": file["repeat"], "train": counts})
    (directory / "meta.json").write_text(json.dumps(meta))
    return directory


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """2,020 documents of three files, with lengths spread like GSM8K's."""
    lengths = np.random.default_rng(0).lognormal(4, 0.4, 2020).astype(int) + 8
    return write(tmp_path_factory.mktemp("mixed") / "d", lengths, FILES)


def take(loader, n=None):
    return [batch.documents for batch in islice(loader, n)]


@pytest.mark.parametrize("rows, T", [(1, 512), (8, 256), (3, 1024)])
def test_an_epoch_has_every_document_as_often_as_it_draws_it(mixed, rows, T):
    seen = Counter(d for documents in take(Loader(mixed, "train", rows, T, epochs=1)) for d in documents)
    assert seen == Counter(Loader(mixed, "train", rows, T).order.tolist())
    assert set(seen.values()) == {1, 3} and sum(d < 1500 for d in seen) == 400
    assert [seen[d] for d in range(1500, 2020)] == [1] * 500 + [3] * 20


def test_three_epochs_use_up_a_file_before_anything_comes_again(mixed):
    seen = Counter(d for documents in take(Loader(mixed, "train", 4, 512, epochs=3)) for d in documents)
    assert max(seen[d] for d in range(1500)) == 1 and sum(seen[d] for d in range(1500)) == 1200
    assert {seen[d] for d in range(1500, 2000)} == {3} and {seen[d] for d in range(2000, 2020)} == {9}


@pytest.mark.parametrize("size, n", [(10, 3), (10, 10), (10, 25), (7, 20), (1, 1)])
def test_a_draw_never_lets_one_document_lag_behind_by_two(size, n):
    documents = np.arange(100, 100 + size, dtype=np.uint32)
    seen = Counter(dict.fromkeys(documents.tolist(), 0))
    for epoch in range(8):
        drawn = draw(documents, n, epoch, (5, 0)).tolist()
        assert len(drawn) == n
        seen.update(drawn)
        assert max(seen.values()) - min(seen.values()) <= 1


def test_rows_are_full_and_hold_whole_documents(tmp_path):
    lengths = np.random.default_rng(0).lognormal(5, 0.4, 8000).astype(int) + 8
    directory = write(tmp_path / "d", lengths, [dict(n=8000, per_epoch=8000, repeat=1)])
    loader = Loader(directory, "train", 8, 4096)
    n_tokens = 0
    for batch in islice(loader, 20):
        n_tokens += batch.n_tokens
        assert batch.n_tokens == (batch.doc >= 0).sum() == sum(lengths[batch.documents] - 1)
        assert batch.n_targets == (batch.targets != IGNORE).sum()
    assert n_tokens / (20 * 8 * 4096) >= 0.995


def test_a_row_is_its_documents_one_after_the_other(tmp_path):
    directory = write(tmp_path / "d", np.array([5, 5]), [dict(n=2, per_epoch=2, repeat=1)])
    batch = next(Loader(directory, "train", 1, 10, epochs=1))
    a, b = batch.documents
    assert batch.idx[0].tolist() == [a] * 4 + [b] * 4 + [0, 0]
    assert batch.doc[0].tolist() == [0] * 4 + [1] * 4 + [-1, -1]
    assert batch.prefix[0].tolist() == [True, True, False, False] * 2 + [False, False]
    wanted = [IGNORE, a, a, a, IGNORE, b, b, b, IGNORE, IGNORE]
    assert batch.targets[0].tolist() == wanted and batch.n_targets == 6
    batch = next(Loader(directory, "train", 1, 10, epochs=1, loss_on="all"))
    assert batch.targets[0].tolist() == [a] * 4 + [b] * 4 + [IGNORE] * 2 and batch.n_targets == 8


def test_ranks_share_the_rows_of_one_plan(mixed):
    alone = list(islice(Loader(mixed, "train", 6, 256), 9))
    for world_size in 2, 3:
        loaders = [Loader(mixed, "train", 6, 256, rank=r, world_size=world_size) for r in range(world_size)]
        for whole in alone:
            for r, part in enumerate(map(next, loaders)):
                assert (part.documents, part.state) == (whole.documents, whole.state)
                assert (part.idx == whole.idx[r::world_size]).all()


@pytest.mark.parametrize("n", [1, 7, 40])
def test_a_loader_goes_on_from_a_state_of_json(mixed, n):
    """Also past the end of an epoch, which has about 25 steps."""
    loader = Loader(mixed, "train", 4, 512)
    batch = list(islice(loader, n))[-1]
    state = json.loads(json.dumps(batch.state))
    assert len(state["waiting"]) <= 128
    again = Loader(mixed, "train", 4, 512, state=state)
    aside = copy.copy(loader)
    assert take(again, 30) == take(loader, 30) == take(aside, 30)


def test_the_state_of_other_data_is_refused(mixed, tmp_path):
    state = next(Loader(mixed, "train", 4, 512)).state
    other = write(tmp_path / "d", np.full(30, 9), [dict(n=30, per_epoch=30, repeat=1)])
    with pytest.raises(SystemExit, match="is not the data that the run had"):
        Loader(other, "train", 4, 512, state=state)


def test_seeds_and_epochs_have_orders_of_their_own(mixed):
    loader = Loader(mixed, "train", 4, 512, seed=1)
    orders = [loader.permutation(0), loader.permutation(1), Loader(mixed, "train", 4, 512, seed=2).order]
    assert len({order.tobytes() for order in orders}) == 3


def test_documents_that_no_row_can_hold_are_left_out_and_counted(mixed):
    loader = Loader(mixed, "train", 4, 60, epochs=1)
    seen = {d for documents in take(loader) for d in documents}
    assert loader.left_out == (loader.lengths > 60).sum() > 100
    assert max(loader.lengths[list(seen)]) <= 60
    with pytest.raises(SystemExit, match="no document of train fits into block_size = 5"):
        Loader(mixed, "train", 4, 5)


def test_a_mixture_is_reweighed_in_meta_json(mixed, tmp_path):
    meta = json.loads((mixed / "meta.json").read_text())
    meta["files"][0]["train"]["per_epoch"] = 10
    for name in "train.bin", "train.idx":
        (tmp_path / name).symlink_to(mixed / name)
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert Loader(tmp_path, "train", 4, 512).n_documents == 570


def test_prefetched_batches_are_the_same_and_an_error_comes_in_its_turn(mixed):
    loader = Loader(mixed, "train", 4, 512, epochs=1)
    assert [b.documents for b in prefetch(loader)] == take(Loader(mixed, "train", 4, 512, epochs=1))

    def broken():
        yield from take(Loader(mixed, "train", 4, 512), 2)
        raise OSError("the disk is gone")

    batches = prefetch(broken())
    assert [len(next(batches)) > 0 for _ in range(2)] == [True, True]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_a_missing_dataset_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="python data.py --dataset=... --source=... makes it"):
        Loader(tmp_path / "none", "train", 1, 64)
