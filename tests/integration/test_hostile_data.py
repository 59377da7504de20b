"""Training and inference with unusual data: extreme image sizes, degenerate annotations, NaN and infinity."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from forms import FORMS, slim
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from pycocotools import mask as rle
from torch.utils._python_dispatch import TorchDispatchMode

from mmvitzoo import optimize_for_inference
from mmvitzoo.models import SimpleFeaturePyramid

ROOT = Path(__file__).resolve().parents[2]
MASK_RCNN, VITDET, FPN, CLASSIFIER = (
    'mpvit/mask-rcnn_mpvit-tiny_fpn_mini-coco.py',
    'vitdet/mask-rcnn_plainvit-mini_mini-coco.py',
    'scalablevit/scalablevit-mini_fpn_mini-coco.py',
    'vit/plainvit-mini_mini-classes.py',
)
HEIGHT, WIDTH = 64, 96
NAN = float('nan')
BOX = [20, 10, 30, 40]
every_form = pytest.mark.parametrize('form', FORMS)
every_detector = pytest.mark.parametrize('name', [MASK_RCNN, VITDET])


@pytest.fixture(scope='module')
def images(workspace, tmp_path_factory):
    """A photograph with its semantic map, and images of extreme sizes."""
    folder = tmp_path_factory.mktemp('images')
    photo = cv2.imread(str(workspace / 'data' / 'mini' / 'train' / '000001.jpg'))[:HEIGHT, :WIDTH]
    grey = cv2.cvtColor(photo, cv2.COLOR_BGR2GRAY)
    wide = cv2.resize(photo, (10000, 40))
    pictures = dict(photo=photo, pixel=photo[:1, :1], wide=wide, map=grey // 25, ignored=np.full_like(grey, 255))
    for name, picture in pictures.items():
        cv2.imwrite(str(folder / f'{name}.png'), picture)
    return folder


@pytest.fixture(scope='module')
def trained():
    """Configs with their models, each built once."""
    built = {}

    def trained(name):
        if name not in built:
            config = Config.fromfile(ROOT / 'configs' / name)
            init_default_scope(config.default_scope)
            if name == FPN:
                # MMSegmentation looks up a class weight of ignored pixels as well; see its issues 3734 and 3831.
                config.model.decode_head.loss_decode.class_weight = None
            if name == CLASSIFIER:  # the Runner passes it to the model
                config.model.data_preprocessor = config.data_preprocessor
            torch.manual_seed(0)
            built[name] = config, MODELS.build(config.model)
            built[name][1].init_weights()
        init_default_scope(built[name][0].default_scope)
        return built[name]

    return trained


def pipeline(config, mode):
    return config[f'{mode}_dataloader'].dataset.pipeline


def sample(config, mode, image, semantic='map.png'):
    """Runs the config's pipeline on an image with a class label and a semantic map."""
    meta = dict(img_path=str(image), gt_label=3, seg_map_path=str(image.parent / semantic), seg_fields=[])
    return Compose(pipeline(config, mode))(dict(meta, reduce_zero_label=False, label_map=None))


def annotation(box, **kwargs):
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    return dict(dict(bbox=box, area=w * h, iscrowd=0, category_id=4, segmentation=[polygon]), **kwargs)


def detection(config, mode, folder, tmp_path, contents, resize=None):
    """Builds the samples of the config's dataset for files with annotations."""
    infos, annotations = [], []
    for i, (name, found) in enumerate(contents):
        height, width = cv2.imread(str(folder / name)).shape[:2]
        infos.append(dict(id=i, file_name=name, height=height, width=width))
        annotations += [dict(ann, id=len(annotations) + j, image_id=i) for j, ann in enumerate(found)]
    categories = [dict(id=i, name=str(i)) for i in range(10)]
    (tmp_path / 'coco.json').write_text(json.dumps(dict(images=infos, annotations=annotations, categories=categories)))
    steps = [step for step in pipeline(config, mode) if step.type != 'Resize' or not resize]
    dataset = dict(config[f'{mode}_dataloader'].dataset, data_root=str(folder), data_prefix=dict(img=''))
    if resize:
        steps.insert(-1, dict(type='Resize', scale=resize, keep_ratio=True))
    data = DATASETS.build(dict(dataset, ann_file=str(tmp_path / 'coco.json'), pipeline=steps))
    assert len(data) == len(contents)  # as configured here, MMDetection filters no image
    return [data[i] for i in range(len(data))]


