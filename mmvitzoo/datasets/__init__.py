"""The demonstration data that comes with the project, and what makes a config for your own."""

from .mini_coco import CLASSES, build_mini_coco
from .own_coco import Split, adapt_config, read_coco_folder

__all__ = ['CLASSES', 'Split', 'adapt_config', 'build_mini_coco', 'read_coco_folder']
