"""Config names, Predictor, tools/infer.py and the toolboxes' inferencers."""

import json
import re
import sys
import traceback
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from mim.commands.download import download
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from PIL import Image
from pycocotools import mask as rle

import mmvitzoo
from mmvitzoo.checkpoints import CheckpointError, export, save
from mmvitzoo.images import read_image, to_rgb
from mmvitzoo.inference import Predictor, crop_mask, load_model, load_weights, merge_tiles
from mmvitzoo.zoo import FAMILIES, TASKS, family_of, tasks_of

DETECTOR = 'mask-rcnn_mpvit-tiny_fpn_mini-coco'
BOXES = 'retinanet_scalablevit-mini_fpn_mini-coco'
SEGMENTOR = 'plainvit-mini_mln_upernet_mini-coco'
CLASSIFIER = 'plainvit-mini_mini-classes'
TASK_NAMES = {
    'Image Classification': 'classification',
    'Object Detection': 'detection',
    'Instance Segmentation': 'instance-segmentation',
    'Semantic Segmentation': 'semantic-segmentation',
}


@pytest.fixture(scope='module')
def image(workspace):
    return sorted((workspace / 'data/mini/val').glob('*.jpg'))[0]


@pytest.fixture(scope='module')
def checkpoints(workspace):
    """Saves checkpoints with random weights."""
    folder = workspace / 'random'
    folder.mkdir()
    for name in (DETECTOR, BOXES, SEGMENTOR, CLASSIFIER):
        torch.manual_seed(0)
        save(load_model(name).state_dict(), folder / f'{name}.pth')
    return folder


# ---------------------------------------------------------------- names


def test_list_models_equals_metafiles(workspace):
    models = [
        model
        for path in workspace.glob('configs/*/metafile.yml')
        for model in yaml.safe_load(path.read_text())['Models']
    ]
    assert mmvitzoo.list_models() == sorted(model['Name'] for model in models)
    for model in models:
        tasks = {TASK_NAMES[result['Task']] for result in model.get('Results', [])}
        if tasks:
            assert set(tasks_of(model['Name'])) == tasks, model['Name']


def test_list_models_by_family_and_task():
    names = mmvitzoo.list_models()
    by_family = [mmvitzoo.list_models(family) for family in FAMILIES]
    assert sorted(sum(by_family, [])) == names and all(by_family)
    assert set().union(*(mmvitzoo.list_models(task=task) for task in TASKS)) == set(names)
    assert mmvitzoo.list_models('vitae', 'detection') == mmvitzoo.list_models('vitae') != []
    assert mmvitzoo.list_models('vitae', 'classification') == []
    assert mmvitzoo.list_models('mpvit', pattern='retinanet*tiny*1x*') == ['retinanet_mpvit-tiny_fpn_1x_coco']
    assert family_of('deit-base_upernet_8xb2-80k_ade20k-512x512') == 'plainvit'
    types = dict(mpvit='MPViT', mvitv2='MViTv2', scalablevit='ScalableViT', plainvit='PlainViT', vitae='ViTAE')
    types['timm'] = 'TimmBackbone'
    for family, (name, *_) in zip(FAMILIES, by_family):
        config = mmvitzoo.get_config(name)
        assert config.model.backbone.type == types[family] and config.filename.endswith(f'/{name}.py')


@pytest.mark.parametrize(
    'call, message',
    [
        (lambda: mmvitzoo.list_models('swin'), "family must be one of mpvit, .*, got 'swin'$"),
        (lambda: mmvitzoo.list_models('*tiny*'), r"family must be .*, got '\*tiny\*'; pattern= takes wildcards"),
        (lambda: mmvitzoo.list_models(task='pose'), "task must be one of classification, .*, got 'pose'"),
        (lambda: mmvitzoo.get_config('mpvit-tyny_8xb128_in1k'), 'no such config.*did you mean mpvit-tiny_8xb128_in1k'),
        (lambda: mmvitzoo.get_config('nothing/of/this.py'), 'nothing/of/this.py: no such config'),
    ],
)
def test_unknown_names_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_mim_downloads_published_weights(tmp_path, monkeypatch):
    urls = []
    module = sys.modules[download.__module__]  # the function of the same name shadows the module
    monkeypatch.setattr(module, 'download_from_file', lambda url, path, **kwargs: urls.append(url))
    download('mmvitzoo', ['mvitv2-tiny_8xb256_in1k'], str(tmp_path))
    assert urls == ['https://dl.fbaipublicfiles.com/mvit/mvitv2_models/MViTv2_T_in1k.pyth']
    assert mmvitzoo.get_config(str(tmp_path / 'mvitv2-tiny_8xb256_in1k.py')).model.backbone.type == 'MViTv2'


