"""Inference with models of MMDetection, MMSegmentation and MMPretrain through one interface.

The toolboxes predict and draw. Checkpoints are read by :func:`mmvitzoo.checkpoints.load`, which converts the authors'
files and executes no code from them.
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional, Union

import numpy as np
import torch
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.structures import BaseDataElement
from pycocotools import mask as rle
from torch import nn

from .checkpoints import CheckpointError, load, match_names
from .images import read_image
from .models.layers import optimize_for_inference
from .zoo import TOOLBOXES, get_config, set_default_scope

TOPK = 5  # classes reported by a classifier


def load_model(config: Union[str, Path, Config], checkpoint: Union[str, Path, None] = None) -> nn.Module:
    """Builds a model from a config for inference on the CPU.

    Args:
        config: Path of a config, a name from :func:`mmvitzoo.list_models`, or a loaded config of MMDetection,
            MMSegmentation or MMPretrain.
        checkpoint: Path or URL of a checkpoint for :func:`load_weights`. None leaves the weights random.

    Returns:
        The model in evaluation mode. SyncBN is replaced by BatchNorm, since SyncBN does not run on a CPU. The default
        scope becomes that of the config, as in ``init_detector``, so that the toolbox's inference functions take it.

    Raises:
        ValueError: There is no such config, or its ``default_scope`` is not one of the three toolboxes.
        FileNotFoundError: There is no such checkpoint.
        CheckpointError: The checkpoint cannot be read or does not fit the model.
    """
    config = copy.deepcopy(config) if isinstance(config, Config) else get_config(str(config))
    set_default_scope(config)
    if config.get('default_scope') not in TOOLBOXES:
        raise ValueError(f'default_scope must be one of {", ".join(TOOLBOXES)}, got {config.get("default_scope")!r}')
    if 'data_preprocessor' in config:  # MMPretrain's position; its runner copies it into the model
        config.model.setdefault('data_preprocessor', config.data_preprocessor)
    current = DefaultScope.get_current_instance()
    if current is None or current.scope_name != config.default_scope:  # init_default_scope would warn of a change
        DefaultScope.get_instance(f'{config.default_scope}-{time.time_ns()}', scope_name=config.default_scope)
    model = revert_sync_batchnorm(MODELS.build(config.model)).eval()
    model.cfg = model._config = config  # the toolboxes' inference functions read it from there
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


def load_weights(model: nn.Module, checkpoint: Union[str, Path]) -> None:
    """Loads a checkpoint into a whole model; converts the authors' layouts.

    Args:
        model: Model of MMDetection, MMSegmentation or MMPretrain.
        checkpoint: Path or URL of a checkpoint written by MMEngine, or in a layout that
            :func:`mmvitzoo.checkpoints.convert` supports.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be read, or its keys or shapes differ from the model's.
    """
    expected = model.state_dict().keys()
    try:
        weights = match_names(model, load(checkpoint))
    except CheckpointError as error:
        raise CheckpointError(f'{checkpoint}: {error}') from error
    differences = []
    for label, keys in (('missing key', expected - weights.keys()), ('unexpected key', weights.keys() - expected)):
        if keys:
            others = f' and {len(keys) - 1} more' if len(keys) > 1 else ''
            differences.append(f'{label} {min(keys)}{others}')
    if differences:
        raise CheckpointError(f'{checkpoint}: does not fit the config: {"; ".join(differences)}')
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # the second line names the first weight with another shape
        raise CheckpointError(f'{checkpoint}: does not fit the config: {str(error).splitlines()[1].strip()}') from None


@dataclass
class Prediction:
    """Prediction of a model for one image.

    Attributes:
        picture: Image with the prediction drawn on it, (H, W, 3), uint8, RGB.
        result: Prediction as a dictionary that can be written as JSON. Detectors return ``objects``, sorted by score,
            with class, score, box (x1, y1, x2, y2 in pixels) and, for instance segmentation, mask (COCO RLE).
            Segmentors return ``classes`` with class and share of the pixels, sorted by share. Classifiers return
            ``classes`` with class and score, the five with the highest scores.
        labels: Class index of each pixel, (H, W), uint8; None unless the model is a segmentor.
    """

    picture: np.ndarray
    result: Dict[str, Any]
    labels: Optional[np.ndarray] = None


class Predictor:
    """Model that predicts and draws the prediction for an image file, optimized for inference on a CPU.

    Images are read by :func:`mmvitzoo.images.read_image` instead of the loader of the config's test pipeline.

    Args:
        config: Config, its path or its name, see :func:`load_model`.
        checkpoint: Path or URL of a checkpoint. None leaves the weights random.
        device: Torch device, such as ``'cuda:1'``. None selects the GPU if there is one, else the CPU.
        score_thr: Score threshold from 0 to 1; detections below it are dropped.

    Raises:
        ValueError: There is no such config, its ``default_scope`` is not one of the three toolboxes, or its test
            pipeline does not read 8-bit color images. Or ``score_thr`` is not from 0 to 1.
        FileNotFoundError: There is no such checkpoint.
        CheckpointError: The checkpoint cannot be read or does not fit the model.
    """

    def __init__(
        self,
        config: Union[str, Path, Config],
        checkpoint: Union[str, Path, None] = None,
        device: Optional[str] = None,
        score_thr: float = 0.3,
    ):
        if not 0 <= score_thr <= 1:
            raise ValueError(f'score_thr is a number from 0 to 1, got {score_thr}')
        device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
        self.model = load_model(config, checkpoint).to(device)
        if device.type == 'cpu':
            optimize_for_inference(self.model)
        self.score_thr = score_thr
        self.scope = self.model.cfg.default_scope
        dataset = self.model.cfg.test_dataloader.dataset
        while 'pipeline' not in dataset:  # wrapped, as in ConcatDataset
            dataset = dataset.dataset if 'dataset' in dataset else dataset.datasets[0]
        with DefaultScope.overwrite_default_scope(self.scope):
            # The class names come from the dataset, since the authors' checkpoints do not hold them.
            self.metainfo = DATASETS.build(dict(dataset, lazy_init=True)).metainfo
            loader, *transforms = Compose(dataset.pipeline).transforms
        # Other loaders give other channels or depths, for which the model was trained.
        if (
            type(loader) is not LoadImageFromFile
            or loader.color_type != 'color'
            or loader.imdecode_backend == 'tifffile'
        ):
            raise ValueError(
                "the test pipeline must begin with LoadImageFromFile(color_type='color', imdecode_backend='cv2'), "
                f'got {loader}'
            )
        self.dtype = np.float32 if loader.to_float32 else np.uint8
        self.pipeline = Compose([x for x in transforms if not isinstance(x, LoadAnnotations)])

    def __call__(self, path: Union[str, Path]) -> Prediction:
        """Predicts for an image file.

        Args:
            path: Image file, see :func:`mmvitzoo.images.read_image`.

        Raises:
            ValueError: There is no such file, it is not an image, or its samples or bands are not supported.
        """
        image = read_image(path)
        convert_sample = dict(mmdet=self._detect, mmseg=self._segment, mmpretrain=self._classify)[self.scope]
        with DefaultScope.overwrite_default_scope(self.scope):
            return convert_sample(self._predict(path, image), image)

    @torch.no_grad()
    def _predict(self, path: Union[str, Path], image: np.ndarray) -> BaseDataElement:
        """Runs the test pipeline on an image that was read, and the model on its output."""
        pixels = np.ascontiguousarray(image[..., ::-1], self.dtype)  # the pipelines take BGR
        shape = image.shape[:2]
        data = self.pipeline(dict(img=pixels, img_shape=shape, ori_shape=shape, img_path=str(path), img_id=0))
        (sample,) = self.model.test_step({key: [value] for key, value in data.items()})
        return sample.cpu()

    def _detect(self, sample: BaseDataElement, image: np.ndarray) -> Prediction:
        from mmdet.visualization import DetLocalVisualizer

        instances = sample.pred_instances
        instances = sample.pred_instances = instances[instances.scores >= self.score_thr]
        visualizer = DetLocalVisualizer()
        visualizer.dataset_meta = dict(classes=self.metainfo['classes'], palette=self.metainfo.get('palette', 'random'))
        visualizer.add_datasample('', image, sample, draw_gt=False, pred_score_thr=self.score_thr)
        fields = zip(instances.labels.tolist(), instances.scores.tolist(), instances.bboxes.tolist())
        objects = [{'class': self._name(label), 'score': score, 'box': box} for label, score, box in fields]
        for detection, mask in zip(objects, instances.get('masks', ())):
            detection['mask'] = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            detection['mask']['counts'] = detection['mask']['counts'].decode()  # JSON holds no bytes
        objects.sort(key=lambda detection: -detection['score'])
        return Prediction(visualizer.get_image(), dict(objects=objects))

    def _segment(self, sample: BaseDataElement, image: np.ndarray) -> Prediction:
        from mmseg.visualization import SegLocalVisualizer

        labels = sample.pred_sem_seg.data[0].numpy().astype(np.uint8)
        visualizer = SegLocalVisualizer()
        visualizer.dataset_meta = dict(self.metainfo)
        visualizer.add_datasample('', image, sample, draw_gt=False)
        classes, pixels = np.unique(labels, return_counts=True)
        shares = sorted(zip((pixels / labels.size).tolist(), classes.tolist()), reverse=True)
        result = dict(classes=[{'class': self._name(label), 'share': share} for share, label in shares])
        return Prediction(visualizer.get_image(), result, labels)

    def _classify(self, sample: BaseDataElement, image: np.ndarray) -> Prediction:
        from mmpretrain.visualization import UniversalVisualizer

        classes = self.metainfo.get('classes')
        picture = UniversalVisualizer().visualize_cls(image, sample, classes=classes, draw_gt=False)
        scores, labels = sample.pred_score.topk(min(TOPK, len(sample.pred_score)))
        topk = zip(labels.tolist(), scores.tolist())
        return Prediction(picture, dict(classes=[{'class': self._name(x), 'score': score} for x, score in topk]))

    def _name(self, label: int) -> str:
        return self.metainfo['classes'][label] if 'classes' in self.metainfo else str(label)
