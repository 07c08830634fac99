"""The table of tile sizes: which entry counts, and the tuner for those who ask for it."""

from __future__ import annotations

import pytest
import torch

from tamba.ops.kernels import tiles

CPU = torch.device("cpu")


def test_the_most_special_entry_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "any": {"op": {"n": 1}, "op wide": {"n": 2}, "op half": {"n": 3}},
        "sm90": {"op": {"n": 4}, "op wide": {"n": 5}},
    }
    monkeypatch.setattr(tiles, "TILES", table)

    def asked(*buckets: str) -> int:
        return tiles.tile("op", *buckets, device=CPU)["n"]

    assert [asked(), asked("wide"), asked("unheard of", "half")] == [1, 2, 3]
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm90")
    # Its bucket comes before its architecture.
    assert [asked(), asked("wide"), asked("half")] == [4, 5, 3]
    with tiles.using({"op": {"n": 6}}):
        assert [asked(), asked("wide")] == [6, 6]
        with tiles.using({"op wide": {"n": 7}}):
            assert [asked(), asked("wide")] == [6, 7]
        assert asked("wide") == 6
    assert asked() == 4
    with pytest.raises(KeyError, match="no tile sizes for other"):
        tiles.tile("other", device=CPU)


def test_the_tuner_tries_each_and_leaves_the_table_as_it_was(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = tiles.tile("ssd_scan", "half", device=CPU)
    candidates = [before | {"per_sm": n} for n in (3, 1, 8, 2)]

    def run() -> None:
        if tiles.tile("ssd_scan", "half", device=CPU)["per_sm"] == 8:
            raise RuntimeError("out of resource: shared memory")

    def microseconds(work, repeats: int) -> float:
        work()
        return 10.0 * tiles.tile("ssd_scan", "half", device=CPU)["per_sm"]

    monkeypatch.setattr(tiles, "_median_us", microseconds)
    found = tiles.tune("ssd_scan", candidates, run)
    assert [(us, sizes["per_sm"]) for us, sizes in found] == [(10.0, 1), (20.0, 2), (30.0, 3)]
    assert tiles.tile("ssd_scan", "half", device=CPU) == before
    assert "RuntimeError" in caplog.text and "'per_sm': 8" in caplog.text