@pytest.mark.parametrize(
    'name, reason',
    [
        ('scalablevit-small_8xb128_in1k', 'no address is known; published by the authors with their implementation'),
        (DETECTOR, 'there are none; train this config'),
    ],
)
def test_mim_download_gives_reason_without_published_weights(tmp_path, name, reason):
    with pytest.raises(TypeError) as error:  # MIM raises a string, which is a TypeError
        download('mmvitzoo', [name], str(tmp_path))
    assert reason in ''.join(traceback.format_exception(error.type, error.value, error.tb))


# ---------------------------------------------------------------- the toolboxes' inferencers


@pytest.mark.stack
@pytest.mark.parametrize('by_name', [True, False])
def test_det_inferencer_equals_predictor(workspace, checkpoints, image, by_name):
    from mmdet.apis import DetInferencer

    config = mmvitzoo.get_config(DETECTOR) if by_name else str(workspace / f'configs/mpvit/{DETECTOR}.py')
    inferencer = DetInferencer(config, str(checkpoints / f'{DETECTOR}.pth'), device='cpu', show_progress=False)
    (prediction,) = inferencer(str(image), return_vis=True, no_save_vis=True)['predictions']
    objects = Predictor(DETECTOR, checkpoints / f'{DETECTOR}.pth', 'cpu', score_thr=0)(image).result['objects']
    assert len(objects) == len(prediction['scores']) > 0
    scores = [x['score'] for x in objects]  # of the optimized model
    np.testing.assert_allclose(scores, sorted(prediction['scores'], reverse=True), rtol=1e-4)


@pytest.mark.stack
@pytest.mark.parametrize('by_name', [True, False])
def test_seg_inferencer_equals_predictor(workspace, checkpoints, image, by_name):
    from mmseg.apis import MMSegInferencer

    config = mmvitzoo.get_config(SEGMENTOR) if by_name else str(workspace / f'configs/vit/{SEGMENTOR}.py')
    inferencer = MMSegInferencer(config, str(checkpoints / f'{SEGMENTOR}.pth'), device='cpu')
    labels = inferencer(str(image), out_dir='')['predictions']
    prediction = Predictor(SEGMENTOR, checkpoints / f'{SEGMENTOR}.pth', 'cpu')(image)
    assert np.array_equal(prediction.labels, labels)
    assert sum(x['share'] for x in prediction.result['classes']) == pytest.approx(1)


