"""Inference with models of MMDetection, MMSegmentation and MMPretrain through one interface.

The toolboxes predict and draw. Checkpoints are read by :func:`mmvitzoo.checkpoints.load`, which converts the authors'
files and executes no code from them.
"""

import copy
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import cv2
import numpy as np
import torch
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from PIL import Image
from torch import nn

from .checkpoints import CheckpointError, load, match_names
from .images import to_rgb
from .models.backbones.base import is_number
from .models.layers import optimize_for_inference
from .zoo import TOOLBOXES, get_config, set_default_scope

TOPK = 5  # classes reported by a classifier
MIN_TILE = 32  # pixels
MAX_PICTURE = 4096  # pixels; drawing takes 120 bytes a pixel
ImageLike = Union[str, Path, np.ndarray, Image.Image]


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


def dataset_config(config: Config) -> Config:
    """Returns the config of the test dataset, of the first one if there are several."""
    dataset = config.test_dataloader.dataset
    while 'pipeline' not in dataset:  # wrapped, as in ConcatDataset
        dataset = dataset.dataset if 'dataset' in dataset else dataset.datasets[0]
    return dataset


def dataset_metainfo(config: Config) -> Mapping[str, Any]:
    """Returns the metainfo of the test dataset of a config, such as the class names, without reading the data."""
    with DefaultScope.overwrite_default_scope(config.default_scope):
        return DATASETS.build(dict(dataset_config(config), lazy_init=True)).metainfo


def reduce_picture(image: np.ndarray) -> np.ndarray:
    """Returns an image, (H, W, 3), with at most ``MAX_PICTURE`` pixels a side."""
    factor = min(1, MAX_PICTURE / max(image.shape))
    if factor == 1:
        return image
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


class ObjectMask(NamedTuple):
    """Mask of an object in a window of an image.

    Attributes:
        inside: (H', W'), bool.
        left: Column of the window in the image.
        top: Row of the window.
    """

    inside: np.ndarray
    left: int
    top: int

    def encode(self, size: Tuple[int, int]) -> Dict[str, Any]:
        """Encodes the mask in COCO's RLE for an image of (H, W)."""
        from pycocotools import mask as rle

        columns, rows = self.inside.T.nonzero()  # RLE runs down the columns
        # The values before the first and behind the last pixel make these start and end a run.
        pixels = (columns + self.left) * size[0] + rows + self.top
        starts = pixels[np.diff(pixels, prepend=-2) > 1]
        ends = pixels[np.diff(pixels, append=size[0] * size[1] + 1) > 1] + 1
        borders = np.concatenate([[0], np.stack([starts, ends], 1).flatten()]).tolist()
        if borders[-1] < size[0] * size[1]:
            borders.append(size[0] * size[1])
        encoded = rle.frPyObjects(dict(counts=np.diff(borders).tolist(), size=list(size)), *size)
        return dict(encoded, counts=encoded['counts'].decode())  # JSON holds no bytes

    def paint(self, image: np.ndarray, color: Sequence[int]) -> None:
        """Blends a color into the pixels of the mask, in place."""
        window = image[self.top :, self.left :][: len(self.inside), : self.inside.shape[1]]
        window[self.inside] = 0.4 * window[self.inside] + 0.6 * np.array(color)


def crop_mask(mask: np.ndarray, left: int = 0, top: int = 0) -> ObjectMask:
    """Returns the smallest window that holds a mask, (H, W), whose corner is at (left, top) of an image."""
    rows, cols = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return ObjectMask(mask[:0, :0], left, top)
    inside = mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].copy()
    return ObjectMask(inside, left + int(cols[0]), top + int(rows[0]))


def union(masks: Sequence[ObjectMask]) -> ObjectMask:
    """Returns the union of masks of one image."""
    left, top = (min(getattr(mask, name) for mask in masks) for name in ('left', 'top'))
    width = max(mask.left + mask.inside.shape[1] for mask in masks) - left
    inside = np.zeros((max(mask.top + len(mask.inside) for mask in masks) - top, width), bool)
    for mask in masks:
        inside[mask.top - top :, mask.left - left :][: len(mask.inside), : mask.inside.shape[1]] |= mask.inside
    return ObjectMask(inside, left, top)


