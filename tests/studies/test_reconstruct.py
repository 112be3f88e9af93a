"""Reconstructed fakes: decoders that learn and go on, colours that stay, and the command's pictures, masks and manifest."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from tiny import make_faces

from solution.data.images import decode_image, decode_mask
from solution.data.manifest import read_manifest
from solution.studies import decoders, reconstruct
from solution.studies.decoders import KINDS, SIDE, Autoencoders, draw_again


@pytest.fixture
def manifest(tmp_path):
    make_faces(tmp_path, 4)
    rows = [
        "path,label,source,split,group",
        "0.png,0,a,train,anna",
        "1.png,0,a,train,",
        "2.png,1,b,train,",
        "3.png,0,a,val,",
    ]
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "manifest.csv"


@pytest.fixture
def faces() -> np.ndarray:
    from skimage.data import astronaut

    return np.stack([cv2.resize(astronaut()[:256, 100:356], (SIDE, SIDE), interpolation=cv2.INTER_AREA)] * 2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_decoder_changes_the_picture_and_not_its_colours(faces, kind):
    torch.manual_seed(0)
    image = faces[0][:90, :117]  # sides that no decoder divides
    drawn = draw_again(Autoencoders().eval(), image, kind)
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    assert (drawn != image).mean() > 0.5
    coarse = [cv2.GaussianBlur(x.astype(np.float32), (0, 0), 12) for x in (drawn, image)]
    assert np.abs(coarse[0] - coarse[1]).mean() < 4


def test_training_lowers_the_error_and_goes_on_where_it_was_stopped(faces, tmp_path, monkeypatch):
    images = torch.from_numpy(faces[:1]).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.manual_seed(0)
    before = Autoencoders().loss(images).item()
    monkeypatch.setattr(decoders, "SAVE_EVERY", 8)
    whole = decoders.train(faces, 30, tmp_path / "whole.pt", seed=0, batch=2)
    assert whole.loss(images).item() < 0.8 * before

    write, calls = decoders.write_checkpoint, []

    def stopped(path, checkpoint):
        write(path, checkpoint)
        calls.append(checkpoint.state.step)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(decoders, "write_checkpoint", stopped)
    with pytest.raises(KeyboardInterrupt):
        decoders.train(faces, 30, tmp_path / "halves.pt", seed=0, batch=2)
    halves = decoders.train(faces, 30, tmp_path / "halves.pt", seed=0, batch=2)
    assert calls == [8, 16, 24, 30]
    for one, other in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_command_writes_a_fake_of_every_real_training_picture(manifest, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reconstruct, "WHOLE_P", 0.0)
    out = tmp_path / "out"
    call = ["--data", str(manifest), "--out", str(out), "--steps", "1"]
    assert reconstruct.main(call) == 0
    assert "4 rows" in capsys.readouterr().out
    items, dropped = read_manifest(out / "manifest.csv", split="train")
    assert not dropped.dropped
    fakes = [item for item in items if item.source == "reconstructed"]
    assert len(items) == 5 and len(fakes) == 2 and all(item.label == 1 for item in fakes)
    assert (
        [item.group for item in items if item.label == 0] == [item.group for item in fakes] == ["anna", "picture 1.png"]
    )
    assert [item.path.name for item in read_manifest(out / "manifest.csv", split="val")[0]] == ["3.png"]
    for fake, name in zip(fakes, ("0.png", "1.png")):
        assert fake.generator.removeprefix("reconstructed_") in KINDS
        picture, image, mask = decode_image(fake.path), decode_image(tmp_path / name), decode_mask(fake.mask)
        change = np.abs(picture.astype(int) - image).mean(axis=2)
        assert picture.shape == image.shape and 0.005 < (mask > 0.5).mean() < 0.6
        assert change[mask > 0.9].mean() > 2 * change[mask == 0].mean()  # beside the mask JPEG alone changes it
    first = {path: path.read_bytes() for path in sorted(out.glob("*s/*"))}
    assert len(first) == 4
    assert reconstruct.main(call) == 0
    assert {path: path.read_bytes() for path in sorted(out.glob("*s/*"))} == first
    assert reconstruct.main([*call[:-1], "2"]) == 2
    assert "number of steps" in (told := capsys.readouterr().err) and "--restart" in told
    assert reconstruct.main([*call[:-1], "2", "--restart"]) == 0
    assert {path: path.read_bytes() for path in sorted(out.glob("*s/*"))}.keys() == first.keys()


def test_without_a_face_or_by_chance_the_whole_picture_is_drawn_again(faces):
    torch.manual_seed(0)
    image = cv2.resize(faces[0], (50, 70))
    fake, mask, kind = reconstruct.fake_of(image, None, Autoencoders().eval(), np.random.default_rng(0))
    assert mask is None and kind in KINDS and fake.shape == image.shape and (fake != image).mean() > 0.5


def test_what_it_cannot_learn_from_is_said(manifest, tmp_path, capsys):
    manifest.write_text("path,label,split\n2.png,1,train\n3.png,0,val\n")
    assert reconstruct.main(["--data", str(manifest), "--out", str(tmp_path / "out")]) == 2
    assert "no real picture of split 'train'" in capsys.readouterr().err
    cv2.imwrite(str(tmp_path / "0.png"), np.full((64, 64, 3), 90, np.uint8))
    manifest.write_text("path,label,split\n0.png,0,train\n2.png,1,train\n3.png,0,val\n")
    assert reconstruct.main(["--data", str(manifest), "--out", str(tmp_path / "out")]) == 2
    assert "no face in any of 1 real training pictures" in capsys.readouterr().err
