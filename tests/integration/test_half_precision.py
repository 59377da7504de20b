"""Training in half precision on the demonstration data: losses as in float32, loss scaling, gradient clipping."""

from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forms import slim
from mmengine.optim import build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from torch import Tensor, nn

BATCHES, BATCH_SIZE, PIXELS = 10, 8, 40
EPOCHS = 6
WINDOW = 20
# A slim model learns at these rates. At higher ones, rounding alone makes two trainings diverge.
LEARNING_RATES = dict(mpvit=3e-4, vit=3e-4, vitdet=3e-4, vitae_s=3e-5, mvitv2=2e-4, scalablevit=3e-4)
pytestmark = pytest.mark.filterwarnings('ignore:TF32 acceleration')  # of `torch.backends.mkldnn.flags`
every_family = pytest.mark.parametrize('form', LEARNING_RATES)
# Longer trainings; `make test` runs the two quickest.
FAST_FORMS = ('vit', 'vitdet')


@pytest.fixture(autouse=True)
def mixed_precision_on_cpu(monkeypatch):
    """Lets MMEngine train in float16 on a CPU, which PyTorch supports."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler', partial(torch.amp.GradScaler, 'cpu'))
    monkeypatch.setattr('mmengine.runner.amp.autocast', partial(torch.autocast, 'cpu'))


@pytest.fixture(scope='module')
def batches(workspace):
    """Returns few images, which a slim model learns in a few epochs; the loss then depends on its features."""
    crops = sorted((workspace / 'data' / 'mini' / 'classes' / 'train').glob('*/*.jpg'))
    crops = [crops[i] for i in np.random.RandomState(0).permutation(len(crops))[: BATCHES * BATCH_SIZE]]
    images = np.stack([cv2.resize(cv2.imread(str(path)), (PIXELS, PIXELS)) for path in crops])
    images = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    labels = torch.tensor([int(path.parent.name) for path in crops])
    images = (images - images.mean()) / images.std()
    return list(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE)))


class Classifier(nn.Module):
    """Classifier on the third map.

    The fourth has 2 x 2 positions, too few for the statistics of BatchNorm.
    """

    def __init__(self, form):
        super().__init__()
        self.backbone = slim(form, out_indices=(2,))
        for module in self.backbone.modules():
            if isinstance(module, nn.Linear):
                # With the usual initial weights, attention is nearly uniform and the GELU nearly linear: errors hide.
                nn.init.xavier_uniform_(module.weight)
        self.fc = nn.Linear(self.backbone.out_channels[2], 10)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.fc(self.backbone(images)[0].mean((2, 3))), labels)


class Step(NamedTuple):
    loss: float
    grad_norm: float  # before clipping
    loss_scale: float  # after the step
    update_norm: float  # norm of the change of all parameters


def train(model, batches, dtype, optimizer, max_norm, **loss_scale):
    """Trains one step for each batch and yields its numbers."""
    wrapper = dict(type='OptimWrapper')
    if dtype != 'float32':
        wrapper = dict(type='AmpOptimWrapper', dtype=dtype, loss_scale=loss_scale)
    optim = build_optim_wrapper(model, dict(wrapper, optimizer=optimizer, clip_grad=dict(max_norm=max_norm)))
    model.train()
    for images, labels in batches:
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        # The backward pass of float16 convolutions is slow in oneDNN.
        with torch.backends.mkldnn.flags(enabled=dtype != 'float16'):
            with optim.optim_context(model):
                loss = model(images, labels)
            optim.update_params(loss)
        update = nn.utils.parameters_to_vector(model.parameters()).detach() - before
        scale = 1.0 if dtype == 'float32' else optim.loss_scaler.get_scale()
        yield Step(loss.item(), optim.message_hub.get_scalar('train/grad_norm').current(), scale, update.norm().item())
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize(
    'form', [pytest.param(form, marks=[] if form in FAST_FORMS else pytest.mark.slow) for form in LEARNING_RATES]
)
def test_losses_in_half_precision_equal_those_in_float32(form, batches):
    def run(dtype):
        model = Classifier(form)  # the same initial weights each time
        optimizer = dict(type='AdamW', lr=LEARNING_RATES[form], weight_decay=0.05)
        steps = list(train(model, EPOCHS * batches, dtype, optimizer, max_norm=1.0, init_scale=2.0**12))
        loss, grad_norm, scale, update_norm = torch.tensor(steps, dtype=torch.float64).T
        assert loss.isfinite().all() and grad_norm.isfinite().all() and grad_norm.max() > 1
        assert len(scale.unique()) == 1 and update_norm.min() > 0, 'a step was skipped'
        return loss.unfold(0, WINDOW, 1).mean(1), grad_norm[0].item()

    smooth, grad_norm = run('float32')
    assert smooth[-1] < 0.9 * smooth[0]
    for dtype in ('bfloat16', 'float16'):
        half_smooth, half_grad_norm = run(dtype)
        error = (half_smooth / smooth - 1).abs().max().item()
        assert 0 < error < 0.003, dtype
        assert half_grad_norm == pytest.approx(grad_norm, rel=0.02), dtype  # clipping reads unscaled gradients


@every_family
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_overflow_skips_steps_and_clipping_bounds_updates(form, dtype, batches):
    """The loss scale overflows in float16 but not in bfloat16, which has the range of float32."""
    optimizer = dict(type='SGD', lr=1.0)  # the update is the clipped gradient
    scaling = dict(init_scale=2.0**40, backoff_factor=2.0**-16, growth_interval=2)
    steps = list(train(Classifier(form), batches[:8], dtype, optimizer, max_norm=0.1, **scaling))
    skipped = [step.update_norm == 0 for step in steps]
    assert skipped == ([True, True] + 6 * [False] if dtype == 'float16' else 8 * [False])
    for step, was_skipped in zip(steps, skipped):
        assert np.isfinite(step.grad_norm) != was_skipped
        assert was_skipped or step.update_norm == pytest.approx(0.1, rel=1e-3)
    if dtype != 'float32':
        assert steps[-1].loss_scale == (2.0**11 if dtype == 'float16' else 2.0**44)