def merge_tiles(instances: Sequence[InstanceData]) -> InstanceData:
    """Merges the detections in overlapping tiles of an image.

    SAHI's greedy merging (https://arxiv.org/abs/2202.06934) takes the detections of a class from the highest score on.
    A detection of another tile is a part of the same object if at least half of the smaller box lies in the other box,
    at most one of each tile: boxes and masks become their unions. Detections of one tile stay apart.

    Args:
        instances: Detections in each tile, with boxes in pixels of the image and, if the detector has masks, a list of
            :class:`ObjectMask`.

    Returns:
        Detections in the image.
    """
    from sahi.postprocess.combine import batched_greedy_nmm

    tiles = torch.cat([torch.full((len(x),), i) for i, x in enumerate(instances)])
    found = InstanceData.cat(list(instances))
    boxes, scores, labels = found.bboxes, found.scores, found.labels
    columns = torch.cat([boxes, scores[:, None], labels[:, None]], 1).numpy()
    groups = []
    for kept, merged in batched_greedy_nmm(columns, 'IOS', 0.5).items():
        parts = {tiles[kept].item(): kept}  # one detection of each tile
        others = [[i] for i in merged if parts.setdefault(tiles[i].item(), i) != i]
        groups += [list(parts.values()), *others]
    result = found[torch.tensor([group[0] for group in groups], dtype=torch.long)]
    for i, group in enumerate(groups):
        result.bboxes[i] = torch.cat([boxes[group, :2].amin(0), boxes[group, 2:].amax(0)])
    if 'masks' in found:
        result.masks = [union([found.masks[i] for i in group]) for group in groups]
    return result


@dataclass
class Prediction:
    """Prediction of a model for one image.

    Attributes:
        picture: Image with the prediction drawn on it, (H, W, 3), uint8, RGB; reduced to at most 4096 pixels a
            side.
        size: (H, W) of the image.
        result: Prediction as a dictionary that can be written as JSON. Detectors return ``objects``, sorted by score,
            with class, score, box (x1, y1, x2, y2 in pixels) and, for instance segmentation, mask (COCO RLE).
            Segmentors return ``classes`` with class and share of the pixels, sorted by share. Classifiers return
            ``classes`` with class and score, the five with the highest scores.
        labels: Class index of each pixel, (H, W), uint8, or uint16 with indices above 255; None unless the model is a
            segmentor.
    """

    picture: np.ndarray
    size: Tuple[int, int]
    result: Dict[str, Any]
    labels: Optional[np.ndarray] = None