def train_step(model, samples):
    """Runs a training step, checks that its loss and gradients are finite, and returns its data."""
    model.train().zero_grad()
    data = model.data_preprocessor(pseudo_collate(samples), True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    assert loss.isfinite()
    for name, value in model.named_parameters():
        # Distributed training waits for every gradient: none may be missing.
        assert value.grad is not None and value.grad.isfinite().all(), name
    return data


@torch.no_grad()
def predict(model, samples):
    model.eval()
    return model(**model.data_preprocessor(pseudo_collate(samples), False), mode='predict')


def check_predictions(results, height, width):
    for result in results:
        found = result.pred_instances
        assert len(found) and found.scores.isfinite().all() and found.masks.shape[1:] == (height, width)
        assert found.bboxes.min() >= 0 and (found.bboxes.max(0)[0] <= torch.tensor([width, height] * 2)).all()


CROWD = dict(
    size=[HEIGHT, WIDTH], counts=rle.encode(np.asfortranarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8)))['counts'].decode()
)
OBJECTS = {  # boxes, and the number of them that training uses
    'none': ([], 0),
    'zero area': ([[10, 10, 0, 20], [10, 10, 20, 0], [10, 10, 0, 0]], 0),
    'negative area': ([[50, 50, -10, -10]], 0),
    'not a number': ([[NAN, NAN, NAN, NAN]], 0),
    'outside': ([[1000, 1000, 20, 20], [-100, -100, 20, 20]], 0),
    'half outside': ([[-10, -10, 30, 30], [80, 50, 1000, 1000]], 2),
    'a pixel': ([[5, 5, 1, 1]], 1),
    'whole image': ([[0, 0, WIDTH, HEIGHT]], 1),
    'many times the same': (50 * [BOX], 50),
}


@pytest.mark.parametrize('case', OBJECTS)
def test_degenerate_boxes(case, images, trained, tmp_path):
    config, model = trained(MASK_RCNN)
    boxes, num_used = OBJECTS[case]
    contents = [('photo.png', [annotation(box) for box in boxes])]
    data = train_step(model, detection(config, 'train', images, tmp_path, contents))
    assert [len(x.gt_instances) for x in data['data_samples']] == [num_used]


@every_detector
@pytest.mark.parametrize('second', [[], [annotation(BOX)], [annotation(BOX, iscrowd=1, segmentation=CROWD)]])
def test_batches_with_an_empty_image(name, second, images, trained, tmp_path):
    """No object in the batch, in one of its images, and crowds alone, which are not trained on."""
    config, model = trained(name)
    contents = [('photo.png', []), ('photo.png', second)]
    train_step(model, detection(config, 'train', images, tmp_path, contents))
    check_predictions(predict(model, detection(config, 'val', images, tmp_path, contents)), HEIGHT, WIDTH)


@every_detector
@pytest.mark.parametrize('image, height, width', [('pixel.png', 1, 1), ('wide.png', 40, 10000)])
def test_detectors_on_extreme_sizes(name, image, height, width, images, trained, tmp_path):
    """Resizing with the aspect ratio makes 10000 x 40 one pixel high, which padding extends to 32."""
    config, model = trained(name)
    contents = 2 * [(image, [annotation([0, 0, width, height])])]
    scale = (192, 160)
    data = train_step(model, detection(config, 'train', images, tmp_path, contents, scale))
    assert min(data['inputs'].shape[2:]) >= 32
    check_predictions(predict(model, detection(config, 'val', images, tmp_path, contents[:1], scale)), height, width)
    if name == MASK_RCNN or image == 'pixel.png':  # without resizing; ViTDet would take minutes for the wide image
        check_predictions(predict(model, detection(config, 'val', images, tmp_path, contents[:1])), height, width)