@pytest.mark.stack
@pytest.mark.parametrize('by_name', [True, False])
def test_classification_inferencer_equals_predictor(workspace, checkpoints, image, by_name):
    from mmpretrain import ImageClassificationInferencer

    config = mmvitzoo.get_config(CLASSIFIER) if by_name else str(workspace / f'configs/vit/{CLASSIFIER}.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):  # unlike the others, it sets no scope
        inferencer = ImageClassificationInferencer(config, str(checkpoints / f'{CLASSIFIER}.pth'), device='cpu')
        (prediction,) = inferencer(str(image))
    classes = Predictor(CLASSIFIER, checkpoints / f'{CLASSIFIER}.pth', 'cpu')(image).result['classes']
    assert len(classes) == 5 and classes[0]['score'] == pytest.approx(prediction['pred_score'])
    assert classes[0]['class'] == str(prediction['pred_label'])  # the classes are digits


def test_predictors_of_several_toolboxes_alternate(checkpoints, image):
    predictors = [Predictor(name, checkpoints / f'{name}.pth', 'cpu') for name in (DETECTOR, SEGMENTOR, CLASSIFIER)]
    first = [predictor(image).result for predictor in predictors]
    assert [predictor(image).result for predictor in predictors] == first


@pytest.mark.parametrize('name', [DETECTOR, BOXES, SEGMENTOR, CLASSIFIER])
def test_predictions_equal_toolbox_that_reads_the_file(checkpoints, image, tmp_path, name):
    from mmdet.apis import inference_detector
    from mmpretrain import ImageClassificationInferencer
    from mmseg.apis import inference_model

    predictor = Predictor(name, checkpoints / f'{name}.pth', 'cpu', score_thr=0)
    picture, exif = Image.open(image), Image.Exif()
    exif[0x0112] = 6  # rotated
    picture.convert('L').save(tmp_path / 'gray.jpg')
    picture.save(tmp_path / 'rotated.jpg', exif=exif)
    picture.convert('RGBA').save(tmp_path / 'alpha.png')
    for path in (str(image), *map(str, sorted(tmp_path.iterdir()))):
        result = predictor(path).result
        with DefaultScope.overwrite_default_scope(predictor.scope):
            if predictor.scope == 'mmdet':
                instances = inference_detector(predictor.model, path).pred_instances
                objects = zip(instances.scores.tolist(), instances.bboxes.tolist())
                expected = sorted(objects, key=lambda x: -x[0])
                assert [(x['score'], x['box']) for x in result['objects']] == expected != []
            elif predictor.scope == 'mmseg':
                labels = inference_model(predictor.model, path).pred_sem_seg.data[0].numpy()
                assert np.array_equal(predictor(path).labels, labels)
            else:
                inferencer = ImageClassificationInferencer(predictor.model)
                (sample,) = inferencer.forward(next(inferencer.preprocess([path])))
                assert [x['score'] for x in result['classes']] == sample.pred_score.topk(5)[0].tolist()


@pytest.mark.parametrize('name', [DETECTOR, SEGMENTOR, CLASSIFIER])
def test_12_bit_data_give_the_prediction_of_the_8_bit_image(checkpoints, image, tmp_path, name):
    predictor = Predictor(name, checkpoints / f'{name}.pth', 'cpu', score_thr=0)
    pixels = cv2.imread(str(image))
    pixels[0, 0] = 255  # the largest value tells the depth
    cv2.imwrite(str(tmp_path / 'a.png'), pixels)
    expected = predictor(tmp_path / 'a.png')
    for file in ('12_bit.png', '12_bit.tif'):
        cv2.imwrite(str(tmp_path / file), pixels.astype(np.uint16) << 4 | pixels >> 4)
        prediction = predictor(tmp_path / file)
        assert prediction.result == expected.result
        assert np.array_equal(prediction.labels, expected.labels)


@pytest.mark.parametrize(
    'loader',
    [
        dict(type='LoadImageFromFile', color_type='unchanged'),
        dict(type='LoadImageFromFile', imdecode_backend='tifffile'),
        dict(type='LoadImageFromNDArray'),
    ],
)
def test_pipeline_with_other_loader_is_an_error(loader):
    config = mmvitzoo.get_config(DETECTOR)
    config.test_dataloader.dataset.pipeline[0] = loader
    with pytest.raises(ValueError, match='the test pipeline must begin with LoadImageFromFile.*, got LoadImageFrom'):
        Predictor(config, device='cpu')


def test_pipeline_of_wrapped_dataset(checkpoints, image):
    config = mmvitzoo.get_config(BOXES)
    dataset = config.test_dataloader.dataset
    config.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[dataset])
    checkpoint = checkpoints / f'{BOXES}.pth'
    wrapped, plain = (Predictor(x, checkpoint, 'cpu', score_thr=0)(image) for x in (config, BOXES))
    assert wrapped.result == plain.result


@pytest.mark.parametrize('name', [DETECTOR, SEGMENTOR, CLASSIFIER])
def test_arrays_pillow_images_and_batches_give_the_predictions_of_files(checkpoints, image, tmp_path, name):
    predictor = Predictor(name, checkpoints / f'{name}.pth', 'cpu', score_thr=0)
    Image.open(image).crop((0, 0, 100, 64)).save(tmp_path / 'small.png')
    files = [image, tmp_path / 'small.png', str(image)]
    expected = [predictor(file) for file in files]
    for images in (files, [read_image(file) for file in files], [Image.open(file) for file in files]):
        predictions = predictor(images, batch_size=3)
        for prediction, other in zip(predictions, expected):
            assert np.array_equal(prediction.picture.shape, other.picture.shape)
            for key, values in other.result.items():
                assert [x['class'] for x in prediction.result[key]] == [x['class'] for x in values]
                number = 'share' if name == SEGMENTOR else 'score'
                np.testing.assert_allclose(*([x[number] for x in y] for y in (prediction.result[key], values)), 1e-4)
    gray = Image.open(image).convert('L')
    assert predictor(np.asarray(gray)).result == predictor(gray).result


