"""Web page in headless Chromium."""

import re
import shutil
import sys
from importlib import import_module

import mmcv
import numpy as np
import pytest
import torch

from mmvitzoo import list_models
from mmvitzoo.checkpoints import save
from mmvitzoo.inference import load_model

DETECTOR = 'retinanet_scalablevit-mini_fpn_mini-coco'
CLASSIFIER = 'plainvit-mini_mini-classes'
TIMEOUT = 60_000  # milliseconds


@pytest.fixture(scope='module')
def app():
    """Imports the module lazily, since it requires gradio."""
    return import_module('mmvitzoo.app')


@pytest.fixture(scope='module')
def page(app):
    from playwright.sync_api import sync_playwright

    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    assert chromium, 'this test requires Chromium: apt-get install chromium'
    server = app.build_app()
    _, url, _ = server.launch(server_name='127.0.0.1', prevent_thread_lock=True, quiet=True)
    flags = ['--no-sandbox', '--disable-gpu', '--disable-background-networking']
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.set_default_timeout(TIMEOUT)
        page.goto(url)
        yield page
        browser.close()
    server.close()


@pytest.fixture(scope='module')
def checkpoints(workspace):
    folder = workspace / 'app_checkpoints'
    folder.mkdir()
    for name in (DETECTOR, CLASSIFIER):
        torch.manual_seed(0)
        save(load_model(name).state_dict(), folder / f'{name}.pth')
    return folder


def submit(page, config, checkpoint):
    page.get_by_label('Config name or path').fill(config)
    page.get_by_label('Config name or path').press('Enter')
    page.get_by_label('Checkpoint').fill(str(checkpoint))
    page.get_by_role('button', name='Run').click()


@pytest.mark.slow
def test_page_filters_predicts_and_recovers_from_errors(page, workspace, checkpoints):
    from playwright.sync_api import expect

    expect(page.get_by_role('heading', name='MMViTZoo')).to_be_visible(timeout=TIMEOUT)
    page.get_by_role('button', name='Run').click()
    expect(page.get_by_text('choose a config first')).to_be_visible(timeout=TIMEOUT)

    page.get_by_label('Family').fill('vitae')
    page.get_by_label('Family').press('Enter')
    for _ in range(60):  # an open list is not updated: close and open it until it is
        page.get_by_role('heading', name='MMViTZoo').click()
        page.get_by_label('Config name or path').click()
        page.wait_for_timeout(500)
        if page.get_by_role('option').count() == len(list_models('vitae')):
            break
    expect(page.get_by_role('option')).to_have_text([re.compile(name) for name in list_models('vitae')])
    page.get_by_label('Family').fill('all')
    page.get_by_label('Family').press('Enter')

    image = sorted((workspace / 'data/mini/val').glob('*.jpg'))[0]
    page.locator('input[type=file]').first.set_input_files(image)
    expect(page.locator('img[src*="gradio_api/file"]')).to_have_count(1, timeout=TIMEOUT)
    submit(page, CLASSIFIER, '')
    expect(page.get_by_text('The weights are random')).to_be_visible(timeout=TIMEOUT)
    expect(page.get_by_text('1.2 M parameters; 1.9 GFLOPs for an image of 224 x 224 pixels.')).to_be_visible()
    expect(page.get_by_text('Latency: ')).to_be_visible()

    submit(page, DETECTOR, checkpoints / f'{DETECTOR}.pth')
    expect(page.get_by_text('2.9 M parameters; 28.3 GFLOPs')).to_be_visible(timeout=TIMEOUT)
    expect(page.get_by_text('The weights are random')).to_be_hidden()
    expect(page.get_by_role('columnheader', name='box').first).to_be_visible()
    images = page.locator('img[src*="gradio_api/file"]')
    expect(images).to_have_count(2)  # the drawn prediction and the uploaded image
    natural_size = 'x => [x.naturalWidth, x.naturalHeight]'
    assert images.nth(0).evaluate(natural_size) == images.nth(1).evaluate(natural_size)
    figure = page.get_by_test_id('matplotlib').locator('img')
    assert figure.evaluate('x => x.naturalWidth') >= 1000

    submit(page, DETECTOR, checkpoints / f'{CLASSIFIER}.pth')
    expect(page.get_by_text(f'{CLASSIFIER}.pth: does not fit the config: missing key backbone.')).to_be_visible(
        timeout=TIMEOUT
    )
    submit(page, 'resnet50', checkpoints / f'{CLASSIFIER}.pth')
    expect(page.get_by_text('resnet50: no such config')).to_be_visible(timeout=TIMEOUT)
    submit(page, CLASSIFIER, checkpoints / f'{CLASSIFIER}.pth')
    expect(page.get_by_text('1.2 M parameters')).to_be_visible(timeout=TIMEOUT)  # waits for the end of the run


@pytest.mark.slow
def test_run_without_image_is_an_error(app):
    with pytest.raises(app.gr.Error, match='upload an image first'):
        app.run(CLASSIFIER, '', None, 0.3)


@pytest.mark.slow
def test_cost_of_unsupported_model(app, monkeypatch):
    def measure(config):
        raise NotImplementedError('Detector has unsupported modules: gan_head')

    monkeypatch.setattr(app, 'measure', measure)
    cost = app.cost_of.__wrapped__(DETECTOR)
    assert cost == 'FLOPs: not available, Detector has unsupported modules: gan_head.'


@pytest.mark.slow
def test_large_image_is_resized_for_feature_maps(app, tmp_path):
    mmcv.imwrite(np.random.RandomState(0).randint(256, size=(700, 1400, 3), dtype=np.uint8), str(tmp_path / 'a.png'))
    figure = app.features(app.Predictor(CLASSIFIER), str(tmp_path / 'a.png'))
    assert figure.axes[0].get_xlabel() == '320 x 640 pixels'


@pytest.mark.slow
def test_command_line_options(app, monkeypatch):
    calls = []
    monkeypatch.setattr(app.gr.Blocks, 'launch', lambda page, **options: calls.append(options))
    monkeypatch.setattr(sys, 'argv', ['app.py', '--host', '0.0.0.0', '--port', '8080'])
    app.main()
    assert calls == [dict(server_name='0.0.0.0', server_port=8080)]


def test_gradio_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    monkeypatch.delitem(sys.modules, 'mmvitzoo.app', raising=False)
    with pytest.raises(ImportError, match='the web page requires gradio: pip install -r requirements/app.txt'):
        import_module('mmvitzoo.app')
