"""The keys of state files."""

from pathlib import Path

import pytest
import torch
from attrs import define, field

from spdfq.errors import DataError
from spdfq.runtime.state_key import check_state_key, state_key


@define
class Settings:
    lr: float = 0.1
    inner: object = None
    counted: int = field(default=0, eq=False)
    seen: list = field(factory=list, init=False)


@define
class Others(Settings):
    pass


def test_it_is_that_of_equal_settings_and_of_no_others():
    assert state_key(Settings(), 1, "a", None) == state_key(Settings(), 1, "a", None)
    different = [
        state_key(Settings()),
        state_key(Others()),
        state_key(Settings(lr=0.2)),
        state_key(Settings(inner=Settings())),
        state_key(Settings(inner=(Settings(lr=0.2),))),
        state_key(Settings(inner={"a": Settings()})),
        state_key(Settings(), 0),
    ]
    assert len(set(different)) == len(different)


def test_what_changes_while_it_is_used_does_not_count():
    used = Settings(counted=7)
    used.seen.append(1)
    assert state_key(used) == state_key(Settings())


def test_what_no_recipe_can_hold_counts_by_its_name():
    assert state_key(Settings(inner=torch.relu)) != state_key(Settings(inner=torch.sigmoid))
    assert state_key(Settings(inner=torch.zeros(1))) == state_key(Settings(inner=torch.ones(2)))


@pytest.mark.parametrize("metadata", [{}, {"key": "b"}])
def test_another_key_and_none_are_refused(metadata):
    check_state_key(Path("x"), {"key": "a"}, "a")
    with pytest.raises(DataError, match=r"^x: is the state of another model, .*; give another folder, or delete it$"):
        check_state_key(Path("x"), metadata, "a")
