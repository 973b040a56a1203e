"""Cached targets: what is read is what the teacher expects; a cache is continued, repaired, and never another's."""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hfkit.artifacts import manifest
from hfkit.data.rows.packing import IGNORED
from hfkit.distillation import cache, losses, sparse
from hfkit.distillation.cache import RowsWithTargets, write_targets
from hfkit.distillation.settings import Targets
from hfkit.errors import HfkitError
from tests.test_packing import packed

LENGTH, VOCABULARY, ROWS_A_SHARD = 12, 40, 4
Batch = dict[str, torch.Tensor]


class Rows(Dataset):
    """Rows of random tokens, a third of which is not learned; nothing is learned in the rows of the second shard."""

    def __init__(self, count: int = 18, vocabulary: int = VOCABULARY):
        self.ids = torch.randint(vocabulary, (count, LENGTH), generator=torch.Generator().manual_seed(1))
        ignored = torch.rand(count, LENGTH, generator=torch.Generator().manual_seed(2)) < 1 / 3
        ignored[ROWS_A_SHARD : 2 * ROWS_A_SHARD] = True
        ignored[:, 0] = ignored[0] = False  # a label of the first token is nobody's to learn
        self.labels = self.ids.masked_fill(ignored, IGNORED)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Batch:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class Teacher:
    """A table of logits by token, asked like a model, three positions at a time.

    Args:
        patience: after how many batches it breaks.
    """

    def __init__(self, width: int = VOCABULARY, patience: int = 1 << 30, scale: float = 2.0):
        self.table = scale * torch.randn(VOCABULARY, width, generator=torch.Generator().manual_seed(3))
        self.loaded, self.asked, self.patience = 0, 0, patience

    def load(self) -> Callable[[Batch], Iterator[torch.Tensor]]:
        self.loaded += 1
        return self

    def __call__(self, batch: Batch) -> Iterator[torch.Tensor]:
        assert not torch.is_grad_enabled() and set(batch) == {"input_ids", "labels"}
        self.asked += 1
        if self.asked > self.patience:
            raise KeyboardInterrupt
        learned = batch["labels"][:, 1:] != IGNORED
        return iter(self.table[batch["input_ids"][:, :-1][learned]].split(3))

    def probabilities(self, rows: Dataset, temperature: float = 1.0) -> torch.Tensor:
        """Of all learned positions in order, (tokens, width), float64."""
        everything = DataLoader(rows, batch_size=len(rows))  # type: ignore[arg-type]
        batch = {name: value for name, value in next(iter(everything)).items() if not name.startswith("target_")}
        with torch.no_grad():
            logits = torch.cat(list(self({name: batch[name] for name in ("input_ids", "labels")})))
        return torch.softmax(logits.double() / temperature, -1)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD_TOKENS", ROWS_A_SHARD * LENGTH)


SAMPLED, TOP_K = Targets(source="cached", draws=20), Targets(source="cached", method="top_k", k=5)


def write(asked: Teacher, folder: Path, settings: Targets = SAMPLED, **changed: Any) -> Path:
    options = {
        "teacher": "one",
        "rows": Rows(),
        "rows_key": "rows",
        "temperature": 1.0,
        "width": asked.table.shape[1],
        "batch_size": 3,
    }
    return write_targets(asked.load, settings=settings, cache=folder, **{**options, **changed})


def dense(rows: RowsWithTargets, width: int = VOCABULARY) -> torch.Tensor:
    """The stored targets of all learned positions in order, (tokens, width)."""
    found = []
    for row in rows:
        learned = row["labels"][1:] != IGNORED
        ids, probabilities = row["target_ids"][:-1][learned], row["target_probabilities"][:-1][learned]
        found.append(torch.zeros(len(ids), width).scatter_add_(1, ids, probabilities))
    return torch.cat(found)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- what is stored


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_top_k_is_read_as_the_teacher_gave_it(tmp_path: Path, temperature: float) -> None:
    teacher, rows = Teacher(), Rows()
    found = RowsWithTargets(rows, write(teacher, tmp_path, TOP_K, temperature=temperature))
    assert len(found) == len(rows)
    values, ids = teacher.probabilities(rows, temperature).topk(5)
    expected = torch.zeros(len(ids), VOCABULARY, dtype=torch.float64).scatter(1, ids, values)
    assert torch.allclose(dense(found).double(), expected, atol=0, rtol=2**-10)  # float16
    for row, plain in zip(found, rows, strict=True):
        assert all(torch.equal(row[name], plain[name]) for name in plain)
        assert row["target_ids"].shape == row["target_probabilities"].shape == (LENGTH, 5)
        assert (row["target_ids"].dtype, row["target_probabilities"].dtype) == (torch.int64, torch.float32)
        learned = torch.cat([plain["labels"][1:] != IGNORED, torch.tensor([False])])
        assert torch.equal((row["target_probabilities"] > 0).all(1), learned)
        assert not row["target_probabilities"][~learned].any() and not row["target_ids"][~learned].any()


