"""A whole compression method in one file, as docs/adding-a-compression-method.md shows it. Tests drop it into the folder."""

import shutil
from typing import Literal

from pydantic import Field

from ml.bundles import Bundle, read_bundle
from ml.compression.registry import CompressionContext, CompressionMethod, MethodConfig
