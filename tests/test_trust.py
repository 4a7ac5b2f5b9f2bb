"""Which addresses are connected to: never a forbidden one, however its host is spelled, resolved or redirected to."""

from __future__ import annotations

import doctest
import ipaddress
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import dask
import numpy as np
import pyarrow as pa
import pystac
import pytest
import rasterio
from answers import Answers, Asked, Said, answering, ranged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_records import as_tuple  # noqa: F401  (replaced below)

import rasteret_dask as rd
