"""Results of sources and how they are stored; the sources without a loop."""

import pytest
import torch
from attrs import evolve, frozen
from support.teachers import RUNTIME, SIDE, recipe, tiny_teacher

from spdfq.data import Batch, LabelledImages
from spdfq.errors import DataError
from spdfq.runtime import Runtime
from spdfq.synth import GaussianNoise, RealImages, SyntheticImages


def test_results_are_stored_and_read_back_bit_for_bit(tmp_path):
    result = evolve(recipe().synthesize(tiny_teacher(), RUNTIME), columns=("a, b", "total"))
    result.save(tmp_path / "synthetic.safetensors")
    again = SyntheticImages.load(tmp_path / "synthetic.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["synthetic.safetensors"]
    for name in ("images", "boxes", "owners", "labels", "curves", "prior", "reached"):
        assert torch.equal(getattr(again, name), getattr(result, name))
    assert (again.columns, again.first_block) == (result.columns, result.first_block)


def test_stored_results_that_are_damaged_are_one_clear_error(tmp_path):
    path = tmp_path / "synthetic.safetensors"
    with pytest.raises(DataError, match=r"synthetic.safetensors: damaged or missing"):
        SyntheticImages.load(path)
    SyntheticImages(images=torch.zeros(1, 3, 4, 4)).save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"synthetic.safetensors: damaged or missing"):
        SyntheticImages.load(path)


# sources without a loop


def test_gaussian_noise_is_standard_normal_in_the_normalised_space():
    images = GaussianNoise(images=20).synthesize(tiny_teacher(), RUNTIME).images
    assert images.shape == (20, 3, SIDE, SIDE)
    assert images.mean().item() == pytest.approx(0, abs=0.02)
    assert images.std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(images, GaussianNoise(images=20).synthesize(tiny_teacher(), RUNTIME).images)
    assert not torch.equal(images, GaussianNoise(images=20).synthesize(tiny_teacher(), Runtime(seed=1)).images)


@frozen(kw_only=True)
class Numbered(LabelledImages):
    """Image i is filled with the number i."""

    def __len__(self):
        return 150

    def batches(self, teacher, batch, indices):
        pixels = torch.tensor(indices).float().view(-1, 1, 1, 1).expand(-1, *teacher.input_size)
        for images in pixels.split(batch):
            yield Batch(images, torch.zeros(len(images), dtype=torch.long))


def test_real_images_are_drawn_without_repeats_over_the_whole_set():
    drawn = RealImages(images=40, dataset=Numbered()).synthesize(tiny_teacher(), RUNTIME).images
    numbers = drawn[:, 0, 0, 0].tolist()
    assert drawn.shape == (40, 3, SIDE, SIDE)
    assert len(set(numbers)) == 40
    assert max(numbers) > 128  # drawn from all of them
    assert torch.equal(drawn, RealImages(images=40, dataset=Numbered()).synthesize(tiny_teacher(), RUNTIME).images)


def test_more_real_images_than_there_are_is_one_clear_error():
    with pytest.raises(DataError, match=r"synthesis\.images: 200 asked for, but the dataset holds 150"):
        RealImages(images=200, dataset=Numbered()).synthesize(tiny_teacher(), RUNTIME)


class Holed(Numbered):
    """Every third image is damaged."""

    def batches(self, teacher, batch, indices):
        for start in range(0, len(indices), batch):
            part = indices[start : start + batch]
            good = [index for index in part if index % 3]
            (found,) = super().batches(teacher, batch, good) if good else (Batch(torch.empty(0, 3, SIDE, SIDE), None),)
            yield found._replace(damaged=tuple(str(index) for index in part if not index % 3))


def test_the_next_of_the_draw_stands_in_for_a_damaged_image_which_is_named(tmp_path):
    drawn = RealImages(images=70, dataset=Holed()).synthesize(tiny_teacher(), RUNTIME)
    numbers = [int(number) for number in drawn.images[:, 0, 0, 0]]
    order = torch.randperm(150, generator=RUNTIME.generator("real")).tolist()
    assert numbers == [index for index in order if index % 3][:70]
    assert list(map(int, drawn.damaged)) == [index for index in order[: order.index(numbers[-1])] if not index % 3]
    drawn.save(tmp_path / "synthetic.safetensors")
    assert SyntheticImages.load(tmp_path / "synthetic.safetensors").damaged == drawn.damaged != ()


def test_fewer_readable_images_than_are_asked_for_are_one_clear_error():
    assert len(RealImages(images=100, dataset=Holed()).synthesize(tiny_teacher(), RUNTIME).images) == 100
    with pytest.raises(
        DataError,
        match=r"synthesis\.images: 101 asked for, but only 100 of the dataset's 150 images can be read",
    ):
        RealImages(images=101, dataset=Holed()).synthesize(tiny_teacher(), RUNTIME)
