"""The training command, of which every process gets a signal after a step: interrupted.py SIGNAL STEP OPTIONS."""

import signal
import sys

from imagenet import train
from imagenet.training.step import Training
from tests.imagenet.commands import stopping_at

if __name__ == "__main__":
    _, name, step, *options = sys.argv
    Training.train_step = stopping_at(Training.train_step, int(step), signal.Signals[name])
    sys.exit(train.main(options))
