"""The demonstration data that comes with the project."""

from .mini_coco import CLASSES, build_mini_coco

__all__ = ['CLASSES', 'build_mini_coco']