def test_more_than_the_vocabulary_is_all_of_it(tmp_path: Path) -> None:
    teacher = Teacher()
    found = dense(RowsWithTargets(Rows(), write(teacher, tmp_path, TOP_K.model_copy(update={"k": 300}))))
    assert torch.allclose(found.double(), teacher.probabilities(Rows()), rtol=2**-10, atol=2**-24)


def test_draws_are_read_as_they_were_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(cache, "sparse", lambda *given: drawn.append(sparse.sparse(*given)) or drawn[-1])
    found = dense(RowsWithTargets(Rows(), write(Teacher(), tmp_path)))
    ids, counts, sizes = (torch.from_numpy(np.concatenate(each)).long() for each in zip(*drawn, strict=True))
    assert (counts == 1).any() and (counts > 1).any()
    expected = torch.zeros(len(sizes), VOCABULARY)
    expected[torch.repeat_interleave(torch.arange(len(sizes)), sizes), ids] = counts / 20
    assert torch.equal(found, expected)


def test_shares_of_draws_sum_to_one_and_padding_is_zero(tmp_path: Path) -> None:
    rows = RowsWithTargets(Rows(), write(Teacher(), tmp_path))
    found = dense(rows)
    assert torch.allclose(found.sum(1), torch.ones(len(found)))
    assert torch.allclose(20 * found, (20 * found).round(), atol=1e-5)
    entries = [(row["target_probabilities"] > 0).sum(1) for row in rows]
    assert max(map(max, entries)) == rows.most_entries < 20
    assert len({int(each) for some in entries for each in some}) > 3  # ragged
    for row in rows:  # an entry of padding is no other token's: 0, with nothing
        assert not row["target_ids"][row["target_probabilities"] == 0].any()


def test_draws_are_unbiased_and_steadier_than_independent_ones() -> None:
    """Rare tokens are drawn as often as they should be, on average over many times."""
    exact = torch.softmax(3 * torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64), -1)
    draws, times = 10, 100_000
    ids, counts, sizes = sparse.draw(exact.expand(times, 50), draws, torch.Generator().manual_seed(1))
    assert int(sizes.sum()) == len(ids) and int(counts.sum()) == draws * times
    shares = torch.zeros(times, 50, dtype=torch.float64)
    shares.index_put_((torch.repeat_interleave(torch.arange(times), sizes), ids), counts.double() / draws)
    independent = exact * (1 - exact) / draws  # variance of a share
    assert ((shares.mean(0) - exact).abs() < 5 * (independent / times).sqrt()).all()
    likely = exact > 1e-3  # the variance of what is hardly ever drawn takes more times
    assert (exact < 1e-3).any() and (shares.var(0) < 1.05 * independent)[likely].all()
    assert shares.var(0).sum() < 0.7 * independent.sum()


def test_equal_rows_in_other_shards_are_drawn_anew(tmp_path: Path) -> None:
    rows = Rows()
    rows.ids[:], rows.labels[:] = rows.ids[0].clone(), rows.labels[0].clone()
    found = dense(RowsWithTargets(rows, write(Teacher(), tmp_path, rows=rows))).unflatten(0, (len(rows), -1))
    assert len({tuple(each.flatten().tolist()) for each in found}) == len(rows)


def test_draws_of_certain_and_impossible_tokens() -> None:
    probabilities = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.5, 0.0, 0.5, 0.0]])
    for seed in range(100):
        ids, times, sizes = sparse.draw(probabilities, 3, torch.Generator().manual_seed(seed))
        assert (ids[0], times[0], sizes[0]) == (2, 3, 1) and set(ids[1:].tolist()) == {0, 2} and sizes[1] == 2


