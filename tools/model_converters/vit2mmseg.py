"""Converts a plain ViT for MMSegmentation's VisionTransformer: an alias of convert.py SRC DST --to mmseg."""

import runpy
import sys
from pathlib import Path

sys.argv[1:1] = ['--to', 'mmseg']
runpy.run_path(str(Path(__file__).with_name('convert.py')), run_name='__main__')