@pytest.mark.parametrize(
    'image, message',
    [
        (np.zeros((8, 8, 3), np.float32), 'of uint8, gray or RGB, got float32 of (8, 8, 3)'),
        (np.zeros((8, 8), np.uint16), 'got uint16 of (8, 8)'),
        (np.zeros((8, 8, 4), np.uint8), 'got uint8 of (8, 8, 4)'),
        (np.zeros((0, 8, 3), np.uint8), 'got uint8 of (0, 8, 3)'),
        (Image.new('I;16', (8, 8)), 'images of Pillow have one of the modes 1, L, LA, P, PA, RGB, RGBA'),
        (torch.zeros(3, 8, 8), 'an image is a path, an array or an image of Pillow, got Tensor'),
    ],
)
def test_other_images_are_refused(image, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        to_rgb(image)


def encode(mask):
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(encoded, counts=encoded['counts'].decode())


def test_masks_are_encoded_like_pycocotools():
    torch.manual_seed(0)
    for mask in (torch.rand(17, 23) > 0.5, torch.ones(5, 4), torch.zeros(6, 3), torch.eye(7)):
        mask = mask.numpy().astype(bool)
        assert crop_mask(mask).encode(mask.shape) == encode(mask)
        image = np.zeros((40, 50), bool)
        image[9 : 9 + len(mask), 20 : 20 + mask.shape[1]] = mask
        assert crop_mask(mask, 20, 9).encode(image.shape) == encode(image)


def test_only_detections_of_different_tiles_are_merged():
    """A small box in a large one is another object if one tile has both, else a part of it."""
    boxes = torch.tensor([[0, 0, 60, 60], [5, 5, 25, 25]]).float()
    tiles = [
        InstanceData(bboxes=boxes, scores=torch.tensor([0.9, 0.8]), labels=torch.tensor([1, 1])),
        InstanceData(bboxes=boxes[1:], scores=torch.tensor([0.7]), labels=torch.tensor([1])),
    ]
    assert merge_tiles(tiles[:1]).bboxes.tolist() == boxes.tolist()
    assert merge_tiles(tiles).bboxes.tolist() == boxes.tolist()
    assert merge_tiles([tiles[0][:1], tiles[1]]).bboxes.tolist() == boxes[:1].tolist()
    two = InstanceData(
        bboxes=torch.tensor([[5.0, 5, 25, 25], [30, 30, 50, 50]]), scores=torch.rand(2) / 2, labels=torch.tensor([1, 1])
    )
    assert len(merge_tiles([tiles[0][:1], two])) == 2  # one of the two is a part of the large box, not both


def find_rectangles(tiles, names, batch_size, keep):
    """Detects the rectangles of one color in each tile; the blue value less 100 is the class."""
    samples = []
    for tile in tiles:
        values = [value for value in np.unique(tile[..., 2]) if value]
        masks = np.array([tile[..., 2] == value for value in values]).reshape(-1, *tile.shape[:2])
        spans = [[np.flatnonzero(mask.any(axis)) for axis in (0, 1)] for mask in masks]
        boxes = [[x[0], y[0], x[-1] + 1, y[-1] + 1] for x, y in spans]
        instances = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            scores=torch.tensor([mask.sum() / 10000 for mask in masks], dtype=torch.float32),
            labels=torch.tensor([int(value) - 100 for value in values], dtype=torch.long),
            masks=torch.from_numpy(masks),
        )
        samples.append(keep(len(samples), SimpleNamespace(pred_instances=instances)))
    return samples