def test_the_gradient_of_sampled_targets_is_that_of_whole_distributions_on_average(tmp_path: Path) -> None:
    """What the loss makes of them over many seeds; top-k misses it, and scaled up by more than as it is."""
    teacher, rows = Teacher(), Rows(4)
    student = torch.randn(len(teacher.probabilities(rows)), VOCABULARY, generator=torch.Generator().manual_seed(9))

    def gradient(probabilities: torch.Tensor) -> torch.Tensor:
        logits = student.clone().requires_grad_()
        ids = torch.arange(VOCABULARY).expand_as(probabilities)
        losses.sparse_forward_kl(logits, ids, probabilities).sum().backward()
        assert logits.grad is not None
        return logits.grad

    exact = gradient(teacher.probabilities(rows).float())
    sampled = [RowsWithTargets(rows, write(teacher, tmp_path, rows=rows, seed=seed)) for seed in range(40)]
    means = [torch.stack([gradient(dense(each)) for each in sampled[:count]]).mean(0) for count in (1, 40)]
    one, many = ((mean - exact).norm() for mean in means)
    kept = dense(RowsWithTargets(rows, write(teacher, tmp_path, TOP_K, rows=rows)))
    as_it_is, scaled = (gradient(each) - exact for each in (kept, kept / kept.sum(1, keepdim=True)))
    assert many < one / 4 and many < as_it_is.norm() / 2 and as_it_is.norm() < scaled.norm()


@pytest.mark.parametrize("width, dtype", [(1 << 16, "U16"), ((1 << 16) + 1, "U32")])
def test_the_ids_of_a_large_vocabulary_fit(tmp_path: Path, width: int, dtype: str) -> None:
    teacher = Teacher(width=width)
    teacher.table[:, -1] = 30  # certain
    folder = write(teacher, tmp_path)
    assert f'"ids":{{"dtype":"{dtype}"'.encode() in (folder / "00000.safetensors").read_bytes()
    for row in RowsWithTargets(Rows(), folder):
        learned = (row["labels"][1:] != IGNORED).sum()
        assert (row["target_ids"] == width - 1).sum() == learned == row["target_probabilities"].sum()


