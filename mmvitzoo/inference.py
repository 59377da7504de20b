"""Models with their weights, and what they see in images: one way for three toolboxes.

The toolboxes predict and draw. Files of weights are read by :func:`mmvitzoo.checkpoints.load`, so that
authors' files work as they are and none executes code.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope
from pycocotools import mask as rle
from torch import nn

from .checkpoints import CheckpointError, convert, load
from .engine.launch import TOOLBOXES
from .zoo import get_config

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
TOP = 5  # classes that are told of a classification


def load_model(config: Union[str, Path, Config], checkpoint: Union[str, Path, None] = None) -> nn.Module:
    """The model of a config, ready for inference on the CPU.

    Args:
        config: A file, a name of :func:`mmvitzoo.list_models`, or a config of MMDetection,
            MMSegmentation or MMPretrain.
        checkpoint: See :func:`load_weights`; None leaves random weights.

    Returns:
        In evaluation mode, without SyncBN, which has no CPU version.

    Raises:
        ValueError: There is no such config, or its ``default_scope`` is none of the three toolboxes.
        FileNotFoundError: There is no such checkpoint.
        CheckpointError: It cannot be read or does not fit.
    """
    config = copy.deepcopy(config) if isinstance(config, Config) else get_config(str(config))
    if config.get('default_scope') not in TOOLBOXES:
        raise ValueError(f'default_scope is one of {", ".join(TOOLBOXES)}, got {config.get("default_scope")!r}')
    if 'data_preprocessor' in config:  # where MMPretrain has it, and puts it into the model as it trains
        config.model.setdefault('data_preprocessor', config.data_preprocessor)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
    model.cfg = model._config = config  # where the toolboxes' functions for inference look for it
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


def load_weights(model: nn.Module, checkpoint: Union[str, Path]) -> None:
    """Loads a whole model's weights, converting authors' files.

    Args:
        model: Of MMDetection, MMSegmentation or MMPretrain.
        checkpoint: Of a training, or a file or address in any layout that
            :func:`mmvitzoo.checkpoints.convert` knows.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It cannot be read, or does not have exactly the model's weights.
    """
    weights, own = load(checkpoint), model.state_dict().keys()
    if not weights.keys() >= {key for key in own if key.startswith('backbone.')}:
        try:
            weights = convert(weights).state_dict
        except CheckpointError as error:
            raise CheckpointError(f'{checkpoint}: {error}') from error
    reasons = []
    for keys, reason in ((own - weights.keys(), 'lacks'), (weights.keys() - own, 'has what the model has not:')):
        if keys:
            others = f' and {len(keys) - 1} more' if len(keys) > 1 else ''
            reasons.append(f'{reason} {min(keys)}{others}')
    if reasons:
        raise CheckpointError(f'{checkpoint}: does not fit the config: {"; ".join(reasons)}')
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # after a first line come the weights of other shapes
        raise CheckpointError(f'{checkpoint}: does not fit the config: {str(error).splitlines()[1].strip()}') from None


def find_images(path: Union[str, Path]) -> List[Path]:
    """An image, or those in a folder and in the folders below it, sorted.

    Args:
        path: Of an image with any suffix, or of a folder, where images are files with one of ``IMAGE_SUFFIXES``.

    Raises:
        FileNotFoundError: There is no such file or folder, or no image in the folder.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f'{path}: no such image or folder')
    found = sorted(x for x in path.rglob('*') if x.suffix.lower() in IMAGE_SUFFIXES and x.is_file())
    if not found:
        raise FileNotFoundError(f'{path}: no image in this folder ({", ".join(IMAGE_SUFFIXES)})')
    return found


def read_image(path: Union[str, Path]) -> np.ndarray:
    """An image as the toolboxes read it.

    Args:
        path: Of a file in any format that OpenCV reads.

    Returns:
        (H, W, 3) of uint8, RGB.

    Raises:
        ValueError: There is no such file, or it is no image.
    """
    if not Path(path).is_file():
        raise ValueError(f'{path}: no such image')
    try:
        image = mmcv.imread(str(path))
    except cv2.error:  # of an empty file
        image = None
    if image is None:
        raise ValueError(f'{path}: cannot be read as an image')
    return np.ascontiguousarray(image[..., ::-1])