def test_tiles_find_objects_of_all_tiles_once(monkeypatch):
    predictor = Predictor(DETECTOR, device='cpu', score_thr=0)
    monkeypatch.setattr(predictor, '_predict', find_rectangles)
    image = np.zeros((300, 420, 3), np.uint8)
    boxes = {'1': (5, 5, 20, 30), '2': (90, 60, 150, 140), '3': (140, 60, 180, 140), '4': (400, 280, 420, 300)}
    for name, (x1, y1, x2, y2) in boxes.items():
        image[y1:y2, x1:x2, 2] = 100 + int(name)
    monkeypatch.setattr('mmvitzoo.inference.MAX_PICTURE', 210)
    prediction = predictor(image, tile_size=100)
    found = {x['class']: x for x in prediction.result['objects']}
    assert len(prediction.result['objects']) == len(found) == 4
    for name in boxes:
        mask = image[..., 2] == 100 + int(name)
        x, y = (np.flatnonzero(mask.any(axis)) for axis in (0, 1))
        assert found[name]['box'] == [x[0], y[0], x[-1] + 1, y[-1] + 1]
        assert found[name]['mask'] == json.loads(json.dumps(encode(mask)))
    assert prediction.size == (300, 420) and prediction.picture.shape == (150, 210, 3)
    assert prediction.picture[50, 60].tolist() != [0, 0, 102]  # the mask is painted
    empty = predictor(np.zeros((150, 150, 3), np.uint8), tile_size=100)
    assert empty.result == dict(objects=[])


def test_tiles_that_hold_the_image_change_nothing(checkpoints, image):
    predictor = Predictor(BOXES, checkpoints / f'{BOXES}.pth', 'cpu', score_thr=0)
    whole, tiles = predictor(image), predictor([image, image], batch_size=2, tile_size=640)[1]
    best = whole.result['objects'][0]
    assert tiles.result['objects'][0]['score'] == best['score']
    assert len(tiles.result['objects']) <= len(whole.result['objects'])
    with pytest.raises(ValueError, match='the side of a tile is an integer of at least 32 pixels, got 16'):
        predictor(image, tile_size=16)
    with pytest.raises(ValueError, match='tiles are for detectors; a segmentor has test_cfg=dict'):
        Predictor(SEGMENTOR, device='cpu')(image, tile_size=64)
    with pytest.raises(ValueError, match='the overlap of tiles is at least 0 and below 1, got 1.5'):
        predictor(image, tile_size=64, tile_overlap=1.5)


# ---------------------------------------------------------------- tools/infer.py

INFER = 'tools/infer.py'


@pytest.mark.parametrize('name', [DETECTOR, BOXES, SEGMENTOR, CLASSIFIER])
def test_infer_folder_of_images(run_tool, workspace, checkpoints, image, name):
    folder, out = workspace / 'my images', workspace / f'results-{name}'
    (folder / 'subfolder').mkdir(parents=True, exist_ok=True)
    picture = Image.open(image)
    picture.save(folder / 'a.png')
    picture.convert('L').save(folder / 'subfolder' / 'a.jpg')
    (folder / 'notes.txt').write_text('not an image')
    (workspace / 'images').unlink(missing_ok=True)
    (workspace / 'images').symlink_to(folder)
    output = run_tool(f'{INFER} {name} random/{name}.pth images --out {out.name} --score-thr 0 --device cpu')
    assert f'{out.name}: 2 of 2 images' in output and '2/2' in output
    for stem in ('a.png', 'subfolder/a.jpg'):
        assert read_image(out / f'pictures/{stem}.png').shape == np.asarray(picture).shape
        content = json.loads((out / f'predictions/{stem}.json').read_text())
        assert (content['width'], content['height']) == picture.size
        if name in (DETECTOR, BOXES):
            assert content['objects'] and content['objects'][0]['class'] in '0123456789'
            scores = [item['score'] for item in content['objects']]
            assert scores == sorted(scores, reverse=True)
        if name == DETECTOR:
            assert rle.decode(content['objects'][0]['mask']).shape == picture.size[::-1]
        assert (out / f'predictions/{stem}.png').exists() == (name == SEGMENTOR)
    if name == SEGMENTOR:
        labels = np.asarray(Image.open(out / 'predictions/a.png.png'))
        largest = json.loads((out / 'predictions/a.png.json').read_text())['classes'][0]
        label = 0 if largest['class'] == 'background' else int(largest['class']) + 1
        assert largest['share'] == pytest.approx((labels == label).mean())


