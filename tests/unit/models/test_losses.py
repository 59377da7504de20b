"""FederatedLoss: formula, class sampling, use in MMDetection's box head, argument checks."""

import json
import math
from functools import partial

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope

from mmvitzoo.models import FederatedLoss


@pytest.fixture(autouse=True)
def mmdet_scope():
    """Resets the default scope, which other tests change."""
    init_default_scope('mmdet')


COUNTS = (100, 1, 25, 9, 0)
LABEL = torch.tensor([2, 5, 0, 2, 5, 5])  # 5 is background


@pytest.fixture
def federated(tmp_path):
    """Returns a function that builds a loss with an annotation file of given image counts."""

    def federated(counts=COUNTS, **kwargs):
        # The ids neither start at 0 nor are consecutive, and the file is not sorted by id.
        categories = [dict(id=3 * i + 7, name=f'c{i}', image_count=count) for i, count in enumerate(counts)]
        ann_file = write(tmp_path, dict(categories=categories[1::2] + categories[::2]))
        return FederatedLoss(len(counts), ann_file, **kwargs)

    torch.manual_seed(0)
    return federated


def write(folder, content):
    path = folder / 'lvis.json'
    path.write_text(json.dumps(content))
    return str(path)


def scores(label=LABEL, columns=6):
    # A separate generator does not change the global one, which samples the classes.
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(label), columns, dtype=torch.float64, generator=generator).requires_grad_()


def reference_loss(cls_score, label, classes, weight=None):
    total = 0.0
    for i, row in enumerate(cls_score.tolist()):
        for c in classes:
            p = 1 / (1 + math.exp(-row[c]))
            total -= (1 if weight is None else weight[i].item()) * math.log(p if label[i] == c else 1 - p)
    return total


def sampled_classes(loss, label, columns):
    """Returns the score columns that receive a gradient."""
    cls_score = scores(label, columns)
    loss(cls_score, label).backward()
    return set(cls_score.grad.abs().sum(0).nonzero().flatten().tolist())


@pytest.mark.parametrize('num_sampled', [5, 50])
def test_equals_double_loop_over_boxes_and_classes(federated, num_sampled):
    cls_score = scores()
    loss = federated(num_sampled=num_sampled)(cls_score, LABEL)
    assert loss.item() == pytest.approx(reference_loss(cls_score, LABEL, range(5)) / 6)


def test_box_weights_avg_factor_and_loss_weight(federated):
    cls_score, weight = scores(), torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 0.0])
    total = reference_loss(cls_score, LABEL, range(5), weight)
    loss = federated()
    assert loss(cls_score, LABEL, weight).item() == pytest.approx(total / 6)
    assert loss(cls_score, LABEL, weight, avg_factor=4.0).item() == pytest.approx(total / 4)
    assert loss(cls_score, LABEL, weight, reduction_override='mean').item() == pytest.approx(total / 6)
    assert federated(loss_weight=0.3)(cls_score, LABEL, weight, 4.0).item() == pytest.approx(0.3 * total / 4)


def test_only_sampled_classes_contribute(federated):
    cls_score = scores()
    loss = federated(num_sampled=3)(cls_score, LABEL)
    loss.backward()
    columns = cls_score.grad.abs().sum(0)
    classes = columns.nonzero().flatten().tolist()
    assert len(classes) == 3 and {0, 2} < set(classes)
    assert loss.item() == pytest.approx(reference_loss(cls_score, LABEL, classes) / 6)
    assert (cls_score.grad[:, classes] != 0).all()  # every box contributes to a sampled class


@pytest.mark.parametrize('num_sampled', [1, 2])
def test_present_classes_are_always_sampled(federated, num_sampled):
    loss = federated(num_sampled=num_sampled)
    assert sampled_classes(loss, torch.tensor([1, 4, 1, 5]), 6) == {1, 4}
    assert sampled_classes(loss, torch.tensor([4, 3, 2, 1, 0]), 6) == {0, 1, 2, 3, 4}


def test_present_classes_are_not_sampled_twice(federated):
    loss = federated((1_000_000, 1, 1, 1), num_sampled=2)
    for _ in range(20):
        assert len(sampled_classes(loss, torch.tensor([0, 4]), 5)) == 2
    # The probabilities are not changed by a step.
    assert 0 in sampled_classes(loss, torch.tensor([4]), 5)


@pytest.mark.parametrize(
    'power, expected', [(None, (0.1, 0.3, 0.6)), (1.0, (1 / 46, 9 / 46, 36 / 46)), (0.0, (1 / 3, 1 / 3, 1 / 3))]
)
def test_sampling_probability_is_power_of_image_count(federated, power, expected):
    loss = federated((1, 9, 36), num_sampled=1, **({} if power is None else dict(power=power)))
    cls_score = torch.tensor([[1.0, 2.0, 3.0, 0.0]]).expm1().log()  # the loss of class c alone is c + 1
    samples = torch.stack([loss(cls_score, torch.tensor([3])) for _ in range(2000)]).round().long() - 1
    frequency = samples.bincount(minlength=3) / len(samples)
    # The tolerance is at least 3.5 standard deviations.
    assert frequency.tolist() == pytest.approx(expected, abs=0.04)