@pytest.mark.parametrize('image', ['pixel.png', 'wide.png'])
def test_classifier_on_extreme_sizes(image, images, trained):
    config, model = trained(CLASSIFIER)
    train_step(model, 2 * [sample(config, 'train', images / image)])
    assert predict(model, [sample(config, 'val', images / image)])[0].pred_score.isfinite().all()


def test_segmentor_on_extreme_sizes(images, trained):
    """The pipeline does not enlarge an image of one pixel; the data preprocessor pads it to 8 x 8."""
    config, model = trained(FPN)
    steps = [step for step in pipeline(config, 'val') if step.type != 'LoadAnnotations']
    pixel, wide = (Compose(steps)(dict(img_path=str(images / f'{name}.png'))) for name in ('pixel', 'wide'))
    result = predict(model, [wide])[0]
    assert result.pred_sem_seg.data.shape == (1, 40, 10000) and result.seg_logits.data.isfinite().all()
    assert model.data_preprocessor.test_cfg == dict(size_divisor=8)
    assert predict(model, [pixel])[0].pred_sem_seg.data.shape == (1, 1, 1)


@pytest.mark.parametrize('maps', [('ignored.png', 'ignored.png'), ('ignored.png', 'map.png')])
def test_ignored_semantic_maps(maps, images, trained):
    config, model = trained(FPN)
    data = train_step(model, [sample(config, 'train', images / 'photo.png', name) for name in maps])
    ignored = [(x.gt_sem_seg.data == 255).all().item() for x in data['data_samples']]
    assert ignored == [name == 'ignored.png' for name in maps]
    has_gradient = any(value.grad.abs().sum() > 0 for value in model.parameters())
    assert has_gradient == (False in ignored)


@every_form
@pytest.mark.parametrize('number', [NAN, float('inf')])
def test_nan_and_inf_propagate_per_image(form, number):
    model = slim(form).eval()
    x = torch.randn(3, 3, 70, 96)
    corrupted = x.clone()
    corrupted[1, 0, 30, 40] = number
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            maps, expected = model(corrupted), model(x)
        for found, clean in zip(maps, expected):
            assert not found[1].isfinite().all()
            torch.testing.assert_close(found[[0, 2]], clean[[0, 2]], rtol=1e-4, atol=1e-4)


def test_nan_propagates_through_the_pyramid():
    neck = SimpleFeaturePyramid(16, 8).eval()
    x = torch.randn(2, 16, 8, 12)
    expected = neck((x,))
    x[1, 0, 0, 0] = NAN  # a pixel that max pooling with stride 2 reads
    for found, clean in zip(neck((x,)), expected):
        assert found[1].isnan().any() and torch.equal(found[0], clean[0])


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that an operator returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [
            x.untyped_storage().nbytes()
            for x in (out if isinstance(out, (tuple, list)) else [out])
            if isinstance(x, torch.Tensor)
        ]
        self.size = max([self.size, *sizes])
        return out


# Forms with relative positions, whose attention to a whole strip needs a table with a row for each pair of columns.
WITH_TABLES = ('vitdet', 'vitae', 'vitae_s', 'mvitv2', 'mvitv2_mlp', 'mvitv2_windows')


@every_form
@torch.no_grad()
def test_memory_of_a_strip_is_linear_in_its_width(form):
    """For 32 x 10000 pixels, the relative positions of an optimized model stay small."""
    model = optimize_for_inference(slim(form).eval())
    sizes = []
    for width in (2500, 10000):
        with LargestTensor() as largest:
            maps = model(torch.randn(1, 3, 32, width))
        sizes.append(largest.size / 2**20)
        assert all(x.isfinite().all() for x in maps)
    for x, stride in zip(maps, FORMS[form].strides):
        assert x.shape[2:] == (32 // stride, -(-10000 // stride))
    assert sizes[1] < (64 if form in WITH_TABLES else 1.1 * 4 * sizes[0])
