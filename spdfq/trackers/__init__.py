"""Trackers: send the results of a run to TensorBoard, Weights & Biases or trackio, through their own libraries.

To add a tracker, write a new file with a registered class and add one import line here.
"""

from spdfq.trackers.base import Tracked as Tracked
from spdfq.trackers.base import Tracker as Tracker
from spdfq.trackers.tensorboard import TensorBoardTracker as TensorBoardTracker
from spdfq.trackers.trackio import TrackioTracker as TrackioTracker
from spdfq.trackers.wandb import WandbTracker as WandbTracker