def test_classes_without_images_are_sampled_last(federated):
    counts, background = (100, 0, 100, 0), torch.tensor([4])
    loss = federated(counts, num_sampled=2)
    # Their probability is small but not zero: about one step in a hundred samples them.
    assert sum(sampled_classes(loss, background, 5) == {0, 2} for _ in range(300)) > 285
    assert sampled_classes(federated(counts, num_sampled=4), background, 5) == {0, 1, 2, 3}
    assert sampled_classes(federated((0, 0, 0), num_sampled=3), torch.tensor([1]), 4) == {0, 1, 2}


def test_background_column_does_not_contribute(federated):
    loss = federated()
    cls_score = scores()
    before = loss(cls_score, LABEL)
    before.backward()
    assert (cls_score.grad[:, -1] == 0).all() and (cls_score.grad[:, :-1] != 0).all()
    changed = cls_score.detach().clone()
    changed[:, -1] += 10
    assert loss(changed, LABEL).item() == before.item()


def test_loss_without_boxes_is_zero(federated):
    cls_score = scores(LABEL[:0])
    loss = federated()(cls_score, LABEL[:0])
    loss.backward()
    assert loss.item() == 0


def test_annotation_file_is_read_once_at_first_loss(federated, tmp_path):
    loss = FederatedLoss(5, str(tmp_path / 'missing.json'))
    cls_score = scores()
    torch.testing.assert_close(loss.get_activation(cls_score), 1 / (1 + (-cls_score).exp()))
    assert loss.get_cls_channels(5) == 6
    assert loss.get_accuracy(cls_score, LABEL).keys() == {'acc_classes'}
    with pytest.raises(FileNotFoundError, match='missing.json'):
        loss(cls_score, LABEL)
    loss = federated()
    before = loss(cls_score, LABEL)
    (tmp_path / 'lvis.json').unlink()
    assert loss(cls_score, LABEL).item() == pytest.approx(before.item())  # the order of summation differs


def test_accuracy_ignores_background_boxes(federated):
    best = torch.tensor([2, 0, 0, 1, 5, 4])  # correct, background, correct, wrong, background, background
    cls_score = torch.nn.functional.one_hot(best, 6).double()
    cls_score[:, -1] += 2  # background has the highest score everywhere
    accuracy = partial(federated().get_accuracy, cls_score)
    assert accuracy(LABEL)['acc_classes'].item() == pytest.approx(200 / 3)
    assert accuracy(torch.full((6,), 5))['acc_classes'].item() == 0


@pytest.mark.parametrize('name', ['FederatedLoss', 'mmvitzoo.FederatedLoss'])
def test_build_from_registry(name):
    assert type(MODELS.build(dict(type=name, num_classes=3, ann_file='missing.json'))) is FederatedLoss


@pytest.mark.parametrize(
    'content, num_categories, num_counts',
    [
        (dict(categories=[dict(id=i, image_count=1) for i in range(4)]), 4, 4),
        (dict(categories=[dict(id=i, image_count=1) for i in range(6)]), 6, 6),
        (dict(categories=[dict(id=i) for i in range(5)]), 5, 0),
        (dict(categories=[dict(id=0), *(dict(id=i, image_count=1) for i in range(1, 5))]), 5, 4),
        (dict(images=[]), 0, 0),
    ],
)
def test_invalid_annotations(tmp_path, content, num_categories, num_counts):
    loss = FederatedLoss(5, write(tmp_path, content))
    expected = f'must have 5 categories .*, got {num_categories} categories, {num_counts} with an image_count'
    with pytest.raises(ValueError, match=f'lvis.json {expected}'):
        loss(scores(), LABEL)


@pytest.mark.parametrize('reduction', ['sum', 'none'])
def test_invalid_reduction(federated, reduction):
    with pytest.raises(ValueError, match=f"reduction_override must be None or 'mean', got '{reduction}'"):
        federated()(scores(), LABEL, reduction_override=reduction)


@pytest.mark.stack
def test_in_mmdetection_box_head(federated):
    from mmdet.models import Shared4Conv1FCBBoxHead

    head = Shared4Conv1FCBBoxHead(
        in_channels=8,
        conv_out_channels=8,
        fc_out_channels=16,
        num_classes=5,
        loss_cls=dict(type='FederatedLoss', num_classes=5, ann_file=federated().ann_file, loss_weight=0.5),
    )
    assert head.fc_cls.out_features == 6
    assert type(head.loss_cls) is FederatedLoss
    cls_score, bbox_pred = head(torch.randn(6, 8, 7, 7))
    rois = torch.tensor([[0.0, 8 * i, 8, 8 * i + 16, 24] for i in range(6)])
    weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    losses = head.loss(cls_score, bbox_pred, rois, LABEL, weight, torch.zeros(6, 4), torch.ones(6, 4))
    # The head divides by the number of boxes with a positive weight.
    expected = 0.5 * reference_loss(cls_score, LABEL, range(5), weight) / 5
    assert losses['loss_cls'].item() == pytest.approx(expected, rel=1e-5)
    assert 0 <= losses['acc_classes'] <= 100
    losses['loss_cls'].backward()
    assert (head.fc_cls.weight.grad.abs().sum(1) > 0).tolist() == [True] * 5 + [False]

    cls_score = torch.full((6, 6), -9.0)
    cls_score[0, 3], cls_score[:, 5] = 2.0, 9.0  # one box of class 3; the background score has no influence
    config = ConfigDict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10)
    (result,) = head.predict_by_feat((rois,), (cls_score,), (bbox_pred,), [dict(img_shape=(64, 64))], config)
    assert result.labels.tolist() == [3]
    assert result.scores.item() == pytest.approx(1 / (1 + math.exp(-2)))