@pytest.mark.parametrize("settings", [SAMPLED, TOP_K])
def test_the_report_is_of_what_is_stored(
    tmp_path: Path, settings: Targets, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = Teacher()
    folder = write(teacher, tmp_path, settings)
    made = json.loads((folder / "targets.json").read_text(encoding="utf-8"))
    tokens, entries = len(teacher.probabilities(Rows())), (dense(RowsWithTargets(Rows(), folder)) > 0).sum()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert (made["tokens"], made["bytes"]) == (tokens, size)
    assert made["entries_per_token"] == pytest.approx(int(entries) / tokens)
    assert made["bytes_per_token"] == pytest.approx(size / tokens)
    shown = capsys.readouterr().out
    assert f"targets: {tokens:,} tokens, {made['entries_per_token']:.1f} entries" in shown
    assert ("more than 120 bytes a token" in shown) == (made["bytes_per_token"] > 120)  # of such small shards


def test_bias_stays_and_noise_averages_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SHARD_TOKENS", 1 << 14)
    teacher, rows, found = Teacher(), Rows(1600), {}
    for settings in (SAMPLED, TOP_K):
        folder = write(teacher, tmp_path, settings, rows=rows, batch_size=64)
        found[settings.method] = json.loads((folder / "targets.json").read_text(encoding="utf-8"))["bias"]
    sampled, top_k = found["sampled"], found["top_k"]
    assert sampled["positions"] == top_k["positions"] and len(sampled["positions"]) == 3
    assert all(count >= step for count, step in zip(sampled["positions"], (256, 1024, 4096), strict=True))
    assert sampled["total_variation"][2] < 0.4 * sampled["total_variation"][0]
    assert top_k["total_variation"][2] > 0.7 * top_k["total_variation"][0]
    assert sampled["total_variation"][2] < 0.2 * top_k["total_variation"][2]
    exact = teacher.probabilities(rows)
    assert top_k["per_token"] == pytest.approx((1 - exact.topk(5).values.sum(1)).mean().item() / 2, rel=0.05)


# ---- how it is made


def test_a_complete_cache_never_loads_the_teacher(tmp_path: Path) -> None:
    first, second = Teacher(), Teacher()
    folder = write(first, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write(second, tmp_path) == folder and (first.loaded, second.loaded) == (1, 0)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_other_teacher_rows_or_settings_make_other_targets(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"teacher": "two"},
        {"rows_key": "others"},
        {"rows": Rows(17)},
        {"temperature": 2.0},
        {"seed": 1},
        {"settings": SAMPLED.model_copy(update={"draws": 21})},
        {"settings": TOP_K},
        {"settings": TOP_K.model_copy(update={"k": 6})},
    ]
    folders = [write(Teacher(), tmp_path, **change) for change in changes]
    folders.append(write(Teacher(width=39), tmp_path))
    assert len(set(folders)) == len(changes) + 1
    assert write(Teacher(), tmp_path, SAMPLED.model_copy(update={"k": 7})) == folders[0]  # k is not sampled's
    assert len({(folder / "00000.safetensors").read_bytes() for folder in folders[4:]}) == len(folders[4:])


@pytest.mark.parametrize("patience", [0, 1, 3, 4])
@pytest.mark.parametrize("settings", [SAMPLED, TOP_K])
def test_an_interrupted_cache_is_continued_to_the_same_bits(
    tmp_path: Path, settings: Targets, patience: int, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write(Teacher(), tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        write(Teacher(patience=patience), tmp_path / "parts", settings)
    (folder,) = (tmp_path / "parts").glob("targets-*")
    with pytest.raises(HfkitError, match="holds no finished targets; run the recipe that makes them to its end"):
        RowsWithTargets(Rows(), folder)
    before = {path: path.stat().st_ino for path in folder.glob("*.safetensors")}
    assert len(before) == {0: 0, 1: 0, 3: 2, 4: 3}[patience]  # of the second shard nothing is asked
    (folder / ".00004.safetensors.abc.partial").write_bytes(b"half")
    assert write(Teacher(), tmp_path / "parts", settings) == folder
    assert shards(folder) == shards(whole)
    assert all(path.stat().st_ino == inode for path, inode in before.items())
    assert (f"{len(before)} of 5 shards are there already" in capsys.readouterr().out) == bool(before)


def test_a_kill_between_a_shard_and_its_description_or_before_the_end_is_made_good(tmp_path: Path) -> None:
    folder = write(Teacher(), tmp_path)
    before = shards(folder)
    (folder / "00004.json").unlink()
    (folder / "targets.json").unlink()
    assert write(Teacher(), tmp_path) == folder and shards(folder) == before
    for text in ("{", "{}", before["targets.json"].decode().replace('"most_entries": 1', '"most_entries": 9')):
        (folder / "targets.json").write_text(text, encoding="utf-8")
        assert write(Teacher(), tmp_path) == folder and shards(folder) == before


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_the_number_of_processes_does_not_matter(
    tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process in turn, the main one last: what the others are told stands in for the launcher's store."""
    whole = write(Teacher(), tmp_path / "one")
    teachers = [Teacher() for _ in range(processes)]
    monkeypatch.setattr(cache, "world_size", lambda: processes)
    monkeypatch.setattr(cache, "of_all", lambda name, value: [value] * processes)
    told = {"targets": lambda function: [0, 1, 2, 3, 4], "targets made": lambda function: None}
    (tmp_path / "many" / whole.name).mkdir(parents=True)
    for rank in reversed(range(processes)):
        monkeypatch.setattr(cache, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(cache, "is_main", lambda rank=rank: rank == 0)
        answers = told if rank else {"targets": lambda function: (function(), [0, 1, 2, 3, 4])[1]}
        monkeypatch.setattr(
            cache, "on_main", lambda name, function, answers=answers: answers.get(name, lambda f: f())(function)
        )
        assert write(teachers[rank], tmp_path / "many") == tmp_path / "many" / whole.name
    assert shards(tmp_path / "many" / whole.name) == shards(whole)
    assert [teacher.loaded for teacher in teachers] == [1] * min(processes, 5) + [0] * (processes - 5)


def test_a_damaged_shard_is_found_told_and_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(Teacher(), tmp_path)
    before = shards(folder)
    damages: dict[str, Callable[[Path], Any]] = {
        "00003.safetensors": lambda path: path.write_bytes(before[path.name][:-1] + b"\xff"),
        "00002.safetensors": lambda path: os.truncate(path, 10),
        "00000.safetensors": lambda path: path.unlink(),
        "00004.json": lambda path: path.write_text("{", encoding="utf-8"),
        "00001.json": lambda path: path.write_text("{}", encoding="utf-8"),
    }
    for name, damage in damages.items():
        damage(folder / name)
        teacher = Teacher()
        assert write(teacher, tmp_path) == folder and shards(folder) == before
        shown = capsys.readouterr().out
        assert f"targets: shard {int(name[:5])} is damaged: made again" in shown
        assert "4 of 5 shards are there already" in shown
        assert teacher.asked <= 2 + len(Rows())  # the batches of the shard, and the rows of the bias


def test_only_the_damaged_shard_is_touched(tmp_path: Path) -> None:
    folder = write(Teacher(), tmp_path)
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}
    content = bytearray((folder / "00003.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "00003.safetensors").write_bytes(content)
    write(Teacher(), tmp_path)
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {
        "00003.safetensors",
        "00003.json",
        "targets.json",
    }


def test_a_repair_that_is_interrupted_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    folder = write(Teacher(), tmp_path)
    before = shards(folder)
    os.truncate(folder / "00003.safetensors", 10)
    with pytest.raises(KeyboardInterrupt):
        write(Teacher(patience=0), tmp_path)
    with pytest.raises(HfkitError, match="holds no finished targets"):
        RowsWithTargets(Rows(), folder)
    assert write(Teacher(), tmp_path) == folder and shards(folder) == before


def test_a_shard_of_another_cache_is_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, other = write(Teacher(), tmp_path), write(Teacher(scale=3), tmp_path, teacher="two")
    before = shards(mine)
    for kind in ("safetensors", "json"):
        (mine / f"00002.{kind}").write_bytes((other / f"00002.{kind}").read_bytes())
    assert write(Teacher(), tmp_path) == mine and shards(mine) == before
    assert "shard 2 is damaged" in capsys.readouterr().out


def test_the_targets_of_other_rows_are_refused(tmp_path: Path) -> None:
    folder = write(Teacher(), tmp_path)
    with pytest.raises(HfkitError, match="holds targets of 18 rows of 12 tokens, got 17 rows of 12; let them be made"):
        RowsWithTargets(Rows(17), folder)
    others = Rows()
    others.labels[3] = IGNORED
    with pytest.raises(HfkitError, match="row 3 learns other tokens than its targets; delete the folder"):
        RowsWithTargets(others, folder)[3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [SAMPLED, TOP_K])
def test_a_teacher_of_bad_numbers_is_named(tmp_path: Path, settings: Targets, value: float) -> None:
    teacher = Teacher()
    teacher.table[5, 7] = value
    with pytest.raises(HfkitError, match="teacher: its logits are not finite, so that there is nothing to learn"):
        write(teacher, tmp_path, settings)


def test_a_masked_logit_is_never_a_target(tmp_path: Path) -> None:
    teacher = Teacher()
    teacher.table[:, 8] = float("-inf")
    assert not dense(RowsWithTargets(Rows(), write(teacher, tmp_path)))[:, 8].any()


def test_rows_without_anything_to_learn_ask_nobody(tmp_path: Path) -> None:
    teacher, rows = Teacher(), Rows(8)
    rows.labels[:] = IGNORED
    found = RowsWithTargets(rows, write(teacher, tmp_path, rows=rows))
    assert teacher.asked == 0 and len(found) == 8
    assert all(row["target_probabilities"].shape == (LENGTH, 0) for row in found)


def test_a_run_that_writes_the_same_targets_is_waited_for(tmp_path: Path) -> None:
    folder = write(Teacher(), tmp_path)
    with manifest.locked(folder), pytest.raises(HfkitError, match="another run is writing this folder; wait for it"):
        write(Teacher(), tmp_path)


# ---- how it is read


def test_workers_give_the_same_targets(tmp_path: Path) -> None:
    rows = packed(tmp_path)

    class OfPacked(Teacher):
        def __call__(self, batch: Batch) -> Iterator[torch.Tensor]:
            assert set(batch) == {"input_ids", "labels", "position_ids"}
            return super().__call__({name: batch[name] for name in ("input_ids", "labels")})

    found = RowsWithTargets(rows, write(OfPacked(), tmp_path, rows=rows))
    plain = [found[index] for index in range(len(found))]  # opens the files before the workers fork
    batches = list(DataLoader(found, batch_size=4, num_workers=2))
    assert len(pickle.dumps(found)) < len(pickle.dumps(rows)) + 500  # the place of the targets, not the targets
    for name in ("input_ids", "labels", "position_ids", "target_ids", "target_probabilities"):
        assert torch.equal(torch.cat([batch[name] for batch in batches]), torch.stack([row[name] for row in plain]))
