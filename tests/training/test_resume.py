"""A run that was stopped and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest_training import Fit, MakeConfig, Recorder, assert_same_state, state_of
from pytorch_lightning.callbacks import Callback

from main import main

ROOT = Path(__file__).parents[2]