@dataclass
class Prediction:
    """What a model sees in an image.

    Attributes:
        picture: (H, W, 3) of uint8, RGB: the image with what was found drawn on it.
        result: What was found, ready for JSON. A detector's ``objects``: class, score, box as x1 y1 x2 y2
            in pixels, mask as COCO's run lengths if there is one; best first. A segmentor's ``classes``: class
            and its share of the pixels, largest first. A classifier's ``classes``: class and score, the best five.
        labels: (H, W) of uint8, a segmentor's number of the class of each pixel; else None.
    """

    picture: np.ndarray
    result: Dict[str, Any]
    labels: Optional[np.ndarray] = None


class Predictor:
    """A config's model with weights, called with images.

    Args:
        config: As for :func:`load_model`.
        checkpoint: As for :func:`load_model`.
        device: Of torch; None is the GPU if there is one.
        score_thr: Detections below this score are left out.

    Raises:
        ValueError: There is no such config, or its ``default_scope`` is none of the three toolboxes.
        FileNotFoundError: There is no such checkpoint.
        CheckpointError: It cannot be read or does not fit.
    """

    def __init__(
        self,
        config: Union[str, Path, Config],
        checkpoint: Union[str, Path, None] = None,
        device: Optional[str] = None,
        score_thr: float = 0.3,
    ):
        self.model = load_model(config, checkpoint).to(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
        self.score_thr = score_thr
        self.scope = self.model.cfg.default_scope
        # Of the data set, since authors' files do not name their classes.
        dataset = dict(self.model.cfg.test_dataloader.dataset, lazy_init=True)
        with DefaultScope.overwrite_default_scope(self.scope):
            self.metainfo = DATASETS.build(dataset).metainfo

    def __call__(self, path: Union[str, Path]) -> Prediction:
        """Predicts.

        Args:
            path: Of an image.

        Raises:
            ValueError: There is no such file, or it is no image.
        """
        predict = dict(mmdet=self._detect, mmseg=self._segment, mmpretrain=self._classify)[self.scope]
        image = read_image(path)
        with DefaultScope.overwrite_default_scope(self.scope):
            return predict(str(path), image)

    def _detect(self, path: str, image: np.ndarray) -> Prediction:
        from mmdet.apis import inference_detector
        from mmdet.visualization import DetLocalVisualizer

        sample = inference_detector(self.model, path).cpu()
        found = sample.pred_instances
        found = sample.pred_instances = found[found.scores >= self.score_thr]
        visualizer = DetLocalVisualizer()
        visualizer.dataset_meta = dict(classes=self.metainfo['classes'], palette=self.metainfo.get('palette', 'random'))
        visualizer.add_datasample('', image, sample, draw_gt=False, pred_score_thr=self.score_thr)
        objects = [
            {'class': self._name(label), 'score': score, 'box': box}
            for label, score, box in zip(found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist())
        ]
        for item, mask in zip(objects, found.get('masks', ())):
            item['mask'] = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            item['mask']['counts'] = item['mask']['counts'].decode()
        objects.sort(key=lambda item: -item['score'])
        return Prediction(visualizer.get_image(), dict(objects=objects))

    def _segment(self, path: str, image: np.ndarray) -> Prediction:
        from mmseg.apis import inference_model
        from mmseg.visualization import SegLocalVisualizer

        sample = inference_model(self.model, path).cpu()
        labels = sample.pred_sem_seg.data[0].numpy().astype(np.uint8)
        visualizer = SegLocalVisualizer()
        visualizer.dataset_meta = dict(self.metainfo)
        visualizer.add_datasample('', image, sample, draw_gt=False)
        classes, pixels = np.unique(labels, return_counts=True)
        shares = sorted(zip((pixels / labels.size).tolist(), classes.tolist()), reverse=True)
        result = dict(classes=[{'class': self._name(label), 'share': share} for share, label in shares])
        return Prediction(visualizer.get_image(), result, labels)

    def _classify(self, path: str, image: np.ndarray) -> Prediction:
        from mmpretrain import ImageClassificationInferencer
        from mmpretrain.visualization import UniversalVisualizer

        classes = self.metainfo.get('classes')
        inferencer = ImageClassificationInferencer(self.model)
        (sample,) = inferencer.forward(next(inferencer.preprocess([path])))  # without its progress bar
        picture = UniversalVisualizer().visualize_cls(image, sample, classes=classes, draw_gt=False)
        scores, labels = sample.pred_score.cpu().topk(min(TOP, len(sample.pred_score)))
        best = [{'class': self._name(x), 'score': score} for x, score in zip(labels.tolist(), scores.tolist())]
        return Prediction(picture, dict(classes=best))

    def _name(self, label: int) -> str:
        return self.metainfo['classes'][label] if 'classes' in self.metainfo else str(label)
