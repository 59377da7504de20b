"""The page, in headless Chromium."""

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
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope='module')
def app():
    """The module, which needs gradio."""
    return import_module('mmvitzoo.app')


@pytest.fixture(scope='module')
def page(app):
    from playwright.sync_api import sync_playwright

    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    assert chromium, 'the page is tested in Chromium: apt-get install chromium'
    served = app.build_app()
    _, address, _ = served.launch(server_name='127.0.0.1', prevent_thread_lock=True, quiet=True)
    flags = ['--no-sandbox', '--disable-gpu', '--disable-background-networking']
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport=dict(width=1280, height=1000))
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        yield page
        browser.close()
    served.close()


@pytest.fixture(scope='module')
def checkpoints(workspace):
    folder = workspace / 'shown'
    folder.mkdir()
    for name in (DETECTOR, CLASSIFIER):
        torch.manual_seed(0)
        save(load_model(name).state_dict(), folder / f'{name}.pth')
    return folder


def ask(page, config, checkpoint):
    page.get_by_label('Config, or its path').fill(config)
    page.get_by_label('Config, or its path').press('Enter')
    page.get_by_label('Checkpoint').fill(str(checkpoint))
    page.get_by_role('button', name='Run').click()


@pytest.mark.slow
def test_page(page, workspace, checkpoints):
    """A visit: a config is found, an image dropped, the result seen; mistakes are told and forgiven."""
    from playwright.sync_api import expect

    expect(page.get_by_role('heading', name='MMViTZoo')).to_be_visible(timeout=PATIENCE)
    page.get_by_role('button', name='Run').click()
    expect(page.get_by_text('choose a config first')).to_be_visible(timeout=PATIENCE)

    page.get_by_label('Family').fill('vitae')
    page.get_by_label('Family').press('Enter')
    for _ in range(60):  # a list that is open does not change
        page.get_by_role('heading', name='MMViTZoo').click()
        page.get_by_label('Config, or its path').click()
        page.wait_for_timeout(500)
        if page.get_by_role('option').count() == len(list_models('vitae')):
            break
    expect(page.get_by_role('option')).to_have_text([re.compile(name) for name in list_models('vitae')])
    page.get_by_label('Family').fill('all')
    page.get_by_label('Family').press('Enter')

    image = sorted((workspace / 'data/mini/val').glob('*.jpg'))[0]
    page.locator('input[type=file]').first.set_input_files(image)
    expect(page.locator('img[src*="gradio_api/file"]')).to_have_count(1, timeout=PATIENCE)
    ask(page, CLASSIFIER, '')
    expect(page.get_by_text('The weights are random')).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text('1.2 M parameters; 1.9 GFLOPs for an image of 224 x 224 pixels.')).to_be_visible()
    expect(page.get_by_text('Latency: ')).to_be_visible()

    ask(page, DETECTOR, checkpoints / f'{DETECTOR}.pth')
    expect(page.get_by_text('2.9 M parameters; 28.3 GFLOPs')).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text('The weights are random')).to_be_hidden()
    expect(page.get_by_role('columnheader', name='box').first).to_be_visible()
    shown = page.locator('img[src*="gradio_api/file"]')
    expect(shown).to_have_count(2)  # the prediction's picture beside the image
    natural = 'x => [x.naturalWidth, x.naturalHeight]'
    assert shown.nth(0).evaluate(natural) == shown.nth(1).evaluate(natural)
    figure = page.get_by_test_id('matplotlib').locator('img')
    assert figure.evaluate('x => x.naturalWidth') >= 1000

    ask(page, DETECTOR, checkpoints / f'{CLASSIFIER}.pth')
    expect(page.get_by_text(f'{CLASSIFIER}.pth: does not fit the config: lacks backbone.')).to_be_visible(
        timeout=PATIENCE
    )
    ask(page, 'resnet50', checkpoints / f'{CLASSIFIER}.pth')
    expect(page.get_by_text('resnet50: no such config')).to_be_visible(timeout=PATIENCE)
    ask(page, CLASSIFIER, checkpoints / f'{CLASSIFIER}.pth')
    expect(page.get_by_text('1.2 M parameters')).to_be_visible(timeout=PATIENCE)  # told when all else is done


@pytest.mark.slow
def test_no_image(app):
    with pytest.raises(app.gr.Error, match='drop an image first'):
        app.run(CLASSIFIER, '', None, 0.3)


@pytest.mark.slow
def test_costs_that_are_not_counted(app, monkeypatch):
    def measure(config):
        raise NotImplementedError('Detector has parts that are not known here: gan_head')

    monkeypatch.setattr(app, 'measure', measure)
    assert app.cost_of.__wrapped__(DETECTOR) == (
        'FLOPs: not counted, Detector has parts that are not known here: gan_head.'
    )


@pytest.mark.slow
def test_features_of_a_large_image(app, tmp_path):
    mmcv.imwrite(np.random.RandomState(0).randint(256, size=(700, 1400, 3), dtype=np.uint8), str(tmp_path / 'a.png'))
    figure = app.features(app.Predictor(CLASSIFIER), str(tmp_path / 'a.png'))
    assert figure.axes[0].get_xlabel() == '320 x 640 pixels'


@pytest.mark.slow
def test_command(app, monkeypatch):
    launched = []
    monkeypatch.setattr(app.gr.Blocks, 'launch', lambda page, **options: launched.append(options))
    monkeypatch.setattr(sys, 'argv', ['app.py', '--host', '0.0.0.0', '--port', '8080'])
    app.main()
    assert launched == [dict(server_name='0.0.0.0', server_port=8080)]


def test_gradio_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    monkeypatch.delitem(sys.modules, 'mmvitzoo.app', raising=False)
    with pytest.raises(ImportError, match='the page needs gradio: pip install -r requirements/app.txt'):
        import_module('mmvitzoo.app')
