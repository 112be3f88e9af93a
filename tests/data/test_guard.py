"""Files that crash, hang or exhaust the process that reads them: named, given up, and the rest goes on."""

import faulthandler
import os
import signal
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from solution.data import guard
from solution.data.guard import LoaderError, Watch, guarded, look_at
from solution.data.images import UnreadableInput
from solution.data.processes import Apart, Killed, alone
from solution.data.views import quiet_worker


def act(path):
    """A made-up decoder: the name says what reading the file does."""
    word = path.name.partition("-")[0]
    if word == "abort":
        faulthandler.disable()
        os.abort()
    if word == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "hangs":
        time.sleep(60)
    if word == "bad":
        raise UnreadableInput(path, "bad")
    if word == "greedy":
        np.ones(1 << 50, np.uint8)
    return path.name


def fails_once(path, mark):
    """What kills one process by chance, when memory is short, kills none the second time."""
    if path.name == "b" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name


def looked(tmp_path, names, look=act, **more):
    paths = [tmp_path / name for name in names]
    return list(look_at(paths, look, workers=2, start=quiet_worker, **more))


def test_a_process_of_its_own_gives_a_result_an_error_or_how_it_ended(tmp_path):
    assert alone(act, tmp_path / "fine") == "fine"
    with pytest.raises(UnreadableInput, match="bad-1: bad"):
        alone(act, tmp_path / "bad-1")
    for name, reason in (("abort-1", "SIGABRT"), ("killed-1", "out of memory"), ("hangs-1", "more than 1 s")):
        with pytest.raises(Killed, match=reason):
            alone(act, tmp_path / name, seconds=1)


def test_files_that_end_their_process_are_named_and_the_others_read_in_order(tmp_path):
    names = [f"{n}" for n in range(40)]
    names[3], names[20], names[21], names[39] = "abort-3", "bad-20", "greedy-21", "hangs-39"
    found = looked(tmp_path, names, seconds=3)
    assert [value for value, _ in found] == [None if "-" in name else name for name in names]
    reasons = {name: reason for name, (_, reason) in zip(names, found) if reason}
    assert list(reasons) == ["abort-3", "bad-20", "greedy-21", "hangs-39"]
    assert reasons["abort-3"] == "reading it crashed its process (SIGABRT)"
    assert "memory" in reasons["greedy-21"]
    assert reasons["hangs-39"] == "reading it took more than 3 s"


def test_a_file_that_was_killed_by_chance_is_read_after_all(tmp_path):
    found = looked(tmp_path, ["a", "b", "c"], partial(fails_once, mark=tmp_path / "mark"))
    assert found == [("a", ""), ("b", ""), ("c", "")] and (tmp_path / "mark").exists()


def test_an_error_of_the_code_is_raised_as_it_is(tmp_path):
    def look(path):
        raise KeyError(path.name)

    with pytest.raises(KeyError):
        looked(tmp_path, ["a"], look)


def test_workers_that_die_of_themselves_end_in_one_line(monkeypatch):
    monkeypatch.setattr(guard, "_MOST_BARE_DEATHS", 1)

    def load(batches):
        return DataLoader([0, 1], sampler=batches, batch_size=None, num_workers=1, worker_init_fn=lambda _: os.abort())

    with pytest.raises(LoaderError, match="fewer --workers"):
        list(guarded([0, 1], load, Watch(1), lambda number, waiting: None))


def test_a_file_within_another_is_the_one_to_blame():
    """A donor that is read for a sample: what is named is the donor, and after it the sample again."""

    class Nested(torch.utils.data.Dataset):
        watch = Watch(1)

        def __getitem__(self, number):
            with self.watch.file(number, f"own-{number}"):
                try:
                    with self.watch.file(7, "donor-7"):
                        os.abort()
                except UnreadableInput as error:
                    return str(error)

    nested = Nested()

    def load(batches):
        return DataLoader(nested, sampler=batches, batch_size=None, num_workers=1)

    (found,) = guarded([0], load, nested.watch, lambda number, waiting: os.abort())
    assert found == "donor-7: reading it crashed its process (SIGABRT)"
    assert list(nested.watch.lost) == [7]


def test_without_workers_files_that_end_their_process_are_named_too(tmp_path):
    names = ["0", "abort-1", "2", "bad-3", "hangs-4", "greedy-5", "6"]
    paths = [tmp_path / name for name in names]
    found = list(look_at(paths, act, workers=0, start=quiet_worker, seconds=1))
    assert [value for value, _ in found] == [None if "-" in name else name for name in names]
    reasons = [reason for _, reason in found if reason]
    assert [r.partition(" ")[0] for r in reasons] == ["reading", "bad", "reading", "reading"]
    assert "SIGABRT" in reasons[0] and "more than 1 s" in reasons[2] and "memory" in reasons[3]


def test_a_process_apart_serves_on_and_a_new_one_follows_one_that_ended(tmp_path):
    with Apart(act, seconds=1) as apart:
        assert apart(tmp_path / "a") == "a"
        first = apart.process.pid
        assert apart(tmp_path / "b") == "b" and apart.process.pid == first
        with pytest.raises(UnreadableInput):
            apart(tmp_path / "bad-1")
        assert apart.process.pid == first
        with pytest.raises(Killed, match="SIGABRT"):
            apart(tmp_path / "abort-1")
        assert apart(tmp_path / "c") == "c" and apart.process.pid != first
        # One that is killed while it waits, as the out-of-memory killer does, costs no file.
        os.kill(apart.process.pid, signal.SIGKILL)
        apart.process.join()
        assert apart(tmp_path / "d") == "d"
        last = apart.process
    assert not last.is_alive()