def test_infer_continues_after_unreadable_image(run_tool, workspace, checkpoints, image):
    folder = workspace / 'unreadable'
    folder.mkdir()
    (folder / 'empty.jpg').touch()
    (folder / 'text.png').write_text('hello')
    Image.open(image).save(folder / 'z.png')
    Image.open(image).convert('CMYK').save(folder / 'bands.tif')
    Image.open(image).save(folder / 'a.gif')
    output = run_tool(f'{INFER} {CLASSIFIER} random/{CLASSIFIER}.pth unreadable --out readable', fails=True)
    assert 'empty.jpg: cannot be read as an image' in output and 'text.png: cannot' in output
    assert 'bands.tif: TIFF with 4 bands' in output
    assert 'readable: 1 of 4 images' in output and (workspace / 'readable/predictions/z.png.json').exists()


@pytest.mark.parametrize(
    'arguments, message',
    [
        (f'swin random/{CLASSIFIER}.pth data/mini/val', 'swin: no such config'),
        (f'{CLASSIFIER} nowhere.pth data/mini/val', 'nowhere.pth: no such checkpoint file'),
        (f'{CLASSIFIER} random/{CLASSIFIER}.pth nowhere', 'nowhere: no such image or folder'),
        (f'{CLASSIFIER} random/{CLASSIFIER}.pth configs/vit', 'configs/vit: no image in this folder'),
        (f'{CLASSIFIER} random/{CLASSIFIER}.pth nowhere.mp4', 'nowhere.mp4: no such video, or OpenCV cannot read it'),
        (f'{CLASSIFIER} random/{CLASSIFIER}.pth 99', '99: no such camera, or OpenCV cannot read it'),
        (f'{CLASSIFIER} random/{CLASSIFIER}.pth data/mini/val --tiles 64', 'tiles are for detectors; a segmentor has'),
        (f'{CLASSIFIER} random/{CLASSIFIER}.pth data/mini/val --device cuda:99', "device 'cuda:99' cannot be used: "),
        (f'{CLASSIFIER} random/{CLASSIFIER}.pth data/mini/val --batch-size 0', '--batch-size is at least 1, got 0'),
        (f'{BOXES} random/{BOXES}.pth data/mini/val --score-thr 30', 'score_thr is a number from 0 to 1, got 30.0'),
        (f'{DETECTOR} random/{CLASSIFIER}.pth data/mini/val', 'the keys fit no mpvit/* layout, but plainvit/mmvitzoo'),
        (f'{DETECTOR} configs/vit/README.md data/mini/val', 'README.md: is neither a PyTorch checkpoint nor'),
    ],
)
def test_infer_with_invalid_arguments(run_tool, workspace, checkpoints, arguments, message):
    output = run_tool(f'{INFER} {arguments} --out invalid', fails=True)
    assert message in output
    assert not (workspace / 'invalid').exists()


def test_infer_skips_pictures_of_an_earlier_run(run_tool, workspace, checkpoints, image):
    folder = workspace / 'again'
    folder.mkdir()
    Image.open(image).save(folder / 'a.png')
    for _ in range(2):
        output = run_tool(f'{INFER} {CLASSIFIER} random/{CLASSIFIER}.pth again --out again/seen')
        assert 'again/seen: 1 of 1 images' in output
    output = run_tool(f'{INFER} {CLASSIFIER} random/{CLASSIFIER}.pth again/seen --out again/seen', fails=True)
    assert 'again/seen: no image outside again/seen' in output


def test_infer_does_not_write_into_a_file(run_tool, workspace):
    output = run_tool(f'{INFER} {CLASSIFIER} nowhere.pth data/mini/val --out {INFER}', fails=True)
    assert output.splitlines()[-1].endswith(f'--out is a folder, got the file {INFER}')