class Predictor:
    """Model that predicts and draws the prediction for images, optimized for inference on a CPU.

    Images are read by :func:`mmvitzoo.images.to_rgb` instead of the loader of the config's test pipeline.

    Args:
        config: Config, its path or its name, see :func:`load_model`.
        checkpoint: Path or URL of a checkpoint. None leaves the weights random.
        device: Torch device, such as ``'cuda:1'``. None selects the GPU if there is one, else the CPU.
        score_thr: Score threshold from 0 to 1; detections below it are dropped.

    Raises:
        ValueError: There is no such config, its ``default_scope`` is not one of the three toolboxes, or its test
            pipeline does not read 8-bit color images. Or ``score_thr`` is not from 0 to 1, or there is no such device.
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
        device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
        try:
            device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:  # PyTorch raises both
            raise ValueError(f'device {device!r} cannot be used: {str(error).splitlines()[0]}') from None
        self.model = load_model(config, checkpoint).to(device)
        if device.type == 'cpu':
            optimize_for_inference(self.model)
        self.score_thr = score_thr
        self.scope = self.model.cfg.default_scope
        dataset = dataset_config(self.model.cfg)
        # The class names come from the dataset, since the authors' checkpoints do not hold them.
        self.metainfo = dataset_metainfo(self.model.cfg)
        with DefaultScope.overwrite_default_scope(self.scope):
            loader, *transforms = Compose(dataset.pipeline).transforms
        # Other loaders give other channels or depths, for which the model was trained.
        if (
            type(loader) is not LoadImageFromFile
            or loader.color_type != 'color'
            or loader.imdecode_backend == 'tifffile'
        ):
            raise ValueError(
                "the test pipeline must begin with LoadImageFromFile(color_type='color'), not of backend 'tifffile', "
                f'got {loader}'
            )
        self.dtype = np.float32 if loader.to_float32 else np.uint8
        self.pipeline = Compose([x for x in transforms if not isinstance(x, LoadAnnotations)])

    def __call__(
        self,
        images: Union[ImageLike, Sequence[ImageLike]],
        batch_size: int = 1,
        tile_size: Optional[int] = None,
        tile_overlap: float = 0.2,
    ) -> Union[Prediction, List[Prediction]]:
        """Predicts for an image or several.

        Args:
            images: Image file, RGB array or image of Pillow, see :func:`mmvitzoo.images.to_rgb`; or a list of these.
            batch_size: Number of images, or tiles, that go through the model together, as far as they are neighbors in
                the list and have one size behind the test pipeline. None is padded to the size of another.
            tile_size: Side of overlapping square tiles in pixels, in which a detector searches large images. Objects in
                several tiles are merged by SAHI, see :func:`merge_tiles`. None predicts for the whole image at once.
            tile_overlap: Overlap of neighboring tiles as a share of their side, at least 0 and below 1. An object that
                is larger than the overlap may be cut in every tile.

        Returns:
            A prediction, or a list of them for a list of images.

        Raises:
            TypeError: An image has an unsupported type.
            ValueError: There is no such file, it is not an image, or its samples or bands are not supported. Or tiles
                are asked of a model that is no detector.
            ImportError: SAHI, which merges the tiles, is not installed.
        """
        if not isinstance(images, (list, tuple)):
            return self([images], batch_size, tile_size, tile_overlap)[0]
        if not is_number(batch_size) or batch_size < 1:
            raise ValueError(f'batch_size is a positive integer, got {batch_size}')
        if tile_size is not None:
            self.check_tiles(tile_size, tile_overlap)
        convert_sample = dict(mmdet=self._detect, mmseg=self._segment, mmpretrain=self._classify)[self.scope]
        predictions: List[Prediction] = []
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size]
            arrays = [to_rgb(image) for image in chunk]
            with DefaultScope.overwrite_default_scope(self.scope):
                if tile_size is not None:
                    predictions += [self._detect_in_tiles(x, batch_size, tile_size, tile_overlap) for x in arrays]
                else:
                    names = [str(x) if isinstance(x, (str, Path)) else 'image' for x in chunk]
                    samples = self._predict(arrays, names, batch_size)
                    predictions += [convert_sample(*x) for x in zip(samples, arrays)]
        return predictions

    def check_tiles(self, tile_size: int, tile_overlap: float) -> None:
        """Checks whether the model can predict in tiles.

        Args:
            tile_size: Side of the tiles in pixels.
            tile_overlap: Overlap as a share of the side.

        Raises:
            ValueError: The model is no detector, or a number is outside its range.
            ImportError: SAHI, which merges the tiles, is not installed.
        """
        if self.scope != 'mmdet':
            raise ValueError("tiles are for detectors; a segmentor has test_cfg=dict(mode='slide') for large images")
        if not is_number(tile_size) or tile_size < MIN_TILE:
            raise ValueError(f'the side of a tile is an integer of at least {MIN_TILE} pixels, got {tile_size}')
        if not 0 <= tile_overlap < 1:
            raise ValueError(f'the overlap of tiles is at least 0 and below 1, got {tile_overlap}')
        if importlib.util.find_spec('sahi') is None:
            raise ImportError('tiles require SAHI: pip install sahi')

    @torch.no_grad()
    def _predict(
        self,
        arrays: Sequence[np.ndarray],
        names: Sequence[str],
        batch_size: int,
        keep: Callable[[int, BaseDataElement], Any] = lambda index, sample: sample,
    ) -> List[Any]:
        """Runs the test pipeline on images, the model on batches of one size, and ``keep`` on its outputs."""
        samples: List[Any] = [None] * len(arrays)
        waiting: Dict[Any, List[Tuple[int, Dict[str, Any]]]] = {}  # by size

        def run(batch: List[Tuple[int, Dict[str, Any]]]) -> None:
            outputs = self.model.test_step({key: [data[key] for _, data in batch] for key in batch[0][1]})
            for (index, _), sample in zip(batch, outputs):
                samples[index] = keep(index, sample.cpu())

        for index, (image, name) in enumerate(zip(arrays, names)):
            pixels = np.ascontiguousarray(image[..., ::-1], self.dtype)  # the pipelines take BGR
            shape = image.shape[:2]
            data = self.pipeline(dict(img=pixels, img_shape=shape, ori_shape=shape, img_path=name, img_id=0))
            if isinstance(data['inputs'], list):
                raise ValueError('test-time augmentation is not supported; set a test pipeline without TestTimeAug')
            batch = waiting.setdefault(data['inputs'].shape, [])
            batch.append((index, data))
            if len(batch) == batch_size:
                run(waiting.pop(data['inputs'].shape))
        for batch in waiting.values():
            run(batch)
        return samples

    def _select_detections(self, sample: BaseDataElement, left: int = 0, top: int = 0) -> InstanceData:
        """Returns the detections above the threshold, whose masks are crops, of an image at (left, top) of another."""
        found = sample.pred_instances[sample.pred_instances.scores >= self.score_thr]
        masks = [crop_mask(mask.numpy(), left, top) for mask in found.get('masks', ())]
        bboxes = found.bboxes + found.bboxes.new_tensor([left, top] * 2)
        result = InstanceData(bboxes=bboxes, scores=found.scores, labels=found.labels)
        if 'masks' in found:
            result.masks = masks
        return result

    def _detect(self, sample: BaseDataElement, image: np.ndarray) -> Prediction:
        return self._detections(self._select_detections(sample), image)

    def _detect_in_tiles(self, image: np.ndarray, batch_size: int, tile_size: int, overlap: float) -> Prediction:
        from sahi.slicing import get_slice_bboxes

        size = image.shape[:2]
        windows = get_slice_bboxes(*size, tile_size, tile_size, False, overlap, overlap)  # (x1, y1, x2, y2)
        tiles = [image[y1:y2, x1:x2] for x1, y1, x2, y2 in windows]

        def keep(index: int, sample: BaseDataElement) -> InstanceData:
            return self._select_detections(sample, *windows[index][:2])

        return self._detections(merge_tiles(self._predict(tiles, ['image'] * len(tiles), batch_size, keep)), image)

    def _detections(self, found: InstanceData, image: np.ndarray) -> Prediction:
        """Draws detections and lists them, highest score first."""
        from mmdet.structures import DetDataSample
        from mmdet.visualization import DetLocalVisualizer
        from mmdet.visualization.palette import get_palette

        size = image.shape[:2]
        masks = found.get('masks', ())
        palette = self.metainfo.get('palette', 'random')
        picture = image.copy()
        if masks:
            colors = get_palette(palette, int(found.labels.max()) + 1)
            for mask, label in zip(masks, found.labels.tolist()):
                mask.paint(picture, colors[label])
        picture = reduce_picture(picture)  # after the masks, which are in pixels of the image
        bboxes = found.bboxes * picture.shape[0] / size[0]
        drawn = InstanceData(bboxes=bboxes, scores=found.scores, labels=found.labels)
        visualizer = DetLocalVisualizer()
        visualizer.dataset_meta = dict(classes=self.metainfo['classes'], palette=palette)
        sample = DetDataSample(pred_instances=drawn)
        # All detections are above the threshold; the visualizer drops those that equal its own.
        visualizer.add_datasample('', picture, sample, draw_gt=False, pred_score_thr=-1)
        fields = zip(found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist())
        objects: List[Dict[str, Any]] = [
            {'class': self._name(label), 'score': score, 'box': box} for label, score, box in fields
        ]
        for detection, mask in zip(objects, masks):
            detection['mask'] = mask.encode(size)
        objects.sort(key=lambda detection: -detection['score'])
        return Prediction(visualizer.get_image(), size, dict(objects=objects))

    def _segment(self, sample: BaseDataElement, image: np.ndarray) -> Prediction:
        from mmseg.structures import SegDataSample
        from mmseg.visualization import SegLocalVisualizer

        labels = sample.pred_sem_seg.data[0].numpy()
        labels = labels.astype(np.uint8 if labels.max() < 256 else np.uint16)
        picture = reduce_picture(image)
        reduced = cv2.resize(labels, picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        drawn = SegDataSample(pred_sem_seg=PixelData(data=torch.from_numpy(reduced.astype(np.int64))[None]))
        visualizer = SegLocalVisualizer()
        visualizer.dataset_meta = dict(self.metainfo)
        visualizer.add_datasample('', picture, drawn, draw_gt=False)
        classes, pixels = np.unique(labels, return_counts=True)
        shares = sorted(zip((pixels / labels.size).tolist(), classes.tolist()), reverse=True)
        result = dict(classes=[{'class': self._name(label), 'share': share} for share, label in shares])
        return Prediction(visualizer.get_image(), image.shape[:2], result, labels)

    def _classify(self, sample: BaseDataElement, image: np.ndarray) -> Prediction:
        from mmpretrain.visualization import UniversalVisualizer

        classes = self.metainfo.get('classes')
        picture = UniversalVisualizer().visualize_cls(reduce_picture(image), sample, classes=classes, draw_gt=False)
        scores, labels = sample.pred_score.topk(min(TOPK, len(sample.pred_score)))
        topk = zip(labels.tolist(), scores.tolist())
        result = dict(classes=[{'class': self._name(x), 'score': score} for x, score in topk])
        return Prediction(picture, image.shape[:2], result)

    def _name(self, label: int) -> str:
        return self.metainfo['classes'][label] if 'classes' in self.metainfo else str(label)
