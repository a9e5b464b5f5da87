"""The training command, of which every process gets a SIGTERM after its 60th step."""

import sys

from imagenet import train
from imagenet.training import Training
from tests.imagenet.commands import stopping_at

if __name__ == "__main__":
    Training.train_step = stopping_at(Training.train_step, 60)
    sys.exit(train.main())