@pytest.mark.parametrize('name', [BOXES, SEGMENTOR])
def test_infer_video(run_tool, workspace, checkpoints, image, name):
    frame = cv2.imread(str(image))
    size = frame.shape[1::-1]
    writer = cv2.VideoWriter(str(workspace / 'drive.avi'), cv2.VideoWriter_fourcc(*'MJPG'), 5, size)
    for shift in range(3):
        writer.write(np.roll(frame, 8 * shift, 1))
    writer.release()
    tiles = '--tiles 128' if name == BOXES else ''
    output = run_tool(f'{INFER} {name} random/{name}.pth drive.avi --out video-{name} --score-thr 0 {tiles}')
    assert f'video-{name}: 3 frames' in output and '3/3' in output
    lines = (workspace / f'video-{name}/predictions/drive.avi.jsonl').read_text().splitlines()
    frames = [json.loads(line) for line in lines]
    assert [(x['frame'], x['seconds'], x['width'], x['height']) for x in frames] == [
        (i, i / 5, *size) for i in range(3)
    ]
    assert all(x['objects' if name == BOXES else 'classes'] for x in frames)
    video = cv2.VideoCapture(str(workspace / f'video-{name}/pictures/drive.avi.mp4'))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 3 and video.read()[1].shape == frame.shape


def test_infer_camera_until_interrupt(run_tool, workspace, checkpoints, image, monkeypatch):
    frames = iter([cv2.imread(str(image))] * 2)

    def read():
        for frame in frames:
            return True, frame
        raise KeyboardInterrupt

    camera = SimpleNamespace(isOpened=lambda: True, get=lambda number: 0.0, read=read)
    monkeypatch.setattr(cv2, 'VideoCapture', lambda number: camera if number == 1 else None)
    output = run_tool(f'{INFER} {CLASSIFIER} random/{CLASSIFIER}.pth 1 --out camera')
    assert 'camera: 2 frames' in output
    assert len((workspace / 'camera/predictions/camera1.jsonl').read_text().splitlines()) == 2
    assert (workspace / 'camera/pictures/camera1.mp4').stat().st_size > 1000


# ---------------------------------------------------------------- weights


def test_load_model_converts_authors_layouts(tmp_path):
    config = mmvitzoo.get_config('plainvit-tiny_in1k')
    model = load_model(config)
    weights = export(model.state_dict(), 'plainvit', 'timm')
    assert not any(key.startswith('backbone.') for key in weights)
    save(weights, tmp_path / 'timm.pth')
    loaded = load_model(config, tmp_path / 'timm.pth').state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.items())


@pytest.mark.stack
def test_loaded_models_work_in_the_toolboxes_functions():
    """They find the transforms of the pipeline in the default scope."""
    from mmdet.apis import inference_detector
    from mmseg.apis import inference_model

    image = np.zeros((64, 64, 3), np.uint8)
    assert len(inference_model(load_model(SEGMENTOR), image).pred_sem_seg.data) == 1
    assert 'bboxes' in inference_detector(load_model(BOXES), image).pred_instances


def test_mismatched_weights_are_an_error(tmp_path):
    model = load_model(CLASSIFIER)
    weights = model.state_dict()
    save({'layer1.weight': torch.zeros(1)}, tmp_path / 'resnet.pth')
    with pytest.raises(CheckpointError, match='resnet.pth: .*layer1.weight'):
        load_weights(model, tmp_path / 'resnet.pth')
    for change, message in (
        (dict(extra=torch.zeros(1)), 'unexpected key extra$'),
        ({'head.fc.weight': torch.zeros(7, 128)}, 'size mismatch for head.fc.weight'),
    ):
        save({**weights, **change}, tmp_path / 'a.pth', overwrite=True)
        with pytest.raises(CheckpointError, match=f'a.pth: does not fit the config: {message}'):
            load_weights(model, tmp_path / 'a.pth')
    del weights['head.fc.bias'], weights['head.fc.weight']
    save(weights, tmp_path / 'a.pth', overwrite=True)
    with pytest.raises(CheckpointError, match='missing key head.fc.bias and 1 more$'):
        load_weights(model, tmp_path / 'a.pth')


def test_unsupported_default_scope_is_an_error():
    config = mmvitzoo.get_config(CLASSIFIER)
    config.default_scope = 'mmpose'
    with pytest.raises(ValueError, match="default_scope must be one of mmdet, mmseg, mmpretrain, got 'mmpose'"):
        load_model(config)
